"""Builds the multimodal model: new for training, or from a checkpoint for inference."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llava_mole.common.errors import CheckpointError, ConfigError, WeightsError, value_errors_as
from llava_mole.common.log import get_logger
from llava_mole.config import AdapterConfig, ModelConfig, Quantization, RunConfig, load_config
from llava_mole.data.images import ImageProcessor
from llava_mole.data.tokenization import HFTextTokenizer, load_tokenizer
from llava_mole.model.adapters import add_adapter
from llava_mole.model.checkpoint import read_manifest, resolve_checkpoint
from llava_mole.model.language_model import check_language_model_dir, load_language_model
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.multimodal_encoder import build_vision_tower
from llava_mole.model.multimodal_projector import build_projector
from llava_mole.model.quantization import quantize_linears, require_bitsandbytes

PROJECTOR_FILE = "mm_projector.safetensors"
PROJECTOR_PREFIX = "mm_projector."
ADAPTER_DIR = "adapter"
TOKENIZER_DIR = "tokenizer"
CONFIG_FILE = "config.yaml"
SAME_ADAPTER = (
    "r", "lora_alpha", "alpha", "attention_r", "num_experts", "mode", "top_k", "granularity", "router", "router_bias",
    "expert_scale", "temperature", "num_tasks", "shared_r", "shared_scale", "use_rslora", "alpha_pattern",
)  # fmt: skip
"""Fields of an adapter's configuration that say what its weights mean. How it is trained may change."""


logger = get_logger(__name__)


@dataclass
class InferenceModel:
    """A model and everything that turns images and text into its input."""

    model: LlavaMole
    tokenizer: HFTextTokenizer
    image_processor: ImageProcessor
    template: str
    """Name of the conversation template it was trained with."""
    context_length: int
    """Longest sequence in tokens, image tokens included."""


@dataclass
class LoadedModel(InferenceModel):
    """The model of a checkpoint, ready for inference."""

    config: RunConfig
    """The run's; paths and quantisation are those in use."""
    path: Path
    """The checkpoint directory."""


def select_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def build_parts(config: ModelConfig) -> tuple[LlavaMole, Any, dict[str, str]]:
    """The model without adapters, its Hugging Face tokenizer and the fingerprints of its frozen parts.

    It is on the CPU with its weights as they are stored; `quantize_linears` is the next step where one is configured.

    Raises:
        WeightsError, ConfigError: see the builders of the parts.
    """
    require_bitsandbytes(config.quantization)
    check_language_model_dir(config.language_model)
    tower = build_vision_tower(
        config.vision_tower.name,
        config.vision_tower.weights,
        config.vision_tower.activation,
        config.vision_tower.select_layer,
    )
    language_model, lm_fingerprint = load_language_model(config.language_model, config.attn_implementation)
    tokenizer = load_tokenizer(config.language_model)
    projector = build_projector(
        config.projector, tower.hidden_size, language_model.config.get_text_config().hidden_size
    )
    fingerprints = {"language_model": lm_fingerprint, "vision_tower": tower.weights_fingerprint}
    return LlavaMole(tower, projector, language_model), tokenizer, fingerprints


def attach_adapter(model: LlavaMole, config: AdapterConfig) -> None:
    """Add the configured adapter to the model's language model, in place.

    Raises:
        ConfigError: an unknown option, options that cannot learn, or a language model without a place for the adapter.
    """
    with value_errors_as(ConfigError):
        model.language_model = add_adapter(
            model.language_model,
            config.method,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            num_experts=config.num_experts,
            preset=config.preset,
            options=config.options,
        )


def load_projector(projector: nn.Sequential, source: str | Path) -> None:
    """Load projector weights from a checkpoint, a run directory or a `.safetensors` file, in place.

    Raises:
        WeightsError: no such file, not readable, keys or shapes that do not fit, each named, or values not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(source)
    if path.is_dir():
        path = resolve_checkpoint(path) / PROJECTOR_FILE
    if not path.is_file() or path.suffix != ".safetensors":
        raise WeightsError(
            f"projector weights {str(source)!r}: no such checkpoint directory or .safetensors file "
            "(projector_weights); run stage 1 first"
        )
    try:
        state = {key.removeprefix(PROJECTOR_PREFIX): value.float() for key, value in load_file(path).items()}
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a readable safetensors file ({error})") from None
    expected = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != expected:
        raise WeightsError(f"{path} does not fit the projector: it has {found}, the model needs {expected}")
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise WeightsError(f"{path} has values that are not finite; train or download the projector again")
    projector.load_state_dict(state)


def load_adapter_state(model: LlavaMole, checkpoint: Path) -> None:
    """Load a checkpoint's adapter weights and counters into the adapter the model has already, in place.

    Raises:
        CheckpointError: the checkpoint's adapter has other parameters.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (checkpoint / ADAPTER_DIR).is_dir():
        return
    path = checkpoint / ADAPTER_DIR / "adapter_model.safetensors"
    try:
        result: Any = set_peft_model_state_dict(model.language_model, load_file(path))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this run's adapter: {' '.join(str(error).split())}") from None
    if result.unexpected_keys:
        raise CheckpointError(f"{path} has parameters this run's adapter has not: {result.unexpected_keys[:3]}")
    missing = [key for key in result.missing_keys if ".mole_" in key or ".lora_" in key]
    if missing:
        raise CheckpointError(f"{path} lacks parameters of this run's adapter: {missing[:3]}")


def start_from(model: LlavaMole, source: str | Path, config: AdapterConfig, fingerprints: dict[str, str]) -> None:
    """Load a run's adapter and projector into a model that has the same kind of adapter, in place.

    Args:
        model: with its adapter attached.
        source: a run directory (its newest valid checkpoint) or a checkpoint of stage `finetune`.
        config: of the adapter attached.
        fingerprints: of the model's frozen parts.

    Raises:
        CheckpointError: it does not verify, has no adapter, another one, or was trained on another base model.
    """
    checkpoint = resolve_checkpoint(source)
    check_base(checkpoint, fingerprints)
    method = read_manifest(checkpoint)["adapter"]
    if method != config.method or method == "none":
        raise CheckpointError(
            f"init_from {checkpoint} has adapter.method {method!r}, this run has {config.method!r}; a checkpoint of "
            "stage 'pretrain' is given as projector_weights"
        )
    there = json.loads((checkpoint / ADAPTER_DIR / "adapter_config.json").read_text(encoding="utf-8"))
    here = model.language_model.peft_config["default"].to_dict()
    pairs = [(key, there.get(key) or None, here.get(key) or None) for key in SAME_ADAPTER]
    different = [f"{key} {then!r} there, {now!r} here" for key, then, now in pairs if then != now]
    if different:
        raise CheckpointError(f"init_from {checkpoint} has another adapter: {'; '.join(different)}")
    load_projector(model.projector, checkpoint / PROJECTOR_FILE)
    load_adapter_state(model, checkpoint)


def check_base(checkpoint: Path, fingerprints: dict[str, str]) -> None:
    """Raise CheckpointError unless the frozen parts are those that the checkpoint was trained on."""
    for part, found in fingerprints.items():
        recorded = read_manifest(checkpoint)["fingerprints"][part]
        if found != recorded:
            raise CheckpointError(
                f"{checkpoint} was trained on another {part.replace('_', ' ')} (fingerprint {recorded}) than the one "
                f"given ({found}); name the original ones (--model-base, or model.language_model and "
                "model.vision_tower.weights)"
            )


def load_pretrained_model(
    model_path: str | Path,
    *,
    model_base: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    quantization: Quantization | None = None,
) -> LoadedModel:
    """Load a checkpoint for inference.

    Args:
        model_path: a `checkpoint-<step>` directory, or a run directory (its newest valid checkpoint).
        model_base: directory of the language model, where it is no longer where the run found it.
        device: `auto`, `cpu` or `cuda`.
        dtype: `float32` or `bfloat16`.
        quantization: of the language model; None as in training, which is what the adapter has learned to correct.

    Raises:
        CheckpointError: the directory does not verify, or the base model is another than the one trained on.
        ConfigError: bitsandbytes is needed and absent.
        WeightsError: a base model is not where it should be.
    """
    path = resolve_checkpoint(model_path)
    manifest = read_manifest(path)
    config = load_config(path / CONFIG_FILE)
    locate_parts(config.model, manifest, path, model_base)
    if quantization is not None and quantization != config.model.quantization:
        logger.info("language model: quantisation %s, in training %s", quantization, config.model.quantization)
        config.model.quantization = quantization
    where, float_type = select_device(device), getattr(torch, dtype)
    model, _, fingerprints = build_parts(config.model)
    check_base(path, fingerprints)
    # The checkpoint's own: the base directory's may have been changed since, down to its chat template.
    hf_tokenizer = load_tokenizer(str(path / TOKENIZER_DIR))
    quantize_linears(model.causal_lm, config.model.quantization, where, float_type)
    load_projector(model.projector, path / PROJECTOR_FILE)
    if (path / ADAPTER_DIR).is_dir():
        model.language_model = _load_adapter(model.language_model, path / ADAPTER_DIR)
    model.requires_grad_(False)
    model.to(where, float_type).eval()
    context = getattr(model.causal_lm.config.get_text_config(), "max_position_embeddings", config.data.max_length)
    return LoadedModel(
        model=model,
        tokenizer=HFTextTokenizer(hf_tokenizer),
        image_processor=build_image_processor(model, config.data.image_aspect_ratio),
        template=manifest["template"],
        context_length=context,
        config=config,
        path=path,
    )


def build_image_processor(model: LlavaMole, aspect_ratio: Literal["pad", "square"]) -> ImageProcessor:
    """The preprocessing that fits the model's tower."""
    tower = model.vision_tower
    return ImageProcessor(tower.image_size, tower.image_mean, tower.image_std, aspect_ratio)


def locate_parts(config: ModelConfig, manifest: dict[str, Any], checkpoint: Path, model_base: str | None) -> None:
    """Point `config`, in place, to where a checkpoint's language model and tower are now.

    The configured path, or where the run found it if the working directory is another now. What the manifest has as a
    relative path lies beside the checkpoint, and is looked for there first: such a directory can be moved.
    """

    def where(configured: str, key: str) -> str:
        recorded = manifest["paths"][key]
        found = checkpoint / recorded  # an absolute path stays itself
        beside = not Path(recorded).is_absolute()
        return str(found) if found.exists() and (beside or not Path(configured).exists()) else configured

    config.language_model = model_base or where(config.language_model, "language_model")
    tower = config.vision_tower
    tower.weights = where(tower.weights, "vision_tower_weights")
    if tower.name.endswith(".json"):
        tower.name = where(tower.name, "vision_tower_config")


def _load_adapter(language_model: nn.Module, directory: Path) -> nn.Module:
    from peft import PeftModel

    import llava_mole.mole  # noqa: F401  registers the MOLE adapter type with PEFT

    with value_errors_as(WeightsError):
        return PeftModel.from_pretrained(language_model, str(directory))

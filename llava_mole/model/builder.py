"""Builds the multimodal model: a new one for training, or a trained one from its checkpoint.

This is where a run's configuration ends: what is built here holds plain values.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_mole.common.errors import CheckpointError, ConfigError, WeightsError, value_errors_as
from llava_mole.common.log import get_logger
from llava_mole.config import (
    AdapterConfig,
    AspectRatio,
    DataConfig,
    ImageModes,
    ModelConfig,
    Quantization,
    load_config,
)
from llava_mole.data.anyres import Grid
from llava_mole.data.images import ImageProcessor
from llava_mole.data.native import ImageGrid, NativeGrid
from llava_mole.data.tokenization import HFTextTokenizer, load_tokenizer
from llava_mole.model.adapters import add_adapter, trainable_parameters
from llava_mole.model.checkpoint import read_manifest, resolve_checkpoint
from llava_mole.model.language_model import (
    check_language_model_dir,
    check_vocabulary,
    load_language_model,
    longest_sequence,
)
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.multimodal_encoder import (
    VisionTower,
    build_vision_tower,
    find_open_clip_weights,
)
from llava_mole.model.multimodal_projector import NEWLINE_KEY, build_projector
from llava_mole.model.quantization import quantize_linears, require_bitsandbytes
from llava_mole.model.tower_files import TowerSpec, find_open_clip_config, is_hugging_face

PROJECTOR_FILE = "mm_projector.safetensors"
PROJECTOR_PREFIX = "mm_projector."
ADAPTER_DIR = "adapter"
TOKENIZER_DIR = "tokenizer"
CONFIG_FILE = "config.yaml"
SAME_ADAPTER = (
    "r", "lora_alpha", "alpha", "attention_r", "num_experts", "mode", "top_k", "granularity", "router", "router_bias",
    "expert_scale", "temperature", "num_tasks", "shared_r", "shared_scale", "use_rslora", "rank_pattern",
    "alpha_pattern", "modules_to_save", "router_scope", "attention_experts", "shared_a", "mix", "experts_by_layer",
    "task_dim",
)  # fmt: skip
"""Fields of an adapter's configuration that determine what its weights mean. The others only affect training."""
BEFORE_THEY_EXISTED = {"router_scope": "ffn", "mix": "projection"}
"""Values of such fields for adapters saved by versions that did not have them."""
GROWN_NOISE = 0.01
"""Noise on the experts that a run has more than the one it starts from, see `mole.surgery.grow`."""
TRAINING_OPTIONS = {"language_model": "--model.language_model", "vision_tower": "--model.vision_tower.weights"}
INFERENCE_OPTIONS = {
    "language_model": "--model-base DIR (in Python and lmms-eval: model_base)",
    "vision_tower": "--vision-tower DIR (in Python and lmms-eval: vision_tower)",
}
"""How training, and how commands that load a checkpoint, name its frozen parts."""

logger = get_logger(__name__)


@dataclass
class LoadedModel:
    """A model ready for inference, with the tokenizer and image processor that prepare its input."""

    model: LlavaMole
    tokenizer: HFTextTokenizer
    image_processor: ImageProcessor
    template: str
    """Name of the conversation template it was trained with."""
    context_length: int
    """Longest sequence in tokens, image tokens included."""
    path: Path
    """The checkpoint directory, or the run directory of a model in training."""
    quantization: Quantization = "none"
    """Of the language model, as loaded."""
    adapter: str = "none"
    """`none`, `lora` or `mole`."""


def select_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def build_parts(config: ModelConfig, tokenizer_dir: Path | None = None) -> tuple[LlavaMole, Any, dict[str, str]]:
    """The model without adapters, its Hugging Face tokenizer and the fingerprints of its frozen parts.

    The model is on the CPU, in the dtype its weights are stored in. If quantisation is configured, call
    `quantize_linears` next.

    Args:
        config: Section `model`.
        tokenizer_dir: Directory of the tokenizer; None takes the language model's.

    Raises:
        WeightsError: A weight file is missing, unreadable or does not fit, or the tokenizer has tokens that the
            language model lacks.
        ConfigError: A part of this name or kind does not exist, or bitsandbytes is needed and not installed.
    """
    require_bitsandbytes(config.quantization)
    check_language_model_dir(config.language_model)
    tower = build_vision_tower(
        config.vision_tower.name,
        config.vision_tower.weights,
        config.vision_tower.activation,
        config.vision_tower.select_layer,
        image_size=config.vision_tower.image_size,
        image_mean=config.vision_tower.image_mean,
        image_std=config.vision_tower.image_std,
    )
    language_model, lm_fingerprint = load_language_model(config.language_model, config.attn_implementation)
    model, tokenizer = _assemble(config, tower, language_model, tokenizer_dir)
    return model, tokenizer, {"language_model": lm_fingerprint, "vision_tower": tower.weights_fingerprint}


def _assemble(
    config: ModelConfig, tower: VisionTower, language_model: nn.Module, tokenizer_dir: Path | None
) -> tuple[LlavaMole, Any]:
    """The model of these parts with a new projector, and its tokenizer."""
    where = str(tokenizer_dir or config.language_model)
    tokenizer = load_tokenizer(where)
    check_vocabulary(language_model, tokenizer, where)
    text_config: Any = language_model.config
    width = text_config.get_text_config().hidden_size
    projector = build_projector(config.projector, tower.hidden_size, width, tower.grid)
    return LlavaMole(tower, projector, language_model), tokenizer


def attach_adapter(model: LlavaMole, config: AdapterConfig) -> None:
    """Add the configured adapter to the model's language model, in place. Raises ConfigError for wrong options."""
    with value_errors_as(ConfigError):
        model.language_model = add_adapter(model.language_model, **asdict(config))


def load_projector(projector: nn.Sequential, source: str | Path, *, start: bool = False) -> None:
    """Load projector weights from a checkpoint, a run directory or a `.safetensors` file, in place.

    Args:
        start: Whether training starts from it. A newline vector that it lacks then keeps its random values: stage 1 may
            have seen whole images only.

    Raises:
        WeightsError: The file is missing or unreadable, its keys or shapes do not fit, or a value is not finite.
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
    if start and NEWLINE_KEY in expected and NEWLINE_KEY not in state:
        logger.info("%s has no newline vector; it starts from random values", path)
        state[NEWLINE_KEY] = projector.state_dict()[NEWLINE_KEY]
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != expected:
        raise WeightsError(f"{path} does not fit the projector: it has {found}, the model needs {expected}")
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise WeightsError(f"{path} has values that are not finite; train or download the projector again")
    projector.load_state_dict(state)


def load_adapter_state(model: LlavaMole, checkpoint: Path) -> None:
    """Load a checkpoint's adapter weights and counters into the model's existing adapter, in place.

    A checkpoint without an adapter changes nothing.

    Raises:
        CheckpointError: The parameters of the checkpoint's adapter differ from the model's.
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
        raise CheckpointError(f"{path} has parameters that this run's adapter lacks: {result.unexpected_keys[:3]}")
    of_adapter = (".mole_", ".lora_", ".modules_to_save.")
    missing = [key for key in result.missing_keys if any(mark in key for mark in of_adapter)]
    if missing:
        raise CheckpointError(f"{path} lacks parameters of this run's adapter: {missing[:3]}")


def starting_adapter(source: str | Path, config: AdapterConfig) -> AdapterConfig:
    """The adapter to attach before `start_from`: `config`, with the checkpoint's experts if it has fewer.

    Args:
        source: As for `start_from`.
        config: The adapter that the run will have.
    """
    checkpoint = resolve_checkpoint(source)
    if config.method != "mole" or read_manifest(checkpoint)["adapter"] != "mole":
        return config
    there = json.loads((checkpoint / ADAPTER_DIR / "adapter_config.json").read_text(encoding="utf-8"))
    if there.get("experts_by_layer") is not None or there["num_experts"] >= config.num_experts:
        return config
    options = {key: value for key, value in config.options.items() if key != "frozen_experts"}
    return replace(config, num_experts=there["num_experts"], options=options)


def start_from(model: LlavaMole, source: str | Path, config: AdapterConfig, fingerprints: dict[str, str]) -> None:
    """Load a run's adapter and projector into a model, in place, and add the experts that `config` has more.

    New experts are copies of the old ones, with a little noise so that they separate (`mole.surgery.grow`).

    Args:
        model: The model, with the adapter of `starting_adapter` attached.
        source: A run directory (its newest valid checkpoint) or a checkpoint of stage `finetune`.
        config: The adapter that the run will have.
        fingerprints: Fingerprints of the model's frozen parts.

    Raises:
        CheckpointError: The checkpoint does not verify, has no adapter or a different one, or was trained on
            another base model.
        ConfigError: The adapter cannot grow.
    """
    checkpoint = resolve_checkpoint(source)
    check_base(checkpoint, fingerprints, TRAINING_OPTIONS)
    method = read_manifest(checkpoint)["adapter"]
    if method != config.method or method == "none":
        raise CheckpointError(
            f"init_from {checkpoint} has adapter.method {method!r}, this run has {config.method!r}; give a "
            "checkpoint of stage 'pretrain' as projector_weights instead"
        )
    there = json.loads((checkpoint / ADAPTER_DIR / "adapter_config.json").read_text(encoding="utf-8"))
    here = model.language_model.peft_config["default"].to_dict()
    there = {**BEFORE_THEY_EXISTED, **there} if method == "mole" else there
    pairs = [(key, there.get(key) or None, here.get(key) or None) for key in SAME_ADAPTER]
    different = [f"{key} {then!r} there, {now!r} here" for key, then, now in pairs if then != now]
    if different:
        raise CheckpointError(f"init_from {checkpoint} has another adapter: {'; '.join(different)}")
    load_projector(model.projector, checkpoint / PROJECTOR_FILE)
    load_adapter_state(model, checkpoint)
    if method == "mole" and here["experts_by_layer"] is None and here["num_experts"] < config.num_experts:
        from llava_mole.mole.surgery import grow

        frozen = config.options.get("frozen_experts", 0)
        with value_errors_as(ConfigError):
            grow(model.language_model, config.num_experts, noise=GROWN_NOISE, frozen=frozen)


def check_base(checkpoint: Path, fingerprints: dict[str, str], options: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the checkpoint was trained on these frozen parts.

    `options` has for each part the option that names it.
    """
    for part, found in fingerprints.items():
        recorded = read_manifest(checkpoint)["fingerprints"][part]
        if found != recorded:
            raise CheckpointError(
                f"{checkpoint} was trained on another {part.replace('_', ' ')} (fingerprint {recorded}) than the one "
                f"given ({found}); name the original one with {options[part]}"
            )


def check_pixels(checkpoint: Path, tower: VisionTower) -> None:
    """Raise CheckpointError unless images become the tower's input as in training; older checkpoints do not say how."""
    now = tower.spec.pixels.described(tower.image_size)
    then = read_manifest(checkpoint).get("pixels") or now
    different = [f"{key} {then.get(key)} there, {value} now" for key, value in now.items() if then.get(key) != value]
    if different:
        raise CheckpointError(
            f"{checkpoint} was trained on other pixels: {'; '.join(different)}; correct the files of the tower "
            f"{tower.spec.name}"
        )


def load_pretrained_model(
    model_path: str | Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    quantization: Quantization | None = None,
    trainable: bool = False,
) -> LoadedModel:
    """Load a checkpoint for inference, or to measure gradients.

    Args:
        model_path: A `checkpoint-<step>` directory, or a run directory (its newest valid checkpoint).
        model_base: Directory of the language model, if it has moved since training.
        vision_tower: open_clip directory or weight file of the vision tower, likewise.
        device: `auto`, `cpu` or `cuda`.
        dtype: `float32` or `bfloat16`.
        quantization: Quantisation of the language model. None keeps that of training, which the adapter has learned
            to compensate.
        trainable: Let train what trained in the run, in float32 whatever `dtype` is.

    Raises:
        CheckpointError: The directory does not verify, or the base model is not the one it was trained on.
        ConfigError: bitsandbytes is needed and not installed.
        WeightsError: A part of the base model is missing.
    """
    return load_pretrained_models(
        [model_path],
        model_base=model_base,
        vision_tower=vision_tower,
        device=device,
        dtype=dtype,
        quantization=quantization,
        trainable=trainable,
    )[0]


def load_pretrained_models(
    model_paths: Sequence[str | Path],
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    quantization: Quantization | None = None,
    trainable: bool = False,
) -> list[LoadedModel]:
    """Load several checkpoints, each as `load_pretrained_model` does; arguments and errors are its.

    Those that were trained on the same language model and vision tower, by their fingerprints, and have the same
    quantisation share the weights of these parts in memory. Only adapters and projectors are their own. A checkpoint
    with another base is loaded beside them, which is logged.
    """
    bases: dict[str, tuple[VisionTower, nn.Module]] = {}
    where, float_type = select_device(device), getattr(torch, dtype)
    found = []
    for model_path in model_paths:
        path = resolve_checkpoint(model_path)
        manifest = read_manifest(path)
        config = load_config(path / CONFIG_FILE)
        locate_parts(config.model, manifest, path, model_base, vision_tower)
        if quantization is not None and quantization != config.model.quantization:
            logger.info(
                "language model: quantisation %s; it was %s in training", quantization, config.model.quantization
            )
            config.model.quantization = quantization
        key = _base_key(config.model, manifest["fingerprints"])
        # Not the base directory's tokenizer: that one, or its chat template, may have changed since training.
        if key in bases:
            tower, language_model = bases[key]
            model, hf_tokenizer = _assemble(config.model, tower, _share(language_model), path / TOKENIZER_DIR)
        else:
            if bases:
                logger.info("%s has another base model than the runs before it; it is loaded separately", path)
            model, hf_tokenizer, fingerprints = build_parts(config.model, path / TOKENIZER_DIR)
            check_base(path, fingerprints, INFERENCE_OPTIONS)
            quantize_linears(model.causal_lm, config.model.quantization, where, float_type)
            if len(model_paths) > 1:
                bases[key] = model.vision_tower, _share(model.language_model)
        check_pixels(path, model.vision_tower)
        load_projector(model.projector, path / PROJECTOR_FILE)
        model.requires_grad_(False)
        model.projector.requires_grad_(trainable and config.train_projector)
        if (path / ADAPTER_DIR).is_dir():
            model.language_model = _load_adapter(model.language_model, path / ADAPTER_DIR, trainable)
        model.to(where, float_type).eval()
        for parameter in trainable_parameters(model).values():
            parameter.data = parameter.data.float()
        found.append(
            LoadedModel(
                model=model,
                # A prompt is never refused: the model has not seen control tokens in texts, and must not see them now.
                tokenizer=HFTextTokenizer(hf_tokenizer, "keep" if config.data.special_tokens == "keep" else "escape"),
                image_processor=configured_image_processor(model, config.data),
                template=manifest["template"],
                context_length=context_length(model, config.data.max_length),
                path=path,
                quantization=config.model.quantization,
                adapter=config.adapter.method,
            )
        )
    return found


def _base_key(config: ModelConfig, fingerprints: Mapping[str, str]) -> str:
    """What two checkpoints must have in common to share their frozen parts."""
    tower = config.vision_tower
    settings = [config.quantization, config.attn_implementation, tower.activation, tower.select_layer, tower.image_size]
    return json.dumps([sorted(fingerprints.items()), settings])


def _share(module: nn.Module) -> nn.Module:
    """A copy of a module tree around the same parameters and buffers: an adapter added to it changes only the copy."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]})


def context_length(model: LlavaMole, default: int) -> int:
    """The language model's longest sequence in tokens; `default` if its configuration does not say."""
    return longest_sequence(model.causal_lm.config) or default


def build_image_processor(
    model: LlavaMole,
    aspect_ratio: AspectRatio,
    modes: ImageModes = "llava",
    pinpoints: Sequence[Sequence[int]] | None = None,
) -> ImageProcessor:
    """The image preprocessing that the model's tower expects; `pinpoints` are `DataConfig.image_grid_pinpoints`.

    Raises ConfigError if the tower cannot see images in tiles, or not in these, or not in their own shape.
    """
    tower = model.vision_tower
    pixels = tower.spec.pixels
    grid = grid_of(aspect_ratio, tower.spec, model.num_image_tokens, pinpoints)
    return ImageProcessor(
        tower.image_size, pixels.mean, pixels.std, aspect_ratio, modes, resample=pixels.resample, grid=grid
    )


def grid_of(
    aspect_ratio: AspectRatio, tower: TowerSpec, image_tokens: int, pinpoints: Sequence[Sequence[int]] | None
) -> ImageGrid | None:
    """The grid of `anyres` or `native` for a tower that gives `image_tokens` tokens of a square image; else None.

    Raises ConfigError as `Grid.of_tower`, or the tower takes images of one shape only.
    """
    if aspect_ratio == "anyres":
        return Grid.of_tower(tower.image_size, image_tokens, pinpoints)
    if aspect_ratio != "native":
        return None
    if not tower.takes_any_grid:
        raise ConfigError(
            f"data.image_aspect_ratio 'native' needs a tower that takes images of any shape, which is "
            f"Siglip2VisionModel (SigLIP2's NaFlex checkpoints); {tower.name} is a {tower.kind} for "
            f"{tower.image_size} x {tower.image_size} pixels; use 'pad', 'square' or 'anyres'"
        )
    return NativeGrid(tower.image_size, tower.grid[0], tower.pixels.resample)


def configured_image_processor(model: LlavaMole, data: DataConfig) -> ImageProcessor:
    """`build_image_processor` as section `data` says."""
    return build_image_processor(model, data.image_aspect_ratio, data.image_modes, data.image_grid_pinpoints)


def locate_parts(
    config: ModelConfig,
    manifest: dict[str, Any],
    checkpoint: Path,
    model_base: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> None:
    """Set the paths in `config`, in place, to where a checkpoint's language model and vision tower are now.

    A part is where `model_base` or `vision_tower` says, else at the configured path or, if that does not exist from
    the present working directory, at the path that the manifest records. A relative path in the manifest is relative
    to the checkpoint and is tried first, so that such a directory can be moved.

    Raises WeightsError, which names the option, if a part is not there, and CheckpointError for a checkpoint of which
    the ranks wrote a part in pieces.
    """
    if manifest.get("in_pieces"):
        lacking = " and ".join(part.replace("_", " ") for part in manifest["in_pieces"])
        raise CheckpointError(
            f"{checkpoint} holds its {lacking} in the pieces that the ranks wrote; make it whole with `llava-mole "
            f"consolidate {checkpoint} --out DIR` and give DIR"
        )

    def where(configured: str, key: str) -> str:
        recorded = manifest["paths"][key]
        found = checkpoint / recorded  # an absolute path stays itself
        beside = not Path(recorded).is_absolute()
        return str(found) if found.exists() and (beside or not Path(configured).exists()) else configured

    config.language_model = str(model_base or where(config.language_model, "language_model"))
    tower = config.vision_tower
    has_file, own_config = tower.name.endswith(".json"), None
    if vision_tower is None:
        tower.weights = where(tower.weights, "vision_tower_weights")
    else:
        of_hugging_face = manifest.get("tower_layout") == "hugging_face"
        weights, own_config = _find_tower(Path(vision_tower), hugging_face=of_hugging_face)
        tower.weights = str(weights)
    if has_file:
        tower.name = str(own_config or where(tower.name, "vision_tower_config"))
    parts = [("language_model", config.language_model), ("vision_tower", tower.weights)]
    for part, path in [*parts, ("vision_tower", tower.name)] if has_file else parts:
        if not Path(path).exists():
            name = part.replace("_", " ")
            raise WeightsError(
                f"the {name} of {checkpoint} is no longer in {path}; name it with {INFERENCE_OPTIONS[part]}"
            )


def _find_tower(path: Path, *, hugging_face: bool) -> tuple[Path, Path | None]:
    """Weights and configuration (None if there is none) of the tower that `--vision-tower` names.

    `hugging_face` allows that layout, which fits a run whose tower has it, and no other.
    """
    beside = path / "config.json" if path.is_dir() else path.parent / "config.json"
    is_other = hugging_face and is_hugging_face(str(beside))
    if not path.is_dir():
        if not path.is_file():
            raise WeightsError(f"--vision-tower {path} does not exist; give a tower's directory or weight file")
        return path, beside if is_other else find_open_clip_config(path.parent)
    if is_other and (path / "model.safetensors").is_file():
        return path / "model.safetensors", beside
    config = find_open_clip_config(path)
    if config is None and (path / "config.json").is_file():
        raise WeightsError(
            f"--vision-tower {path} is not in open_clip's layout; convert it with `llava-mole convert {path} --to "
            "open-clip --out TOWER` and name that"
        )
    return find_open_clip_weights(path), config


def _load_adapter(language_model: nn.Module, directory: Path, trainable: bool = False) -> nn.Module:
    from peft import PeftModel

    import llava_mole.mole  # noqa: F401  registers the MOLE adapter type with PEFT

    with value_errors_as(WeightsError):
        return PeftModel.from_pretrained(
            language_model,
            str(directory),
            is_trainable=trainable,
            strict_base=True,  # MoLE's; LoRA ignores it
        )

"""The frozen language model: any Hugging Face causal LM from a local directory; recomputation and compilation."""

import json
from pathlib import Path
from typing import Any, Literal

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.model.checkpoint import fingerprint


def check_language_model_dir(path: str) -> None:
    """Raise WeightsError unless `path` is a directory with the configuration of an unquantised model."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise WeightsError(
            f"language model {path!r} is no directory with a config.json (model.language_model, --model-base); "
            "download it first, or use a config of configs/tiny/, which needs no download"
        )
    try:
        stored = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        method = stored.get("quant_method", "unknown method") if stored else None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise WeightsError(f"{file} is no model configuration: {error}") from None
    if stored:
        raise WeightsError(
            f"language model {path!r} is stored quantised ({method}), which "
            "cannot be recognised as the base of an adapter; give the original, and quantise it at load with "
            "--model.quantization 4bit or 8bit (for inference --load-4bit or --load-8bit)"
        )


def load_language_model(path: str, attn_implementation: str = "sdpa"):
    """Load a causal LM from the directory `path`, in the dtype it is stored in, without gradients.

    Returns:
        The model and the fingerprint of its weights.

    Raises:
        WeightsError: It is not a model directory, its files do not load, or tensors are missing, unexpected or of
            the wrong shape (transformers would silently initialise them at random).
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    check_language_model_dir(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with their names
        )
    except Exception as error:  # transformers raises many kinds, down to KeyError for a value in config.json
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise WeightsError(f"language model {path!r} does not load: {reason}") from None
    model, info = loaded
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
    problems += [f"{n} is {tuple(found)}, needed is {tuple(to)}" for n, found, to in sorted(info["mismatched_keys"])]
    if problems:
        shown = "; ".join(problems[:5])
        raise WeightsError(f"language model {path!r} does not fit its config.json: {len(problems)} problems: {shown}")
    # Vicuna's generation config has sampling values: they would leak into greedy decoding, and newer versions of
    # transformers refuse to save them.
    stored = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=stored.bos_token_id, eos_token_id=stored.eos_token_id, pad_token_id=stored.pad_token_id
    )
    model.requires_grad_(False)
    return model, fingerprint(model.state_dict().items())


Recompute = Literal["none", "every_n", "all"]


def decoder_layers(causal_lm: Any) -> list[Any]:
    """The decoder layers of a transformers causal LM, in order.

    Raises:
        ConfigError: The architecture keeps them under an unknown name.
    """
    decoder = causal_lm.get_decoder()
    for name in ("layers", "h"):
        if hasattr(decoder, name):
            return list(getattr(decoder, name))
    raise ConfigError(f"{type(causal_lm).__name__} keeps its layers in no known place")


def set_recompute(causal_lm: Any, policy: Recompute, every: int) -> None:
    """Recompute activations in the backward pass: in no layer, in layers 0, n, 2n, ..., or in all.

    Always non-reentrant: with reentrant checkpointing the router would silently get no gradient from the balance loss.
    """
    if policy == "none":
        return
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = decoder_layers(causal_lm)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = policy == "all" or index % every == 0


def compile_layers(causal_lm: Any, backend: str = "inductor") -> None:
    """Compile each decoder layer separately with dynamic lengths: one compilation serves all layers and steps."""
    for layer in decoder_layers(causal_lm):
        layer.compile(dynamic=True, backend=backend)

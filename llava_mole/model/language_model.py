"""The frozen language model: any Hugging Face causal LM from a local directory; recomputation and compilation."""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.common.text import shorten
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


@contextmanager
def load_errors(path: str):
    """Turn what transformers raises for a model directory into a WeightsError."""
    try:
        yield
    except Exception as error:  # of many kinds, down to KeyError for a value in config.json
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise WeightsError(f"language model {path!r} does not load: {reason}") from None


def longest_sequence(config: Any) -> int | None:
    """The positions of a language model, by its transformers configuration; None if it does not say.

    Scaled rotary embeddings (linear, dynamic, yarn) reach `factor` times as far as those it was pretrained with.
    """
    config = config.get_text_config()
    positions, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if positions is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return positions
    return max(positions, int(rope.get("original_max_position_embeddings", positions) * rope.get("factor", 1)))


def read_config(path: str) -> Any:
    """The transformers configuration of the language model in directory `path`.

    Raises:
        WeightsError: it is not a model directory, transformers does not know the model, or a special id is outside its
            vocabulary.
    """
    from transformers import AutoConfig

    check_language_model_dir(path)
    with load_errors(path):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    if hasattr(text, "vocab_size"):  # not so for a configuration of another kind, which its loading refuses by name
        check_special_ids(text, text.vocab_size, f"{path}/config.json")
    return config


def check_max_length(config: Any, max_length: int, path: str) -> None:
    """Raise ConfigError if `data.max_length` exceeds the positions of the language model in `path`.

    Learned positions end there, and rotary ones were not trained beyond. `config` is its transformers configuration.
    """
    positions = longest_sequence(config)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"data.max_length is {max_length}, but language model {path!r} has {positions} positions; set "
            f"--data.max_length to at most {positions}, or scale rotary embeddings with rope_scaling in its config.json"
        )


def check_vocabulary(causal_lm: Any, hf_tokenizer: Any, where: str | Path) -> None:
    """Raise WeightsError if the tokenizer in directory `where` has tokens that the language model cannot embed.

    The model, a transformers causal LM, may be on the meta device.
    """
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    outside = sorted((number, token) for token, number in hf_tokenizer.get_vocab().items() if number >= rows)
    if outside:
        raise WeightsError(
            f"the tokenizer in {str(where)!r} does not fit the language model, whose embedding has rows 0 to "
            f"{rows - 1}: {shorten([f'{token!r} has id {number}' for number, token in outside])}. Give the tokenizer "
            "the model was trained with, or enlarge the embedding (model.resize_token_embeddings in transformers)"
        )


def check_special_ids(config: Any, rows: int, file: str) -> None:
    """Raise WeightsError if a pad, bos or eos id of the configuration in `file` is outside an embedding of `rows`."""
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, key, None)
        for number in value if isinstance(value, list) else [value]:
            # The first Llama configurations have a pad_token_id of -1 for none, and nothing here reads it.
            if number is not None and not 0 <= number < rows and (key, number) != ("pad_token_id", -1):
                raise WeightsError(
                    f"{file}: {key} {number} is outside the language model's embedding, which has rows 0 to "
                    f"{rows - 1}; write the id that its tokenizer has"
                )


def load_language_model(path: str, attn_implementation: str = "sdpa"):
    """Load a causal LM from the directory `path`, in the dtype it is stored in, without gradients.

    Returns:
        The model and the fingerprint of its weights.

    Raises:
        WeightsError: It is not a model directory, its files do not load, a special id is outside the vocabulary, or
            tensors are missing, unexpected or of the wrong shape (transformers would silently initialise them at
            random).
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    read_config(path)
    with load_errors(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with their names
        )
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
    check_special_ids(stored, model.get_input_embeddings().weight.shape[0], f"{path}/generation_config.json")
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

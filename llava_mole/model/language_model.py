"""The language model: any Hugging Face causal LM from a local directory, frozen."""

import json
from pathlib import Path

from llava_mole.errors import WeightsError
from llava_mole.model.fingerprint import fingerprint


def check_language_model_dir(path: str) -> None:
    """Raise WeightsError unless `path` is a directory with the configuration of an unquantised model in it."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise WeightsError(
            f"language model {path!r} is no directory with a config.json (model.language_model); download it first, "
            "or use a config of configs/tiny/, which needs no download"
        )
    try:
        stored = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise WeightsError(f"{file} is no model configuration: {error}") from None
    if stored:
        raise WeightsError(
            f"language model {path!r} is stored quantised ({stored.get('quant_method', 'unknown method')}), which "
            "cannot be recognised as the base of an adapter; give the original, and quantise it at load with "
            "--model.quantization 4bit or 8bit"
        )


def load_language_model(path: str, attn_implementation: str = "sdpa"):
    """Load a causal LM from the directory `path`, in the dtype it is stored in, without gradients.

    Returns:
        The model and the fingerprint of its weights.

    Raises:
        WeightsError: not a model directory, or its files do not load.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    check_language_model_dir(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", local_files_only=True, trust_remote_code=False, attn_implementation=attn_implementation
        )
    except (OSError, ValueError, ImportError) as error:
        raise WeightsError(f"language model {path!r} does not load: {' '.join(str(error).split())}") from None
    # Vicuna ships sampling values in its generation config; they would leak into greedy decoding and newer
    # transformers refuse to save them.
    stored = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=stored.bos_token_id, eos_token_id=stored.eos_token_id, pad_token_id=stored.pad_token_id
    )
    model.requires_grad_(False)
    return model, fingerprint(model.state_dict().items())


def load_tokenizer(path: str):
    """The fast tokenizer in directory `path`. Raises WeightsError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, use_fast=True)
    except (OSError, ValueError, ImportError) as error:
        raise WeightsError(f"no tokenizer loads from {path!r}: {' '.join(str(error).split())}") from None
    if not tokenizer.is_fast:
        raise WeightsError(f"the tokenizer in {path!r} has no fast form, which label masking by text spans needs")
    return tokenizer

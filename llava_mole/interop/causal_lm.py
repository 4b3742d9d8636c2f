"""Model directories of a Hugging Face causal LM: expected tensors, writing, and the fingerprint without loading."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import WeightsError
from llava_mole.interop.names import BUFFERS
from llava_mole.interop.tensors import Weights, check_shapes, open_weights, read_object, write_object, write_shards
from llava_mole.model.checkpoint import fingerprint_in_order
from llava_mole.model.language_model import check_language_model_dir, load_language_model

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
GENERATION_FILE = "generation_config.json"
LLAVA_MODEL_TYPES = {
    "llava": ("llama", "LlamaForCausalLM"),
    "llava_llama": ("llama", "LlamaForCausalLM"),
    "llava_mistral": ("mistral", "MistralForCausalLM"),
}
"""`model_type` in LLaVA's config.json -> `model_type` and class of its language model."""
LLAVA_KEYS = ("mm_", "tune_mm_", "freeze_mm_", "use_mm_proj", "unfreeze_mm_", "image_", "pretrain_mm_", "vision_tower")
"""Prefixes of the keys in LLaVA's config.json that describe the other parts."""
OTHER_KEYS = ("tokenizer_model_max_length", "tokenizer_padding_side", "_name_or_path", "auto_map")


class Skeleton:
    """Tensor names and shapes of a causal LM, from its configuration. Raises WeightsError if transformers has none."""

    def __init__(self, config: Mapping[str, Any], where: object):
        from transformers import AutoConfig, AutoModelForCausalLM

        values = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
        try:
            self.config = AutoConfig.for_model(config.get("model_type", ""), **values)
            with torch.device("meta"):
                self.model: Any = AutoModelForCausalLM.from_config(self.config)
        except Exception as error:  # transformers raises many types for an unusable value
            raise WeightsError(f"{where}: not a causal LM: {' '.join(str(error).split())[:200]}") from None
        self.model.tie_weights()
        first: dict[int, str] = {}
        self.same_as: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            self.shapes[name] = tuple(value.shape)
            self.same_as[name] = first.setdefault(id(value), name)

    @classmethod
    def of_directory(cls, directory: Path) -> "Skeleton":
        """The skeleton that `directory/config.json` describes."""
        return cls(read_object(directory / "config.json"), directory / "config.json")

    def check(self, where: object, found: Mapping[str, tuple[int, ...]]) -> None:
        """Raise WeightsError unless `found` has these names and shapes. Tied tensors may be absent."""
        needed = {name: s for name, s in self.shapes.items() if name in found or self.same_as[name] == name}
        check_shapes(where, found, needed)

    def source(self, name: str, found: Mapping[str, Any]) -> str:
        """The name in `found` that holds tensor `name`: another name if the weights are tied."""
        return name if name in found else self.same_as[name]

    def linears(self) -> dict[str, tuple[int, int]]:
        """Path -> (out, in) of every linear of the decoder layers."""
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not self.model.get_output_embeddings()
        }


def language_model_config(llava_config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The language model's part of LLaVA's config.json. Raises WeightsError for an unsupported model type."""
    kind = llava_config.get("model_type")
    if kind not in LLAVA_MODEL_TYPES:
        raise WeightsError(f"{where}: model_type {kind!r}; supported are {', '.join(LLAVA_MODEL_TYPES)}")
    model_type, architecture = LLAVA_MODEL_TYPES[kind]
    config = {k: v for k, v in llava_config.items() if not k.startswith(LLAVA_KEYS) and k not in OTHER_KEYS}
    return {**config, "model_type": model_type, "architectures": [architecture]}


@dataclass
class LanguageModelPart:
    """A language model inside a larger checkpoint."""

    config: dict[str, Any]
    weights: Weights
    directory: Path
    """Directory with its tokenizer."""

    def write(self, directory: Path) -> None:
        """Write a model directory. Raises WeightsError if tensors do not fit the configuration or are not finite."""
        Skeleton(self.config, self.weights).check(self.weights, self.weights.shapes)
        directory.mkdir(parents=True)
        write_object(directory / "config.json", self.config)
        copy_tokenizer(self.directory, directory)
        write_shards(directory, self.weights.items(), "language model", self.weights.bytes)


def open_language_model(directory: Path) -> Weights:
    """The weights in a model directory, without constant buffers."""
    weights = open_weights(directory)
    return weights.part({name: name for name in weights if not name.endswith(BUFFERS)})


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy a tokenizer's files and the ids that begin and end texts. Raises WeightsError if there is no tokenizer.

    The generation configuration's other values stay behind: Vicuna's would turn greedy decoding into sampling.
    """
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(found):
        raise WeightsError(f"{source} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}); copy it there from the base")
    for name in found:
        shutil.copyfile(source / name, directory / name)
    if (source / GENERATION_FILE).is_file():
        ids = {key: value for key, value in read_object(source / GENERATION_FILE).items() if key.endswith("_token_id")}
        write_object(directory / GENERATION_FILE, ids)


def base_end_ids(directory: Path, config: Any) -> int | list[int] | None:
    """`eos_token_id` with which transformers generates from a model directory with this configuration."""
    file = directory / GENERATION_FILE
    return read_object(file).get("eos_token_id") if file.is_file() else config.get_text_config().eos_token_id


def fingerprint_language_model(path: Path) -> str:
    """The fingerprint that `load_language_model` returns, computed tensor by tensor.

    Raises WeightsError if `path` is not a language model, or its weights do not fit its configuration.
    """
    check_language_model_dir(str(path))
    weights, skeleton = open_language_model(path), Skeleton.of_directory(path)
    try:
        skeleton.check(path, weights.shapes)
    except WeightsError:
        # Some architectures store other names than transformers gives its modules; only loading maps them.
        return load_language_model(str(path))[1]
    tensors = ((name, weights[skeleton.source(name, weights)]) for name in sorted(skeleton.shapes))
    # In the dtype in which the model is loaded:
    return fingerprint_in_order((name, tensor.to(skeleton.config.dtype or tensor.dtype)) for name, tensor in tensors)

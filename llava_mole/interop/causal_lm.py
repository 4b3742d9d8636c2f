"""Directories of a Hugging Face causal LM: what its weights must be, writing one, its identity unloaded."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import WeightsError
from llava_mole.interop.tensors import ShardWriter, Weights, check_shapes, open_weights, read_json, shorten
from llava_mole.model.fingerprint import fingerprint_in_order
from llava_mole.model.language_model import check_language_model_dir, load_language_model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
LLAVA_MODEL_TYPES = {
    "llava": ("llama", "LlamaForCausalLM"),
    "llava_llama": ("llama", "LlamaForCausalLM"),
    "llava_mistral": ("mistral", "MistralForCausalLM"),
}
"""`model_type` of LLaVA's config.json -> that of its language model, and its class."""
LLAVA_KEYS = ("mm_", "tune_mm_", "freeze_mm_", "use_mm_proj", "unfreeze_mm_", "image_", "pretrain_mm_", "vision_tower")
"""Keys of LLaVA's config.json that start so belong to the other parts."""
LLAVA_TOKENIZER_KEYS = ("tokenizer_model_max_length", "tokenizer_padding_side")


class Skeleton:
    """Names and shapes of a causal LM's tensors, from its configuration alone.

    Raises:
        WeightsError: transformers knows no causal LM of this configuration.
    """

    def __init__(self, config: Mapping[str, Any], where: object):
        from transformers import AutoConfig, AutoModelForCausalLM

        values = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
        try:
            self.config = AutoConfig.for_model(config.get("model_type", ""), **values)
            with torch.device("meta"):
                self.model: Any = AutoModelForCausalLM.from_config(self.config)
        except Exception as error:  # transformers raises many kinds for a value that it cannot use
            raise WeightsError(f"{where}: no causal LM: {' '.join(str(error).split())[:200]}") from None
        self.model.tie_weights()
        first: dict[int, str] = {}
        self.same_as: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            self.shapes[name] = tuple(value.shape)
            self.same_as[name] = first.setdefault(id(value), name)

    def check(self, where: object, found: Mapping[str, tuple[int, ...]]) -> None:
        """Raise WeightsError that lists what is missing, unexpected or of another shape; tied tensors may be absent."""
        check_shapes(where, found, {name: s for name, s in self.shapes.items() if name in found or self._own(name)})

    def source(self, name: str, found: Mapping[str, Any]) -> str:
        """The name in `found` that holds tensor `name`, which is another one where weights are tied."""
        return name if name in found else self.same_as[name]

    def _own(self, name: str) -> bool:
        return self.same_as[name] == name

    def linears(self) -> dict[str, tuple[int, int]]:
        """Path -> (out, in) of every linear of the decoder layers."""
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not self.model.get_output_embeddings()
        }


def language_model_config(llava_config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The language model's part of LLaVA's config.json. Raises WeightsError for a model type not in the table."""
    kind = llava_config.get("model_type")
    if kind not in LLAVA_MODEL_TYPES:
        raise WeightsError(f"{where}: model_type {kind!r}; supported are {', '.join(LLAVA_MODEL_TYPES)}")
    model_type, architecture = LLAVA_MODEL_TYPES[kind]
    config = {
        key: value
        for key, value in llava_config.items()
        if not key.startswith(LLAVA_KEYS) and key not in (*LLAVA_TOKENIZER_KEYS, "_name_or_path", "auto_map")
    }
    return {**config, "model_type": model_type, "architectures": [architecture]}


def write_language_model(
    directory: Path,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    weights: Weights,
    tokenizer_from: Path,
) -> None:
    """Write a causal LM out of a larger checkpoint, shard by shard.

    Args:
        directory: is created.
        config: of the causal LM.
        names: name in the causal LM -> name in `weights`.
        weights: of the larger checkpoint.
        tokenizer_from: directory whose tokenizer is copied.

    Raises:
        WeightsError: tensors missing, unexpected, of another shape or not finite.
    """
    skeleton = Skeleton(config, weights)
    skeleton.check(weights, {name: weights.shape(there) for name, there in names.items()})
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer_from, directory)
    writer = ShardWriter(directory, "language model", weights.bytes)
    inner = {there: name for name, there in names.items()}
    for there in weights:
        if there in inner:
            writer.add(inner[there], weights[there])
    writer.finish()


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy a tokenizer's files. Raises WeightsError where there are none."""
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(found):
        raise WeightsError(f"{source} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}); copy it there from the base")
    for name in found:
        shutil.copyfile(source / name, directory / name)


def fingerprint_language_model(path: Path) -> str:
    """The fingerprint that `load_language_model` gives, read tensor by tensor.

    Raises:
        WeightsError: no language model, or its weights do not fit its configuration.
    """
    check_language_model_dir(str(path))
    weights = open_weights(path)
    skeleton = Skeleton(read_json(path / "config.json"), path / "config.json")
    found = {name: weights.shape(name) for name in weights if not name.endswith("rotary_emb.inv_freq")}
    try:
        skeleton.check(path, found)
    except WeightsError:
        # Some architectures are stored in other names than transformers gives its modules; it knows the way.
        return load_language_model(str(path))[1]

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(skeleton.shapes):
            tensor = weights[skeleton.source(name, found)]
            yield name, tensor.to(skeleton.config.dtype or tensor.dtype)  # as a model is loaded, whatever is stored

    return fingerprint_in_order(tensors())


def load_causal_lm(config: Mapping[str, Any], read: Callable[[str], torch.Tensor], names: list[str]) -> Any:
    """A causal LM in float32, in eval mode, whose tensor `name` is `read(name)`."""
    skeleton = Skeleton(config, "config")
    state = {name: read(name).float() for name in names}
    missing = [name for name in skeleton.shapes if skeleton.source(name, state) not in state]
    if missing:
        raise WeightsError(f"{len(missing)} tensors missing: {shorten(missing)}")
    model = type(skeleton.model).from_pretrained(
        None, config=skeleton.config, state_dict=state, dtype=torch.float32, local_files_only=True
    )
    return model.eval()

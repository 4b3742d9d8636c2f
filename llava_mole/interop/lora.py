"""Plain LoRA adapters on disk: read in every spelling PEFT has had, checked, written, and merged tensor by tensor."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import WeightsError
from llava_mole.interop.tensors import check_finite, check_shapes, open_weights, read_json, shorten, two_spellings
from llava_mole.mole.surgery import ending, not_plain, pattern_value, scaling

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.(?P<half>lora_[AB])(?:\.\w+)?\.weight")
KEPT = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
    "use_rslora",
)  # fmt: skip


@dataclass
class Lora:
    """A LoRA: module path in the causal LM -> A `[r, in]`, B `[out, r]`, as stored."""

    config: dict[str, Any]
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def scaling(self, path: str) -> float:
        """alpha / r of a module (alpha / sqrt(r) for rsLoRA)."""
        return scaling(self.config, path, self.pairs[path][0].shape[0])

    def merged(self, path: str, weight: torch.Tensor) -> torch.Tensor:
        """`W + (alpha / r) B A` of a linear `[out, in]`, computed in float64, in the dtype of `weight`."""
        a_RI, b_OR = (value.double() for value in self.pairs[path])
        return (weight.double() + self.scaling(path) * (b_OR @ a_RI)).to(weight.dtype)

    def renamed(self, rename: Callable[[str], str]) -> "Lora":
        """The same pairs for another model, whose modules are called `rename(path)`, each named in full."""
        r, alpha = self.config["r"], self.config["lora_alpha"]
        ranks = {rename(path): a_RI.shape[0] for path, (a_RI, _) in self.pairs.items()}
        alphas = {
            rename(path): pattern_value(self.config.get("alpha_pattern") or {}, path, alpha) for path in self.pairs
        }
        config = {
            **self.config,
            "target_modules": list(ranks),
            "exclude_modules": None,
            "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r},
            "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        }
        return Lora(config, {rename(path): pair for path, pair in self.pairs.items()})


def is_adapter_dir(path: Path) -> bool:
    """Whether a directory holds a PEFT adapter of any kind."""
    return (path / ADAPTER_CONFIG).is_file()


def read_lora(directory: Path, linears: Mapping[str, tuple[int, int]]) -> Lora:
    """Read and check a PEFT LoRA.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
        linears: path -> (out, in) of every linear of the language model that it may adapt.

    Raises:
        WeightsError: no plain LoRA, or its tensors are missing, unexpected or of another shape.
    """
    file = directory / ADAPTER_CONFIG
    config = read_json(file)
    if odd := not_plain(config):
        raise WeightsError(f"{file}: {', '.join(odd)}; only plain LoRA pairs can be carried over")
    absent = [key for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]
    if absent:
        raise WeightsError(f"{file} lacks {', '.join(absent)}; download it again")
    _check_config(file, config)
    weights_file = next((directory / name for name in ADAPTER_FILES if (directory / name).is_file()), None)
    if weights_file is None:
        raise WeightsError(f"{directory} has no {' or '.join(ADAPTER_FILES)}")
    weights = open_weights(weights_file)
    halves: dict[str, torch.Tensor] = {}
    spelled: dict[str, str] = {}
    unknown = []
    for name in weights:
        match = _NAME.fullmatch(name)
        path = "" if match is None else match["path"].removeprefix(PREFIX)
        path = path.removeprefix("model.") if path.startswith("model.model.") else path
        if match is None or path not in linears:
            unknown.append(name)
            continue
        half = f"{path}.{match['half']}"
        if half in spelled:
            raise WeightsError(f"{weights_file}: {two_spellings(spelled[half], name)}")
        spelled[half], halves[half] = name, weights[name]
    if unknown:
        raise WeightsError(
            f"{weights_file}: {len(unknown)} tensors adapt no linear of the language model: {shorten(unknown)}"
        )
    excluded = config.get("exclude_modules") or []
    adapted = [p for p in linears if targets(config["target_modules"], p) and not targets(excluded, p)]
    needed: dict[str, tuple[int, ...]] = {}
    for path in adapted:
        out, inner = linears[path]
        rank = int(pattern_value(config.get("rank_pattern") or {}, path, config["r"]))
        needed |= {f"{path}.lora_A": (rank, inner), f"{path}.lora_B": (out, rank)}
    check_shapes(weights_file, {name: tuple(value.shape) for name, value in halves.items()}, needed)
    check_finite(weights_file, halves)
    return Lora(config, {path: (halves[f"{path}.lora_A"], halves[f"{path}.lora_B"]) for path in adapted})


def targets(target_modules: str | list[str], path: str) -> bool:
    """Whether PEFT's `target_modules` means the module: name endings, or one regular expression."""
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or re.fullmatch(target_modules, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in target_modules)


def write_lora(lora: Lora, directory: Path, base: str) -> None:
    """Write a LoRA as PEFT does, with the tensors as they are stored."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    kept = {key: lora.config[key] for key in KEPT if lora.config.get(key) is not None}
    config = LoraConfig(**kept, task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=base)
    config.save_pretrained(str(directory))
    tensors = {}
    for path, (a_RI, b_OR) in lora.pairs.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a_RI.detach().clone(memory_format=torch.contiguous_format)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b_OR.detach().clone(memory_format=torch.contiguous_format)
    save_file(tensors, directory / ADAPTER_FILES[0], metadata={"format": "pt"})


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raise WeightsError where a value is not what the arithmetic and the matching of names take."""

    def number(key: str, value: object, *, whole: bool) -> None:
        fits = isinstance(value, int) and value > 0 if whole else isinstance(value, int | float) and isfinite(value)
        if not fits or isinstance(value, bool):
            needed = "a whole number from 1 on" if whole else "a number"
            raise WeightsError(f"{file}: {key} {value!r}; needed is {needed}")

    def expression(key: str, text: str, used: str) -> None:
        try:
            re.compile(used)
        except re.error as error:
            raise WeightsError(f"{file}: {key} {text!r} is no regular expression: {error}") from None

    for key in ("target_modules", "exclude_modules"):
        modules = config.get(key) or []
        if isinstance(modules, str):
            expression(key, modules, modules)
        elif not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
            raise WeightsError(f"{file}: {key} {modules!r}; needed are names or a regular expression")
    number("lora_dropout", config.get("lora_dropout") or 0.0, whole=False)
    for key, pattern, whole in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        number(key, config[key], whole=whole)
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise WeightsError(f"{file}: {pattern} {patterns!r}; needed is an object of module names")
        for name, value in patterns.items():
            expression(pattern, name, ending(name))
            number(f"{pattern} {name}", value, whole=whole)

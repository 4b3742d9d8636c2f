"""Plain LoRA adapters on disk: read in every spelling PEFT has used, checked, and written."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import WeightsError
from llava_mole.common.text import count_of, shorten
from llava_mole.interop.names import WRAPPER, spelled_twice, unwrap
from llava_mole.interop.tensors import check_finite, check_shapes, open_weights, read_object, save_tensors
from llava_mole.mole.surgery import ending, not_plain, pattern_value

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = re.compile(r"(?P<path>.+)\.(?P<half>lora_[AB])(?:\.\w+)?\.weight")
KEPT = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
    "use_rslora",
)  # fmt: skip
"""Keys of an adapter's configuration that are carried over."""


@dataclass
class Lora:
    """A plain LoRA."""

    config: dict[str, Any]
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Module path in the causal LM -> A `[r, in]` and B `[out, r]`, as stored."""

    def renamed(self, rename: Callable[[str], str]) -> "Lora":
        """The same LoRA for a model that calls the modules `rename(path)`; each one is targeted by its full path."""
        r, alpha = self.config["r"], self.config["lora_alpha"]
        patterns = self.config.get("alpha_pattern") or {}
        ranks = {rename(path): a_RI.shape[0] for path, (a_RI, _) in self.pairs.items()}
        alphas = {rename(path): pattern_value(patterns, path, alpha) for path in self.pairs}
        config = {
            **self.config,
            "target_modules": list(ranks),
            "exclude_modules": None,
            "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r},
            "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        }
        return Lora(config, {rename(path): pair for path, pair in self.pairs.items()})


def read_lora(directory: Path, linears: Mapping[str, tuple[int, int]]) -> Lora:
    """Read a LoRA that PEFT saved, and check it against the language model.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
        linears: path -> (out, in) of every linear of the language model that may be adapted.

    Raises:
        WeightsError: not a plain LoRA, or tensors are missing, unexpected, of another shape or not finite.
    """
    file = directory / ADAPTER_CONFIG
    config = read_object(file)
    _check_config(file, config)
    weights_file = next((directory / name for name in ADAPTER_FILES if (directory / name).is_file()), None)
    if weights_file is None:
        raise WeightsError(f"{directory} has no {' or '.join(ADAPTER_FILES)}")
    weights = open_weights(weights_file)
    stored: dict[str, str] = {}
    unknown = []
    for name in weights:
        match = _NAME.fullmatch(unwrap(name))
        if match is None or match["path"] not in linears:
            unknown.append(name)
            continue
        half = f"{match['path']}.{match['half']}"
        if half in stored:
            raise WeightsError(f"{weights_file}: {spelled_twice(stored[half], name)}")
        stored[half] = name
    if unknown:
        count = count_of(len(unknown), "tensor")
        raise WeightsError(f"{weights_file}: the language model has no linear for {count}: {shorten(unknown)}")
    excluded = config.get("exclude_modules") or []
    adapted = [p for p in linears if is_target(config["target_modules"], p) and not is_target(excluded, p)]
    needed: dict[str, tuple[int, ...]] = {}
    for path in adapted:
        out, inner = linears[path]
        rank = int(pattern_value(config.get("rank_pattern") or {}, path, config["r"]))
        needed |= {f"{path}.lora_A": (rank, inner), f"{path}.lora_B": (out, rank)}
    check_shapes(weights_file, {half: weights.shapes[name] for half, name in stored.items()}, needed)
    halves = {half: weights[name].clone() for half, name in stored.items()}
    check_finite(weights_file, halves)
    return Lora(config, {path: (halves[f"{path}.lora_A"], halves[f"{path}.lora_B"]) for path in adapted})


def is_target(target_modules: str | list[str], path: str) -> bool:
    """Whether PEFT's `target_modules` (name endings, or one regular expression) includes the module."""
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or re.fullmatch(target_modules, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in target_modules)


def write_lora(lora: Lora, directory: Path, base: str) -> None:
    """Write a LoRA as PEFT does, with the tensors as they are stored. `base` is the language model's directory."""
    from peft import LoraConfig

    directory.mkdir(parents=True, exist_ok=True)
    kept = {key: lora.config[key] for key in KEPT if lora.config.get(key) is not None}
    config = LoraConfig(**kept, task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=base)
    config.save_pretrained(str(directory))
    halves = {f"{p}.lora_{h}.weight": t for p, pair in lora.pairs.items() for h, t in zip("AB", pair, strict=True)}
    save_tensors(halves, directory / ADAPTER_FILES[0], WRAPPER)


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raise WeightsError unless this is a plain LoRA whose values the arithmetic and the name matching can use."""
    if odd := not_plain(config):
        raise WeightsError(f"{file}: {', '.join(odd)}; only plain LoRA pairs can be converted")
    absent = [key for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]
    if absent:
        raise WeightsError(f"{file} lacks {', '.join(absent)}; download it again")

    def check_number(key: str, value: object, *, whole: bool) -> None:
        fits = isinstance(value, int) and value > 0 if whole else isinstance(value, int | float) and isfinite(value)
        if not fits or isinstance(value, bool):
            needed = "a whole number from 1 on" if whole else "a number"
            raise WeightsError(f"{file}: {key} {value!r}; needed is {needed}")

    def check_expression(key: str, text: str, used: str) -> None:
        try:
            re.compile(used)
        except re.error as error:
            raise WeightsError(f"{file}: {key} {text!r} is not a regular expression: {error}") from None

    for key in ("target_modules", "exclude_modules"):
        modules = config.get(key) or []
        if isinstance(modules, str):
            check_expression(key, modules, modules)
        elif not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
            raise WeightsError(f"{file}: {key} {modules!r}; needed are names or a regular expression")
    check_number("lora_dropout", config.get("lora_dropout") or 0.0, whole=False)
    for key, pattern, whole in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        check_number(key, config[key], whole=whole)
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise WeightsError(f"{file}: {pattern} {patterns!r}; needed is an object of module names")
        for name, value in patterns.items():
            check_expression(pattern, name, ending(name))
            check_number(f"{pattern} {name}", value, whole=whole)

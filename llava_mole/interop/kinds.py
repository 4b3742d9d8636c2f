"""Finds out what a directory or file is from its content; names of folders and weight files decide nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_mole.common.errors import WeightsError
from llava_mole.common.text import count_of, shorten
from llava_mole.interop.causal_lm import LLAVA_MODEL_TYPES
from llava_mole.interop.lora import ADAPTER_CONFIG, ADAPTER_FILES
from llava_mole.interop.names import split_llava
from llava_mole.interop.tensors import SUFFIXES, Weights, find_weights, open_weights, read_object
from llava_mole.interop.towers import CLIP_TYPES, find_open_clip_config
from llava_mole.model.checkpoint import FORMAT as CHECKPOINT_FORMAT
from llava_mole.model.checkpoint import MANIFEST, list_checkpoints

NON_LORA_FILE = "non_lora_trainables.bin"
PROJECTOR_FILE = "mm_projector.bin"
PREPARED_FORMAT = "llava_mole.prepared/"

KINDS = {
    "run": "a run of llava_mole",
    "checkpoint": "a checkpoint of llava_mole",
    "prepared": "a prepared data set of llava_mole",
    "llava": "a full LLaVA-1.5 checkpoint",
    "llava-lora": "a LLaVA-1.5 LoRA checkpoint",
    "llava-projector": "a LLaVA-1.5 projector",
    "projector": "a projector of llava_mole",
    "llava-hf": "a LLaVA-1.5 checkpoint in the layout of llava-hf",
    "released-mole": "a LLaVA-MoLE checkpoint of the paper's authors",
    "peft": "a PEFT adapter",
    "clip": "a CLIP vision tower in Hugging Face's layout",
    "open_clip": "a vision tower of open_clip",
    "language-model": "a language model in Hugging Face's layout",
}


@dataclass(frozen=True)
class Found:
    """A recognised directory or file."""

    kind: str
    """A key of `KINDS`."""
    path: Path
    config: dict[str, Any]
    """Content of `config.json`, `manifest.json` or `adapter_config.json`; empty if there is none."""

    @property
    def files(self) -> list[Path]:
        """The weight files directly in the directory, or the file itself."""
        if self.path.is_file():
            return [self.path]
        if self.kind == "llava-projector":
            return [self.path / PROJECTOR_FILE]
        if self.kind == "open_clip":
            return sorted(p for p in self.path.iterdir() if p.suffix in SUFFIXES)
        extra = (self.path / name for name in (NON_LORA_FILE, *ADAPTER_FILES))
        return find_weights(self.path) + [file for file in extra if file.is_file()]


class _Directory:
    """What the rules below ask about a directory. Its files are read on the first question about them."""

    def __init__(self, path: Path):
        self.path = path

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_object(self.path / MANIFEST) if self.has(MANIFEST) else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        config = read_object(file) if file.is_file() else {}
        if not isinstance(config.get("model_type", ""), str):
            raise WeightsError(f"{file}: model_type {config['model_type']!r}; it must be a name")
        return config

    @cached_property
    def weights(self) -> list[Path]:
        return find_weights(self.path)

    @property
    def is_llava(self) -> bool:
        is_known = self.config.get("model_type") in LLAVA_MODEL_TYPES
        return is_known and any(key.startswith("mm_") for key in self.config)


_RULES: tuple[tuple[str, Callable[[_Directory], bool]], ...] = (
    ("prepared", lambda d: str(d.manifest.get("format")).startswith(PREPARED_FORMAT)),
    ("checkpoint", lambda d: str(d.manifest.get("format")).startswith(CHECKPOINT_FORMAT.partition("/")[0])),
    ("run", lambda d: bool(list_checkpoints(d.path))),
    ("llava-lora", lambda d: d.has(ADAPTER_CONFIG) and (d.has(NON_LORA_FILE) or d.is_llava)),
    ("peft", lambda d: d.has(ADAPTER_CONFIG)),
    ("llava-hf", lambda d: d.config.get("model_type") == "llava" and "text_config" in d.config),
    ("llava", lambda d: d.is_llava and bool(d.weights)),
    ("llava-projector", lambda d: d.is_llava and d.has(PROJECTOR_FILE)),
    ("open_clip", lambda d: find_open_clip_config(d.path) is not None),
    ("clip", lambda d: d.config.get("model_type") in CLIP_TYPES),
    ("language-model", lambda d: bool(d.config and d.weights)),
    ("llava-projector", lambda d: d.has(PROJECTOR_FILE)),
)
"""Kind of a directory: that of the first rule that holds."""

_FILE_RULES: tuple[tuple[str, Callable[[Weights], bool]], ...] = (
    ("released-mole", lambda names: any(".moe_gate." in n for n in names)),
    ("open_clip", lambda names: any(n.removeprefix("visual.").startswith("transformer.resblocks.") for n in names)),
    ("projector", lambda names: bool(names) and all(n.startswith("mm_projector.") for n in names)),
    ("llava-projector", lambda names: _is_projector(names)),
)
"""Kind of a weight file: that of the first rule that holds for its tensor names."""


def find_kind(path: Path) -> Found:
    """What `path` is.

    Raises:
        WeightsError: it does not exist or is none of `KINDS`; the message says what was looked for.
    """
    if path.is_file():
        weights = open_weights(path)
        kind = next((kind for kind, holds in _FILE_RULES if holds(weights)), None)
        if kind is None:
            count = count_of(len(weights), "tensor")
            raise WeightsError(f"{path} holds {count} in an unknown layout, such as {shorten(list(weights))}")
        return Found(kind, path, {})
    if not path.is_dir():
        what = "is neither a file nor a directory" if path.exists() else "does not exist"
        raise WeightsError(f"{path} {what}")
    directory = _Directory(path)
    kind = next((kind for kind, holds in _RULES if holds(directory)), None)
    if kind is None:
        note = f"; its {MANIFEST} has format {directory.manifest.get('format')!r}" if directory.has(MANIFEST) else ""
        raise WeightsError(
            f"{path} is not a known kind of directory: no {MANIFEST}, checkpoint-<step>, {ADAPTER_CONFIG}, "
            f"{PROJECTOR_FILE} or config.json with weights beside it{note}"
        )
    if kind in ("prepared", "checkpoint"):
        return Found(kind, path, directory.manifest)
    if kind == "peft":
        return Found(kind, path, read_object(path / ADAPTER_CONFIG))
    says_nothing = kind == "run" or (kind == "llava-projector" and not directory.is_llava)
    return Found(kind, path, {} if says_nothing else directory.config)


def _is_projector(names: Weights) -> bool:
    parts = split_llava(names)
    return bool(parts.projector) and not parts.tower and len(parts.language_model) <= 1

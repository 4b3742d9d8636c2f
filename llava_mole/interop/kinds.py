"""Recognises directories and files by their content; names of folders and weight files do not matter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_mole.common.errors import WeightsError
from llava_mole.common.text import count_of, shorten
from llava_mole.interop.causal_lm import LLAVA_MODEL_TYPES
from llava_mole.interop.lora import ADAPTER_CONFIG, ADAPTER_FILES
from llava_mole.interop.names import split_llava
from llava_mole.interop.tensors import SUFFIXES, Weights, find_weights, open_weights, read_object
from llava_mole.interop.towers import CLIP_TYPES, OTHER_TYPES
from llava_mole.model.checkpoint import FORMAT as CHECKPOINT_FORMAT
from llava_mole.model.checkpoint import MANIFEST, list_checkpoints
from llava_mole.model.tower_files import find_open_clip_config

NON_LORA_FILE = "non_lora_trainables.bin"
LLAVA_PROJECTOR_FILE = "mm_projector.bin"
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
    "llava-next-hf": "a LLaVA-NeXT checkpoint in the layout of llava-hf",
    "released-mole": "a LLaVA-MoLE checkpoint of the paper's authors",
    "peft": "a PEFT adapter",
    "clip": "a CLIP vision tower in Hugging Face's layout",
    "open_clip": "a vision tower of open_clip",
    "vision-tower": "a SigLIP or DINOv2 vision tower in Hugging Face's layout",
    "language-model": "a language model in Hugging Face's layout",
}

HF_TYPES = {"llava": "llava-hf", "llava_next": "llava-next-hf"}
"""`model_type` of transformers' LLaVA -> kind."""


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
            return [self.path / LLAVA_PROJECTOR_FILE]
        if self.kind == "open_clip":
            return sorted(p for p in self.path.iterdir() if p.suffix in SUFFIXES)
        extra = (self.path / name for name in (NON_LORA_FILE, *ADAPTER_FILES))
        return find_weights(self.path) + [file for file in extra if file.is_file()]


def find_kind(path: Path) -> Found:
    """What `path` is. Raises WeightsError, which says what was looked for, if it is missing or none of `KINDS`."""
    if path.is_file():
        weights = open_weights(path)
        return Found(_file_kind(weights), path, {})
    if not path.is_dir():
        what = "is neither a file nor a directory" if path.exists() else "does not exist"
        raise WeightsError(f"{path} {what}")
    return _find_directory(path)


def _file_kind(weights: Weights) -> str:
    """Kind of a weight file, from its tensor names."""
    parts = split_llava(weights)
    if any(".moe_gate." in name for name in weights):
        return "released-mole"
    if any(name.removeprefix("visual.").startswith("transformer.resblocks.") for name in weights):
        return "open_clip"
    if weights and all(name.startswith("mm_projector.") for name in weights):
        return "projector"
    if parts.projector and not parts.tower and len(parts.language_model) <= 1:
        return "llava-projector"
    count = count_of(len(weights), "tensor")
    raise WeightsError(f"{weights} holds {count} in an unknown layout, such as {shorten(list(weights))}")


def _find_directory(path: Path) -> Found:
    """What a directory is; the first rule that holds decides."""

    def read(name: str) -> dict[str, Any]:
        return read_object(path / name) if (path / name).is_file() else {}

    manifest = read(MANIFEST)
    written_as = str(manifest.get("format"))
    if written_as.startswith(PREPARED_FORMAT):
        return Found("prepared", path, manifest)
    if written_as.startswith(CHECKPOINT_FORMAT.partition("/")[0]):
        return Found("checkpoint", path, manifest)
    if list_checkpoints(path):
        return Found("run", path, {})
    config = read("config.json")
    model_type = config.get("model_type", "")
    if not isinstance(model_type, str):
        raise WeightsError(f"{path / 'config.json'}: model_type {model_type!r}; it must be a name")
    is_llava = model_type in LLAVA_MODEL_TYPES and any(key.startswith("mm_") for key in config)
    has_projector = (path / LLAVA_PROJECTOR_FILE).is_file()
    if (path / ADAPTER_CONFIG).is_file():
        is_llava_lora = is_llava or (path / NON_LORA_FILE).is_file()
        return Found("llava-lora", path, config) if is_llava_lora else Found("peft", path, read(ADAPTER_CONFIG))
    if model_type in HF_TYPES and "text_config" in config:
        return Found(HF_TYPES[model_type], path, config)
    if is_llava and find_weights(path):
        return Found("llava", path, config)
    if is_llava and has_projector:
        return Found("llava-projector", path, config)
    if find_open_clip_config(path) is not None:
        return Found("open_clip", path, config)
    if model_type in CLIP_TYPES:
        return Found("clip", path, config)
    if model_type in OTHER_TYPES:
        return Found("vision-tower", path, config)
    if config and find_weights(path):
        return Found("language-model", path, config)
    if has_projector:
        return Found("llava-projector", path, {})
    note = f"; its {MANIFEST} has format {manifest.get('format')!r}" if (path / MANIFEST).is_file() else ""
    raise WeightsError(
        f"{path} is not a known kind of directory: no {MANIFEST}, checkpoint-<step>, {ADAPTER_CONFIG}, "
        f"{LLAVA_PROJECTOR_FILE} or config.json with weights beside it{note}"
    )

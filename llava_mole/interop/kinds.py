"""Says what a directory or file is, from what is in it; names of folders and files decide nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_mole.common.errors import WeightsError
from llava_mole.interop.causal_lm import LLAVA_MODEL_TYPES
from llava_mole.interop.lora import ADAPTER_CONFIG, is_adapter_dir
from llava_mole.interop.names import split_llava
from llava_mole.interop.tensors import SUFFIXES, Weights, find_weights, open_weights, read_json
from llava_mole.interop.towers import CLIP_TYPES, is_open_clip_dir
from llava_mole.model.checkpoint import FORMAT as CHECKPOINT_FORMAT
from llava_mole.model.checkpoint import MANIFEST, list_checkpoints

NON_LORA_FILE = "non_lora_trainables.bin"
PROJECTOR_FILE = "mm_projector.bin"
OUR_PROJECTOR = "mm_projector.safetensors"
PREPARED_FORMAT = "llava_mole.prepared/"
RELEASED_EXPERT = ".moe_gate."

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
    """One of `KINDS`."""
    path: Path
    config: dict[str, Any]
    """Of `config.json`, `manifest.json` or `adapter_config.json`; empty where there is none."""

    @property
    def files(self) -> list[Path]:
        """The files with its weights, as far as they lie in its directory itself."""
        if self.path.is_file():
            return [self.path]
        if self.kind == "llava-projector":
            return [self.path / PROJECTOR_FILE]
        if self.kind == "open_clip":
            return sorted(p for p in self.path.iterdir() if p.suffix in SUFFIXES)
        found = find_weights(self.path)
        extra = [self.path / name for name in (NON_LORA_FILE, "adapter_model.safetensors", "adapter_model.bin")]
        return found + [file for file in extra if file.is_file()]


def find_kind(path: Path) -> Found:
    """What `path` is.

    Raises:
        WeightsError: it does not exist or is none of `KINDS`; the message says what was looked for.
    """
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        what = "is neither a file nor a directory" if path.exists() else "does not exist"
        raise WeightsError(f"{path} {what}")
    manifest_note = ""
    if (path / MANIFEST).is_file():
        manifest = read_json(path / MANIFEST)
        form = str(manifest.get("format"))
        if form.startswith(PREPARED_FORMAT):
            return Found("prepared", path, manifest)
        if form.startswith(CHECKPOINT_FORMAT.partition("/")[0]):
            return Found("checkpoint", path, manifest)
        manifest_note = f"; its {MANIFEST} has format {form!r}, not {CHECKPOINT_FORMAT!r}"
    if list_checkpoints(path):
        return Found("run", path, {})
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if not isinstance(config.get("model_type", ""), str):
        raise WeightsError(f"{path / 'config.json'}: model_type {config['model_type']!r}; it must be a name")
    if is_adapter_dir(path):
        adapter = read_json(path / ADAPTER_CONFIG)
        is_llava = (path / NON_LORA_FILE).is_file() or _is_llava_config(config)
        return Found("llava-lora", path, config) if is_llava else Found("peft", path, adapter)
    if _is_llava_hf_config(config):
        return Found("llava-hf", path, config)
    if _is_llava_config(config):
        if find_weights(path):
            return Found("llava", path, config)
        if (path / PROJECTOR_FILE).is_file():
            return Found("llava-projector", path, config)
        raise WeightsError(f"{path} has a LLaVA config.json, but no weights and no {PROJECTOR_FILE}")
    if is_open_clip_dir(path):
        return Found("open_clip", path, config)
    if config.get("model_type") in CLIP_TYPES:
        return Found("clip", path, config)
    if config and find_weights(path):
        return Found("language-model", path, config)
    if (path / PROJECTOR_FILE).is_file():
        return Found("llava-projector", path, {})
    raise WeightsError(
        f"{path} is nothing known here: no {MANIFEST}, checkpoint-<step>, {ADAPTER_CONFIG}, {PROJECTOR_FILE} or "
        f"config.json with weights beside it{manifest_note}"
    )


def _of_file(path: Path) -> Found:
    weights = open_weights(path)
    names = list(weights)
    if any(RELEASED_EXPERT in name for name in names):
        return Found("released-mole", path, {})
    if any(name.removeprefix("visual.").startswith("transformer.resblocks.") for name in names):
        return Found("open_clip", path, {})
    if names and all(name.startswith("mm_projector.") for name in names):
        return Found("projector", path, {})
    if _is_projector(weights):
        return Found("llava-projector", path, {})
    raise WeightsError(f"{path} holds {len(names)} tensors of no known layout, such as {', '.join(names[:3])}")


def _is_projector(weights: Weights) -> bool:
    parts = split_llava(weights)
    return bool(parts.projector) and not parts.tower and len(parts.language_model) <= 1


def _is_llava_config(config: dict[str, Any]) -> bool:
    return config.get("model_type") in LLAVA_MODEL_TYPES and any(key.startswith("mm_") for key in config)


def _is_llava_hf_config(config: dict[str, Any]) -> bool:
    return config.get("model_type") == "llava" and "text_config" in config

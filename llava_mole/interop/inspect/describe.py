"""What a directory or weight file is and holds, and whether our own is intact."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_mole.common.errors import CheckpointError, WeightsError
from llava_mole.common.text import count_of, format_bytes
from llava_mole.data.store import read_manifest
from llava_mole.interop.causal_lm import fingerprint_language_model
from llava_mole.interop.inspect.prepared import describe_prepared, prepared_kind
from llava_mole.interop.kinds import KINDS, NON_LORA_FILE, Found, find_kind
from llava_mole.interop.lora import ADAPTER_CONFIG
from llava_mole.interop.names import split_llava, split_llava_hf
from llava_mole.interop.tensors import LABEL_FILE, Weights, open_weights, read_object
from llava_mole.interop.towers import open_tower
from llava_mole.model.checkpoint import TRAINER_DIR, list_checkpoints, verify_checkpoint

NEXT = {
    "llava": "use it: llava-mole convert DIR --to checkpoint --vision-tower CLIP --out RUN",
    "llava-lora": "use it: llava-mole convert DIR --to checkpoint --model-base VICUNA --vision-tower CLIP --out RUN",
    "llava-projector": "use it: llava-mole convert FILE --to projector --out FILE.safetensors (projector_weights)",
    "llava-hf": "use it: llava-mole convert DIR --to checkpoint --out RUN",
    "llava-next-hf": "use it: llava-mole convert DIR --to checkpoint --out RUN",
    "released-mole": "use it: llava-mole convert FILE --to checkpoint --model-base LLM --vision-tower CLIP --out RUN",
    "clip": "use it: llava-mole convert DIR --to open-clip --out TOWER (model.vision_tower)",
    "open_clip": "use it as model.vision_tower",
    "vision-tower": "use it as model.vision_tower.name",
    "language-model": "use it as model.language_model",
    "projector": "use it as projector_weights",
    "peft": "use it: peft.PeftModel.from_pretrained on its base",
    "prepared": "use it: data.sources.<name>.annotations",
}
_LLAVA_KEYS = ("model_type", "mm_vision_tower", "mm_projector_type", "mm_vision_select_layer", "image_aspect_ratio")
CONFIG_KEYS = {
    "llava": _LLAVA_KEYS,
    "llava-lora": _LLAVA_KEYS,
    "llava-projector": _LLAVA_KEYS,
    "llava-hf": ("vision_feature_layer", "vision_feature_select_strategy", "image_token_index"),
    "llava-next-hf": ("vision_feature_layer", "vision_feature_select_strategy", "image_grid_pinpoints"),
    "peft": ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "num_experts", "mode"),
    "language-model": ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"),
    "prepared": ("name", "format", "rows"),
}
"""Keys of a kind's configuration that are printed."""
_WHOLE = ("llava", "llava-hf", "llava-next-hf", "language-model")
"""Kinds whose directory holds a whole model in shards."""
_RELEASED_MARKS = {
    "in_adaptor.text_embed": "frozen",
    "in_adaptor.": "projector",
    ".mlp.moe_": "experts",
    ".mlp.router.": "router",
    ".lora_": "attention LoRA",
}
"""Part of a tensor in the authors' file, by the first mark that its name holds."""


def describe(path: Path) -> tuple[list[str], bool]:
    """Lines about a path, and whether everything in it is intact.

    Raises:
        WeightsError: it is nothing known, or its files cannot be read.
        CheckpointError: a checkpoint is damaged.
        DataError: a prepared data set is damaged.
    """
    if path.is_dir() and (kind := prepared_kind(path)):
        return describe_prepared(path, kind)
    found = find_kind(path)
    if found.kind == "run":
        return _describe_run(path)
    return (_describe_checkpoint(path) if found.kind == "checkpoint" else _describe_foreign(found)), True


def count_parameters(path: Path) -> int:
    """Number of elements of all tensors in a weight file, from its header."""
    weights = Weights([path])
    return _count(weights, weights)


def _count(weights: Weights, names: Iterable[str]) -> int:
    return sum(math.prod(weights.shapes[name]) for name in names)


def _line(key: str, value: object) -> str:
    return f"  {key:<27} {value}"


def _describe_run(run_dir: Path) -> tuple[list[str], bool]:
    """The checkpoints of a run, the newest intact one in full, and whether all are intact."""
    checkpoints = list_checkpoints(run_dir)
    lines = [f"run {run_dir}: {count_of(len(checkpoints), 'checkpoint')}"]
    intact: list[Path] = []
    for path in checkpoints:
        try:
            manifest = verify_checkpoint(path)
        except CheckpointError as error:
            lines.append(f"  {path.name:<20}NOT USABLE: {error}")
            continue
        intact.append(path)
        lines.append(f"  {path.name:<20}verified, stage {manifest.get('stage')}, step {manifest.get('step')}")
    if intact:
        lines += ["", *_describe_checkpoint(intact[0])]
    return lines, len(intact) == len(checkpoints)


def _describe_checkpoint(directory: Path) -> list[str]:
    """Raises CheckpointError if the checkpoint is damaged."""
    manifest = verify_checkpoint(directory)
    lines = [f"checkpoint {directory}: verified, {count_of(len(manifest['files']), 'file')} with the recorded sha256"]
    for key in ("stage", "step", "adapter", "template", "quantization", "version"):
        lines.append(_line(key, manifest.get(key, "not recorded")))
    for key, value in manifest.get("paths", {}).items():
        is_there = (directory / value).exists() or "/" not in value
        lines.append(_line(key, value + ("" if is_there else "   (not there now)")))
    lines += [_line(f"imported {key}", value) for key, value in manifest.get("imported", {}).items()]
    lines += [_line(f"{key} fingerprint", value) for key, value in manifest.get("fingerprints", {}).items()]
    lines.append("parts:")
    parts: dict[str, list[str]] = {}
    for name in manifest["files"]:
        parts.setdefault(name.split("/")[0], []).append(name)
    if not (directory / TRAINER_DIR).exists():
        parts.pop(TRAINER_DIR, None)
        lines.insert(1, _line("for inference only", f"it has no {TRAINER_DIR}/, so no run can resume from it"))
    for part, names in parts.items():
        size = format_bytes(sum(manifest["files"][name]["bytes"] for name in names))
        counts = [count_parameters(directory / name) for name in names if name.endswith(".safetensors")]
        lines.append(f"  {part:<28}{size:>10}" + (f"{sum(counts):>16,} numbers" if counts else ""))
    return lines


def _describe_foreign(found: Found) -> list[str]:
    """Lines about anything but runs and checkpoints of this package.

    Raises WeightsError if files cannot be read, DataError if the shards of a prepared data set differ in size from its
    manifest.
    """
    lines = [f"{found.path}: {KINDS[found.kind]}"]
    label: dict[str, Any] = {}
    if (found.path / LABEL_FILE).is_file():
        label = read_object(found.path / LABEL_FILE)
        lines.append(_line("written by", f"llava_mole {label.get('version')}, {label.get('converted')}"))
        keys = {"from": "from", "label": "approximation", "template": "template"}
        lines += [_line(shown, label[key]) for shown, key in keys.items() if key in label]
    keys_of_kind = CONFIG_KEYS.get(found.kind, ())
    lines += [_line(key, found.config[key]) for key in keys_of_kind if found.config.get(key) is not None]
    if found.kind == "prepared":
        shards = read_manifest(found.path)["shards"]
        size = format_bytes(sum(shard["bytes"] for shard in shards))
        lines.append(_line("shards", f"{len(shards)}, {size}, all of the recorded size"))
    else:
        lines += _facts(found, template_is_known="template" in label)
        lines += ["parts:", *_parts(found)]
    return [*lines, NEXT[found.kind]]


def _facts(found: Found, *, template_is_known: bool) -> list[str]:
    """Facts that follow from the kind, and fingerprints of the parts that our checkpoints would name."""
    lines = []
    if found.kind == "llava-lora":
        adapter = read_object(found.path / ADAPTER_CONFIG)
        lines += [_line(key, adapter.get(key)) for key in ("base_model_name_or_path", "r", "lora_alpha")]
        if not (found.path / NON_LORA_FILE).is_file():
            lines.append(_line("incomplete", f"no {NON_LORA_FILE}: the projector is not in it"))
    if found.kind.startswith(("llava", "released", "projector")):
        lines.append(_line("stage", "pretrain" if found.kind.endswith("projector") else "finetune"))
        if not template_is_known:
            lines.append(_line("template", "not recorded in this layout; LLaVA-1.5's is vicuna_v1"))
    if found.kind in _WHOLE:
        lines.append(_line("base", "none: it holds the language model itself"))
    if found.kind == "released-mole":
        lines.append(_line("base", "not recorded; vicuna-7b-v1.5 in the authors' code"))
    if found.kind == "language-model":
        lines.append(_line("fingerprint", fingerprint_language_model(found.path)))
    if found.kind in ("clip", "vision-tower") or (found.kind == "open_clip" and found.path.is_dir()):
        tower = open_tower(found.path)
        lines += [_line("activation", tower.activation), _line("fingerprint", tower.fingerprint())]
    return lines


def _parts(found: Found) -> list[str]:
    files = found.files
    if not files:
        raise WeightsError(f"{found.path} holds no weights")
    weights = open_weights(found.path) if found.kind in _WHOLE else Weights(files)
    parts = _split(found.kind, list(weights))
    lines = [f"  {part:<28}{_count(weights, names):>16,} numbers" for part, names in parts.items() if names]
    return [*lines, _line("files", f"{len(files)}, {format_bytes(sum(file.stat().st_size for file in files))}")]


def _split(kind: str, names: list[str]) -> Mapping[str, Iterable[str]]:
    """Part -> tensor names."""
    if kind == "released-mole":
        groups: dict[str, list[str]] = {p: [] for p in ("experts", "router", "attention LoRA", "projector", "frozen")}
        for name in names:
            groups[next((part for mark, part in _RELEASED_MARKS.items() if mark in name), "frozen")].append(name)
        return groups
    if not kind.startswith(("llava", "projector")):
        return {{"peft": "adapter", "language-model": "language model"}.get(kind, "vision tower"): names}
    others = [name for name in names if ".lora_" not in name]
    parts = split_llava_hf(others) if kind in ("llava-hf", "llava-next-hf") else split_llava(others)
    return {
        "language model": parts.language_model.values(),
        "vision tower": parts.tower.values(),
        "projector": parts.projector.values(),
        "adapter": [name for name in names if ".lora_" in name],
        "unknown": parts.unknown,
    }

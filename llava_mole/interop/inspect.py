"""`llava-mole inspect PATH`: what a directory or weight file is and holds, and whether our own is intact.

Our runs and checkpoints are described here, everything else in `interop.describing`.
"""

import argparse
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import EXIT_USER_ERROR, CheckpointError, WeightsError, command, one_line
from llava_mole.common.text import format_bytes
from llava_mole.data.store import read_manifest
from llava_mole.interop.causal_lm import fingerprint_language_model
from llava_mole.interop.kinds import KINDS, NON_LORA_FILE, Found
from llava_mole.interop.lora import ADAPTER_CONFIG
from llava_mole.interop.names import split_llava, split_llava_hf
from llava_mole.interop.tensors import LABEL_FILE, Weights, open_weights, read_json
from llava_mole.interop.towers import open_tower, tower_fingerprint
from llava_mole.model.checkpoint import list_checkpoints, verify_checkpoint


def count_parameters(path: Path) -> int:
    """Elements of all tensors in a `.safetensors` file, read from its header (8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            elements = 1
            for size in tensor["shape"]:
                elements *= size
            total += elements
    return total


def describe_parts(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """One line per top-level part of a checkpoint: size on disk, and parameters where it holds weights."""
    sizes: dict[str, int] = {}
    parameters: dict[str, int] = {}
    for name, recorded in manifest["files"].items():
        part = name.split("/")[0]
        sizes[part] = sizes.get(part, 0) + recorded["bytes"]
        if name.endswith(".safetensors"):
            parameters[part] = parameters.get(part, 0) + count_parameters(directory / name)
    return [
        f"  {part:<28}{format_bytes(size):>10}" + (f"{parameters[part]:>16,} numbers" if part in parameters else "")
        for part, size in sizes.items()
    ]


def describe_checkpoint(directory: Path) -> str:
    """A verified checkpoint in words. Raises CheckpointError where it is none or damaged."""
    manifest = verify_checkpoint(directory)
    lines = [f"checkpoint {directory}: verified, {len(manifest['files'])} files match their sha256"]
    for key in ("stage", "step", "adapter", "template", "quantization", "version"):
        lines.append(f"  {key:<28}{manifest.get(key, 'not recorded')}")
    for key, value in manifest.get("paths", {}).items():
        there = (directory / value).exists() or "/" not in value
        lines.append(f"  {key:<28}{value}" + ("" if there else "   (not there now)"))
    for key, value in manifest.get("imported", {}).items():
        lines.append(f"  {'imported ' + key:<28}{value}")
    for key, value in manifest.get("fingerprints", {}).items():
        lines.append(f"  {key + ' fingerprint':<28}{value}")
    return "\n".join([*lines, "parts:", *describe_parts(directory, manifest)])


def describe_run(run_dir: Path, checkpoints: Sequence[Path]) -> tuple[str, bool]:
    """A run directory's checkpoints, and the newest intact one in full. The flag says whether all are intact."""
    lines = [f"run {run_dir}: {len(checkpoints)} checkpoints"]
    newest: Path | None = None
    for path in checkpoints:
        try:
            manifest = verify_checkpoint(path)
        except CheckpointError as error:
            lines.append(f"  {path.name:<20}NOT USABLE: {error}")
            continue
        newest = newest or path
        lines.append(f"  {path.name:<20}verified, stage {manifest.get('stage')}, step {manifest.get('step')}")
    intact = not any("NOT USABLE" in line for line in lines)
    if newest is not None:
        lines += ["", describe_checkpoint(newest)]
    return "\n".join(lines), intact


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Describe a path. The exit code is 0 only if everything in it is intact."""
    from llava_mole.interop.kinds import find_kind

    parser = argparse.ArgumentParser(
        prog="llava-mole inspect", description="What a directory or weight file is and holds; its name plays no part."
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="run, checkpoint, model, adapter, tower or data set")
    path = parser.parse_args(argv).path
    with one_line("`inspect` must be able to read what it describes"):
        found = find_kind(path)
        if found.kind == "checkpoint":
            text, intact = describe_checkpoint(path), True
        elif found.kind == "run":
            text, intact = describe_run(path, list_checkpoints(path))
        else:
            text, intact = "\n".join(describe_found(found)), True
    print(text)
    return 0 if intact else EXIT_USER_ERROR


NEXT = {
    "llava": "use it: llava-mole convert DIR --to checkpoint --vision-tower CLIP --out RUN",
    "llava-lora": "use it: llava-mole convert DIR --to checkpoint --model-base VICUNA --vision-tower CLIP --out RUN",
    "llava-projector": "use it: llava-mole convert FILE --to projector --out FILE.safetensors (projector_weights)",
    "llava-hf": "use it: llava-mole convert DIR --to checkpoint --out RUN",
    "released-mole": "use it: llava-mole convert FILE --to checkpoint --model-base LLM --vision-tower CLIP --out RUN",
    "clip": "use it: llava-mole convert DIR --to open-clip --out TOWER (model.vision_tower)",
    "open_clip": "use it as model.vision_tower",
    "language-model": "use it as model.language_model",
    "projector": "use it as projector_weights",
    "peft": "use it: peft.PeftModel.from_pretrained on its base",
}


def describe_found(found: Found) -> list[str]:
    """Lines about anything but our own runs and checkpoints. Raises WeightsError where its files cannot be read."""
    lines = [f"{found.path}: {KINDS[found.kind]}"]
    written: dict = {}
    label = found.path / LABEL_FILE
    if found.path.is_dir() and label.is_file():
        written = read_json(label)
        lines += [_line("written by", f"llava_mole {written.get('version')}, {written.get('converted')}")]
        lines += [_line("from", written["from"])] if "from" in written else []
        lines += [_line("label", written["approximation"])] if "approximation" in written else []
        lines += [_line("template", written["template"])] if "template" in written else []
    if found.kind == "prepared":
        return lines + _describe_prepared(found)
    lines += _facts(found, template_is_known="template" in written)
    lines += ["parts:", *_parts(found)]
    return [*lines, NEXT[found.kind]]


def _facts(found: Found, *, template_is_known: bool) -> list[str]:
    config = found.config
    keys = {
        "llava": ("model_type", "mm_vision_tower", "mm_projector_type", "mm_vision_select_layer", "image_aspect_ratio"),
        "llava-hf": ("vision_feature_layer", "vision_feature_select_strategy", "image_token_index"),
        "peft": ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "num_experts", "mode"),
        "language-model": ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"),
    }
    names = keys["llava"] if found.kind in ("llava-lora", "llava-projector") else keys.get(found.kind, ())
    lines = [_line(key, config[key]) for key in names if config.get(key) is not None]
    if found.kind == "llava-lora":
        adapter = read_json(found.path / ADAPTER_CONFIG)
        lines += [_line(key, adapter.get(key)) for key in ("base_model_name_or_path", "r", "lora_alpha")]
        if not (found.path / NON_LORA_FILE).is_file():
            lines.append(_line("incomplete", f"no {NON_LORA_FILE}: the projector is not in it"))
    stage = {"llava-projector": "pretrain", "projector": "pretrain"}.get(found.kind, "finetune")
    if found.kind.startswith(("llava", "released", "projector")):
        lines.append(_line("stage", stage))
        if not template_is_known:
            lines.append(_line("template", "not recorded in this layout; LLaVA-1.5's is vicuna_v1"))
    if found.kind in ("llava", "llava-hf", "language-model"):
        lines.append(_line("base", "none: it holds the language model itself"))
    if found.kind == "released-mole":
        lines.append(_line("base", "not recorded; vicuna-7b-v1.5 in the authors' code"))
    return [*lines, *_fingerprints(found)]


def _fingerprints(found: Found) -> list[str]:
    """Of whole parts that our checkpoints would name; the others have none before they are converted."""
    if found.kind == "language-model":
        return [_line("fingerprint", fingerprint_language_model(found.path))]
    if found.kind == "clip" or (found.kind == "open_clip" and found.path.is_dir()):
        tower = open_tower(found.path)
        return [_line("activation", tower.activation), _line("fingerprint", tower_fingerprint(tower))]
    return []


def _parts(found: Found) -> list[str]:
    files = found.files
    if not files:
        raise WeightsError(f"{found.path} holds no weights")
    weights = open_weights(found.path) if found.kind in ("llava", "llava-hf", "language-model") else Weights(files)
    lines = [
        f"  {part:<28}{_count(weights, names):>16,} numbers" for part, names in _split(found, weights).items() if names
    ]
    return [*lines, _line("files", f"{len(files)}, {format_bytes(sum(file.stat().st_size for file in files))}")]


def _split(found: Found, weights: Weights) -> Mapping[str, list[str]]:
    names = list(weights)
    if found.kind in ("llava", "llava-lora", "llava-projector", "projector", "llava-hf"):
        adapter = [name for name in names if ".lora_" in name]
        others = [name for name in names if ".lora_" not in name]
        parts = split_llava_hf(others) if found.kind == "llava-hf" else split_llava(others)
        return {
            "language model": list(parts.language_model.values()),
            "vision tower": list(parts.tower.values()),
            "projector": list(parts.projector.values()),
            "adapter": adapter,
            "unknown": parts.unknown,
        }
    if found.kind == "released-mole":
        groups: dict[str, list[str]] = {
            "experts": [],
            "router": [],
            "attention LoRA": [],
            "projector": [],
            "frozen": [],
        }
        for name in names:
            groups[_released_part(name)].append(name)
        return groups
    whole = {"peft": "adapter", "clip": "vision tower", "open_clip": "vision tower"}.get(found.kind, "language model")
    return {whole: names}


def _released_part(name: str) -> str:
    if "in_adaptor." in name and "text_embed" not in name:
        return "projector"
    marks = ((".mlp.moe_", "experts"), (".mlp.router.", "router"), (".lora_", "attention LoRA"))
    return next((part for mark, part in marks if mark in name), "frozen")


def _count(weights: Weights, names: list[str]) -> int:
    return sum(math.prod(weights.shape(name)) for name in names)


def _describe_prepared(found: Found) -> list[str]:
    """Rows and shards, whose sizes have been compared with the manifest. Raises DataError where they differ."""
    manifest = read_manifest(found.path)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    lines = [_line(key, manifest[key]) for key in ("name", "format", "rows") if key in manifest]
    shards = f"{len(manifest['shards'])}, {format_bytes(size)}, all of the recorded size"
    return [*lines, _line("shards", shards), "use it: data.sources.<name>.annotations"]


def _line(key: str, value: object) -> str:
    return f"  {key:<27} {value}"


if __name__ == "__main__":
    raise SystemExit(main())

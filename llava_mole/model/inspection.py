"""`llava-mole inspect PATH`: what a directory or weight file is and holds, and whether our own is intact.

Our runs and checkpoints are described here, everything else in `interop.describing`.
"""

import argparse
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import EXIT_USER_ERROR, CheckpointError, command, one_line
from llava_mole.common.text import format_bytes
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
    from llava_mole.model.interop.describing import describe_found
    from llava_mole.model.interop.kinds import find_kind

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


if __name__ == "__main__":
    raise SystemExit(main())

"""Checkpoint directories: written completely or not at all, and verified before they are read.

A checkpoint is a directory `checkpoint-<step>` with a `manifest.json` that lists every file with its size and sha256.
It is written under a temporary name, fsynced and renamed, so a directory of that name is complete unless it was
damaged later. A directory that does not match its manifest is never loaded.

The folder's name only orders the steps. Whose checkpoint it is, `run.json` inside says: the identifier of the run that
wrote it, and the name it wrote it under. A run replaces and deletes only what bears its own identifier. A killed
process leaves names that start with a dot: `.tmp-checkpoint-<step>-<pid>` was being written, `.old-...` replaced and
`.gone-...` deleted.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import CheckpointError
from llava_mole.common.files import atomic_path, remove, sha256_of, sha256_of_json
from llava_mole.common.log import get_logger

logger = get_logger(__name__)


MANIFEST = "manifest.json"
OWNER_FILE = "run.json"
TRAINER_DIR = "trainer"
OPTIMIZER_FILE = f"{TRAINER_DIR}/optimizer.safetensors"
PIECES = "optimizer-*-of-*.safetensors"
"""The same in pieces, one of each rank, in `TRAINER_DIR`."""
STATE_FILE = f"{TRAINER_DIR}/state.json"
SELF_HASH = "manifest_sha256"
LEFTOVER = re.compile(r"\.(tmp|old|gone)-(checkpoint-\d+)-\d+")
FORMAT = "llava_mole.checkpoint/2"
READABLE_FORMATS = ("llava_mole.checkpoint/1", FORMAT)
"""Format 1 has neither an owner nor the contents of data, tokenizer and template."""


class UnknownFormatError(CheckpointError):
    """A checkpoint that another version of this program wrote, or another program."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """`RUN/checkpoint-<step>`."""
    return run_dir / f"checkpoint-{step}"


def check_free_space(directory: Path, expected_bytes: int) -> None:
    """Raise OSError (ENOSPC) unless the file system of `directory` has twice `expected_bytes` free.

    Twice, because other processes write to the disk too and a replaced file is deleted only after its successor exists.
    """
    free = shutil.disk_usage(directory).free
    if free < 2 * expected_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{directory} has {free:,} bytes free; a checkpoint takes about {expected_bytes:,} and is written only "
            "where twice that is free",
        )


def write_checkpoint(
    directory: Path,
    write_files: Callable[[Path], Mapping[str, Any] | None],
    fields: dict[str, Any],
    expected_bytes: int = 0,
    run: str | None = None,
) -> None:
    """Create `directory` atomically, with its manifest.

    Args:
        directory: Final path; replaced if it exists and, where `run` is given, is that run's own.
        write_files: Writes every file of the checkpoint into the temporary directory it is given. What it returns
            replaces fields of the manifest that depend on the files.
        fields: Stored in the manifest beside the list of files (stage, step, template, fingerprints, ...).
        expected_bytes: Approximate size; the free space is checked against it before anything is written.
        run: Identifier of the run that owns the checkpoint; None for one that no run wrote.

    Raises:
        FileExistsError: Something that is not the run's own is in the way. It is left alone.
        OSError: The disk is full or cannot be written. The temporary directory is removed; older checkpoints stay.
            Any exception of `write_files` has the same effect.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    if run is not None and os.path.lexists(directory) and not is_owned(directory, run):
        raise FileExistsError(errno.EEXIST, f"{directory} exists and does not belong to this run; move it away")
    check_free_space(directory.parent, expected_bytes)
    with atomic_path(directory) as temporary:
        temporary.mkdir()
        if run is not None:  # first of all, so that whatever a killed process leaves can be told from others' files
            owner = json.dumps({"run": run, "checkpoint": directory.name})
            (temporary / OWNER_FILE).write_text(owner + "\n", encoding="utf-8")
            fields = {**fields, "run": run}
        fields = {**fields, **(write_files(temporary) or {})}
        files = {
            path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        manifest = {"format": FORMAT, **fields, "files": files}
        manifest[SELF_HASH] = _manifest_hash(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError if it is missing, damaged or of another format."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: it is not a checkpoint, or it was not written completely; "
            "give a checkpoint-<step> directory of a run"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint of the run") from None
    if isinstance(manifest, dict) and manifest.get(SELF_HASH, "") not in ("", _manifest_hash(manifest)):
        raise CheckpointError(f"{path} is damaged (it differs from what was written); use another checkpoint")
    if not isinstance(manifest, dict) or manifest.get("format") not in READABLE_FORMATS:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        known = " and ".join(map(repr, READABLE_FORMATS))
        raise UnknownFormatError(f"{path} has format {found!r}; this version reads {known}")
    return manifest


def verify_checkpoint(directory: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, and return the manifest.

    The folder `trainer/`, which only a resumed run needs, may be absent as a whole.

    Raises:
        CheckpointError: A file is missing, or its size or sha256 differs. The message names it.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    slim = not os.path.lexists(directory / TRAINER_DIR)
    for name, recorded in _recorded_files(directory, manifest):
        path = directory / name
        if slim and name.startswith(f"{TRAINER_DIR}/"):
            continue
        if not path.is_file():
            raise CheckpointError(f"{directory} is incomplete: {name} is missing; use another checkpoint of the run")
        size = path.stat().st_size
        if size != recorded["bytes"]:
            raise CheckpointError(
                f"{directory} is damaged: {name} has {size} bytes, {recorded['bytes']} were written; "
                "use another checkpoint of the run"
            )
        try:
            found = sha256_of(path)
        except OSError as error:
            raise CheckpointError(f"{directory} is damaged: {name} cannot be read ({error}); use another one") from None
        if found != recorded["sha256"]:
            raise CheckpointError(
                f"{directory} is damaged: {name} differs from what was written (sha256); use another checkpoint"
            )
    return manifest


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The `checkpoint-<step>` directories of a run, newest step first. They are not verified."""
    named = Path(run_dir).glob("checkpoint-*")
    found = [path for path in named if path.is_dir() and path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_valid_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, or None. Each skipped one is logged with the reason."""
    for path in list_checkpoints(run_dir):
        try:
            step = verify_checkpoint(path).get("step")
        except CheckpointError as error:
            logger.warning("skipping %s: %s", path.name, error)
        else:
            if step == _step_of(path):
                return path
            logger.warning("skipping %s: it is the checkpoint of step %s under another name", path.name, step)
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`, or the newest valid one if `path` is a run directory.

    Raises:
        CheckpointError: `path` is neither, or no checkpoint there verifies.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a run directory or a checkpoint-<step> inside one")
    if (path / MANIFEST).is_file() or not list_checkpoints(path):
        verify_checkpoint(path)
        return path
    newest = newest_valid_checkpoint(path)
    if newest is None:
        raise CheckpointError(f"{path} has checkpoints, but none of them verifies; see the warnings above")
    return newest


def is_owned(directory: Path, run: str) -> bool:
    """Whether `directory` is a checkpoint that the run with this identifier wrote under this name.

    A link is not, nor is a copy under another name, nor one in a format that this version does not read. Where the
    manifest is missing or damaged, `run.json` answers.
    """
    if directory.is_symlink() or not directory.is_dir():
        return False
    name = (LEFTOVER.fullmatch(directory.name) or ("", "", directory.name))[2]
    try:
        manifest = read_manifest(directory)
    except UnknownFormatError:
        return False
    except CheckpointError:
        return _owner(directory) == {"run": run, "checkpoint": name}
    return manifest.get("run") == run and f"checkpoint-{manifest['step']}" == name


def _owner(directory: Path) -> Any:
    """Content of `run.json`; None if it cannot be read."""
    try:
        return json.loads((directory / OWNER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def rotate_checkpoints(published: Path, keep: int, run: str) -> None:
    """Keep `published`, which was just completed, and the `keep` - 1 of the run before it; delete its others.

    Checkpoints of later steps are deleted too. The run skipped them when it resumed because they do not verify; if
    they counted as the newest, valid ones would be deleted in their place. What the run did not write stays.
    """
    step = _step_of(published)
    checkpoints = [path for path in list_checkpoints(published.parent) if is_owned(path, run)]
    earlier = [path for path in checkpoints if _step_of(path) < step]
    for path in [path for path in checkpoints if _step_of(path) > step] + earlier[keep - 1 :]:
        # Rename first: an interrupted deletion must not leave half a checkpoint under a checkpoint's name.
        gone = path.parent / f".gone-{path.name}-{os.getpid()}"
        os.replace(path, gone)
        _delete(gone)


def _delete(directory: Path) -> None:
    """Delete a checkpoint, its owner's mark last: what an interruption leaves can be recognised and removed."""
    for path in directory.iterdir():
        if path.name != OWNER_FILE:
            remove(path)
    shutil.rmtree(directory)


def clean_leftovers(run_dir: Path) -> None:
    """Remove what killed processes left in a run directory. No other process may be writing there.

    A checkpoint that was moved aside for a replacement that was never completed gets its name back. A folder that has
    such a name and is not a checkpoint's is left alone.
    """
    if not run_dir.is_dir():
        return
    for path in sorted(run_dir.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        kind, target = match[1], run_dir / match[2]
        is_checkpoint = _owner(path) is not None or (path / MANIFEST).is_file()
        replaced = kind != "old" or (target / MANIFEST).is_file()
        if kind == "old" and is_checkpoint and not os.path.lexists(target):
            os.replace(path, target)
            logger.warning("%s: an interrupted save had moved this checkpoint aside; it has been restored", target)
        elif not any(path.iterdir()) or (is_checkpoint and replaced):
            _delete(path)
            logger.info("removed %s, left by a killed process", path)
        else:
            logger.warning("%s was not written by a run, or is the only copy: it is left alone", path)


def _recorded_files(directory: Path, manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    try:
        return [
            (name, {"bytes": entry["bytes"], "sha256": entry["sha256"]}) for name, entry in manifest["files"].items()
        ]
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{directory / MANIFEST} is damaged (no list of files); use another checkpoint") from None


def _manifest_hash(manifest: dict[str, Any]) -> str:
    return sha256_of_json({key: value for key, value in manifest.items() if key != SELF_HASH})


_SAMPLES = 64


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hex digest over the names, shapes and up to 64 evenly spaced values of every tensor.

    Args:
        tensors: `(name, tensor)` pairs in any order, in the dtype they are stored in. Values are read as float32,
            so a file in half precision and its float32 copy have the same fingerprint. Quantised weights do not:
            call this before quantising.
    """
    return fingerprint_in_order(sorted(tensors, key=lambda pair: pair[0]))


def fingerprint_in_order(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`fingerprint` of pairs already sorted by name, which may be generated one at a time."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLES)
        digest.update(flat[::stride][:_SAMPLES].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]

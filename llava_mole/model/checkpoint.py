"""Checkpoint directories: written whole or not at all, verified before they are read.

A checkpoint is a directory `checkpoint-<step>` with a `manifest.json` that names every file with its size and sha256.
It is written under a temporary name, fsynced and renamed, so a directory of that name is complete unless something
damaged it later; a directory whose manifest does not verify is never loaded. Nothing is decided by a folder's name
except the order of the steps. What a killed process leaves behind has a name that starts with a dot:
`.tmp-checkpoint-<step>-<pid>` is being written, `.old-...` is being replaced, `.gone-...` is being deleted.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_mole.common.errors import CheckpointError
from llava_mole.common.log import get_logger

MANIFEST = "manifest.json"
SELF_HASH = "manifest_sha256"
LEFTOVER = re.compile(r"\.(tmp|old|gone)-(checkpoint-\d+)-\d+")
FORMAT = "llava_mole.checkpoint/1"

logger = get_logger(__name__)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / f"checkpoint-{step}"


def check_free_space(directory: Path, expected_bytes: int) -> None:
    """Raise OSError (ENOSPC) unless the file system of `directory` has twice the bytes that are about to be written.

    Twice, because others write to the disk too, and because what replaces a file needs room before that is gone.
    """
    free = shutil.disk_usage(directory).free
    if free < 2 * expected_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{directory} has {free:,} bytes free; a checkpoint takes about {expected_bytes:,} and is written only "
            "where twice that is free",
        )


def write_checkpoint(
    directory: Path, write_files: Callable[[Path], None], fields: dict[str, Any], expected_bytes: int = 0
) -> None:
    """Create `directory` atomically.

    Args:
        directory: final name; replaced if it exists.
        write_files: writes every file of the checkpoint below the temporary directory it is given.
        fields: stored in the manifest beside the list of files (stage, step, template, fingerprints, ...).
        expected_bytes: about how much will be written; checked against the free space before anything is.

    Raises:
        OSError: the disk is full or cannot be written; the temporary directory is removed, older checkpoints stay.
            `write_files` may raise what it likes, with the same effect.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(directory.parent, expected_bytes)
    temporary = directory.parent / f".tmp-{directory.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write_files(temporary)
        files = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            _fsync(path)
            files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = {"format": FORMAT, **fields, "files": files}
        manifest[SELF_HASH] = _manifest_hash(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _fsync(temporary / MANIFEST)
        for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
            _fsync(folder)
        replaced = None
        if directory.exists():
            replaced = directory.parent / f".old-{directory.name}-{os.getpid()}"
            os.replace(directory, replaced)
        os.replace(temporary, directory)
        _fsync(directory.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError where there is none or it is of another format."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: it is no checkpoint, or its writing was cut short; "
            f"give a directory checkpoint-<step> of a run"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint of the run") from None
    if isinstance(manifest, dict) and manifest.get(SELF_HASH, "") not in ("", _manifest_hash(manifest)):
        raise CheckpointError(f"{path} is damaged (it differs from what was written); use another checkpoint")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
    return manifest


def verify_checkpoint(directory: Path) -> dict[str, Any]:
    """Check every file against the manifest and return it.

    Raises:
        CheckpointError: a file is missing, shorter or longer, or its sha256 differs; the message names it.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, recorded in _recorded_files(directory, manifest):
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{directory} is incomplete: {name} is missing; use another checkpoint of the run")
        size = path.stat().st_size
        if size != recorded["bytes"]:
            raise CheckpointError(
                f"{directory} is damaged: {name} has {size} bytes, {recorded['bytes']} were written; "
                "use another checkpoint of the run"
            )
        try:
            found = _sha256(path)
        except OSError as error:
            raise CheckpointError(f"{directory} is damaged: {name} cannot be read ({error}); use another one") from None
        if found != recorded["sha256"]:
            raise CheckpointError(
                f"{directory} is damaged: {name} differs from what was written (sha256); use another checkpoint"
            )
    return manifest


def list_checkpoints(run_dir: Path) -> list[Path]:
    """`checkpoint-<step>` directories of a run, newest step first, verified or not."""
    found = []
    for path in Path(run_dir).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if path.is_dir() and step.isdecimal():
            found.append((int(step), path))
    return [path for _, path in sorted(found, reverse=True)]


def newest_valid_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, or None; each one passed over is logged with the reason."""
    for path in list_checkpoints(run_dir):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("passing over %s: %s", path.name, error)
        else:
            return path
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest valid one of the run directory it is.

    Raises:
        CheckpointError: neither; or the named checkpoint does not verify.
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


def rotate_checkpoints(published: Path, keep: int) -> None:
    """Delete all checkpoints of a run but the newest `keep`, of which `published`, just completed, is the first.

    Checkpoints of later steps go too: the run has passed over them when it resumed, because they do not verify. If they
    counted as the newest, the good ones would be deleted in their place.
    """
    step = int(published.name.removeprefix("checkpoint-"))
    steps = [(int(path.name.removeprefix("checkpoint-")), path) for path in list_checkpoints(published.parent)]
    earlier = [path for other, path in steps if other < step]
    for path in [path for other, path in steps if other > step] + earlier[keep - 1 :]:
        # Renamed first: a deletion that is cut short must not leave half a checkpoint under a checkpoint's name.
        gone = path.parent / f".gone-{path.name}-{os.getpid()}"
        os.replace(path, gone)
        shutil.rmtree(gone)


def clean_leftovers(run_dir: Path) -> None:
    """Remove what killed saves and deletions left in a run directory. Nobody else may be writing to it.

    A checkpoint that was about to be replaced, and whose replacement did not arrive, gets its name back.
    """
    if not run_dir.is_dir():
        return
    for path in sorted(run_dir.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        kind, name = match.groups()
        if kind == "old" and not (run_dir / name).exists():
            os.replace(path, run_dir / name)
            logger.warning("%s: an interrupted save had moved this checkpoint away; it is back", run_dir / name)
        else:
            shutil.rmtree(path, ignore_errors=True)
            logger.info("removed %s, left by a process that was killed", path)


def _recorded_files(directory: Path, manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    try:
        return [
            (name, {"bytes": entry["bytes"], "sha256": entry["sha256"]}) for name, entry in manifest["files"].items()
        ]
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{directory / MANIFEST} is damaged (no list of files); use another checkpoint") from None


def _manifest_hash(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != SELF_HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

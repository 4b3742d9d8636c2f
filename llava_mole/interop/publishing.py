"""Puts a result in its place whole or not at all, and decides what it may replace there."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_mole.common.errors import UserError, WeightsError
from llava_mole.interop.kinds import KINDS, find_kind
from llava_mole.interop.tensors import LABEL_FILE, fsync


@contextmanager
def publish(out: Path, *, overwrite: bool, inputs: Iterable[Path | None], is_file: bool = False) -> Iterator[Path]:
    """A temporary path that becomes `out` when the block ends without an error, and is removed when it does not.

    Raises:
        WeightsError: `out` must not be written to; see `check_target`, which takes the same arguments.
        OSError: the disk is full, or cannot be written.
    """
    check_target(out, overwrite=overwrite, inputs=inputs, is_file=is_file)
    out = out.resolve()  # a link stays, and what it leads to is written
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".tmp-{out.name}-{os.getpid()}"
    old = out.parent / f".old-{out.name}-{os.getpid()}"
    _remove(temporary)
    try:
        yield temporary
        for path in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            fsync(path)
        if out.is_dir():
            os.replace(out, old)
        os.replace(temporary, out)
        fsync(out.parent)
        _remove(old)
    except BaseException as error:
        _remove(temporary)
        if old.exists() and not out.exists():
            os.replace(old, out)
        if "(os error " in str(error) and not isinstance(error, UserError):
            raise OSError(str(error)) from None  # it came through safetensors or tokenizers, which are Rust
        raise


def check_target(out: Path, *, overwrite: bool, inputs: Iterable[Path | None], is_file: bool = False) -> None:
    """Raise WeightsError where `out` must not be written to; called before hours of work, too.

    Args:
        out: what is to be written.
        overwrite: whether what a conversion has written there may be replaced.
        inputs: what the conversion reads, as far as it is known; None for what is not given.
        is_file: whether a projector's file is to be written; else a directory.
    """
    if not out.exists():
        return
    if not overwrite:
        raise WeightsError(f"{out} exists; give another --out, or --overwrite to replace it")
    held = next((path for path in inputs if path is not None and _is_within(path, out)), None)
    if held is not None:
        raise WeightsError(f"--out {out} holds {held}, which is read; give another --out")
    if out.is_file() != is_file:
        found, needed = ("directory", "file") if is_file else ("file", "directory")
        raise WeightsError(f"{out} is a {found}, but a {needed} is to be written; give another --out")
    if is_file:
        _check_file(out)
    elif any(out.iterdir()) and not (out / LABEL_FILE).is_file():
        raise WeightsError(
            f"{out} is a directory that no conversion has written (no {LABEL_FILE}); it stays: remove it"
        )


def _check_file(out: Path) -> None:
    """A file has no label; a projector is the only one that a conversion writes."""
    try:
        kind = find_kind(out).kind
        problem = None if kind in ("projector", "llava-projector") else f"it is {KINDS[kind]}"
    except WeightsError as error:
        problem = str(error)
    if problem is not None:
        raise WeightsError(
            f"{out} is no projector's file, so no conversion has written it; it stays: give another --out ({problem})"
        )


def _is_within(path: Path, directory: Path) -> bool:
    """Also where a link inside the directory leads out of it: the link would be gone."""
    places = directory.resolve(), Path(os.path.abspath(directory))
    return any(
        spelled.is_relative_to(place) for spelled in (path.resolve(), Path(os.path.abspath(path))) for place in places
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

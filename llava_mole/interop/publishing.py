"""Decides what a conversion may replace, and publishes its result as a whole or not at all."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_mole.common.errors import UserError, WeightsError
from llava_mole.common.files import atomic_path
from llava_mole.interop.kinds import KINDS, find_kind
from llava_mole.interop.tensors import LABEL_FILE


@contextmanager
def publish(out: Path, *, overwrite: bool, inputs: Iterable[Path | None], is_file: bool = False) -> Iterator[Path]:
    """Yield a temporary path that becomes `out` if the block ends without an error, and is removed otherwise.

    The arguments and the WeightsError are those of `check_out`. Raises OSError if the disk cannot be written.
    """
    check_out(out, overwrite=overwrite, inputs=inputs, is_file=is_file)
    try:
        with atomic_path(out.resolve()) as temporary:  # resolved: a link stays, and its target is written
            yield temporary
    except Exception as error:
        if "(os error " in str(error) and not isinstance(error, UserError):
            raise OSError(str(error)) from None  # it came through safetensors or tokenizers, which are Rust
        raise


def check_out(out: Path, *, overwrite: bool, inputs: Iterable[Path | None], is_file: bool = False) -> None:
    """Raise WeightsError if `out` may not be written. Call it also before hours of work.

    Args:
        out: path of the result.
        overwrite: whether the result of an earlier conversion may be replaced.
        inputs: paths that the conversion reads, as far as they are known; None is skipped.
        is_file: whether the result is a projector's file; otherwise it is a directory.
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
        raise WeightsError(f"{out} is a {found}, but the result is a {needed}; give another --out")
    if not is_file:
        if any(out.iterdir()) and not (out / LABEL_FILE).is_file():
            raise WeightsError(
                f"{out} is a directory that no conversion has written (no {LABEL_FILE}); remove it, or give another "
                "--out"
            )
        return
    try:  # a file has no label, but conversions write no file except projectors
        kind = find_kind(out).kind
        problem = None if kind in ("projector", "llava-projector") else f"it is {KINDS[kind]}"
    except UserError as error:
        problem = str(error)
    if problem is not None:
        raise WeightsError(
            f"{out} is not a projector's file, so no conversion has written it; give another --out ({problem})"
        )


def _is_within(path: Path, directory: Path) -> bool:
    """Whether the path, with or without its links followed, is at or below the directory, likewise.

    A link inside the directory that leads out of it counts, because replacing the directory would remove the link.
    """
    one, other = ((p.resolve(), Path(os.path.abspath(p))) for p in (path, directory))
    return any(inner.is_relative_to(outer) for inner in one for outer in other)

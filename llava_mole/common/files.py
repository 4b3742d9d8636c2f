"""Files and folders that are complete or absent: atomic writing, checksums and locks, one implementation of each."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block (full disk, no permission) into a ConfigError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}; make room, or name another place"
        ) from error


def sync(path: Path) -> None:
    """Flush a file's or a folder's entry to the disk (fsync). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for every file and folder below `folder`, then for `folder` itself."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder. A missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and give it its name when the block ends without an error.

    The block creates a file or a folder there. A reader of `path` sees what was there before or all of the new
    content. An existing folder is moved aside during the exchange and comes back if the exchange fails.

    Raises:
        ConfigError: `path` is a link, device or pipe.
        OSError: it cannot be written; nothing of the new content is left. Wrap in `write_errors` for a UserError.
    """
    refuse_special(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}"
    old = path.parent / f".old-{path.name}-{os.getpid()}"
    remove(temporary)
    try:
        yield temporary
        (sync_tree if temporary.is_dir() else sync)(temporary)
        if path.is_dir() and temporary.is_dir():  # the system replaces a file, but no folder that holds something
            os.replace(path, old)
        os.replace(temporary, path)
        sync(path.parent)
        remove(old)
    except BaseException:
        remove(temporary)
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises ConfigError if it cannot be written; the old file is then untouched."""
    with write_errors(path), atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of the text as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """`write_text` of the value as strict JSON (no NaN) with a final line break."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None for numbers that JSON cannot represent (NaN and infinity)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises DataError that names the file where it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number of too many digits
        raise DataError(f"{path} is not valid JSON: {' '.join(str(error).split())[:200]}") from None


def refuse_special(path: Path) -> None:
    """Raise ConfigError for a link, device, pipe or socket at `path`, which a renamed file would replace.

    Raises:
        OSError: the path cannot be looked at.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(mode):
        raise ConfigError(
            f"{path} is a link to {os.readlink(path)} and is not replaced; name a file such as its target"
        )
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise ConfigError(f"{path} is a {kind} and is not replaced; name a file")


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise ConfigError unless a file may be written at `path`. Call it before the work, not after it."""
    with write_errors(path):
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; name a file")
        refuse_special(path)
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; give --overwrite to replace it, or another name")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{path} cannot be written: {folder} is not a directory that may be written to")


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content, read in pieces. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex digest of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""Raw files: unpack archives, find files, and read their values one by one."""

import contextlib
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from llava_mole.common.errors import DataError
from llava_mole.common.log import get_logger
from llava_mole.data.json_stream import PACKED, iterate_json
from llava_mole.data.prepare.defects import Defects
from llava_mole.data.prepare.samples import Split

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LARGEST_RATIO = 200
"""Most unpacked bytes for one byte of an archive: more is a decompression bomb."""
_SMALL = 64 << 20
"""Unpacked bytes that are never a bomb."""
_BLOCK = 1 << 20
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError,
           RuntimeError)  # fmt: skip
# Python before 3.10.12 and 3.11.4 has no filters.
_DATA_FILTER = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}

ARROW_BATCH_ROWS = 64
"""Rows of a parquet or Arrow file in memory at a time: they may hold images of megabytes."""

_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|val|valid|validation|dev|test|testing)(?:[^a-z]|$)")

logger = get_logger(__name__)


def unpack_archives(raw: Path, folder: Path) -> None:
    """Unpack `raw`, or every archive in the folder `raw`, into `folder`. Raises DataError, see `unpack_archive`."""
    archives = sorted(path for path in raw.iterdir() if path.is_file()) if raw.is_dir() else [raw]
    archives = [path for path in archives if path.name.lower().endswith(ARCHIVE_SUFFIXES)]
    if not archives:
        raise DataError(f"--unpack-archives: {raw} holds no zip or tar file")
    for archive in archives:
        unpack_archive(archive, folder)


def unpack_archive(archive: Path, folder: Path) -> int:
    """Write the files of an archive below `folder` and return their number; nothing is written if one is refused.

    A second call finds `<folder>/.unpacked/<name>` and does nothing. After an interruption all files are written again.

    Raises:
        DataError: a member's name is absolute, has `..`, or is that of another member; a member is a link or a device;
            the archive is damaged, encrypted, or a decompression bomb.
    """
    done = folder / ".unpacked" / archive.name
    size = archive.stat().st_size
    if done.is_file() and done.read_text(encoding="utf-8") == str(size):
        return 0
    try:
        is_zip = archive.suffix.lower() == ".zip"
        opening: Any = zipfile.ZipFile(archive) if is_zip else tarfile.open(archive, tarinfo=CheckedHeader)
        with opening as opened:
            members = _checked_members(opened, archive, folder, max(_SMALL, LARGEST_RATIO * size))
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit=" files", disable=None, delay=3.0):
                opened.extract(member, folder, **({} if is_zip else _DATA_FILTER))
    except _DAMAGE as error:
        raise DataError(f"{archive}: cannot be unpacked: {' '.join(str(error).split())}; download it again") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{archive}: cannot be unpacked: {reason}; is it damaged, or the disk full?") from None
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(str(size), encoding="utf-8")
    return len(members)


class CheckedHeader(tarfile.TarInfo):
    """A member's header; a damaged or cut one is an error, which `tarfile` takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "CheckedHeader":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in the stubs
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset:,}") from None


def _checked_members(opened: Any, archive: Path, folder: Path, most: int) -> list[Any]:
    """The files of an opened zip or tar archive, with forward slashes in their names.

    The standard library's filters rename or skip members, but a data set must be unpacked whole or not at all. At most
    `most` unpacked bytes are allowed. Raises DataError, see `unpack_archive`.
    """
    is_zip = isinstance(opened, zipfile.ZipFile)
    files: dict[str, Any] = {}
    home, total = os.path.realpath(folder), 0
    for member in opened.infolist() if is_zip else opened:
        given, kind, size = _describe(member)
        total = _add_size(total, size, most, archive)  # a compressed tar is decompressed to read its names
        name = given.replace("\\", "/")
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or ":" in parts[0] or "\0" in name:
            raise DataError(f"{archive}: member {given[:100]!r} would be written elsewhere; nothing was unpacked")
        if kind not in ("file", "folder"):
            raise DataError(f"{archive}: member {given[:100]!r} is a {kind}; nothing was unpacked")
        if kind == "folder":
            continue
        if name in files:
            raise DataError(f"{archive}: two members are called {given[:100]!r}; nothing was unpacked")
        target = os.path.realpath(os.path.join(folder, name))
        if not target.startswith(home + os.sep):
            raise DataError(f"{folder / name}: a link leads out of {folder}; unpack into a folder without links")
        setattr(member, "filename" if is_zip else "name", name)
        files[name] = member
    if not is_zip:
        # The checksum of a compressed file is at its very end, after the last member.
        while rest := opened.fileobj.read(_BLOCK):
            if rest.strip(b"\0"):  # a hole in a download consists of zeros, as the end does
                raise tarfile.ReadError("more data after its end")
            total = _add_size(total, len(rest), most, archive)
    return list(files.values())


def _describe(member: zipfile.ZipInfo | tarfile.TarInfo) -> tuple[str, str, int]:
    """Name, kind (`file`, `folder`, `link` or `device`) and unpacked bytes of a member."""
    if isinstance(member, zipfile.ZipInfo):
        link = stat.S_ISLNK(member.external_attr >> 16)
        return member.filename, "folder" if member.is_dir() else "link" if link else "file", member.file_size
    link = member.issym() or member.islnk()
    kind = "file" if member.isreg() else "folder" if member.isdir() else "link" if link else "device"
    return member.name, kind, member.size


def _add_size(total: int, size: int, most: int, archive: Path) -> int:
    """Return the sum of the sizes. Raises DataError if it is more than `most`."""
    if total + size > most:
        raise DataError(
            f"{archive}: {total + size:,} bytes or more from {archive.stat().st_size:,}, a decompression bomb; nothing "
            "was unpacked"
        )
    return total + size


def split_of(name: str) -> Split:
    """The split that a file or folder name mentions; `train` if it mentions none."""
    match = _SPLIT.search(name.lower())
    if match is None or match[1].startswith("train"):
        return "train"
    return "test" if match[1].startswith("test") else "val"


def find_files(raw: Path, suffixes: Sequence[str], what: str, follow_links: bool = False) -> list[Path]:
    """Every file below `raw` whose name ends in one of the suffixes, sorted; `raw` itself if it is a file.

    Hidden files and folders are left out, and so are linked folders unless `follow_links`; the latter are logged.

    Raises:
        DataError: there is none, or such a file is compressed in a way that is not read.
        OSError: a folder cannot be read.
    """
    if raw.is_file():
        return [raw]
    files = [path for path in walk(raw, follow_links) if not path.name.startswith(".")]
    ends = tuple(suffixes)
    for path in files:
        packed = path.suffix.lower() in PACKED and path.stem.lower().endswith(ends)
        if packed and not path.name.lower().endswith(ends):
            raise DataError(f"{path}: is compressed in a way that this source does not read; unpack it")
    found = sorted(path for path in files if path.name.lower().endswith(ends) and path.is_file())
    if not found:
        raise DataError(f"{raw}: no {what} below it ({', '.join('*' + suffix for suffix in suffixes)})")
    return found


def walk(folder: Path, follow_links: bool) -> Iterator[Path]:
    """Yield everything below a folder that is not itself a folder, without hidden folders.

    With `follow_links` linked folders are searched too, and every folder once, whatever leads to it. Otherwise they are
    left out, and logged. Raises OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=follow_links):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        target = os.path.realpath(place)
        if target in seen:
            folders.clear()
            continue
        seen.add(target)
        yield from (Path(place, name) for name in names)
        for linked in (os.path.join(place, name) for name in folders if not follow_links):
            if os.path.islink(linked):
                logger.warning("%s is a link to a folder and is not searched; --follow-links searches it", linked)


def show(path: Path, raw: Path) -> str:
    """The name of a raw file in `where`: relative to `--raw`, since `--raw` may be moved."""
    return path.name if path == raw else path.relative_to(raw).as_posix()


def read_values(path: Path, raw: Path, defects: Defects) -> Iterator[tuple[Any, str]]:
    """Yield the values of a JSON list or JSONL file with their `file:line`; bad JSONL lines are counted and skipped."""
    name = show(path, raw)

    def skip(line: int, problem: str) -> None:
        defects.add("bad-json", f"{name}:{line}", problem)

    for value, line in iterate_json(path, on_error=skip):
        yield value, f"{name}:{line}"


def read_rows(path: Path, raw: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a parquet file, Arrow file or Arrow stream as plain values, with their `file:row` from 1.

    Raises:
        DataError: the file cannot be read, or lacks one of `columns`.
    """
    import pyarrow as pa

    name = show(path, raw)
    row = 0
    try:
        for batch in _batches(path, columns, name):
            for value in batch.to_pylist():
                row += 1
                yield value, f"{name}:{row}"
    # OverflowError: for example a date that Python cannot represent.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}:{row + 1}: cannot be read: {reason}; download the file again, or leave out that column"
        ) from None


def _batches(path: Path, columns: Sequence[str] | None, name: str) -> Iterator[Any]:
    """Yield the rows of a file in batches of at most `ARROW_BATCH_ROWS`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        try:
            if path.suffix == ".parquet":
                file: Any = stack.enter_context(pq.ParquetFile(path))
                present = file.schema_arrow.names
            else:
                file = _open_arrow(stack.enter_context(pa.memory_map(str(path))))
                present = file.schema.names
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: cannot be read: {reason}; download the file again") from None
        absent = sorted(set(columns or ()) - set(present))
        if absent:
            raise DataError(f"{name}: no column {', '.join(absent)}; there are {', '.join(present)}")
        if path.suffix == ".parquet":
            yield from file.iter_batches(batch_size=ARROW_BATCH_ROWS, columns=columns)
            return
        if isinstance(file, pa.RecordBatchFileReader):
            file = map(file.get_batch, range(file.num_record_batches))
        for batch in file:
            batch = batch.select(columns) if columns is not None else batch
            for start in range(0, batch.num_rows, ARROW_BATCH_ROWS):
                yield batch.slice(start, ARROW_BATCH_ROWS)


def _open_arrow(source: Any) -> Any:
    """Return the reader of an Arrow file, or of an Arrow stream, which `datasets` saves."""
    import pyarrow as pa

    is_file = bytes(source.read(6)) == b"ARROW1"
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)

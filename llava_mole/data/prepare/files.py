"""Raw files: unpacking archives, finding files, and reading their values one by one."""

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
from llava_mole.data.json_stream import iterate_json
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
_DATA_FILTER = (
    {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
)  # Python before 3.10.12 and 3.11.4 has none

JSON_SUFFIXES = (".json", ".jsonl")
ARROW_BATCH_ROWS = 64
"""Rows of a parquet or Arrow file in memory at a time: they may hold images of megabytes."""

_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|val|valid|validation|dev|test|testing)(?:[^a-z]|$)")


def unpack_archives(raw: Path, folder: Path) -> None:
    """Unpack `raw`, or every archive in the folder `raw`, into `folder`. Raises DataError, see `unpack_archive`."""
    archives = sorted(path for path in raw.iterdir() if path.is_file()) if raw.is_dir() else [raw]
    archives = [path for path in archives if path.name.lower().endswith(ARCHIVE_SUFFIXES)]
    if not archives:
        raise DataError(f"--unpack-archives: {raw} holds no zip or tar file")
    for archive in archives:
        unpack_archive(archive, folder)


def unpack_archive(archive: Path, folder: Path) -> int:
    """Write the files of an archive below `folder` and return how many; nothing is written if a name is refused.

    A second call finds `<folder>/.unpacked/<name>` and does nothing; an interrupted one starts again.

    Raises:
        DataError: a member is absolute, climbs with `..`, is a link or a device, or shares its name with another; the
            archive is damaged, encrypted, or a decompression bomb.
    """
    done = folder / ".unpacked" / archive.name
    size = archive.stat().st_size
    if done.is_file() and done.read_text(encoding="utf-8") == str(size):
        return 0
    try:
        opener: Any = zipfile.ZipFile if archive.suffix.lower() == ".zip" else _open_tar
        options = {} if opener is zipfile.ZipFile else _DATA_FILTER
        with opener(archive) as opened:
            members = _checked_members(opened, archive, folder, max(_SMALL, LARGEST_RATIO * size))
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit=" files", disable=None, delay=3.0):
                opened.extract(member, folder, **options)
    except _DAMAGE as error:
        raise DataError(f"{archive}: cannot be unpacked: {' '.join(str(error).split())}; download it again") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{archive}: cannot be unpacked: {reason}; is it damaged, or the disk full?") from None
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(str(size), encoding="utf-8")
    return len(members)


class _Header(tarfile.TarInfo):
    """A member's header. `tarfile` takes a damaged or cut one for the end of the archive; here it is an error."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in the stubs
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset:,}") from None


def _open_tar(archive: Path) -> tarfile.TarFile:
    return tarfile.open(archive, tarinfo=_Header)


def _checked_members(opened: Any, archive: Path, folder: Path, most: int) -> list[Any]:
    """The files of an opened zip or tar archive, with forward slashes in their names.

    The standard library's filters would rename or skip members; a data set must be unpacked whole or not at all.

    Args:
        opened: `ZipFile` or `TarFile`.
        archive: Its file, for messages.
        folder: Where it is to be unpacked.
        most: Most unpacked bytes.

    Raises:
        DataError: see `unpack_archive`.
    """
    is_zip = isinstance(opened, zipfile.ZipFile)
    files: dict[str, Any] = {}
    home, total = os.path.realpath(folder), 0
    for member in opened.infolist() if is_zip else opened:
        given = member.filename if is_zip else member.name
        kind, size = _zip_kind(member) if is_zip else _tar_kind(member)
        total += size
        if total > most:  # at once, since reading the names of a compressed tar file decompresses it
            raise _bomb(archive, total)
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
        # The checksum of a compressed file is at its very end, beyond the last member.
        while rest := opened.fileobj.read(_BLOCK):
            if rest.strip(b"\0"):  # a hole in a download is zeros, too, and looks like the end
                raise tarfile.ReadError("more data behind its end")
            total += len(rest)
            if total > most:
                raise _bomb(archive, total)
    return list(files.values())


def _zip_kind(member: zipfile.ZipInfo) -> tuple[str, int]:
    link = stat.S_ISLNK(member.external_attr >> 16)
    return "folder" if member.is_dir() else "link" if link else "file", member.file_size


def _tar_kind(member: tarfile.TarInfo) -> tuple[str, int]:
    link = member.issym() or member.islnk()
    return "file" if member.isreg() else "folder" if member.isdir() else "link" if link else "device", member.size


def _bomb(archive: Path, total: int) -> DataError:
    return DataError(
        f"{archive}: {total:,} bytes or more from {archive.stat().st_size:,}, a decompression bomb; nothing was "
        "unpacked"
    )


def split_of(name: str) -> Split:
    """The split that a file or folder name mentions; `train` if it mentions none."""
    match = _SPLIT.search(name.lower())
    if match is None or match[1].startswith("train"):
        return "train"
    return "test" if match[1].startswith("test") else "val"


def find_one(raw: Path, names: Sequence[str], what: str) -> Path:
    """The first of `names` (relative paths) that is a file below `raw`, or `raw` itself if it is a file.

    Raises:
        DataError: none of them exists.
    """
    if raw.is_file():
        return raw
    for name in names:
        if (raw / name).is_file():
            return raw / name
    raise DataError(f"{raw}: {what} does not exist; looked for {', '.join(names)}")


def find_files(raw: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """Every file below `raw` with one of the suffixes, sorted; `raw` itself if it is a file.

    Hidden files and folders and links to folders are left out.

    Raises:
        DataError: there is none.
    """
    if raw.is_file():
        return [raw]
    found = sorted(
        path
        for path in raw.rglob("*")
        if path.suffix in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(raw).parts)
    )
    if not found:
        raise DataError(f"{raw}: no {what} below it ({', '.join('*' + suffix for suffix in suffixes)})")
    return found


def show(path: Path, raw: Path) -> str:
    """Name of a raw file in `where`, relative to `--raw`, so that it does not depend on the place of `--raw`."""
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
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # for example a date that Python cannot represent
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}:{row + 1}: cannot be read: {reason}; download the file again, or leave out that column"
        ) from None


def column_names(path: Path) -> list[str]:
    """Columns of a parquet or Arrow file. Raises DataError if it is neither."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        with pa.memory_map(str(path)) as source:
            return list(_open_arrow(source).schema.names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}; download the file again") from None


def _batches(path: Path, columns: Sequence[str] | None, name: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    absent = sorted(set(columns or ()) - set(column_names(path)))
    if absent:
        raise DataError(f"{name}: no column {', '.join(absent)}; there are {', '.join(column_names(path))}")
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=ARROW_BATCH_ROWS, columns=columns)
        return
    with pa.memory_map(str(path)) as source:
        reader = _open_arrow(source)
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if hasattr(reader, "get_batch") else reader
        )
        for batch in batches:
            batch = batch.select(columns) if columns is not None else batch
            for start in range(0, batch.num_rows, ARROW_BATCH_ROWS):
                yield batch.slice(start, ARROW_BATCH_ROWS)


def _open_arrow(source: Any) -> Any:
    """Reader of an Arrow file, or of an Arrow stream, which `datasets` saves."""
    import pyarrow as pa

    if bytes(source.read(6)) == b"ARROW1":
        source.seek(0)
        return pa.ipc.open_file(source)
    source.seek(0)
    return pa.ipc.open_stream(source)

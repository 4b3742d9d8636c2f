"""Unpacking zip and tar files that came from elsewhere: nothing is written outside the folder, nothing but files."""

import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tqdm import tqdm

from llava_mole.common.errors import DataError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LARGEST_RATIO = 200
"""Bytes that an archive may hold for one of its own: more is a decompression bomb."""
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
)
_SMALL = 64 << 20
_BLOCK = 1 << 20


class _Header(tarfile.TarInfo):
    """A member's header. `tarfile` takes one that is damaged or cut for the end of the archive: here it is an error."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in the stubs
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset:,}") from None


class _Member(NamedTuple):
    name: str
    kind: str
    """`file`, `folder`, or what else it is."""
    open: "object"
    size: int


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive that `unpack_archive` reads."""
    return path.name.lower().endswith(SUFFIXES)


def unpack_archive(archive: Path, folder: Path) -> int:
    """Write the files of an archive below `folder` and return how many. Nothing is written if a name is refused.

    A second call finds `<folder>/.unpacked/<name>` and does nothing; an interrupted one is begun again.

    Raises:
        DataError: a member is absolute, climbs with `..`, is a link or a device, or two have one name; the archive is
            damaged, encrypted, or a decompression bomb.
    """
    done = folder / ".unpacked" / archive.name
    if done.is_file() and done.read_text(encoding="utf-8") == str(archive.stat().st_size):
        return 0
    try:
        with _open(archive) as opened:
            members = list(_members(opened, archive))
            _check(members, archive)
            count = 0
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit=" files", disable=None, delay=3.0):
                if member.kind == "file":
                    _write(opened, member, folder)
                    count += 1
    except _DAMAGE as error:
        raise DataError(f"{archive}: cannot be unpacked: {' '.join(str(error).split())}; download it again") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{archive}: cannot be unpacked: {reason}; is it damaged, or the disk full?") from None
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(str(archive.stat().st_size), encoding="utf-8")
    return count


def _open(archive: Path) -> zipfile.ZipFile | tarfile.TarFile:
    return zipfile.ZipFile(archive) if archive.suffix.lower() == ".zip" else tarfile.open(archive, tarinfo=_Header)


def _members(opened: zipfile.ZipFile | tarfile.TarFile, archive: Path) -> Iterator[_Member]:
    """Name, kind and size of every member; nothing is unpacked."""
    if isinstance(opened, zipfile.ZipFile):
        for info in opened.infolist():
            mode = info.external_attr >> 16
            kind = "folder" if info.is_dir() else "link" if stat.S_ISLNK(mode) else "file"
            yield _Member(info.filename, kind, info, info.file_size)
    else:
        total, most = 0, _most(archive)
        for entry in opened:
            kind = "file" if entry.isreg() else "folder" if entry.isdir() else "link" if _is_link(entry) else "device"
            total += entry.size
            if total > most:  # now, since reading a compressed tar's names means decompressing it
                raise _bomb(archive, total)
            yield _Member(entry.name, kind, entry, entry.size)
        # Compressed files are checked at their very end, which lies behind the last member.
        while opened.fileobj is not None and (rest := opened.fileobj.read(_BLOCK)):
            if rest.strip(b"\0"):  # a hole in a download is zeros, too, and looks like the end
                raise tarfile.ReadError("more data behind its end")
            total += len(rest)
            if total > most:
                raise _bomb(archive, total)


def _is_link(entry: tarfile.TarInfo) -> bool:
    return entry.issym() or entry.islnk()


def _check(members: list[_Member], archive: Path) -> None:
    seen: set[str] = set()
    for member in members:
        name = member.name.replace("\\", "/")
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or ":" in parts[0] or "\0" in name:
            raise DataError(f"{archive}: member {member.name[:100]!r} would be written elsewhere; nothing was unpacked")
        if member.kind not in ("file", "folder"):
            raise DataError(f"{archive}: member {member.name[:100]!r} is a {member.kind}; nothing was unpacked")
        if member.kind == "file":
            if name in seen:
                raise DataError(f"{archive}: two members are called {member.name[:100]!r}; nothing was unpacked")
            seen.add(name)
    total = sum(member.size for member in members)
    if total > _most(archive):
        raise _bomb(archive, total)


def _most(archive: Path) -> int:
    return max(_SMALL, LARGEST_RATIO * archive.stat().st_size)


def _bomb(archive: Path, total: int) -> DataError:
    return DataError(
        f"{archive}: {total:,} bytes or more from {archive.stat().st_size:,}, a decompression bomb; nothing was "
        "unpacked"
    )


def _write(opened: zipfile.ZipFile | tarfile.TarFile, member: _Member, folder: Path) -> None:
    """Write one file beside its name, and no more bytes than the archive said."""
    target = folder / member.name.replace("\\", "/")
    home = os.path.realpath(folder)
    if os.path.commonpath([os.path.realpath(target.parent), home]) != home:
        raise DataError(f"{target}: a link leads out of {folder}; unpack into a folder without links")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    source: IO[bytes] | None
    if isinstance(opened, zipfile.ZipFile):
        source = opened.open(member.open)  # type: ignore[arg-type]
    else:
        source = opened.extractfile(member.open)  # type: ignore[arg-type]
    if source is None:
        raise DataError(f"{target}: the archive holds no bytes for it; download it again")
    with source, temporary.open("wb") as file:
        shutil.copyfileobj(source, file, _BLOCK)
    os.replace(temporary, target)

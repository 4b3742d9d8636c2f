"""One image at a time: check its path, its header and its pixels, and copy it under its hash."""

import base64
import binascii
import functools
import hashlib
import io
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava_mole.common.errors import DataError
from llava_mole.common.text import UNPAIRED_SURROGATE, is_text
from llava_mole.data.images import DECODER_ERRORS, FORMATS, may_be_odd, oddities, reason_of
from llava_mole.data.prepare.defects import Issue

LARGEST_IMAGE = 64 << 20
"""Most bytes of an encoded image."""
EXTENSIONS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("jpg", "jpeg"),
    "PNG": ("png", "apng"),
    "GIF": ("gif",),
    "WEBP": ("webp",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
"""Pillow's name of a format -> its extensions; an unpacked file gets the first."""
_KNOWN_EXTENSIONS = {extension for group in EXTENSIONS.values() for extension in group}
_DECODING_ERRORS = (Image.DecompressionBombError, MemoryError, *DECODER_ERRORS)
_MOST_FOLDERS = 50_000
_LONGEST_NAME = 100
_DATA_URL = re.compile(rb"data:[^,]{0,200};base64,")
_PAGE = re.compile(r"(.+\.tiff?)\.([0-9]{1,6})", re.IGNORECASE | re.DOTALL)
_PAGE_MODES = ("1", "L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I", "F")
"""Modes in which a TIFF page is unpacked; others become RGB, which changes no value that matters."""


class ImageInfo(NamedTuple):
    """What is known about an image."""

    path: str
    """Relative to the image folder of the prepared set."""
    size: tuple[int, int] | None
    """(width, height) in pixels; None if the file was not opened."""
    problem: Issue | None
    """Why it cannot be used."""
    notes: tuple[Issue, ...] = ()
    """Oddities of an image that can be used."""


def path_problem(path: str) -> Issue | None:
    """Return what is wrong with an image path as text, if anything; nothing is opened."""
    if not is_text(path):
        return Issue("bad-text", f"{path[:200]!a}: {UNPAIRED_SURROGATE}")
    if "://" in path or path.startswith("data:"):
        return Issue("remote-image", path[:200])
    if not path or path[0] == "/" or "\0" in path or (".." in path and ".." in path.replace("\\", "/").split("/")):
        return Issue("outside-image", repr(path[:200]))
    return None


class ImageRoot:
    """The folder that the records' image paths are relative to.

    Nothing outside it is touched, unless `follow_links` lets symbolic links lead out of it.
    """

    def __init__(self, folder: Path, *, follow_links: bool = False) -> None:
        self.folder = os.path.realpath(folder)
        self._follow_links = follow_links
        self._resolve = functools.lru_cache(_MOST_FOLDERS)(self._resolve_folder)

    def problem(self, path: str) -> Issue | None:
        """Return why an image cannot be read, if so: its path, a link that leads out, or no such file. One `lstat`."""
        problem = path_problem(path)
        if problem is not None:
            return problem
        parent, _, name = path.rpartition("/")
        folder = self._resolve(parent)
        if folder is None:
            return Issue("outside-image", f"{path!r} leads out of {self.folder} through a link")
        file = f"{folder}/{name}"
        try:
            mode = os.lstat(file).st_mode
        except (OSError, ValueError):
            return Issue("missing-image", path)
        if stat.S_ISLNK(mode):
            target = os.path.realpath(file)
            if not self._inside(target):
                return Issue("outside-image", f"{path!r} is a link to {target}")
            return None if os.path.isfile(target) else Issue("missing-image", path)
        return None if stat.S_ISREG(mode) else Issue("missing-image", f"{path!r} is not a file")

    def _resolve_folder(self, path: str) -> str | None:
        folder = os.path.realpath(os.path.join(self.folder, path))
        return folder if self._inside(folder) else None

    def _inside(self, target: str) -> bool:
        return self._follow_links or target == self.folder or target.startswith(self.folder.rstrip(os.sep) + os.sep)


def look(source: str | bytes, path: str, *, decode: bool, again: bool = False) -> tuple[ImageInfo, str]:
    """Open an image.

    Args:
        source: Name of the file, or its bytes.
        path: The `path` of the result; its extension is compared with the content.
        decode: Decode every pixel of the first frame and note its oddities; else read the header only.
        again: Whether the image was decoded before; it then is only if its pixels may be odd.

    Returns:
        The image's information, and the extension that belongs to its content ("" if unknown).
    """
    notes: list[Issue] = []
    size: tuple[int, int] | None = None
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            size = image.size
            extensions = EXTENSIONS.get(image.format or "", ((image.format or "bin").lower(),))
            given = path.rpartition(".")[2].lower()
            if given != path.lower() and given in _KNOWN_EXTENSIONS and given not in extensions:
                notes.append(Issue("wrong-extension", f"{path} holds {image.format}"))
            frames = getattr(image, "n_frames", 1)
            if image.format != "MPO" and frames > 1:
                notes.append(Issue("animated-image", f"{path} has {frames} frames"))
            if image.mode == "CMYK":
                notes.append(Issue("cmyk-image", path))
            if decode and (not again or may_be_odd(image)):
                image.seek(0)
                image.load()
                notes += [Issue(odd.kind, f"{path}: {odd.detail}") for odd in oddities(image)]
    except _DECODING_ERRORS as error:
        return ImageInfo(path, size, _decoder_issue(error, path)), ""
    return ImageInfo(path, size, None, tuple(notes)), extensions[0]


def _decoder_issue(error: BaseException, name: str) -> Issue:
    if isinstance(error, (Image.DecompressionBombError, MemoryError)):
        return Issue("too-large-image", f"{name}: {error}")
    return Issue("corrupt-image", f"{name}: {reason_of(error)}")


def unpack(data: bytes, folder: Path, group: str, name: str, *, decode: bool) -> ImageInfo:
    """Write an image as `folder/<group>/<sha1>.<ext>` unless that file exists; the content decides the extension.

    Args:
        data: The file's bytes; more than `LARGEST_IMAGE` are refused.
        folder: The prepared set's image folder.
        group: Folder below it, see `safe_name`.
        name: Name of the image in messages.
        decode: See `look`. A plain image that exists was decoded when it was written.

    Raises:
        DataError: the file cannot be written, for example because the disk is full.
    """
    if len(data) > LARGEST_IMAGE:
        detail = f"{name}: {len(data):,} bytes; an image may have {LARGEST_IMAGE:,}"
        return ImageInfo(name, None, Issue("too-large-image", detail))
    digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    group = safe_name(group)
    info, extension = look(data, name, decode=False)
    if info.problem is None and decode:
        exists = (folder / group / f"{digest}.{extension}").is_file()
        info, extension = look(data, name, decode=True, again=exists)
    if info.problem is not None:
        return info
    path = f"{group}/{digest}.{extension}"
    target = folder / path
    if not target.is_file():
        temporary = target.with_name(f".{digest}.{os.getpid()}")
        try:  # no flush to the disk for each of a million files: `prepare` flushes all of them at its end
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, target)
        except OSError as error:
            raise DataError(
                f"{target}: cannot be written: {error.strerror or error}; make room or name another --out, then call "
                "again: existing images are kept"
            ) from None
    return info._replace(path=path)


def safe_name(text: str) -> str:
    """Return `text` as a file name of letters, digits, `-`, `_` and `.` that is not hidden, empty or very long."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).lstrip(".")
    if len(name.encode()) > _LONGEST_NAME:  # a file system takes 255 bytes
        digest = hashlib.sha1(text.encode(errors="replace"), usedforsecurity=False).hexdigest()[:12]
        return f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{digest}"
    return name or "images"


def decode_base64(text: str | bytes, *, largest: int = LARGEST_IMAGE) -> bytes:
    """Decode base64 text.

    White space, a leading `data:...;base64,`, missing padding and the URL-safe alphabet are accepted.

    Raises:
        DataError: other characters, an impossible length, empty text, or more than `largest` bytes.
    """
    if len(text) > 2 * largest:
        raise DataError(f"base64 text of {len(text):,} characters; an image may have {largest:,} bytes")
    try:
        data = text.encode("ascii") if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError:
        raise DataError("not base64: it holds characters that are not ASCII") from None
    match = _DATA_URL.match(data)
    data = data[match.end() if match else 0 :].translate(None, b" \t\r\n")
    data = data.rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    if not data:
        raise DataError("not base64: it is empty")
    try:
        decoded = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise DataError(f"not base64: {' '.join(str(error).split())}") from None
    if len(decoded) > largest:
        raise DataError(f"an image of {len(decoded):,} bytes; it may have {largest:,}")
    return decoded


def tiff_page(path: str) -> tuple[str, int] | None:
    """Split `file.tiff.<page>` into the file and the page, counted from 0; None for another path."""
    match = _PAGE.fullmatch(path)
    return None if match is None else (match[1], int(match[2]))


def unpack_page(path: str, folder: Path, group: str, name: str) -> ImageInfo:
    """`unpack` one page of a TIFF file as PNG (TIFF for 32-bit and float); `path` is `file.tiff.<page>`."""
    found = tiff_page(path)
    if found is None:
        return ImageInfo(name, None, Issue("missing-image", name))
    buffer = io.BytesIO()
    try:
        with Image.open(found[0], formats=FORMATS) as image:
            image.seek(found[1])
            page = image if image.mode in _PAGE_MODES else image.convert("RGB")
            page.save(buffer, "TIFF" if page.mode in ("I", "F") else "PNG")
            notes = tuple([Issue(odd.kind, f"{name}: {odd.detail}") for odd in oddities(page)])
    except _DECODING_ERRORS as error:
        return ImageInfo(name, None, _decoder_issue(error, name))
    return unpack(buffer.getvalue(), folder, group, name, decode=False)._replace(notes=notes)

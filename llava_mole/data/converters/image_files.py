"""Looking at one image: is it there, what is in it, does it decode; and unpacking it under its hash. Without torch."""

import hashlib
import io
import os
import stat
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from llava_mole.common.errors import DataError
from llava_mole.data.image_bytes import LARGEST_IMAGE
from llava_mole.data.images import DECODER_ERRORS, FORMATS
from llava_mole.data.records import is_text

CheckImages = Literal["none", "exist", "decode"]

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
"""Pillow's name of a format -> extensions, the one that unpacked files get first."""

_MOST_FOLDERS = 50_000
_LONGEST_NAME = 100


class Note(NamedTuple):
    """Something worth counting about an image, by the kinds of `defects.KINDS`."""

    kind: str
    detail: str


class ImageFacts(NamedTuple):
    """What was found out about an image."""

    path: str
    """Relative to the image folder of the prepared set."""
    size: tuple[int, int] | None
    """(width, height) in pixels; None where the file was not opened."""
    problem: Note | None
    """Why it cannot be used."""
    notes: tuple[Note, ...] = ()


def path_problem(path: str) -> Note | None:
    """What is wrong with an image path as text; nothing is opened."""
    if not path.isascii() and not is_text(path):
        return Note("bad-text", f"{path[:200]!a} holds half of a surrogate pair, which is no character")
    if "://" in path or path.startswith("data:"):
        return Note("remote-image", path[:200])
    if not path or path[0] == "/" or "\0" in path or (".." in path and ".." in path.replace("\\", "/").split("/")):
        return Note("outside-image", repr(path[:200]))
    return None


class ImageRoot:
    """The folder that the records' image paths are relative to; nothing outside it is touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self._parents: dict[str, str | None] = {}

    def problem(self, path: str) -> Note | None:
        """What keeps an image from being read: its path, a link that leads out, or no such file. One `lstat`."""
        problem = path_problem(path)
        if problem is not None:
            return problem
        parent, _, name = path.rpartition("/")
        try:
            folder = self._parents[parent]
        except KeyError:
            folder = self._resolve(parent)
        if folder is None:
            return Note("outside-image", f"{path!r} leads out of {self.folder} through a link")
        file = f"{folder}/{name}"
        try:
            mode = os.lstat(file).st_mode
        except (OSError, ValueError):
            return Note("missing-image", path)
        if stat.S_ISLNK(mode):
            target = os.path.realpath(file)
            if not self._inside(target):
                return Note("outside-image", f"{path!r} is a link to {target}")
            return None if os.path.isfile(target) else Note("missing-image", path)
        return None if stat.S_ISREG(mode) else Note("missing-image", f"{path!r} is no file")

    def _resolve(self, parent: str) -> str | None:
        if len(self._parents) >= _MOST_FOLDERS:
            self._parents.clear()
        folder = os.path.realpath(os.path.join(self.folder, parent))
        result = folder if self._inside(folder) else None
        self._parents[parent] = result
        return result

    def _inside(self, target: str) -> bool:
        return target == self.folder or target.startswith(self.folder.rstrip(os.sep) + os.sep)


def look(source: str | bytes, path: str, *, decode: bool) -> tuple[ImageFacts, str]:
    """Open an image file (or its bytes), and decode it if asked to.

    Args:
        source: Name of the file, or its bytes.
        path: What the facts say as `path`; its extension is compared with the content.
        decode: Decode every pixel of the first frame; else the header only.

    Returns:
        The facts, and the extension that belongs to the content ("" if unknown).
    """
    notes: list[Note] = []
    size: tuple[int, int] | None = None
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            size = image.size
            extensions = EXTENSIONS.get(image.format or "", ((image.format or "bin").lower(),))
            given = path.rpartition(".")[2].lower()
            if given != path.lower() and given in _KNOWN_EXTENSIONS and given not in extensions:
                notes.append(Note("wrong-extension", f"{path} holds {image.format}"))
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                notes.append(Note("animated-image", f"{path} has {image.n_frames} frames"))
            if image.mode == "CMYK":
                notes.append(Note("cmyk-image", path))
            if decode:
                image.seek(0)
                image.load()
    except (Image.DecompressionBombError, MemoryError) as error:
        return ImageFacts(path, size, Note("too-large-image", f"{path}: {error}")), ""
    except DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ImageFacts(path, size, Note("corrupt-image", f"{path}: {reason}")), ""
    return ImageFacts(path, size, None, tuple(notes)), extensions[0]


_KNOWN_EXTENSIONS = {extension for group in EXTENSIONS.values() for extension in group}


def unpack(data: bytes, folder: Path, group: str, name: str, *, decode: bool) -> ImageFacts:
    """Write an image once as `folder/<group>/<sha1>.<ext>`, the extension that of its content.

    Args:
        data: The file's bytes; more than `LARGEST_IMAGE` are refused.
        folder: The prepared set's image folder.
        group: Folder below it; characters that do not belong into a name are replaced.
        name: What messages call the image.
        decode: See `look`; an image that is there already was decoded when it was written.

    Raises:
        DataError: the file cannot be written, such as to a full disk.
    """
    if len(data) > LARGEST_IMAGE:
        detail = f"{name}: {len(data):,} bytes; an image may have {LARGEST_IMAGE:,}"
        return ImageFacts(name, None, Note("too-large-image", detail))
    digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    group = safe_name(group)
    facts, extension = look(data, name, decode=False)
    if facts.problem is None and decode and not (folder / group / f"{digest}.{extension}").is_file():
        facts, extension = look(data, name, decode=True)
    if facts.problem is not None:
        return facts
    path = f"{group}/{digest}.{extension}"
    target = folder / path
    if not target.is_file():
        temporary = target.with_name(f".{digest}.{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, target)
        except OSError as error:
            raise DataError(
                f"{target}: cannot be written: {error.strerror or error}; make room or give another --out, then call "
                "again: images that are there stay"
            ) from None
    return facts._replace(path=path)


def safe_name(text: str) -> str:
    """A file name made of `text`: letters, digits, `-`, `_` and `.`, never a hidden, empty or very long one."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).lstrip(".")
    if len(name.encode()) > _LONGEST_NAME:  # a file system takes 255 bytes
        digest = hashlib.sha1(text.encode(errors="replace"), usedforsecurity=False).hexdigest()[:12]
        return f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{digest}"
    return name or "images"

"""Images that arrive as bytes or base64: what they are, by content, and whether they can be decoded.

File names and declared types of the public data sets lie (GIFs named `.jpg`, whitespace in base64, truncated JPEGs), so
nothing is believed but the bytes.
"""

import base64
import binascii
import io
import os
import re
from dataclasses import dataclass

from PIL import Image

from llava_mole.data.images import FORMATS, decode_rgb, reading
from llava_mole.errors import DataError

LARGEST_IMAGE = 64 << 20
"""Most bytes of an encoded image."""
MOST_PIXELS = 178_956_970
"""Most pixels of an image: what Pillow refuses as a decompression bomb, 512 MiB as RGB."""
_MAGIC: tuple[tuple[bytes, int, str], ...] = (
    (b"\xff\xd8\xff", 0, "jpeg"),
    (b"\x89PNG\r\n\x1a\n", 0, "png"),
    (b"GIF87a", 0, "gif"),
    (b"GIF89a", 0, "gif"),
    (b"WEBP", 8, "webp"),
    (b"BM", 0, "bmp"),
    (b"II*\0", 0, "tiff"),
    (b"MM\0*", 0, "tiff"),
)
EXTENSIONS = {"jpeg": ".jpg", "png": ".png", "gif": ".gif", "webp": ".webp", "bmp": ".bmp", "tiff": ".tif"}
"""File name endings, by format."""
_DATA_URL = re.compile(rb"data:[^,]{0,200};base64,")
_BLANKS = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What an image is, after it has been decoded completely."""

    format: str
    """One of `EXTENSIONS`."""
    width: int
    height: int
    mode: str
    """Pillow's name of the pixels' kind: `RGB`, `L`, `CMYK`, `P`, ..."""
    animated: bool
    """More than one frame, of which training takes the first."""


def sniff(data: bytes) -> str:
    """The format of an image by its first bytes: one of `EXTENSIONS`.

    Raises:
        DataError: no image of a known format, or nothing at all.
    """
    for magic, offset, name in _MAGIC:
        if data[offset : offset + len(magic)] == magic and (name != "webp" or data[:4] == b"RIFF"):
            return name
    start = data[:12]
    raise DataError(f"no image: {f'it begins with {start!r}' if start else 'it is empty'}; known are {_known()}")


def decode_base64(text: str | bytes, *, largest: int = LARGEST_IMAGE) -> bytes:
    """The bytes of base64 text. Blanks and line breaks in it, a `data:...;base64,` in front and a missing padding are
    forgiven, as is the URL-safe alphabet; everything else is an error.

    Raises:
        DataError: other characters, a length that cannot be, nothing, or more than `largest` bytes.
    """
    if len(text) > 2 * largest:
        raise DataError(f"base64 text of {len(text):,} characters; an image may have {largest:,} bytes")
    try:
        data = text.encode("ascii") if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError:
        raise DataError("not base64: it holds characters that are not ASCII") from None
    match = _DATA_URL.match(data)
    data = data[match.end() if match else 0 :].translate(None, _BLANKS)
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


def inspect_image(source: bytes | str | os.PathLike[str], *, most_pixels: int = MOST_PIXELS) -> ImageInfo:
    """Decode an image completely, from bytes or a file, and say what it is.

    Raises:
        DataError: it is missing, of no known format, cut short or damaged, or has more than `most_pixels` pixels (a
            decompression bomb: nothing is decoded then).
    """
    if isinstance(source, bytes):
        if len(source) > LARGEST_IMAGE:
            raise DataError(f"an image of {len(source):,} bytes; it may have {LARGEST_IMAGE:,}")
        name, first = "", source
    else:
        name = os.fspath(source)
        with reading(name), open(name, "rb") as file:
            first = file.read(16)
    try:
        kind = sniff(first)
    except DataError as error:
        raise DataError(f"image {name!r}: {error}" if name else str(error)) from None
    with reading(name), Image.open(io.BytesIO(source) if isinstance(source, bytes) else name, formats=FORMATS) as image:
        width, height = image.size
        if width * height > most_pixels:
            raise DataError(f"image {name!r} has {width} x {height} pixels; allowed are {most_pixels:,} in all")
        mode = image.mode
        # Asked first: decoding may close the file. Formats without frames have no such attribute.
        animated = bool(getattr(image, "is_animated", False))
        decode_rgb(image)
        return ImageInfo(kind, width, height, mode, animated)


def decode_bytes(data: bytes) -> Image.Image:
    """The RGB image in `data`, its first frame. Raises DataError as `inspect_image` does."""
    sniff(data)
    with reading(""), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return decode_rgb(image)


def _known() -> str:
    return ", ".join(EXTENSIONS)

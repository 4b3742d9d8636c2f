"""From an image file to the pixels the vision tower takes.

Pixels equal those of LLaVA-1.5 with the CLIP processor on its Pillow path: RGB by `convert` (alpha is dropped, EXIF
rotation ignored), bicubic resize on 8-bit pixels, centre crop, mean and standard deviation.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.constants import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    import torch

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM")
"""All that Pillow may take an image for, whatever its name says: for PostScript it would run Ghostscript. MPO comes
with its reader of JPEG."""
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError, AssertionError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's readers let through for damaged files, depending on the format and on where the damage is."""
ASPECT_RATIOS = ("pad", "square")

_LARGEST_SIDE = 8192
"""Longer images are first reduced by a whole factor: padded to a square they would take gigabytes."""
_LONGEST_STRIP = 64
"""Ratio of the sides beyond which `square` crops before it resizes; the cut part never reaches the result."""


class ImageProcessor:
    """Image to normalised tensor.

    Args:
        image_size: Side S of the result in pixels.
        mean: Per channel, in units of 0..1; `int(255 * mean)` is the colour of the padding.
        std: Per channel, in units of 0..1.
        aspect_ratio: `pad` pastes the image on the middle of a square (LLaVA stage 2); `square` cuts the middle out of
            it (LLaVA stage 1).

    Raises:
        ConfigError: another `aspect_ratio`, or a size below 1.
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        aspect_ratio: Literal["pad", "square"] = "pad",
    ) -> None:
        if aspect_ratio not in ASPECT_RATIOS:
            raise ConfigError(f"image aspect ratio {aspect_ratio!r} does not exist; choose one of {ASPECT_RATIOS}")
        if image_size < 1:
            raise ConfigError(f"image size is {image_size}; it must be at least 1")
        self.image_size = image_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.aspect_ratio = aspect_ratio

    def __call__(self, image: Image.Image) -> "torch.Tensor":
        """The image as normalised float32 [3, S, S]; any Pillow mode is taken."""
        return normalise_pixels(self.pixels(image), self.mean, self.std)

    def pixels(self, image: Image.Image) -> "torch.Tensor":
        """The image as uint8 [3, S, S], a quarter of the bytes; the tower normalises them."""
        image = decode_rgb(image)
        square = self._padded_square(image) if self.aspect_ratio == "pad" else self._resize_and_crop(_cut_strip(image))
        import torch  # here, so that what only looks at images starts at once

        return torch.from_numpy(np.stack([np.asarray(channel) for channel in square.split()]))

    def _padded_square(self, image: Image.Image) -> Image.Image:
        """The image on the middle of a square of the padding colour, S x S."""
        size = self.image_size
        if max(image.size) > _LARGEST_SIDE:
            image = image.reduce(-(-max(image.size) // _LARGEST_SIDE))
        width, height = image.size
        side = max(width, height)
        if width > height:
            # Pillow resizes rows first, each on its own, then columns: the padding's rows need not take part in the
            # first half. The pixels are the same, bit for bit.
            image = image.resize((size, height), Image.Resampling.BICUBIC)
        if width != height:
            red, green, blue = (int(255 * value) for value in self.mean)
            square = Image.new("RGB", (image.width if width > height else side, side), (red, green, blue))
            square.paste(image, ((square.width - image.width) // 2, (side - height) // 2))
            image = square
        return image.resize((size, size), Image.Resampling.BICUBIC)

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Shorter side to S, then the middle S x S."""
        size = self.image_size
        width, height = image.size
        if width <= height:
            resized = (size, int(size * height / width))
        else:
            resized = (int(size * width / height), size)
        image = image.resize(resized, Image.Resampling.BICUBIC)
        left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
        return image.crop((left, top, left + size, top + size))


def normalise_pixels(pixels: "torch.Tensor", mean: Sequence[float], std: Sequence[float]) -> "torch.Tensor":
    """uint8 [..., 3, S, S] as `(pixels / 255 - mean) / std`, float32 of the same shape, on its device."""
    import torch

    normalised = pixels.to(torch.float32).div_(255)
    for channel, (middle, spread) in enumerate(zip(mean, std, strict=True)):
        normalised.select(-3, channel).sub_(middle).div_(spread)
    return normalised


def _cut_strip(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = _LONGEST_STRIP * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, min(width, left + longest), min(height, top + longest)))


def resolve_image(path: str, root: str | os.PathLike[str]) -> Path:
    """The file that a record's `image` names.

    Raises:
        DataError: the path is absolute, climbs with `..`, leads out of `root` through a symbolic link, or names no
            file.
    """
    if os.path.isabs(path) or ".." in Path(path).parts or "\0" in path or not _is_text(path):
        raise DataError(f"image path {path!r} must be relative to the image folder {root}, without '..'")
    folder = os.path.realpath(root)
    target = os.path.realpath(os.path.join(folder, path))
    if not os.path.isfile(target):
        hint = "" if os.path.isdir(folder) else "; this folder does not exist, check data.sources.<name>.image_folder"
        raise DataError(f"image {path!r} is no file in the image folder {root}{hint}")
    if os.path.commonpath([folder, target]) != folder:
        raise DataError(
            f"image {path!r} is a link to {target}, outside the image folder {root}; set image_folder to where the "
            "images are"
        )
    return Path(target)


def _is_text(path: str) -> bool:
    """Whether the path can be handed to the file system: half a surrogate pair cannot."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def open_image(path: str | os.PathLike[str], *, draft_size: int | None = None) -> Image.Image:
    """Decode one image file completely and convert it to RGB.

    Args:
        path: File of one of `FORMATS`, whatever its name; of several frames the first is taken.
        draft_size: Let the JPEG decoder leave out detail, down to an eighth of the size as long as both sides keep
            this many pixels and nothing is rounded. The pixels are not those of the full decoder: of photos and pages
            they differed, after resizing to half of `draft_size`, by up to 3 of 255 on average and up to 32.

    Raises:
        DataError: the file is missing, is no image, is cut short, or has more pixels than Pillow decodes (a
            decompression bomb).
    """
    with reading(os.fspath(path)), Image.open(path, formats=FORMATS) as image:
        if draft_size is not None:
            factor = _draft_factor(image.width, image.height, draft_size)
            image.draft(None, (image.width // factor, image.height // factor))
        return decode_rgb(image)


def _draft_factor(width: int, height: int, smallest: int) -> int:
    """8, 4, 2 or 1: what the sides can be divided by without a rest, so that the picture does not shift, not even by
    half a pixel when it is padded to a square."""
    margin = abs(width - height) // 2
    fits = [f for f in (8, 4, 2) if min(width, height) >= f * smallest and not (width % f or height % f or margin % f)]
    return max(fits, default=1)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Errors of reading and decoding the image called `name` become DataErrors."""
    shown = f"image {name!r}"
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{shown} does not exist") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise DataError(f"{shown} is too large to decode: {str(error) or 'out of memory'}; scale it down") from None
    except DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{shown} cannot be decoded: {reason}; replace the file or remove the record") from None


def decode_rgb(image: Image.Image) -> Image.Image:
    """`image` decoded, as RGB; without a copy where it is that already."""
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(path: str, root: str | os.PathLike[str], *, draft_size: int | None = None) -> Image.Image:
    """Image `path` below `root` as RGB. Raises DataError, see `resolve_image` and `open_image`."""
    return open_image(resolve_image(path, root), draft_size=draft_size)

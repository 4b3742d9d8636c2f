"""Images, from a file to the pixels of the vision tower.

The pixels equal those of LLaVA-1.5 with the Pillow version of the CLIP processor: RGB by `convert` (alpha is dropped,
EXIF rotation is ignored), bicubic resize of 8-bit pixels, centre crop, normalisation by mean and standard deviation.
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
from llava_mole.common.text import is_text
from llava_mole.constants import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    import torch

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM")
"""Formats that Pillow may recognise, whatever the file's name; for PostScript it would run Ghostscript. The JPEG reader
also reads MPO."""
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError, AssertionError,
    struct.error, zlib.error,
)  # fmt: skip
"""Errors that Pillow raises for damaged files, depending on the format and the place of the damage."""
ASPECT_RATIOS = ("pad", "square")

_LARGEST_SIDE = 8192
"""Longer images are first reduced by an integer factor; padded to a square they would take gigabytes."""
_LONGEST_STRIP = 64
"""Ratio of the sides above which `square` crops before it resizes, removing only what the result would not show."""


class ImageProcessor:
    """Converts an image to the input tensor of a vision tower.

    Args:
        image_size: Side S of the result in pixels.
        mean: Per channel, from 0 to 1; `int(255 * mean)` is the colour of the padding.
        std: Per channel, from 0 to 1.
        aspect_ratio: `pad` centres the image on a square (LLaVA stage 2); `square` crops the centre (LLaVA stage 1).

    Raises:
        ConfigError: the aspect ratio is unknown, or the size is below 1.
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
        """The image in any Pillow mode as normalised float32 [3, S, S]."""
        return normalise_pixels(self.pixels(image), self.mean, self.std)

    def pixels(self, image: Image.Image) -> "torch.Tensor":
        """The image as uint8 [3, S, S], a quarter of the bytes; the vision tower normalises it."""
        image = decode_rgb(image)
        square = self._padded_square(image) if self.aspect_ratio == "pad" else self._resize_and_crop(_cut_strip(image))
        import torch  # here because `prepare` and `check-data` only open images and must start fast

        return torch.from_numpy(np.stack([np.asarray(channel) for channel in square.split()]))

    def _padded_square(self, image: Image.Image) -> Image.Image:
        """The image centred on a square of the padding colour, S x S."""
        size = self.image_size
        if max(image.size) > _LARGEST_SIDE:
            image = image.reduce(-(-max(image.size) // _LARGEST_SIDE))
        width, height = image.size
        side = max(width, height)
        if width > height:
            # Pillow resizes the rows one by one and then the columns. Adding the rows of the padding between the two
            # passes gives identical pixels.
            image = image.resize((size, height), Image.Resampling.BICUBIC)
        if width != height:
            red, green, blue = (int(255 * value) for value in self.mean)
            square = Image.new("RGB", (image.width if width > height else side, side), (red, green, blue))
            square.paste(image, ((square.width - image.width) // 2, (side - height) // 2))
            image = square
        return image.resize((size, size), Image.Resampling.BICUBIC)

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        """The shorter side resized to S, then the central S x S."""
        size = self.image_size
        width, height = image.size
        shorter = min(width, height)
        resized = (int(size * width / shorter), int(size * height / shorter))
        image = image.resize(resized, Image.Resampling.BICUBIC)
        left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
        return image.crop((left, top, left + size, top + size))


def normalise_pixels(pixels: "torch.Tensor", mean: Sequence[float], std: Sequence[float]) -> "torch.Tensor":
    """`(pixels / 255 - mean) / std` as float32 on the same device, for uint8 pixels [..., 3, S, S]."""
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
    """The absolute path of the file that a record's `image` names.

    Raises:
        DataError: the path is absolute, contains `..`, leads out of `root` through a symbolic link, or is not a file.
    """
    if os.path.isabs(path) or ".." in Path(path).parts or "\0" in path or not is_text(path):
        raise DataError(f"image path {path!r} must be relative to the image folder {root}, without '..'")
    folder = os.path.realpath(root)
    target = os.path.realpath(os.path.join(folder, path))
    if not os.path.isfile(target):
        hint = "" if os.path.isdir(folder) else "; this folder does not exist, check data.sources.<name>.image_folder"
        raise DataError(f"image {path!r} is not a file in the image folder {root}{hint}")
    if os.path.commonpath([folder, target]) != folder:
        raise DataError(
            f"image {path!r} is a link to {target}, outside the image folder {root}; set image_folder to the folder of "
            "the images"
        )
    return Path(target)


def open_image(path: str | os.PathLike[str], *, draft_size: int | None = None) -> Image.Image:
    """Decode an image file completely and convert it to RGB.

    Args:
        path: File in one of `FORMATS`, whatever its name. The first of several frames is read.
        draft_size: Let the JPEG decoder reduce the image, to an eighth at most, if both sides keep this many pixels and
            no size is rounded. The pixels then differ from those of the full decoder: for photos and pages that are
            resized to half of `draft_size`, by up to 3 of 255 on average and 32 at most.

    Raises:
        DataError: the file is missing, not an image or truncated, or has more pixels than Pillow decodes (a
            decompression bomb).
    """
    with image_errors(os.fspath(path)), Image.open(path, formats=FORMATS) as image:
        if draft_size is not None:
            factor = _draft_factor(image.width, image.height, draft_size)
            image.draft(None, (image.width // factor, image.height // factor))
        return decode_rgb(image)


def _draft_factor(width: int, height: int, smallest: int) -> int:
    """The largest of 8, 4, 2, 1 that divides the sides and the margin of the padding, so that nothing shifts."""
    margin = abs(width - height) // 2
    fits = [f for f in (8, 4, 2) if min(width, height) >= f * smallest and not (width % f or height % f or margin % f)]
    return max(fits, default=1)


@contextlib.contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn errors of reading and decoding inside the block into a DataError that names the image."""
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
    """The decoded image as RGB; the same object if it is RGB already."""
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(path: str, root: str | os.PathLike[str], *, draft_size: int | None = None) -> Image.Image:
    """Image `path` below `root` as RGB. Raises DataError like `resolve_image` and `open_image`."""
    return open_image(resolve_image(path, root), draft_size=draft_size)

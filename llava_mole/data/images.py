"""From an image file to the tensor the vision tower takes.

Pixels equal those of LLaVA-1.5 with the CLIP processor on its Pillow path: RGB by `convert` (alpha is dropped, EXIF
rotation ignored), bicubic resize on 8-bit pixels, centre crop, mean and standard deviation.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from llava_mole.constants import CLIP_MEAN, CLIP_STD
from llava_mole.errors import ConfigError, DataError

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

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """The image as float32 [3, S, S]; any Pillow mode is taken."""
        image = image.convert("RGB")
        image = self._pad_to_square(image) if self.aspect_ratio == "pad" else _cut_strip(image)
        pixels = np.asarray(self._resize_and_crop(image), dtype=np.float32) / np.float32(255)
        pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        if max(image.size) > _LARGEST_SIDE:
            image = image.reduce(-(-max(image.size) // _LARGEST_SIDE))
        width, height = image.size
        if width == height:
            return image
        side = max(width, height)
        red, green, blue = (int(255 * value) for value in self.mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square

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
    if os.path.isabs(path) or ".." in Path(path).parts or "\0" in path:
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


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode one image file completely and convert it to RGB.

    Raises:
        DataError: the file is missing, is no image, is cut short, or has more pixels than Pillow decodes (a
            decompression bomb).
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"image {os.fspath(path)!r} does not exist") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"image {os.fspath(path)!r} is too large to decode: {error}; scale it down") from None
    # Pillow's readers let these through for damaged files, depending on the format and on where the damage is.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"image {os.fspath(path)!r} cannot be decoded: {reason}; replace the file or remove the record"
        ) from None


def load_image(path: str, root: str | os.PathLike[str]) -> Image.Image:
    """Image `path` below `root` as RGB. Raises DataError, see `resolve_image` and `open_image`."""
    return open_image(resolve_image(path, root))

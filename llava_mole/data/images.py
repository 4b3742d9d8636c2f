"""Images, from a file to the pixels of the vision tower.

The pixels equal those of LLaVA-1.5 with the Pillow version of the CLIP processor: bicubic resize of 8-bit pixels,
centre crop, normalisation by mean and standard deviation. Images that have more than 8 bits, transparency or a
rotation become RGB by one of `ImageModes`; `llava` is the original's way (`convert`: values are clipped, alpha is
dropped, the rotation is ignored).
"""

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
from PIL import ExifTags, Image

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.common.log import get_logger
from llava_mole.common.text import is_text
from llava_mole.config import AspectRatio, ImageModes
from llava_mole.constants import CLIP_MEAN, CLIP_STD
from llava_mole.data.anyres import Size, Tiles
from llava_mole.data.native import ImageGrid, NativeLayout

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
ASPECT_RATIOS = get_args(AspectRatio)
IMAGE_MODES = get_args(ImageModes)

_LARGEST_SIDE = 8192
"""Longer images are first reduced by an integer factor; padded to a square they would take gigabytes."""
_BUFFER = re.compile(r"<_io\.\w+ object at 0x[0-9a-f]+>")
_LONGEST_STRIP = 64
"""Ratio of the sides above which `square` crops before it resizes, removing only what the result would not show."""
REFUSED_BY: Mapping[ImageModes, tuple[str, ...]] = {
    "llava": (),
    "rescale": ("not-finite-image",),
    "strict": ("not-finite-image", "deep-image", "transparent-image"),
}
"""Kinds of `Oddity` with which an image is not read."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the stored pixels upright; 1 is upright. Pillow itself turns TIFF images."""
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")

logger = get_logger(__name__)


class Oddity(NamedTuple):
    """A property of an image with which `llava` shows something else than an image viewer."""

    kind: str
    """`deep-image`, `not-finite-image`, `transparent-image` or `rotated-image`."""
    detail: str
    """Follows "the image has"."""


class ImageProcessor:
    """Converts an image to the input tensor of a vision tower.

    Args:
        image_size: Side S of the result in pixels.
        mean: Per channel, from 0 to 1; `int(255 * mean)` is the colour of the padding.
        std: Per channel, from 0 to 1.
        aspect_ratio: `pad` centres the image on a square (LLaVA stage 2); `square` crops the centre (LLaVA stage 1);
            `anyres` shows the whole image and tiles of it (LLaVA-NeXT); `native` keeps its shape (SigLIP2's NaFlex).
        modes: How unusual images become RGB, see `DataConfig.image_modes`.
        resample: Filter of the resize, one of Pillow's.
        grid: The tiles of `anyres`, or the patches of `native`; None for the others.

    Raises:
        ConfigError: the aspect ratio or `modes` is unknown, or the size is below 1.
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        aspect_ratio: AspectRatio = "pad",
        modes: ImageModes = "llava",
        resample: int = Image.Resampling.BICUBIC,
        grid: ImageGrid | None = None,
    ) -> None:
        if aspect_ratio not in ASPECT_RATIOS:
            raise ConfigError(f"image aspect ratio {aspect_ratio!r} does not exist; choose one of {ASPECT_RATIOS}")
        if modes not in IMAGE_MODES:
            raise ConfigError(f"data.image_modes {modes!r} does not exist; choose one of {IMAGE_MODES}")
        if image_size < 1:
            raise ConfigError(f"image size is {image_size}; it must be at least 1")
        self.image_size = image_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.aspect_ratio = aspect_ratio
        self.modes: ImageModes = modes
        self.resample = resample
        if (grid is not None) != (aspect_ratio in ("anyres", "native")):
            raise ValueError(f"aspect ratio {aspect_ratio!r} with grid {grid}; 'anyres' and 'native' need one")
        self.grid = grid
        self._warned = False

    def load(self, image: Image.Image | str | os.PathLike[str], name: str = "given") -> Image.Image:
        """An image or image file as RGB by the rule `modes`; the first one that `llava` alters is logged.

        Args:
            image: Any Pillow image, decoded or not, or the path of a file.
            name: What an image without a file is called in messages.

        Raises:
            DataError: as `open_image`.
        """
        on_odd = None if self._warned else self._warn
        if isinstance(image, Image.Image):
            name = getattr(image, "filename", "") or name
            with image_errors(name):
                return decode_rgb(image, self.modes, name=repr(name), on_odd=on_odd)
        return open_image(image, modes=self.modes, on_odd=on_odd)

    def _warn(self, name: str, oddity: Oddity) -> None:
        self._warned = True
        warn_odd("inference", name, oddity)

    def __call__(self, image: Image.Image) -> "torch.Tensor":
        """The image in any Pillow mode as normalised float32 [3, S, S]."""
        return normalise_pixels(self.pixels(image), self.mean, self.std)

    def pixels(self, image: Image.Image) -> "torch.Tensor":
        """The image as uint8 [3, S, S], a quarter of the bytes; the vision tower normalises it.

        For `anyres` and `native` this is the whole image, resized to a square; `tiles` has what the model sees.
        """
        image = decode_rgb(image, self.modes)
        if self.grid is not None:
            return _as_tensor(image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))
        square = self._padded_square(image) if self.aspect_ratio == "pad" else self._resize_and_crop(_cut_strip(image))
        return _as_tensor(square)

    def tiles(self, image: Image.Image, name: str = "given") -> Tiles:
        """All that the model sees of an image; one tile without `shows` unless the processor has a grid.

        Args:
            image: In any Pillow mode.
            name: What it is called in messages.

        Raises:
            DataError: `Grid.layout` refuses its size.
        """
        if self.grid is None:
            return Tiles(self.pixels(image).unsqueeze(0))
        import torch

        image = decode_rgb(image, self.modes)
        layout = self.grid.layout(image.size, name)
        grids = torch.tensor([[layout.rows, layout.columns]]) if isinstance(layout, NativeLayout) else None
        return Tiles(torch.stack([_as_tensor(picture) for picture in self.grid.pictures(image)]), layout.index(), grids)

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
            image = image.resize((size, height), self.resample)
        if width != height:
            red, green, blue = (int(255 * value) for value in self.mean)
            square = Image.new("RGB", (image.width if width > height else side, side), (red, green, blue))
            square.paste(image, ((square.width - image.width) // 2, (side - height) // 2))
            image = square
        return image.resize((size, size), self.resample)

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        """The shorter side resized to S, then the central S x S."""
        size = self.image_size
        width, height = image.size
        shorter = min(width, height)
        resized = (int(size * width / shorter), int(size * height / shorter))
        image = image.resize(resized, self.resample)
        left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
        return image.crop((left, top, left + size, top + size))


def _as_tensor(image: Image.Image) -> "torch.Tensor":
    """uint8 [3, H, W] of an image in mode RGB."""
    import torch  # here because `prepare` and `check-data` only open images and must start fast

    channels = b"".join(image.tobytes("raw", channel) for channel in "RGB")
    return torch.frombuffer(bytearray(channels), dtype=torch.uint8).view(3, image.height, image.width)


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


def resolve_image(path: str, root: str | os.PathLike[str], *, follow_links: bool = False) -> Path:
    """The absolute path of the file that a record's `image` names.

    Args:
        follow_links: Whether symbolic links may lead out of `root`.

    Raises:
        DataError: the path is absolute, contains `..`, leads out of `root` through a link, or is not a file.
    """
    if os.path.isabs(path) or ".." in Path(path).parts or "\0" in path or not is_text(path):
        raise DataError(f"image path {path!r} must be relative to the image folder {root}, without '..'")
    folder = os.path.realpath(root)
    target = os.path.realpath(os.path.join(folder, path))
    if not os.path.isfile(target):
        hint = "" if os.path.isdir(folder) else "; this folder does not exist"
        raise DataError(f"image {path!r} is not a file in the image folder {root}{hint}")
    if not follow_links and os.path.commonpath([folder, target]) != folder:
        raise DataError(
            f"image {path!r} is a link to {target}, outside the image folder {root}; name the folder of the "
            "images, or allow such links (data.sources.<name>.follow_links, --follow-links in evaluation)"
        )
    return Path(target)


def open_image(
    path: str | os.PathLike[str] | bytes,
    *,
    name: str | None = None,
    draft_size: int | None = None,
    modes: ImageModes = "llava",
    on_odd: Callable[[str, Oddity], object] | None = None,
) -> Image.Image:
    """Decode an image file completely and convert it to RGB.

    Args:
        path: File in one of `FORMATS`, whatever its name, or its content. The first of several frames is read.
        name: Of the image, for messages; None takes the path.
        draft_size: Let the JPEG decoder reduce the image, to an eighth at most, if both sides keep this many pixels and
            no size is rounded. The pixels then differ from those of the full decoder: for photos and pages that are
            resized to half of `draft_size`, by up to 3 of 255 on average and 32 at most.
        modes, on_odd: See `decode_rgb`.

    Raises:
        DataError: the file is missing, not an image or truncated, has more pixels than Pillow decodes (a
            decompression bomb), or as `decode_rgb`.
    """
    source = io.BytesIO(path) if isinstance(path, bytes) else path
    name = name or ("given" if isinstance(path, bytes) else os.fspath(path))
    with image_errors(name), Image.open(source, formats=FORMATS) as image:
        if draft_size is not None:
            factor = _draft_factor(image.width, image.height, draft_size)
            image.draft(None, (image.width // factor, image.height // factor))
        return decode_rgb(image, modes, name=repr(name), on_odd=on_odd)


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
        raise DataError(
            f"{shown} cannot be decoded: {reason_of(error)}; replace the file or remove the record"
        ) from None


def reason_of(error: BaseException) -> str:
    """What Pillow says about an image on one line, without the address of the buffer that held it."""
    return " ".join(_BUFFER.sub("", str(error)).split()) or type(error).__name__


def decode_rgb(
    image: Image.Image,
    modes: ImageModes = "llava",
    *,
    name: str = "given",
    on_odd: Callable[[str, Oddity], object] | None = None,
) -> Image.Image:
    """The decoded image as RGB; the same object if it is such already.

    Args:
        modes: See `DataConfig.image_modes`.
        name: Of the image, for messages.
        on_odd: Called with the name for everything that `llava` shows differently from an image viewer.

    Raises:
        DataError: `modes` refuses the image, see `REFUSED_BY`.
    """
    image.load()
    if modes == "llava":
        for oddity in oddities(image) if on_odd is not None else ():
            on_odd(name, oddity)  # type: ignore[misc]  # not None here
        return image if image.mode == "RGB" else image.convert("RGB")
    for oddity in oddities(image):
        if oddity.kind in REFUSED_BY[modes]:
            raise DataError(
                f"image {name} has {oddity.detail}, which data.image_modes {modes!r} refuses; convert the file to 8 "
                "bits without transparency, or choose 'rescale' (values stretched to 0 to 255, white background) or "
                "'llava' (as the original: values clipped, alpha dropped)"
            )
    original, orientation = image, _orientation(image)
    if _is_deep(image):
        image = _stretched(image)
    elif (drawing := _with_alpha(image)) is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), drawing)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if orientation != 1:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    if rgb is not original:
        rgb.info = {}  # it may still say that the image is to be turned, or that a colour is transparent
    return rgb


def oddities(image: Image.Image) -> list[Oddity]:
    """What `llava` shows differently from an image viewer, for a decoded image."""
    found = []
    if _is_deep(image):
        values = np.asarray(image)
        bits = "float" if image.mode == "F" else "32-bit" if image.mode == "I" else "16-bit"
        if not np.isfinite(values).all():
            found.append(Oddity("not-finite-image", f"float pixels that are NaN or infinite (mode {image.mode})"))
        elif not _fits_bytes(values):
            detail = f"{bits} pixels from {values.min():g} to {values.max():g} (mode {image.mode})"
            found.append(Oddity("deep-image", detail))
    elif _with_alpha(image) is not None:
        found.append(Oddity("transparent-image", f"transparent pixels (mode {image.mode})"))
    if (orientation := _orientation(image)) != 1:
        found.append(Oddity("rotated-image", f"EXIF orientation {orientation}, so its pixels are not stored upright"))
    return found


def warn_odd(source: str, name: str, oddity: Oddity) -> None:
    """Log what `llava` does to an image of a source that has an oddity."""
    effect = {
        "deep-image": "they are clipped to 0 to 255, so the model sees mostly white or black",
        "not-finite-image": "they are black",
        "transparent-image": "alpha is dropped, so the model sees the colour below, often black",
        "rotated-image": "it is ignored, so the model sees the image rotated or mirrored",
    }
    logger.warning(
        "%s: image %s has %s; with data.image_modes 'llava', as in the original, %s. 'rescale' shows it like an image "
        "viewer, 'strict' refuses deep and transparent images; `llava-mole check-data` counts them. Logged once",
        source,
        name,
        oddity.detail,
        effect[oddity.kind],
    )


def may_be_odd(image: Image.Image) -> bool:
    """Whether an opened image may have an oddity; it need not be decoded. A PNG's EXIF data may follow its pixels."""
    return _is_deep(image) or image.has_transparency_data or any(key in image.info for key in _METADATA)


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _fits_bytes(values: np.ndarray) -> bool:
    """Whether deep pixels hold 8-bit values, which need no change: from 0 to 255, and not only 0 and 1."""
    return bool(values.min() >= 0 and 1 < values.max() <= 255) or not values.any()


def _stretched(image: Image.Image) -> Image.Image:
    """Deep pixels as mode L: the smallest value becomes 0 and the largest 255, unless they are 8-bit values."""
    values = np.asarray(image)
    if not _fits_bytes(values):
        low, high = float(values.min()), float(values.max())
        # A constant image has no range; it becomes black.
        values = (values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _with_alpha(image: Image.Image) -> Image.Image | None:
    """The image as RGBA if a pixel of it is transparent, by alpha, palette or a transparent colour; else None.

    A transparent colour that does not fit the mode counts as none, since no pixel has it.
    """
    if not image.has_transparency_data:
        return None
    try:
        drawing = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    except DECODER_ERRORS:
        return None
    return None if drawing.getchannel("A").getextrema() == (255, 255) else drawing


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 without one. Damaged metadata count as none, as in image viewers."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODER_ERRORS:
        return 1
    return value if value in _UPRIGHT else 1


def load_image(
    path: str,
    root: str | os.PathLike[str],
    *,
    draft_size: int | None = None,
    modes: ImageModes = "llava",
    on_odd: Callable[[str, Oddity], object] | None = None,
    follow_links: bool = False,
) -> Image.Image:
    """Image `path` below `root` as RGB. Takes and raises what `resolve_image` and `open_image` do."""
    file = resolve_image(path, root, follow_links=follow_links)
    return open_image(file, draft_size=draft_size, modes=modes, on_odd=on_odd)


def image_size(
    path: str, root: str | os.PathLike[str], *, modes: ImageModes = "llava", follow_links: bool = False
) -> Size:
    """Width and height of what `load_image` returns. Raises as `resolve_image` and `open_size`."""
    return open_size(resolve_image(path, root, follow_links=follow_links), os.fspath(path), modes)


def open_size(file: Any, name: str, modes: ImageModes = "llava") -> Size:
    """Width and height of an image file once it is RGB; nothing is decoded unless `modes` needs it to turn it upright.

    Args:
        file: A path, or a file open for reading.
        name: Of the image, for messages.
        modes: See `decode_rgb`.

    Raises:
        DataError: it is not an image, or damaged.
    """
    with image_errors(name), Image.open(file, formats=FORMATS) as image:
        return shown_size(image, modes)


def shown_size(image: Image.Image, modes: ImageModes = "llava") -> Size:
    """Width and height of an opened image once it is RGB by the rule `modes`."""
    width, height = image.size
    # Pillow turns TIFF images itself, and gives their size as it will be.
    turned = modes != "llava" and image.format != "TIFF" and _orientation(image) >= 5
    return (height, width) if turned else (width, height)

"""Native resolution, as in SigLIP2's NaFlex: an image keeps its aspect ratio, and its shape decides its tokens.

It is resized to whole patches, to as many as its shape allows among the tower's P, and enlarged if it is small. A tower
that takes patches of any grid sees it at once, and each patch is a token. Sizes and pixels are those of transformers'
`Siglip2ImageProcessorPil`. Everything follows from the image's size alone, as in `anyres`.

The patches travel in the pixels of a square with P places, row by row; places that are left over stay black, and the
tower masks them.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from llava_mole.common.errors import DataError
from llava_mole.data.anyres import Grid, Layout, Size

if TYPE_CHECKING:
    import torch

_PRECISION = 1e-5
"""Width of the interval at which the search for the scale ends, as in transformers."""
_LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class NativeLayout:
    """The patches of an image of one size."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Positions that the image takes."""
        return self.rows * self.columns

    @property
    def tiles(self) -> int:
        """Images that the tower encodes."""
        return 1

    def index(self) -> "torch.Tensor":
        """int64 [tokens, 2]: 0 and the feature of each position."""
        import torch

        return torch.stack([torch.zeros(self.tokens, dtype=torch.int64), torch.arange(self.tokens)], dim=1)

    def places(self) -> list[tuple[int, int, int] | None]:
        """For each position: its view, and row and column of the patch."""
        return [(0, row, column) for row in range(self.rows) for column in range(self.columns)]

    def views(self) -> list[tuple[Literal["whole", "tiles"], int, int]]:
        """The pictures that the patches lie on, with their rows and columns."""
        return [("whole", self.rows, self.columns)]


@dataclass(frozen=True)
class NativeGrid:
    """The images that a tower takes patch by patch.

    Args:
        tile: Side S of the square of pixels that holds all patches of an image.
        side: Patches in a row of that square; P is `side * side`.
        resample: Filter of the resize, one of Pillow's.
    """

    tile: int
    side: int
    resample: int = Image.Resampling.BILINEAR

    @property
    def least(self) -> int:
        """Fewest tokens of an image."""
        return 1

    @property
    def most(self) -> int:
        """Most tokens of an image."""
        return self.side * self.side

    @property
    def most_tiles(self) -> int:
        """Most images that the tower encodes for one image."""
        return 1

    def layout(self, size: Size, name: str = "given") -> NativeLayout:
        """Rows and columns of patches of an image.

        Args:
            size: Width and height of the image.
            name: What the image is called in messages.

        Raises:
            DataError: the image has no pixels.
        """
        width, height = size
        if width < 1 or height < 1:
            raise DataError(f"image {name!r} has no pixels: its size is {width} x {height}; replace it")
        return _layout(self.tile // self.side, self.most, width, height)

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """The square with the patches of an image in mode RGB, S x S."""
        patch, side = self.tile // self.side, self.side
        layout = self.layout(image.size)
        pixels = np.asarray(self._resized(image, layout))
        patches = pixels.reshape(layout.rows, patch, layout.columns, patch, 3).swapaxes(1, 2)
        square = np.zeros((self.most, patch, patch, 3), dtype=np.uint8)
        square[: layout.tokens] = patches.reshape(-1, patch, patch, 3)
        square = square.reshape(side, side, patch, patch, 3).swapaxes(1, 2)
        return [Image.fromarray(square.reshape(self.tile, self.tile, 3))]

    def shown(self, image: Image.Image, size: int) -> list[Image.Image]:
        """The picture that the patches lie on, `size` pixels on its longer side."""
        resized = self._resized(image, self.layout(image.size))
        scale = size / max(resized.size)
        width, height = (max(1, round(scale * side)) for side in resized.size)
        return [resized.resize((width, height), Image.Resampling.BICUBIC)]

    def _resized(self, image: Image.Image, layout: NativeLayout) -> Image.Image:
        patch = self.tile // self.side
        return image.resize((layout.columns * patch, layout.rows * patch), self.resample)


ImageGrid = Grid | NativeGrid
"""How the images of a run become tokens by their sizes: `anyres` or `native`."""
ImageLayout = Layout | NativeLayout


@lru_cache(maxsize=4096)
def _layout(patch: int, most: int, width: int, height: int) -> NativeLayout:
    def at(scale: float) -> NativeLayout:
        rows, columns = (max(1, math.ceil(side * scale / patch)) for side in (height, width))
        return NativeLayout(rows, columns)

    low, high = _PRECISION / 10, _LARGEST_SCALE
    while high - low >= _PRECISION:
        middle = (low + high) / 2
        if at(middle).tokens <= most:
            low = middle
        else:
            high = middle
    return at(low)

"""Any resolution, as in LLaVA-NeXT: an image is seen whole and in tiles of the vision tower's size.

The whole image is resized to S x S. It is also resized, with its aspect ratio, into the best of several resolutions
(the pinpoints), centred there on black and cut into tiles of S x S. The features of the tiles, put together, form one
map; rows and columns that show nothing but the black border are taken away, and a learned vector ends every row
(`spatial_unpad` with `image_newline`). Everything follows from the image's size alone, so the number of tokens is known
before training. Sizes, rounding and order are those of transformers' `LlavaNextProcessor` and `LlavaNextModel`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image

from llava_mole.common.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]
"""Width and height of an image in pixels, as Pillow has them."""
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-NeXT's resolutions, rows and columns of tiles: 336 x 672, 672 x 336, ... for a tower of 336 pixels."""


class Tiles(NamedTuple):
    """The pixels of one image, and which features of them fill its positions in the sequence."""

    pixels: "torch.Tensor"
    """uint8 [t, 3, S, S]: the image for `pad` and `square`; for `anyres` the whole image, then its tiles row by row;
    for `native` a square with its patches."""
    shows: "torch.Tensor | None" = None
    """int64 [n, 2]: tile and feature of each position; None if they are those of the only tile, in order."""
    grids: "torch.Tensor | None" = None
    """int64 [t, 2]: rows and columns of patches that each square of `native` holds; None for the others."""


def join_tiles(shown: Sequence[Tiles]) -> Tiles:
    """The tiles of several images as one, in order; the indices count through all of them."""
    import torch  # here because `prepare` and `check-data` only open images and must start fast

    starts = list(accumulate((len(each.pixels) for each in shown), initial=0))
    index = [
        each.shows + torch.tensor([start, 0])
        for each, start in zip(shown, starts[:-1], strict=True)
        if each.shows is not None
    ]
    grids = [each.grids for each in shown if each.grids is not None]
    return Tiles(
        torch.cat([each.pixels for each in shown]),
        torch.cat(index) if index else None,
        torch.cat(grids) if grids else None,
    )


@dataclass(frozen=True)
class Layout:
    """How an image of one size is tiled, and which part of the tiles' feature map shows it.

    The map has `rows * side` rows and `columns * side` columns of features.
    """

    side: int
    """Features in a row of a tile."""
    rows: int
    columns: int
    top: int
    """First row of the map that shows the image."""
    left: int
    shown_rows: int
    shown_columns: int

    @property
    def tokens(self) -> int:
        """Positions that the image takes: the whole image, the shown part of the map, a newline for each row."""
        return self.side * self.side + self.shown_rows * (self.shown_columns + 1)

    @property
    def tiles(self) -> int:
        """Images that the tower encodes, the whole image included."""
        return 1 + self.rows * self.columns

    def index(self) -> "torch.Tensor":
        """int64 [tokens, 2]: tile (0 is the whole image) and feature of each position.

        Feature `side * side` of a tile is the newline vector, see `ImageNewline`.
        """
        import torch

        side, whole = self.side, self.side * self.side
        rows = np.arange(self.top, self.top + self.shown_rows)[:, None]
        columns = np.arange(self.left, self.left + self.shown_columns)[None]
        index = np.zeros((self.shown_rows, self.shown_columns + 1, 2), dtype=np.int64)
        index[:, :-1, 0] = 1 + rows // side * self.columns + columns // side
        index[:, :-1, 1] = rows % side * side + columns % side
        index[:, -1] = 0, whole
        base = np.stack([np.zeros(whole, dtype=np.int64), np.arange(whole)], axis=1)
        return torch.from_numpy(np.concatenate([base, index.reshape(-1, 2)]))

    def places(self) -> list[tuple[int, int, int] | None]:
        """For each position: its view (0 the whole image, 1 the tiles), row and column of the patch; None for a
        newline."""
        whole = [(0, row, column) for row in range(self.side) for column in range(self.side)]
        rest: list[tuple[int, int, int] | None] = []
        for row in range(self.shown_rows):
            rest += [*((1, row, column) for column in range(self.shown_columns)), None]
        return [*whole, *rest]

    def views(self) -> list[tuple[Literal["whole", "tiles"], int, int]]:
        """The pictures that the patches lie on, with their rows and columns."""
        return [("whole", self.side, self.side), ("tiles", self.shown_rows, self.shown_columns)]


@dataclass(frozen=True)
class Grid:
    """The tiles that a tower allows.

    Args:
        tile: Side S of a tile in pixels: the tower's image size.
        side: Features in a row of a tile.
        pinpoints: Resolutions to choose from, (height, width) in pixels.

    Raises:
        ConfigError: there is no pinpoint, or a side of one is not a multiple of the tile.
    """

    tile: int
    side: int
    pinpoints: tuple[tuple[int, int], ...]

    @classmethod
    def of_tower(cls, tile: int, features: int, pinpoints: Sequence[Sequence[int]] | None = None) -> "Grid":
        """The grid of a tower that gives `features` features for an image; None takes LLaVA-NeXT's five pinpoints."""
        side = math.isqrt(features)
        if side * side != features:
            raise ConfigError(
                f"data.image_aspect_ratio 'anyres' needs as many rows as columns of features; the tower gives "
                f"{features}, which is no square; use 'pad' or 'square'"
            )
        if pinpoints is None:
            pinpoints = [(rows * tile, columns * tile) for rows, columns in PINPOINTS]
        return cls(tile, side, tuple((height, width) for height, width in pinpoints))

    def __post_init__(self) -> None:
        for height, width in self.pinpoints:
            if height % self.tile or width % self.tile or min(height, width) < self.tile:
                near = [max(1, round(value / self.tile)) * self.tile for value in (height, width)]
                raise ConfigError(
                    f"data.image_grid_pinpoints has [{height}, {width}], but tiles have the tower's {self.tile} x "
                    f"{self.tile} pixels: height and width must be multiples of {self.tile}, such as {near}"
                )
        if not self.pinpoints:
            raise ConfigError("data.image_grid_pinpoints is empty; give pairs of height and width, or null")

    @property
    def least(self) -> int:
        """Fewest tokens of an image."""
        return self.side * self.side + 2

    @property
    def most(self) -> int:
        """Most tokens of an image."""
        return max(
            self.side**2 + height // self.tile * self.side * (width // self.tile * self.side + 1)
            for height, width in self.pinpoints
        )

    @property
    def most_tiles(self) -> int:
        """Most images that the tower encodes for one image."""
        return 1 + max(height * width for height, width in self.pinpoints) // self.tile**2

    def layout(self, size: Size, name: str = "given") -> Layout:
        """How an image is tiled.

        Args:
            size: Width and height of the image.
            name: What the image is called in messages.

        Raises:
            DataError: the image has no pixels, or it is so narrow that no feature of its tiles would show it.
        """
        width, height = size
        if width < 1 or height < 1:
            raise DataError(f"image {name!r} has no pixels: its size is {width} x {height}; replace it")
        layout = _layout(self, width, height)
        if layout.shown_rows < 1 or layout.shown_columns < 1:
            raise DataError(
                f"image {name!r} is {width} x {height} pixels, too narrow for data.image_aspect_ratio 'anyres': no "
                f"feature of its tiles would show it; crop it to at most {self._narrowest(height > width)}:1, or "
                "use 'pad'"
            )
        return layout

    def _narrowest(self, upright: bool) -> int:
        """Ratio of the sides up to which every image is shown."""
        return min(self.side * pair[0 if upright else 1] // self.tile for pair in self.pinpoints)

    def fitted(self, size: Size) -> tuple[Size, Size]:
        """Width and height of the best pinpoint, and those of the image inside it."""
        width, height = size
        best_height, best_width = _best(self.pinpoints, width, height)
        across, down = best_width / width, best_height / height
        if across < down:
            return (best_width, best_height), (best_width, min(math.ceil(height * across), best_height))
        return (best_width, best_height), (min(math.ceil(width * down), best_width), best_height)

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """The whole image and its tiles, all S x S, from an image in mode RGB."""
        tile, canvas = self.tile, self._fit(image)
        corners = [(left, top) for top in range(0, canvas.height, tile) for left in range(0, canvas.width, tile)]
        return [
            image.resize((tile, tile), Image.Resampling.BICUBIC),
            *(canvas.crop((left, top, left + tile, top + tile)) for left, top in corners),
        ]

    def shown(self, image: Image.Image, size: int) -> list[Image.Image]:
        """The pictures that the patches lie on: the whole image in `size` x `size` pixels, and the part of the tiles
        that positions show. Raises DataError as `layout`."""
        layout, cell = self.layout(image.size), self.tile / self.side
        right, bottom = layout.left + layout.shown_columns, layout.top + layout.shown_rows
        left, top, right, bottom = (round(cell * edge) for edge in (layout.left, layout.top, right, bottom))
        part = self._fit(image).crop((left, top, right, bottom))
        return [image.resize((size, size), Image.Resampling.BICUBIC), part]

    def _fit(self, image: Image.Image) -> Image.Image:
        """The image in the middle of its best resolution, on black."""
        (width, height), inner = self.fitted(image.size)
        canvas = Image.new("RGB", (width, height))
        resized = image.resize(inner, Image.Resampling.BICUBIC)
        canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return canvas


@lru_cache(maxsize=4096)
def _layout(grid: Grid, width: int, height: int) -> Layout:
    best_height, best_width = _best(grid.pinpoints, width, height)
    rows, columns = best_height // grid.tile, best_width // grid.tile
    map_rows, map_columns = rows * grid.side, columns * grid.side
    top = left = 0
    # As `unpad_image` of transformers, with its rounding; the border is cut equally on both sides.
    if width / height > map_columns / map_rows:
        top = (map_rows - int(round(height * (map_columns / width), 7))) // 2
    else:
        left = (map_columns - int(round(width * (map_rows / height), 7))) // 2
    return Layout(grid.side, rows, columns, top, left, map_rows - 2 * top, map_columns - 2 * left)


def _best(pinpoints: Sequence[tuple[int, int]], width: int, height: int) -> tuple[int, int]:
    """The pinpoint (height, width) in which the image keeps most pixels; of equals the one that wastes fewest."""

    def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)  # the first of equals

"""The projector from vision features to the language model's embedding space."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from llava_mole.common.errors import ConfigError

ENDS = "+ends"
NEWLINE = "+newline"
NEWLINE_KEY = "newline.vector"
"""Name of the newline vector in a projector's state."""
SHUFFLE = "pixel_shuffle+"


class PixelShuffle(nn.Module):
    """Joins 2 x 2 neighbouring patches to one token: [N, P, W] -> [N, P', 4 W].

    The four stand in the order top left, top right, bottom left, bottom right, as in Qwen2-VL. A grid with an odd side
    (SigLIP at 384 pixels: 27 x 27) first gets a last row or column of zeros, as in VILA.
    """

    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid

    def forward(self, features_NPW: torch.Tensor) -> torch.Tensor:
        count, _, width = features_NPW.shape
        rows, columns = self.grid
        grid_NRCW = features_NPW.reshape(count, rows, columns, width)
        if rows % 2 or columns % 2:
            grid_NRCW = F.pad(grid_NRCW, (0, 0, 0, columns % 2, 0, rows % 2))
        rows, columns = half_grid(self.grid)
        blocks = grid_NRCW.reshape(count, rows, 2, columns, 2, width).transpose(2, 3)
        return blocks.reshape(count, rows * columns, 4 * width)


def half_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns after `PixelShuffle`."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


def split_kind(kind: str) -> tuple[bool, str, str]:
    """Whether a kind of projector shuffles, its layers (`linear` or `mlp<N>x_gelu`), and its suffix (may be empty).

    Raises ConfigError if there is no such kind.
    """
    layers, plus, suffix = kind.removeprefix(SHUFFLE).partition("+")
    known = layers == "linear" or re.fullmatch(r"mlp[1-9]\d?x_gelu", layers) is not None
    if not known or plus + suffix not in ("", ENDS, NEWLINE):
        raise ConfigError(
            f"model.projector {kind!r}: allowed are 'linear' and 'mlp<N>x_gelu', as in 'mlp2x_gelu', either with "
            f"{SHUFFLE!r} before it, which quarters the tokens of an image. Behind it may stand {ENDS!r} for learned "
            f"vectors around an image, or {NEWLINE!r} for data.image_aspect_ratio 'anyres'"
        )
    return kind.startswith(SHUFFLE), layers, plus + suffix


def image_grid(kind: str, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of an image's tokens behind a projector, for the grid of the tower's patches."""
    return half_grid(grid) if split_kind(kind)[0] else grid


def image_positions(kind: str, grid: tuple[int, int]) -> int:
    """Positions that an image takes in the sequence, for the grid of the tower's patches."""
    rows, columns = image_grid(kind, grid)
    return rows * columns + (ImageEnds.extra_positions if split_kind(kind)[2] == ENDS else 0)


class ImageEnds(nn.Module):
    """Learned vectors around the features of an image: [N, P, D] -> [N, P + 2, D].

    The LLaVA-MoLE authors' checkpoint has them; LLaVA-1.5 does not.
    """

    extra_positions = 2

    def __init__(self, hidden_size: int):
        super().__init__()
        self.start = nn.Parameter(torch.empty(hidden_size))
        self.end = nn.Parameter(torch.empty(hidden_size))
        for vector in (self.start, self.end):
            nn.init.normal_(vector, std=hidden_size**-0.5)

    def forward(self, features_NPD: torch.Tensor) -> torch.Tensor:
        ends = (vector.expand(features_NPD.shape[0], 1, -1) for vector in (self.start, self.end))
        start_N1D, end_N1D = ends
        return torch.cat([start_N1D, features_NPD, end_N1D], dim=1)


class ImageNewline(nn.Module):
    """The learned vector that ends a row of tiles, after the features of every tile: [N, P, D] -> [N, P + 1, D].

    LLaVA-NeXT's `image_newline`. Which positions show it says `data.anyres.Layout.index`. As a part of the projector's
    output it trains and is saved with the projector, and has a gradient whenever the projector has one.
    """

    extra_positions = 0  # no position of its own in the sequence

    def __init__(self, hidden_size: int):
        super().__init__()
        self.vector = nn.Parameter(torch.empty(hidden_size))
        nn.init.normal_(self.vector, std=hidden_size**-0.5)

    def forward(self, features_NPD: torch.Tensor) -> torch.Tensor:
        newline_N1D = self.vector.to(features_NPD.dtype).expand(features_NPD.shape[0], 1, -1)
        return torch.cat([features_NPD, newline_N1D], dim=1)


def build_projector(
    kind: str, vision_size: int, hidden_size: int, grid: tuple[int, int] | None = None
) -> nn.Sequential:
    """Projector [N, P, vision_size] -> [N, P', hidden_size].

    Args:
        kind: `linear`, or `mlp<N>x_gelu`: N linear layers with exact GELU in between. The state keys are LLaVA's
            (`0.weight`, `0.bias`, `2.weight`, ...). The prefix `pixel_shuffle+` puts `PixelShuffle` before them, so
            that the keys begin with `1.`. The suffix `+ends` appends `ImageEnds`, `+newline` `ImageNewline`.
        grid: rows and columns of the tower's patches, for `pixel_shuffle+` alone; without it only shapes are of use.

    Raises:
        ConfigError: `kind` is neither.
    """
    shuffles, plain, suffix = split_kind(kind)
    layers: list[nn.Module] = [PixelShuffle(grid or (2, 2))] if shuffles else []
    layers.append(nn.Linear(vision_size * (4 if shuffles else 1), hidden_size))
    for _ in range(0 if plain == "linear" else int(plain[3:].partition("x")[0]) - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    if suffix == ENDS:
        layers.append(ImageEnds(hidden_size))
    projector = nn.Sequential(*layers)
    if suffix == NEWLINE:
        projector.add_module("newline", ImageNewline(hidden_size))  # `newline.vector`, for projectors of any depth
    return projector

"""The projector from vision features to the language model's embedding space."""

import re

import torch
from torch import nn

from llava_mole.common.errors import ConfigError

ENDS = "+ends"
NEWLINE = "+newline"
NEWLINE_KEY = "newline.vector"
"""Name of the newline vector in a projector's state."""


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


def build_projector(kind: str, vision_size: int, hidden_size: int) -> nn.Sequential:
    """Projector [.., vision_size] -> [.., hidden_size].

    Args:
        kind: `linear`, or `mlp<N>x_gelu`: N linear layers with exact GELU in between. The state keys are LLaVA's
            (`0.weight`, `0.bias`, `2.weight`, ...). The suffix `+ends` appends `ImageEnds`, `+newline` `ImageNewline`.

    Raises:
        ConfigError: `kind` is neither.
    """
    plain = kind.removesuffix(ENDS).removesuffix(NEWLINE)
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", plain)
    if (match is None and plain != "linear") or kind not in (plain, plain + ENDS, plain + NEWLINE):
        raise ConfigError(
            f"model.projector {kind!r}: allowed are 'linear' and 'mlp<N>x_gelu', as in 'mlp2x_gelu', and either with "
            f"{ENDS!r} for learned vectors around an image, or {NEWLINE!r} for data.image_aspect_ratio 'anyres'"
        )
    layers: list[nn.Module] = [nn.Linear(vision_size, hidden_size)]
    for _ in range(int(match[1]) - 1 if match else 0):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    if kind.endswith(ENDS):
        layers.append(ImageEnds(hidden_size))
    projector = nn.Sequential(*layers)
    if kind.endswith(NEWLINE):
        projector.add_module("newline", ImageNewline(hidden_size))  # `newline.vector`, for projectors of any depth
    return projector

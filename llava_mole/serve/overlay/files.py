"""The routing of one prompt and its answer as data and as a figure."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as pil
from PIL.Image import Image

from llava_mole.common.figures import COLORS, new_figure, tidy
from llava_mole.data.images import ImageProcessor
from llava_mole.inference.inputs import OneImage, open_any
from llava_mole.inference.token_routing import Role, TokenRouting, View

FORMAT = "llava_mole.routing_overlay/1"
SHOWN_SIZE = 448
"""Side of a shown image in pixels."""
PANELS = 8
"""Layers that the figure shows, unless they are named."""
FAINTEST, STRONGEST = 0.25, 0.75
"""How strongly a patch's colour covers the image, from an undecided router to a certain one."""
NEWLINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
"""Shows a line break."""
ROLES: tuple[Role, ...] = ("image", "prompt", "answer")
_ROW = 60
"""Tokens in a row of the figure."""


def color_of(expert: int) -> str:
    """The colour of an expert (from 0), `#RRGGBB`; the chat, the figure and the page use the same."""
    return COLORS[expert % len(COLORS)]


def ink_on(color: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = (int(color[n : n + 2], 16) for n in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "#ffffff"


def strength(certainty: float, num_experts: int) -> float:
    """The opacity of a patch whose router is that sure of its expert: 1 / K is undecided, 1 certain."""
    least = 1 / num_experts
    share = (certainty - least) / (1 - least) if num_experts > 1 else 1.0
    return FAINTEST + (STRONGEST - FAINTEST) * min(1.0, max(0.0, share))


def shown_images(processor: ImageProcessor, image: OneImage) -> list[Image]:
    """The image as the model sees it, in a size for people: one picture for each of its `TokenRouting.views`.

    It is padded or cropped to a square; in tiles it is resized to one, and the part that the tiles show follows. With
    `native` it keeps its shape.
    Raises DataError.
    """
    opened = open_any(image, processor)
    if processor.grid is not None:
        return processor.grid.shown(opened, SHOWN_SIZE)
    larger = ImageProcessor(SHOWN_SIZE, processor.mean, processor.std, processor.aspect_ratio, processor.modes)
    return [pil.fromarray(np.ascontiguousarray(larger.pixels(opened).permute(1, 2, 0).numpy()))]


def view_name(view: View, views: Sequence[View]) -> str:
    """What a view is called beside others; empty if it is the only one."""
    names = [f"image {view.image + 1}"] if views[-1].image > 0 else []
    names += [{"whole": "whole image", "tiles": "tiles"}[view.part]] if views[-1].part == "tiles" else []
    return ", ".join(names)


def blend_grey(image: Image, share: float = 0.8) -> Image:
    """The image with that share of its colour taken out, so that it does not change the colours over it."""
    return pil.blend(image, image.convert("L").convert("RGB"), share)


def as_data(routing: TokenRouting) -> dict[str, Any]:
    """The routing as plain values; `overall` is the expert that most layers use, and the share of layers that do."""
    tokens: list[dict[str, Any]] = []
    views, tiled = routing.views(), any(layout is not None for layout in routing.layouts)
    places = {
        token: {"row": n // view.columns, "column": n % view.columns, **({"part": view.part} if tiled else {})}
        for view in views
        for n, token in enumerate(view.patches)
    }
    for n, (piece, role, image) in enumerate(zip(routing.pieces, routing.roles, routing.images.tolist(), strict=True)):
        if role == "image":
            tokens.append({"role": role, "image": image, **places.get(n, {"part": "newline"})})
        else:
            tokens.append({"role": role, "text": piece})
    load = {}
    for role in ROLES:
        part = routing.part(role)
        by_layer = [part.load(layer) for layer in range(len(part.layers))]
        load[role] = {"tokens": len(part.roles), "overall": part.load(None), "by_layer": by_layer}
    return {
        "format": FORMAT,
        "num_experts": routing.num_experts,
        "layers": list(routing.layers),
        "tokens": tokens,
        "expert": routing.experts.tolist(),
        "gate": [[round(gate, 6) for gate in layer] for layer in routing.gates.tolist()],
        "overall": {"expert": routing.of_layer(None), "agreement": routing.certainty(None)},
        "load": load,
    }


def spread(count: int, most: int = PANELS) -> list[int]:
    """At most `most` of `count` layers, from the first to the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(n * (count - 1) / (most - 1)) for n in range(most)})


def draw(routing: TokenRouting, images: Sequence[Image], layers: Sequence[int], *, title: str) -> Any:
    """A matplotlib figure: every image by each of the layers and by all of them, text tokens by layer, and loads.

    Args:
        images: What `shown_images` returns for each image of the prompt, in one list.
        layers: Numbers of layers, from 0.
    """
    views: list[int | None] = [None, *layers]
    across = min(len(views), 5)
    rows = math.ceil(len(views) / across) if images else 0
    text = [n for n, role in enumerate(routing.roles) if role != "image" and routing.pieces[n]]
    lines = [text[start : start + _ROW] for start in range(0, len(text), _ROW)]
    image_inches = 2.6 * rows * len(images)
    line_inches = 0.75 + 0.2 * len(views)
    figure = new_figure(2.6 * max(across, 5), 1.4 + image_inches + line_inches * len(lines) + 2.4)
    parts = figure.subfigures(3, 1, height_ratios=[max(image_inches, 0.01), line_inches * len(lines), 2.4])
    wrapped = [line for part in title.split("\n") for line in textwrap.wrap(part, 120)][:6]
    figure.suptitle("\n".join(wrapped).replace("$", r"\$"), x=0.01, ha="left", fontsize=11, fontweight="bold")
    if images:
        panels = parts[0].subplots(rows * len(images), across, squeeze=False)
        for panel in panels.flat:
            panel.axis("off")
        pictures = routing.views()
        for number, (picture, image) in enumerate(zip(pictures, images, strict=True)):
            for n, layer in enumerate(views):
                panel = panels[number * rows + n // across][n % across]
                _draw_patches(panel, routing.of_view(picture), image, layer, picture.grid)
                name = "all layers" if layer is None else f"layer {layer}"
                tidy(panel, ", ".join(filter(None, [view_name(picture, pictures), name])))
    for panel, line in zip(parts[1].subplots(len(lines), 1, squeeze=False)[:, 0], lines, strict=True):
        _draw_line(panel, routing, line, views)
    _draw_loads(parts[2], routing)
    return figure


def _draw_patches(panel: Any, patches: TokenRouting, image: Image, layer: int | None, grid: tuple[int, int]) -> None:
    cells = np.zeros((*grid, 4))
    for n, (expert, sure) in enumerate(zip(patches.of_layer(layer), patches.certainty(layer), strict=True)):
        color = [int(color_of(expert)[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        cells[n // grid[1], n % grid[1]] = [*color, strength(sure, patches.num_experts)]
        if grid[1] <= 12:  # legible, and then the expert can be told without its colour
            panel.text(
                (n % grid[1] + 0.5) / grid[1], 1 - (n // grid[1] + 0.5) / grid[0], str(expert), fontsize=7,
                transform=panel.transAxes, ha="center", va="center", color="white",
            ).set_path_effects(_outline())  # fmt: skip
    extent = (0, 1, 0, image.height / image.width)
    panel.imshow(blend_grey(image), extent=extent)
    panel.imshow(cells, extent=extent, interpolation="nearest")


def _outline() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=1.6, foreground="black")]


def _draw_line(panel: Any, routing: TokenRouting, line: Sequence[int], views: Sequence[int | None]) -> None:
    """Text tokens from left to right, layers from top to bottom; an answer's tokens are in bold."""
    from matplotlib.colors import ListedColormap

    rows = np.array([[routing.of_layer(layer)[n] for n in line] for layer in views])
    colors = ListedColormap([color_of(expert) for expert in range(max(2, routing.num_experts))])
    panel.imshow(
        rows, cmap=colors, vmin=0, vmax=max(2, routing.num_experts) - 1, aspect="auto", interpolation="nearest"
    )
    panel.set_xlim(-0.5, _ROW - 0.5)
    shown = [
        routing.pieces[n].replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace("$", r"\$") for n in line
    ]
    panel.set_xticks(range(len(line)), shown, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    for label, n in zip(panel.get_xticklabels(), line, strict=True):
        label.set_fontweight("bold" if routing.roles[n] == "answer" else "normal")
    panel.set_yticks(range(len(views)), ["all" if layer is None else str(layer) for layer in views], fontsize=7)
    panel.set_xticks(np.arange(len(line) + 1) - 0.5, minor=True)
    panel.set_yticks(np.arange(len(views) + 1) - 0.5, minor=True)
    panel.grid(which="minor", color="white", linewidth=0.8)
    panel.tick_params(which="both", length=0)
    panel.spines[:].set_visible(False)


def _draw_loads(part: Any, routing: TokenRouting) -> None:
    """Each expert's share of the tokens by role, and of all tokens by layer."""
    roles = [role for role in ROLES if role in routing.roles]
    left, right = part.subplots(1, 2)
    names = [f"{role} ({len(routing.part(role).roles)})" for role in roles]
    _draw_shares(left, names, [routing.part(role).load(None) for role in roles])
    tidy(left, "load by kind of token (number)", "share of tokens, all layers")
    layers = range(len(routing.layers))
    _draw_shares(right, [str(layer) for layer in layers], [routing.load(layer) for layer in layers])
    tidy(right, "load by layer", "share of all tokens", "layer")
    for panel in (left, right):
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    right.yaxis.set_major_locator(_whole_numbers())
    handles, labels = left.get_legend_handles_labels()
    part.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=min(8, len(labels)))


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=8, integer=True)


def _draw_shares(panel: Any, names: Sequence[str], loads: Sequence[Sequence[float]]) -> None:
    starts = np.zeros(len(loads))
    for expert in range(len(loads[0])):
        widths = np.array([load[expert] for load in loads])
        bars = panel.barh(range(len(loads)), widths, left=starts, color=color_of(expert), label=f"expert {expert}")
        if len(loads) <= len(ROLES):
            labels = [f"{100 * width:.0f}%" if width > 0.06 else "" for width in widths]
            panel.bar_label(bars, labels, label_type="center", fontsize=8, color=ink_on(color_of(expert)))
        starts += widths
    panel.set_xlim(0, 1)
    panel.set_yticks(range(len(loads)), names, fontsize=9)
    panel.invert_yaxis()

"""Panels of the meters' figures: annotated matrices, maps of layers, bars with intervals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_mole.common.figures import COLORS, tidy

GREY = "#E4E4E4"
"""For values that do not exist."""


def matrix_panel(
    axes: Any,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    limits: tuple[float, float],
    colors: str = "RdBu",
    intervals: Sequence[Sequence[float]] | None = None,
    digits: int = 2,
    x: str = "",
    y: str = "",
) -> Any:
    """An image of a matrix with its numbers, each with its interval if that is known. Returns the image."""
    array = np.array(values, dtype=float)
    image = _image(axes, array, limits, colors)
    for row, column in np.ndindex(array.shape):
        value = array[row, column]
        text = "-" if math.isnan(value) else f"{value:.{digits}f}"
        if intervals is not None and not math.isnan(intervals[row][column]):
            text += f"\n±{intervals[row][column]:.{digits}f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=_ink(value, limits, colors))
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    tidy(axes, title, x, y)
    axes.grid(visible=False)
    return image


def map_panel(
    axes: Any,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    limits: tuple[float, float],
    colors: str = "viridis",
    x: str = "",
    y: str = "",
) -> Any:
    """An image of many numbers without text, such as layers by parts. Returns the image."""
    array = np.array(values, dtype=float)
    if array.size <= 80:
        return matrix_panel(
            axes, values, rows, columns, title=title, limits=limits, colors=colors, x=x, y=y
        )  # there is room for the numbers
    image = _image(axes, array, limits, colors)
    every = math.ceil(len(rows) / 16)
    axes.set_yticks(range(0, len(rows), every), rows[::every], fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=30, ha="right")
    tidy(axes, title, x, y)
    axes.grid(visible=False)
    return image


def bars(
    axes: Any,
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float], Sequence[float] | None]],
    *,
    title: str,
    y: str,
) -> None:
    """Bars of several series side by side in each group: `(label, heights, half intervals)`."""
    width = 0.8 / max(1, len(series))
    for number, (label, heights, errors) in enumerate(series):
        places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
        known = None if errors is None else np.nan_to_num(np.array(errors, dtype=float))
        axes.bar(
            places, heights, width * 0.92, yerr=known, color=COLORS[number % len(COLORS)], label=label,
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )  # fmt: skip
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups, fontsize=9, rotation=20 if len(groups) > 4 else 0)
    tidy(axes, title, "", y)
    if len(series) > 1:
        axes.legend(
            frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14 if len(groups) <= 4 else -0.2),
            ncols=min(3, len(series)),
        )  # fmt: skip


def _image(axes: Any, array: Any, limits: tuple[float, float], colors: str) -> Any:
    axes.set_facecolor(GREY)
    return axes.imshow(
        np.ma.masked_invalid(array), vmin=limits[0], vmax=limits[1], cmap=colors, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip


def _ink(value: float, limits: tuple[float, float], colors: str) -> str:
    """Black or white, whichever reads better on the value's colour."""
    place = (value - limits[0]) / (limits[1] - limits[0]) if limits[1] > limits[0] else 0.5
    if math.isnan(place):
        return "black"
    dark = abs(place - 0.5) > 0.36 if colors.startswith("RdBu") else place < 0.55
    return "white" if dark else "black"


def widest(matrices: Sequence[Sequence[Sequence[float]]], least: float = 1e-9) -> float:
    """The largest absolute finite number of all matrices; at least `least`."""
    numbers = np.concatenate([np.abs(np.array(matrix, dtype=float)).ravel() for matrix in matrices])
    numbers = numbers[np.isfinite(numbers)]
    return max(least, float(numbers.max(initial=0.0)))

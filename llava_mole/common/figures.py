"""Figures: matplotlib without a display, shared colours, and a clear error if it is not installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError
from llava_mole.common.files import atomic_path, write_errors

# Okabe and Ito's palette: distinguishable for colour-blind readers.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999933", "#666666", "#BBBBBB")


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of `width` x `height` inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures need matplotlib: pip install 'llava_mole[eval]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def check_matplotlib() -> None:
    """Raise ConfigError if matplotlib is not installed: before the work whose figures need it."""
    new_figure(1, 1)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure atomically as PNG and return its path. Raises ConfigError if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(140)
    with write_errors(path), atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
    return path


def tidy(axes: Any, title: str, x: str = "", y: str = "") -> None:
    """Set title and labels, draw a light grid, and remove the frame at the top and right."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


FAINT = 0.5
"""A line with a lower opacity is faint: it shows what a stronger one of its colour smooths."""


def legend_below(figure: Any, handles: Sequence[Any], columns: int, fontsize: float = 8) -> None:
    """Add a legend of labelled artists under all axes, in at most `columns` columns and no wider than the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for count in range(max(1, min(columns, len(handles))), 0, -1):
        place = {"loc": "outside lower center", "ncols": count, "frameon": False, "fontsize": fontsize}
        legend = figure.legend(handles=handles, **place)
        if count == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def add_legend(axes: Any, faint: str = "pale: every value", **options: Any) -> None:
    """Add a legend without a frame. One entry, `faint`, explains all faint lines, if there are any.

    `options` are those of `Axes.legend`.
    """
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    if any((line.get_alpha() or 1.0) < FAINT for line in axes.get_lines()):
        handles.append(Line2D([], [], color="#666666", alpha=0.4, linewidth=0.8))
        labels.append(faint)
    axes.legend(handles, labels, **{"frameon": False, "fontsize": 9, **options})

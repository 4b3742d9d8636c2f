"""The numbers of a report as grouped bars with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError
from llava_mole.common.figures import COLORS, legend_below, new_figure, save_figure, tidy
from llava_mole.common.log import get_logger
from llava_mole.eval.report.groups import MAJORITY

logger = get_logger(__name__)

LONG_LABEL = 9
"""Labels with more characters are rotated."""


def _literal(text: str) -> str:
    """Return a name that matplotlib shows as it is: no formulas, and in the legend even if it begins with `_`."""
    text = " ".join(text.split())
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def draw_benchmarks(benchmarks: Mapping[str, Any], path: Path) -> bool:
    """Draw bars like the paper's Figure 1: a panel per benchmark, a group per number, a bar with interval per run.

    Numbers that are sums (of 500, say) get a panel of their own, with an axis that starts near the values. The majority
    baseline, where there is one, is a dashed line.

    Returns:
        Whether the figure was drawn; False, with a warning in the log, if matplotlib is not installed.

    Raises:
        ConfigError: `path` cannot be written.
    """
    panels: list[tuple[Mapping[str, Any], list[str], bool]] = []
    for entry in benchmarks.values():
        others = [column for column in entry["compared"] if column not in entry["summed"]]
        panels += [(entry, shown, summed) for shown, summed in ((entry["summed"], True), (others, False)) if shown]
    names = list(dict.fromkeys(name for entry in benchmarks.values() for name in entry["runs"]))
    widths = [max(1.6, 0.4 + len(columns) * max(0.9, 0.3 * len(names))) for _, columns, _ in panels]
    try:
        figure = new_figure(max(5.0, 0.8 * len(panels) + sum(widths)), 4.2)
    except ConfigError as error:
        logger.warning("no figure: %s", error)
        return False
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axis, (entry, columns, summed) in zip(axes, panels, strict=True):
        ends = _draw_bars(axis, names, columns, entry["runs"])
        for c, column in enumerate(columns):
            if column in entry.get("groups", {}):
                level = entry["groups"][column]["majority"]["value"]
                line = {"colors": "black", "linestyles": "dashed", "label": MAJORITY}
                axis.hlines(level, c - 0.45, c + 0.45, **line)
        turned = max(map(len, columns)) > LONG_LABEL
        style = {"rotation": 30, "horizontalalignment": "right"} if turned else {}
        axis.set_xticks(range(len(columns)), [_literal(c) for c in columns], **style)
        tidy(axis, _literal(entry["title"] + (" (axis cut)" if summed else "")))
        axis.grid(axis="x", visible=False)
        if summed and ends:
            margin = max(1.0, 0.5 * (max(ends) - min(ends)))
            axis.set_ylim(max(0.0, min(ends) - margin), max(ends) + 0.3 * margin)
    axes[0].set_ylabel("percent, 95% interval")
    shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    legend_below(figure, list(shown.values()), columns=4, fontsize=9)
    save_figure(figure, path)
    return True


def _draw_bars(axis: Any, names: list[str], columns: list[str], runs: Mapping[str, Any]) -> list[float]:
    """Draw each run's bars, side by side in each column. Returns the ends of all intervals."""
    width, ends = 0.8 / len(names), []
    for n, name in enumerate(names):
        numbers = (runs.get(name) or {"numbers": {}})["numbers"]
        found = [(c, numbers[column]) for c, column in enumerate(columns) if numbers.get(column)]
        bars = [(c, entry) for c, entry in found if entry["value"] is not None]
        centres = [c + (n - (len(names) - 1) / 2) * width for c, _ in bars]
        # The percentile interval of a skewed number need not contain the number itself.
        below = [max(0.0, entry["value"] - entry["low"]) for _, entry in bars]
        above = [max(0.0, entry["high"] - entry["value"]) for _, entry in bars]
        heights = [entry["value"] for _, entry in bars]
        style = {"capsize": 2.5, "color": COLORS[n % len(COLORS)], "label": _literal(name)}
        axis.bar(centres, heights, width * 0.92, yerr=[below, above], **style)
        ends += [end for _, entry in bars for end in (entry["low"], entry["high"])]
    return ends

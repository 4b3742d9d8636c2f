"""The accuracy comparison as grouped bars."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mole.common.log import get_logger
from llava_mole.eval.answers import write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

logger = get_logger(__name__)


def _literal(text: str) -> str:
    """A name as matplotlib shows it: without formulas, and in the legend though it begins with `_`."""
    text = " ".join(text.split())
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _write_png(canvas: "FigureCanvasAgg", path: Path) -> None:
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_bytes_atomically(path, buffer.getvalue())


def draw_accuracies(report: Mapping[str, Any], path: Path) -> bool:
    """Draw a group of bars per domain, one bar per run, with 95% intervals and the majority baseline as a line.

    Returns:
        Whether it was drawn; without matplotlib (extra `demo`) a line in the log says so.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no figure: matplotlib is not installed (pip install 'llava_mole[demo]')")
        return False
    domains = list(report["domains"])
    names = list(next(iter(report["domains"].values()))["runs"])
    width = 0.8 / len(names)
    figure = Figure(figsize=(max(5.0, 2.2 * len(domains)), 4.0), layout="constrained")
    axes = figure.subplots()
    for n, name in enumerate(names):
        entries = [report["domains"][domain]["runs"][name] for domain in domains]
        heights = [100 * entry["accuracy"] for entry in entries]
        errors = [
            [100 * (entry["accuracy"] - entry["low"]) for entry in entries],
            [100 * (entry["high"] - entry["accuracy"]) for entry in entries],
        ]
        centres = [d + (n - (len(names) - 1) / 2) * width for d in range(len(domains))]
        axes.bar(centres, heights, width * 0.92, yerr=errors, capsize=3, label=_literal(name))
    for d, domain in enumerate(domains):
        level = 100 * report["domains"][domain]["majority"]["accuracy"]
        label = "_majority" if d else "majority"  # a leading underscore keeps repetitions out of the legend
        axes.hlines(level, d - 0.45, d + 0.45, colors="black", linestyles="dashed", label=label)
    axes.set_xticks(range(len(domains)), [_literal(domain) for domain in domains])
    axes.set_ylabel("accuracy in percent, 95% interval")
    axes.set_ylim(0, 100)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(names) + 1, frameon=False)
    _write_png(FigureCanvasAgg(figure), path)
    return True


def draw_benchmarks(benchmarks: Mapping[str, Any], path: Path) -> bool:
    """Grouped bars like the paper's Figure 1: a panel a benchmark, a group a number, a bar a run with its interval.

    Numbers that are sums (of 500, say) get a panel of their own, with an axis that starts near the values.

    Returns:
        Whether it was drawn; without matplotlib a line in the log says so.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no figure: matplotlib is not installed (pip install 'llava_mole[eval]')")
        return False
    panels: list[tuple[str, list[str], Mapping[str, Any], bool]] = []
    for entry in benchmarks.values():
        for columns, summed in (
            (entry["summed"], True),
            ([column for column in entry["compared"] if column not in entry["summed"]], False),
        ):
            if columns:
                panels.append((entry["title"], columns, entry["runs"], summed))
    names = list(dict.fromkeys(name for _, _, runs, _ in panels for name in runs))
    widths = [max(1.6, 0.4 + len(columns) * max(0.9, 0.3 * len(names))) for _, columns, _, _ in panels]
    figure = Figure(figsize=(max(5.0, 0.8 * len(panels) + sum(widths)), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    width = 0.8 / len(names)
    for axis, (title, columns, runs, summed) in zip(axes, panels, strict=True):
        lows, highs = [], []
        for n, name in enumerate(names):
            found = [
                (c, (runs.get(name) or {"numbers": {}})["numbers"].get(column)) for c, column in enumerate(columns)
            ]
            bars = [(c, entry) for c, entry in found if entry is not None and entry["value"] is not None]
            centres = [c + (n - (len(names) - 1) / 2) * width for c, _ in bars]
            heights = [entry["value"] for _, entry in bars]
            # A percentile interval of a skewed number need not hold the number itself.
            below = [max(0.0, entry["value"] - entry["low"]) for _, entry in bars]
            above = [max(0.0, entry["high"] - entry["value"]) for _, entry in bars]
            axis.bar(
                centres, heights, width * 0.92, yerr=[below, above], capsize=2.5, color=f"C{n}", label=_literal(name)
            )
            lows += [entry["low"] for _, entry in bars]
            highs += [entry["high"] for _, entry in bars]
        axis.set_xticks(
            range(len(columns)), [_literal(c) for c in columns], rotation=30 if max(map(len, columns)) > 9 else 0
        )
        for label in axis.get_xticklabels():
            label.set_horizontalalignment("right" if max(map(len, columns)) > 9 else "center")
        axis.set_title(_literal(f"{title} (axis cut)" if summed else title), fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
        if summed and lows:
            margin = max(1.0, 0.5 * (max(highs) - min(lows)))
            axis.set_ylim(max(0.0, min(lows) - margin), max(highs) + 0.3 * margin)
    axes[0].set_ylabel("percent, 95% interval")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    _write_png(FigureCanvasAgg(figure), path)
    return True

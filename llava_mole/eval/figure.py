"""The accuracy comparison as grouped bars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_mole.log import get_logger

logger = get_logger(__name__)


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
        axes.bar(centres, heights, width * 0.92, yerr=errors, capsize=3, label=name)
    for d, domain in enumerate(domains):
        level = 100 * report["domains"][domain]["majority"]["accuracy"]
        label = "_majority" if d else "majority"  # a leading underscore keeps repetitions out of the legend
        axes.hlines(level, d - 0.45, d + 0.45, colors="black", linestyles="dashed", label=label)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("accuracy in percent, 95% interval")
    axes.set_ylim(0, 100)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(names) + 1, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return True

"""The figure of a plan: memory of one GPU by item, hours by cause."""

from pathlib import Path
from typing import Any

from llava_mole.analysis.plan.estimates import Estimate
from llava_mole.analysis.plan.plan import Plan
from llava_mole.analysis.plan.text import HOURS, in_unit, unit_for
from llava_mole.common.figures import COLORS, add_legend, new_figure, save_figure, tidy
from llava_mole.model.flops import GIB

CAUSES = (
    ("useful", "useful compute", COLORS[2]),
    ("padding", "padding", COLORS[1]),
    ("recompute", "recompute", COLORS[3]),
    ("stragglers", "waiting for the slowest rank", COLORS[8]),
)


def draw_plan(plan: Plan, path: Path) -> Path:
    """Draw the plan's two panels as a PNG and return its path. Raises ConfigError without matplotlib."""
    figure = new_figure(12.5, 5.4)
    memory, time = figure.subplots(1, 2, width_ratios=(1.0, 1.5))
    _memory_panel(memory, plan)
    _time_panel(time, plan)
    return save_figure(figure, path)


def _memory_panel(axes: Any, plan: Plan) -> None:
    best, capacity = plan.recommended, plan.options.gpu.memory_bytes / GIB
    items = list(best.memory.items())
    sizes = [size / GIB for _, size in items]
    axes.barh(range(len(items)), sizes, color=COLORS[0], height=0.65)
    for row, size in enumerate(sizes):
        axes.text(size + 0.01 * max(sizes), row, f"{size:.2f}", va="center", fontsize=9)
    axes.set_yticks(range(len(items)), [name for name, _ in items])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(sizes))
    verdict = "fits" if plan.fits(best) else "does not fit"
    title = f"Memory of one GPU: {best.memory_bytes / GIB:.1f} of {capacity:g} GiB, {verdict}"
    tidy(axes, title, f"GiB ({best.batching}, rows of {best.row_tokens:,} tokens, recompute: {best.policy.name})")
    axes.grid(axis="y", visible=False)


def _time_panel(axes: Any, plan: Plan) -> None:
    rows = [e for e in plan.estimates if _is_drawn(e, plan)]
    unit, gpu_unit = (unit_for(hours, HOURS) for hours in ([e.hours for e in rows], [e.gpu_hours for e in rows]))
    left = [0.0] * len(rows)
    for key, label, color in CAUSES:
        widths = [e.hours / unit.size * getattr(e.step, key) / e.step.seconds for e in rows]
        axes.barh(range(len(rows)), widths, left=left, color=color, label=label, height=0.65)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, estimate in enumerate(rows):
        text = f"{in_unit(estimate.hours, unit)}, {in_unit(estimate.gpu_hours, gpu_unit)} of all GPUs"
        axes.text(left[row] + 0.01 * max(left), row, text, va="center", fontsize=9)
    labels = [f"{e.gpus} GPUs, {e.batching}, recompute {e.policy.name}" for e in rows]
    axes.set_yticks(range(len(rows)), labels)
    for row, estimate in enumerate(rows):
        if estimate == plan.recommended:
            axes.get_yticklabels()[row].set_fontweight("bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(left))  # room for the text beside the longest bar
    names = {"h": "hours", "min": "minutes", "s": "seconds", "ms": "milliseconds"}
    tidy(
        axes, f"Time of the run, at {plan.options.utilisation:.0%} of {plan.options.gpu.name}'s peak", names[unit.name]
    )
    axes.grid(axis="y", visible=False)
    add_legend(axes, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=4)


def _is_drawn(estimate: Estimate, plan: Plan) -> bool:
    """Whether the figure shows it: all estimates on the requested GPUs, only packed ones on other numbers."""
    return estimate.gpus == plan.options.gpus or estimate.batching == "packed"

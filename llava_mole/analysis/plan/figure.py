"""The figure of a plan: memory of one GPU by item, hours by cause."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.analysis.plan.estimates import Estimate
from llava_mole.analysis.plan.plan import Plan
from llava_mole.analysis.plan.scale import ScaleRow
from llava_mole.analysis.plan.text import HOURS, in_unit, unit_for
from llava_mole.common.figures import COLORS, add_legend, new_figure, save_figure, tidy
from llava_mole.model.flops import GIB

CAUSES = (
    ("useful", "useful compute", COLORS[2]),
    ("padding", "padding", COLORS[1]),
    ("recompute", "recompute", COLORS[3]),
    ("stragglers", "waiting for the rank with the most work", COLORS[8]),
    ("slow", "waiting for slow GPUs", COLORS[4]),
    ("communication", "waiting for data", COLORS[0]),
)


def draw_plan(plan: Plan, path: Path) -> Path:
    """Draw the plan's two panels as a PNG and return its path. Raises ConfigError without matplotlib."""
    figure = new_figure(12.5, 5.4)
    memory, time = figure.subplots(1, 2, width_ratios=(1.0, 1.5))
    _memory_panel(memory, plan)
    _time_panel(time, plan)
    return save_figure(figure, path)


def draw_scale(plan: Plan, rows: Sequence[ScaleRow], path: Path) -> Path:
    """Draw where the time goes on each number of GPUs, and where communication binds, as a PNG."""
    figure = new_figure(12.5, 4.8)
    shares, binding = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    places, bottom = range(len(rows)), [0.0] * len(rows)
    for key, label, color in CAUSES:
        heights = [100 * getattr(row.step, key) / row.step.seconds for row in rows]
        shares.bar(places, heights, bottom=bottom, color=color, label=label, width=0.7)
        bottom = [start + height for start, height in zip(bottom, heights, strict=True)]
    shares.set_xticks(places, [f"{row.gpus:,}" for row in rows])
    tidy(shares, f"Where a step's time goes, {plan.planner.sharing}", "GPUs", "% of the step")
    shares.grid(axis="x", visible=False)
    add_legend(shares, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    gpus = [row.gpus for row in rows]
    binding.loglog(gpus, [row.tokens_per_pass for row in rows], color=COLORS[2], marker="o", label="of this run")
    below = [(row.gpus, row.binds_below) for row in rows if row.binds_below]
    if below:
        label = "needed to hide communication"
        binding.loglog(*zip(*below, strict=True), color=COLORS[0], marker="s", label=label)
    binding.set_xticks(gpus, [f"{row.gpus:,}" for row in rows])
    binding.minorticks_off()
    tokens = [size for row in rows for size in (row.tokens_per_pass, row.binds_below or row.tokens_per_pass)]
    ticks = [2**power for power in range(int(math.log2(min(tokens))), math.ceil(math.log2(max(tokens))) + 1)]
    binding.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    network = plan.options.connection
    rates = f"{network.link / 1e9:g} GB/s in a node, {network.node / 1e9:g} between nodes"
    tidy(binding, "Where communication binds", f"GPUs ({rates})", "tokens of a micro-batch")
    add_legend(binding)
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
    add_legend(axes, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3)


def _is_drawn(estimate: Estimate, plan: Plan) -> bool:
    """Whether the figure shows it: all estimates on the requested GPUs, only packed ones on other numbers."""
    return estimate.gpus == plan.options.gpus or estimate.batching == "packed"

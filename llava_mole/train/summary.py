"""The table at the end of a run: what was trained on, how the losses fell, what it took."""

import math
from collections.abc import Sequence
from typing import Any

from llava_mole.common.text import format_bytes
from llava_mole.train.progress import format_seconds

WINDOW = 0.1
"""Share of the entries whose mean stands for the start and for the end."""


def summary_table(title: str, entries: Sequence[dict[str, Any]], samples_by_source: dict[str, int]) -> str:
    """The table as text.

    Args:
        title: Name of the run.
        entries: Of `metrics.jsonl`, in order; at least one.
        samples_by_source: Samples consumed of each source.
    """
    last = entries[-1]
    window = max(1, math.ceil(WINDOW * len(entries)))
    seconds = sum(entry["step_s"] for entry in entries)
    samples = sum(samples_by_source.values())
    lines = [f"{title}: {last['step']:,} steps, {samples:,} samples"]
    lines += ["", f"{'source':<24}{'samples':>12}{'loss, first':>13}{'last':>9}{'validation':>12}"]
    validation: dict[str, float] = next((e["validation_loss"] for e in reversed(entries) if "validation_loss" in e), {})
    for name, count in {**samples_by_source, "all": samples}.items():
        losses = [e["loss"] if name == "all" else e["source_loss"].get(name, math.nan) for e in entries]
        held_out = f"{validation[name]:.3f}" if name in validation else ""
        first, end = _mean(losses[:window]), _mean(losses[-window:])
        lines.append(f"{name:<24}{count:>12,}{first:>13.3f}{end:>9.3f}{held_out:>12}")
    rows = [
        ("time of logged steps", format_seconds(seconds)),
        ("tokens per second", f"{sum(e['tokens'] for e in entries) / seconds:,.0f}"),
        ("waiting for data", f"{sum(e['data_wait_s'] for e in entries) / seconds:.1%} of the time"),
    ]
    if "mfu" in last:
        rows.append(("MFU", f"{_mean([e['mfu'] for e in entries if 'mfu' in e]):.1%}"))
    if "max_memory_bytes" in last:
        rows.append(("peak memory", format_bytes(max(e.get("max_memory_bytes", 0) for e in entries))))
    if "expert_load" in last:
        rows.append(("expert load at the end", "  ".join(f"{share:.2f}" for share in last["expert_load"])))
    return "\n".join([*lines, "", *(f"{name:<24}{value}" for name, value in rows)])


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan

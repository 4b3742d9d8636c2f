"""The display of a running training: a bar on a terminal, lines in a log file, and a summary at the end."""

import math
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from llava_mole.common.log import get_logger
from llava_mole.common.text import format_bytes, format_seconds

logger = get_logger(__name__)

LOG_EVERY_S = 60.0
"""Seconds between two lines without a terminal."""
SMOOTHING = 0.9
"""Weight of the past in the displayed loss and rate."""
WINDOW = 0.1
"""Share of a source's entries whose mean stands for the start and for the end of the run."""


class ProgressDisplay:
    """Shows steps, loss, tokens per second and the remaining time.

    Args:
        total: Steps of the run.
        first: Steps already done.
        name: Name of the run.
        enabled: Whether this rank shows anything.
    """

    def __init__(self, total: int, first: int, name: str, enabled: bool) -> None:
        self._total = total
        self._enabled = enabled
        disable = None if enabled else True  # None: tqdm disables the bar without a terminal, and lines replace it
        self._bar = tqdm(total=total, initial=first, disable=disable, unit="step", desc=name, dynamic_ncols=True)
        self._lines = enabled and self._bar.disable
        self._first, self._started, self._last_line = first, time.monotonic(), -LOG_EVERY_S
        self._shown: dict[str, float] = {}

    def show(self, entry: dict[str, Any]) -> None:
        """Show an entry of the metrics; loss and rate are smoothed."""
        if not self._enabled:
            return
        loss, rate = self._smooth("loss", entry["loss"]), self._smooth("rate", entry["tokens_per_s"])
        texts = {"loss": f"{loss:.3f}", "tok/s": f"{rate:,.0f}", "lr": f"{max(entry['learning_rate'].values()):.1e}"}
        if "mfu" in entry:
            texts["mfu"] = f"{entry['mfu']:.0%}"
        if "validation_loss" in entry:
            losses = ", ".join(f"{name} {value:.3f}" for name, value in entry["validation_loss"].items())
            logger.info("step %d validation loss %s", entry["step"], losses)
        self._bar.set_postfix(texts, refresh=False)
        if self._lines:
            self._line(entry["step"], "  ".join(f"{name} {value}" for name, value in texts.items()))

    def advance(self) -> None:
        """Count one more step."""
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def _smooth(self, key: str, value: float) -> float:
        before = self._shown.get(key, value)
        # NaN is shown but not included in later values.
        self._shown[key] = SMOOTHING * before + (1 - SMOOTHING) * value if value == value else before
        return self._shown[key] if value == value else value

    def _line(self, step: int, text: str) -> None:
        now = time.monotonic()
        if step < self._total and now - self._last_line < LOG_EVERY_S:
            return
        self._last_line = now
        done = step - self._first
        left = format_seconds((now - self._started) / done * (self._total - step)) if done else "?"
        logger.info("step %d/%d  %s  %s left", step, self._total, text, left)


def summary_table(title: str, entries: Sequence[dict[str, Any]], samples_by_source: dict[str, int]) -> str:
    """The table of sources, losses and speed at the end of a run, as text.

    Args:
        entries: At least one entry of `metrics.jsonl`, in order.
        samples_by_source: Consumed samples of each source.
    """
    last = entries[-1]
    seconds = sum(entry["step_s"] for entry in entries)
    samples = sum(samples_by_source.values())
    lines = [f"{title}: {last['step']:,} steps, {samples:,} samples"]
    lines += ["", f"{'source':<24}{'samples':>12}{'loss, first':>13}{'last':>9}{'validation':>12}"]
    validation: dict[str, float] = next((e["validation_loss"] for e in reversed(entries) if "validation_loss" in e), {})
    for name, count in {**samples_by_source, "all": samples}.items():
        losses = [e["loss"] if name == "all" else e["source_loss"].get(name, math.nan) for e in entries]
        shown = [loss for loss in losses if math.isfinite(loss)]  # a source is absent from some steps
        own = max(1, math.ceil(WINDOW * len(shown)))
        held_out = f"{validation[name]:.3f}" if name in validation else ""
        first, end = (f"{_mean(part):.3f}" if part else "-" for part in (shown[:own], shown[-own:]))
        lines.append(f"{name:<24}{count:>12,}{first:>13}{end:>9}{held_out:>12}")
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

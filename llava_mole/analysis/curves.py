"""A run's `metrics.jsonl` as values to draw: one entry a step, smoothed and thinned."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llava_mole.common.errors import DataError
from llava_mole.train.metrics import METRICS_FILE, read_metrics

Values = npt.NDArray[np.float64]


def read_entries(run: Path) -> list[dict[str, Any]]:
    """The entries of a run in order of steps; of a step that stands twice (after a resume) the later one counts.

    Raises:
        DataError: no run directory, or nothing is recorded there yet.
    """
    path = run / METRICS_FILE
    if not run.is_dir() or not path.is_file():
        raise DataError(f"{run}: no {METRICS_FILE} there; give the directory of a run (train.output_dir)")
    entries = {entry["step"]: entry for entry in read_metrics(path)}
    if not entries:
        raise DataError(f"{path}: no step is recorded yet; draw it after the first optimizer step")
    return [entries[step] for step in sorted(entries)]


def series(entries: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> tuple[Values, Values]:
    """Steps and values of the entries that have a finite one, float64 [n] both."""
    pairs = [(entry["step"], found) for entry in entries if (found := value(entry)) is not None]
    pairs = [(step, number) for step, number in pairs if math.isfinite(number)]
    return np.array([p[0] for p in pairs], dtype=np.float64), np.array([p[1] for p in pairs], dtype=np.float64)


def named_series(entries: Sequence[dict[str, Any]], key: str, name: str) -> tuple[Values, Values]:
    """The series of `entry[key][name]`, where an entry has it."""
    return series(entries, lambda entry: entry.get(key, {}).get(name))


def smooth(values: Values, span: float) -> Values:
    """Exponential moving average over about `span` values; the start is not pulled towards anything."""
    keep = 1.0 - 2.0 / (max(span, 1.0) + 1.0)
    result, total, weight = np.empty_like(values), 0.0, 0.0
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1.0
        result[index] = total / weight
    return result


def span_for(count: int) -> float:
    """Values to average over for a curve of `count` points: none of a short one, a thirtieth of a long one."""
    return max(1.0, count / 30)


def names_in(entries: Sequence[dict[str, Any]], key: str) -> list[str]:
    """Keys that the dictionaries under `key` have, in the order they first appear."""
    return list(dict.fromkeys(name for entry in entries for name in entry.get(key, {})))


def layer_loads(entries: Sequence[dict[str, Any]], columns: int = 300) -> tuple[Values, Values]:
    """Expert load by layer over time: steps `[C]` and shares `[C, layers, K]`, averaged into at most `columns`."""
    chosen = [entry for entry in entries if entry.get("expert_load_by_layer")]
    steps = np.array([entry["step"] for entry in chosen], dtype=np.float64)
    loads = np.array([entry["expert_load_by_layer"] for entry in chosen], dtype=np.float64)
    if len(chosen) <= columns:
        return steps, loads
    parts = np.array_split(np.arange(len(chosen)), columns)
    return np.array([steps[part].mean() for part in parts]), np.stack([loads[part].mean(axis=0) for part in parts])

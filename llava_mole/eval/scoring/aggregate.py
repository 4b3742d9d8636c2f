"""Sums the fields of every question to a benchmark's numbers, with intervals, and compares two runs on them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_mole.common.errors import DataError
from llava_mole.common.text import count_of
from llava_mole.eval.benchmarks.benchmark import COUNTED, Benchmark, Number
from llava_mole.eval.metrics.table import METRICS, Fields
from llava_mole.eval.scoring import intervals
from llava_mole.eval.scoring.intervals import RESAMPLES, SEED, Array, Statistic, Sums, group_sums

PERCENT = 100.0


@dataclass(frozen=True)
class Units:
    """The units that are scored and resampled: questions, or for example the images that several questions share.

    `fields["<metric>.<field>"]` has one value per unit, 0 if the metric does not apply to the unit's group.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    fields: Mapping[str, Array]

    def rows(self) -> dict[str, Array]:
        """Return group -> `[n, F]`, the fields in the order of `fields`."""
        table = np.stack(list(self.fields.values()), axis=1)
        member = np.array(self.groups)
        return {group: table[member == group] for group in dict.fromkeys(self.groups)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, column by column."""
        return {
            "ids": list(self.ids),
            "groups": list(self.groups),
            "fields": {name: [_plain(value) for value in values] for name, values in self.fields.items()},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str) -> "Units":
        """Read back. Raises DataError for anything that `to_dict` does not write."""
        try:
            fields = {name: np.array(values, dtype=np.float64) for name, values in value["fields"].items()}
            units = cls(tuple(map(str, value["ids"])), tuple(map(str, value["groups"])), fields)
            if not all(column.ndim == 1 and np.isfinite(column).all() for column in fields.values()):
                raise ValueError("a score is not a number")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}: its scores per question are damaged ({error!r}); score the answers again"
            ) from None
        if any(len(column) != len(units.ids) for column in (units.groups, *fields.values())):
            raise DataError(f"{where}: its scores per question differ in number; score the answers again")
        return units


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def build_units(
    benchmark: Benchmark, scored: Sequence[tuple[str, str, Mapping[str, Any], Mapping[str, Fields]]]
) -> Units:
    """Build units from scored questions.

    Args:
        scored: (id, group, question line, metric -> fields) of every question; a metric that left the question out
            has no fields.
    """
    names = list(dict.fromkeys(metric for metrics in benchmark.metrics.values() for metric in metrics))
    keys = {METRICS[name].unit_key for name in names}
    key = keys.pop() if len(keys) == 1 else None
    members: dict[str, list[tuple[str, Mapping[str, Fields]]]] = {}
    for question_id, group, line, fields in scored:
        unit = f"{group}/{line[key]}" if key and line.get(key) is not None else question_id
        members.setdefault(unit, []).append((group, fields))
    columns: dict[str, list[float]] = {f"{m}.{f}": [] for m in names for f in (COUNTED, *METRICS[m].fields)}
    for parts in members.values():
        for name in names:
            metric = METRICS[name]
            given = [fields[name] for _, fields in parts if name in fields]
            sums = {field: sum(fields.get(field, 0.0) for fields in given) for field in metric.fields}
            combined = metric.combine(given) if metric.combine and given else {}
            for field, value in {COUNTED: len(given), **sums, **combined}.items():
                columns[f"{name}.{field}"].append(float(value))
    groups = tuple(parts[0][0] for parts in members.values())
    return Units(tuple(members), groups, {name: np.array(values) for name, values in columns.items()})


def mean_units(runs: Sequence[Units]) -> Units:
    """Return the mean of every field over several runs, by question.

    Raises:
        DataError: the runs answered different questions, or were scored by different metrics.
    """
    first = runs[0]
    totals = {field: np.zeros(len(first.ids)) for field in first.fields}
    for units in runs:
        aligned = _align(first, units)
        for field, values in aligned.fields.items():
            totals[field] += values
    return Units(first.ids, first.groups, {field: values / len(runs) for field, values in totals.items()})


def _align(first: Units, second: Units) -> Units:
    """Return `second` with its units in the order of `first`. Raises DataError if they are not the same."""
    order = {unit: n for n, unit in enumerate(second.ids)}
    if dict(zip(first.ids, first.groups, strict=True)) != dict(zip(second.ids, second.groups, strict=True)):
        only = len(set(first.ids) ^ set(second.ids))
        raise DataError(
            f"{count_of(only, 'question')} found in only one of the runs; score both runs on the same questions"
        )
    if set(first.fields) != set(second.fields):
        raise DataError("the scores per question of the two runs have different fields; score both again")
    positions = np.array([order[unit] for unit in first.ids])
    return Units(first.ids, first.groups, {field: second.fields[field][positions] for field in first.fields})


def statistic(name: str, numbers: Mapping[str, Number], fields: Sequence[str]) -> Statistic:
    """Return the number `name`, in percent, as a function of the groups' sums; NaN if its denominator is 0."""
    number = numbers[name]
    if number.value is None:
        parts = [statistic(part, numbers, fields) for part in (*number.sum, *number.mean)]
        divisor = len(parts) if number.mean else 1
        return lambda sums: np.sum([part(sums) for part in parts], axis=0) / divisor
    top = fields.index(number.value)
    bottom = [fields.index(field) for field in denominator(number)]

    def ratio(sums: Sums) -> Array:
        pooled = _pooled(number, sums)
        below = pooled[:, bottom].sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(below > 0, PERCENT * number.scale * pooled[:, top] / below, math.nan)

    return ratio


def _pooled(number: Number, sums: Sums) -> Array:
    """Return the sums of a ratio's fields over its groups, `[B, F]`; zeros if no question is of these groups."""
    chosen = [values for group, values in sums.items() if not number.groups or group in number.groups]
    return np.sum(chosen, axis=0) if chosen else np.zeros_like(next(iter(sums.values())))


def denominator(number: Number) -> list[str]:
    """Return the fields whose sums form the denominator."""
    assert number.value is not None
    return number.of or [f"{number.value.partition('.')[0]}.{COUNTED}"]


def is_share(number: Number) -> bool:
    """Whether the number is a share of questions that are each right or wrong."""
    if number.value is None or number.scale != 1 or number.of:
        return False
    name, _, field = number.value.partition(".")
    return field in METRICS[name].binary and METRICS[name].unit_key is None


def share_entry(k: int, n: int) -> dict[str, Any]:
    """Return the share k/n as a number's entry, see `compute_numbers`, with Wilson's interval."""
    if not n:
        return {"value": None, "low": None, "high": None, "interval": "wilson", "k": k, "n": n}
    low, high = (PERCENT * end for end in intervals.wilson_interval(k, n))
    return {"value": PERCENT * k / n, "low": low, "high": high, "interval": "wilson", "k": k, "n": n}


def compute_numbers(
    benchmark: Benchmark, units: Units, *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, dict[str, Any]]:
    """Return an entry for every number.

    An entry has `value`, `low` and `high` in percent (None if there is nothing to divide by), `interval` (`wilson` or
    `bootstrap`) and, for ratios, `k` and `n`, the sums above and below the line.
    """
    rows, fields = units.rows(), list(units.fields)
    numbers = benchmark.expand_numbers(benchmark.groups or list(rows))
    observed = group_sums(rows)
    resampled: dict[str, Array] | None = None
    results: dict[str, dict[str, Any]] = {}
    for name, number in numbers.items():
        ratio: dict[str, Any] = {}
        if number.value is not None:
            pooled = _pooled(number, observed)[0]
            ratio["k"] = _plain(number.scale * pooled[fields.index(number.value)])
            ratio["n"] = _plain(sum(pooled[fields.index(field)] for field in denominator(number)))
        if is_share(number):
            results[name] = share_entry(int(ratio["k"]), int(ratio["n"]))
            continue
        if resampled is None:
            resampled = intervals.bootstrap_sums(rows, resamples=resamples, seed=seed)
        function = statistic(name, numbers, fields)
        value = _finite(float(function(observed)[0]))
        low, high = (None, None) if value is None else map(_finite, intervals.percentile_interval(function(resampled)))
        results[name] = {"value": value, "low": low, "high": high, "interval": "bootstrap", **ratio}
    return results


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare_units(
    benchmark: Benchmark,
    name: str,
    first: Units,
    second: Units,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    averaged: bool = False,
) -> dict[str, Any]:
    """Compare a number between two runs, paired by question.

    Args:
        averaged: The fields are means over several runs (`mean_units`), for which McNemar's test has no meaning.

    Returns:
        `difference` (second - first, percentage points) with its interval `low`..`high`, `test` (`mcnemar` or
        `permutation`), `p_value`, and the discordant units: `better` and `worse` for 0/1 shares whose denominator has
        the same questions in both runs, else `changed`.

    Raises:
        DataError: the runs answered different questions.
    """
    aligned, fields = _align(first, second), list(first.fields)
    one, two = first.rows(), aligned.rows()
    numbers = benchmark.expand_numbers(benchmark.groups or list(one))
    number, function = numbers[name], statistic(name, numbers, fields)
    difference = float(function(group_sums(two))[0] - function(group_sums(one))[0])
    low, high = map(_finite, intervals.difference_interval(one, two, function, resamples=resamples, seed=seed))
    result: dict[str, Any] = {"number": name, "difference": _finite(difference), "low": low, "high": high}
    ratios = _ratios(name, numbers)
    involved = [group for group in one if any(not ratio.groups or group in ratio.groups for ratio in ratios)]
    counted = [fields.index(field) for field in denominator(number)] if number.value else []
    # McNemar's test needs answers that are right or wrong: none may leave the denominator in only one of the runs.
    if (
        not averaged
        and is_share(number)
        and all((one[group][:, counted] == two[group][:, counted]).all() for group in involved)
    ):
        index = fields.index(number.value or "")
        change = np.concatenate([two[group][:, index] - one[group][:, index] for group in involved])
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        p_value = intervals.mcnemar_exact(worse, better)
        return result | {"test": "mcnemar", "p_value": p_value, "better": better, "worse": worse}
    used = dict.fromkeys(field for ratio in ratios for field in (ratio.value or "", *denominator(ratio)))
    columns = [fields.index(field) for field in used]
    changed = sum(int((one[g][:, columns] != two[g][:, columns]).any(axis=1).sum()) for g in involved)
    p_value = intervals.permutation_p_value(one, two, function, resamples=resamples, seed=seed)
    return result | {"test": "permutation", "p_value": p_value, "changed": changed}


def _ratios(name: str, numbers: Mapping[str, Number]) -> list[Number]:
    """Return the ratios that the number `name` is made of: itself, or those of its parts."""
    number = numbers[name]
    if number.value is not None:
        return [number]
    return [ratio for part in (*number.sum, *number.mean) for ratio in _ratios(part, numbers)]

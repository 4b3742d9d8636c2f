"""The numbers of a study's finished cells, and the statistics over seeds and over questions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_mole.common.errors import ConfigError
from llava_mole.common.files import read_json
from llava_mole.common.text import count_of
from llava_mole.eval.report.compare import stored_benchmark
from llava_mole.eval.scoring.aggregate import Units, compare_units, mean_units
from llava_mole.eval.scoring.intervals import LEVEL, RESAMPLES, SEED, holm_adjusted
from llava_mole.eval.scoring.score import read_score_file
from llava_mole.study.cells import RUN, Cell, Plan
from llava_mole.study.definition import Study
from llava_mole.study.runner import DONE, is_done
from llava_mole.train.tracker import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval."""

    values: tuple[float, ...]
    mean: float
    half: float | None
    """Half the width of the interval; None for one seed."""

    @property
    def text(self) -> str:
        """For example `48.2 ± 1.3`."""
        return f"{self.mean:.1f}" + ("" if self.half is None else f" ± {self.half:.1f}")


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values with Student's interval: mean ± t(0.975, n - 1) s / sqrt(n)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(tuple(values), mean, None)
    quantile = float(_student().ppf((1 + LEVEL) / 2, len(values) - 1))
    return Estimate(tuple(values), mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values)))


def paired_t(differences: Sequence[float]) -> float | None:
    """p of the two-sided paired t-test over seeds; None where it has no meaning (one seed, or no variation).

    Equal differences of scores `100 k / n` vary by rounding, which is no variation.
    """
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    if spread <= 1e-9 * max(1.0, *map(abs, differences)):
        return None
    t = float(np.mean(differences)) / (spread / math.sqrt(len(differences)))
    return 2.0 * float(_student().sf(abs(t), len(differences) - 1))


def _student() -> Any:
    try:
        from scipy.stats import t
    except ImportError:
        raise ConfigError("intervals over seeds need scipy: pip install 'llava_mole[eval]'") from None
    return t


@dataclass(frozen=True)
class RunResult:
    """A finished run of one arm and seed."""

    cell: Cell
    scores: Mapping[str, dict[str, Any]]
    """The base's name of a benchmark -> the content of its score file, with its path as `score_file`."""
    cost: Mapping[str, Any]
    """See `read_cost`."""

    def number(self, place: str) -> float | None:
        """The value of `BENCHMARK.NUMBER`, in percent; None if it was not computed."""
        benchmark, _, name = place.partition(".")
        entry = self.scores.get(benchmark, {}).get("numbers", {}).get(name)
        return None if entry is None else entry["value"]


@dataclass(frozen=True)
class Results:
    """What a study has found so far."""

    study: Study
    plan: Plan
    runs: Mapping[str, Mapping[int, RunResult]]
    """Arm -> seed -> its run, those that are finished."""

    def values(self, arm: str, column: str) -> dict[int, float]:
        """Seed -> the arm's value in a column of the base."""
        place = self.study.bases[arm].columns[column].number
        found = {seed: run.number(place) for seed, run in self.runs[arm].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, arm: str, column: str) -> Estimate | None:
        """Mean and interval over the arm's seeds; None without any."""
        values = list(self.values(arm, column).values())
        return estimate(values) if values else None

    @property
    def columns(self) -> list[str]:
        """The base's columns whose benchmark has questions in the study's split."""
        there = self.study.base.benchmarks[self.study.split]
        return [name for name, c in self.study.base.columns.items() if c.number.partition(".")[0] in there]


def collect(study: Study, plan: Plan) -> Results:
    """Read the finished cells. A run counts once all of its evaluations are finished.

    Raises:
        DataError: a score file is damaged.
        ConfigError: a column names a number that its benchmark does not have.
    """
    runs: dict[str, dict[int, RunResult]] = {arm: {} for arm in study.arms}
    for (arm, seed), name in plan.runs.items():
        evaluations = {own: plan.cells[cell] for own, cell in plan.evaluations[arm, seed].items()}
        if not all(is_done(cell) for cell in (plan.cells[name], *evaluations.values())):
            continue
        scores = {
            own: read_score_file(cell.outputs[0]) | {"score_file": str(cell.outputs[0])}
            for own, cell in evaluations.items()
        }
        cost = read_cost(plan.cells[name], list(evaluations.values()))
        runs[arm][seed] = RunResult(plan.cells[name], scores, cost)
        for column, spec in study.bases[arm].columns.items():
            own, _, number = spec.number.partition(".")
            if own in scores and number not in scores[own]["numbers"]:
                raise ConfigError(
                    f"{study.bases[arm].path}: columns.{column}.number is {spec.number!r}; the benchmark has "
                    f"{', '.join(scores[own]['numbers'])}"
                )
    return Results(study, plan, runs)


def read_cost(run: Cell, evaluations: Sequence[Cell]) -> dict[str, Any]:
    """What a run cost: `trainable` by part, `steps`, `samples`, `tokens`, `seconds`, `memory`, `evaluation_s`.

    `tokens` and `seconds` are sums over the steps; repeated steps of an interrupted run count once. `memory` is the
    peak of the GPU in bytes, or of the process without one; None for a run of a version that did not record it.
    """
    summary = read_json(run.folder / RUN / "summary.json")
    entries = read_metrics(run.folder / RUN / METRICS_FILE)
    peak = summary.get("peak_memory_bytes") or {}
    return {
        "trainable": summary.get("trainable_parameters"),
        "steps": summary["step"],
        "samples": summary["samples_consumed"],
        "tokens": sum(entry["tokens"] for entry in entries),
        "seconds": sum(entry["step_s"] for entry in entries),
        "memory": peak.get("gpu", peak.get("host")),
        "evaluation_s": sum(read_json(cell.folder / DONE)["seconds"] for cell in evaluations),
    }


def compare_arms(results: Results, *, resamples: int = RESAMPLES, seed: int = SEED) -> list[dict[str, Any]]:
    """Test the differences that the study names, in every column.

    There are two tests, which ask different things. Over seeds: would other seeds of the training agree? It is a paired
    t-test, and its interval Student's, over the seeds that both arms have. Over questions: would other questions
    agree? The scores of every question are averaged over these seeds, then tested as between two runs. Holm's
    adjustment is over all tests of a kind in the study.

    Returns:
        Rows with `second`, `first`, `column`, `seeds`, `difference`, `by_seed`, and for `seeds` and `questions`:
        `low`, `high`, `p_value` (None where there is no test), `p_value_holm`.
    """
    rows: list[dict[str, Any]] = []
    for second, first in results.study.compare:
        for column in results.columns:
            one, two = results.values(first, column), results.values(second, column)
            shared = [s for s in one if s in two]
            if not shared:
                continue
            differences = [two[s] - one[s] for s in shared]
            over_seeds = estimate(differences)
            half = over_seeds.half
            rows.append(
                {
                    "second": second,
                    "first": first,
                    "column": column,
                    "seeds": shared,
                    "difference": over_seeds.mean,
                    "by_seed": differences,
                    "over_seeds": {
                        "low": None if half is None else over_seeds.mean - half,
                        "high": None if half is None else over_seeds.mean + half,
                        "p_value": paired_t(differences),
                    },
                    "over_questions": _over_questions(results, first, second, column, shared, resamples, seed),
                }
            )
    for kind in ("over_seeds", "over_questions"):
        tested = [row[kind] for row in rows if row[kind]["p_value"] is not None]
        for entry, adjusted in zip(tested, holm_adjusted([t["p_value"] for t in tested]), strict=True):
            entry["p_value_holm"] = adjusted
    return rows


def _over_questions(
    results: Results, first: str, second: str, column: str, seeds: Sequence[int], resamples: int, seed: int
) -> dict[str, Any]:
    """The paired test of a number between two arms over questions, their scores averaged over seeds."""
    own, _, number = results.study.base.columns[column].number.partition(".")
    scores = {arm: [results.runs[arm][s].scores[own] for s in seeds] for arm in (first, second)}
    kinds = {(s["question_set"], str(s["definition"]["numbers"])) for arm in scores.values() for s in arm}
    if len(kinds) > 1:
        return {"low": None, "high": None, "p_value": None, "test": "other questions"}
    units = [
        mean_units([Units.from_dict(s["per_question"], s["score_file"]) for s in scores[arm]])
        for arm in (first, second)
    ]
    benchmark = stored_benchmark(scores[first][0])
    found = compare_units(benchmark, number, *units, resamples=resamples, seed=seed, averaged=len(seeds) > 1)
    return {key: found[key] for key in ("low", "high", "p_value", "test")}


def shares(results: Results, arm: str) -> dict[int, dict[str, Any]]:
    """The data of the paper's Figure 3, by seed: label -> `samples`, and by layer and expert `mean` and `std`.

    Mean and standard deviation are over the samples of all groups that the label covers (n - 1).
    """
    found: dict[int, dict[str, Any]] = {}
    base = results.study.bases[arm]
    for seed, run in results.runs[arm].items():
        by_label: dict[str, Any] = {}
        for label, place in base.routing.items():
            benchmark, _, group = place.partition(".")
            file = run.scores.get(benchmark, {}).get("routing")
            if not file:
                continue
            groups = read_json(Path(file))["groups"]
            chosen = [groups[group]] if group in groups else ([] if group else list(groups.values()))
            if chosen:
                by_label[label] = _pool([entry["all"] for entry in chosen])
        if by_label:
            found[seed] = by_label
    return found


def _pool(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the shares over the samples of several groups, from those of each group."""
    counts = np.array([part["samples"] for part in parts], dtype=float)
    means = np.array([part["sample_mean"] for part in parts])  # [groups, layers, experts]
    stds = np.array([part["sample_std"] for part in parts])
    n = counts.sum()
    mean = np.einsum("g,glk->lk", counts, means) / n
    squares = np.einsum("g,glk->lk", counts - 1, stds**2) + np.einsum("g,glk->lk", counts, (means - mean) ** 2)
    return {"samples": int(n), "mean": mean.tolist(), "std": np.sqrt(squares / max(1.0, n - 1)).tolist()}


def progress(study: Study, plan: Plan) -> str:
    """How far the study is, in a sentence."""
    finished = sum(is_done(cell) for cell in plan.cells.values())
    return f"{finished} of {count_of(len(plan.cells), 'cell')} finished"

"""Compares runs on benchmarks: the numbers side by side with published rows, and paired tests against the first run."""

from collections.abc import Mapping
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.aggregate import Units, compare_units
from llava_mole.eval.benchmarks.benchmark import Benchmark, check_benchmark, read_value
from llava_mole.eval.intervals import RESAMPLES, SEED, holm_adjusted
from llava_mole.eval.report_runs import Run

SIGNIFICANT = 0.05


def stored_benchmark(scores: Mapping[str, Any]) -> Benchmark:
    """The definition that a score file was made with. Raises DataError where it is damaged."""
    where = scores["score_file"]
    try:
        benchmark = read_value(Benchmark, scores["definition"], f"{where}: definition")
        check_benchmark(benchmark, f"{where}: definition")
    except ConfigError as error:
        raise DataError(f"{where}: its definition is damaged ({error}); score again") from None
    absent = [name for name in dict.fromkeys((*benchmark.columns, benchmark.primary)) if name not in scores["numbers"]]
    if absent:
        raise DataError(
            f"{where}: its definition shows {', '.join(map(str, absent))}, which it has no number for; score again"
        )
    return benchmark


def build_benchmarks(
    runs: Mapping[str, Run], *, published: str = "main", resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """What the report says about each benchmark, as plain values.

    Args:
        published: Which published rows: `main`, `all` or `none`.

    Returns:
        Benchmark -> {`title`, `primary`, `columns`, `compared` (the columns that were published), `summed` (those that
        are sums), `runs`: name -> {`numbers`, `prompt`, `total`, `complete`, `empty_answers`, `score_file`},
        `published`: rows, `comparisons`: rows, their `p_value_holm` over all tests of the report, `warnings`, `notes`}.
    """
    found = {name: stored_benchmark(scores) for run in runs.values() for name, scores in run.benchmarks.items()}
    names = sorted(found, key=lambda name: (found[name].position, name))
    report = {name: _one(name, runs, published, resamples, seed) for name in names}
    comparisons = [row for entry in report.values() for row in entry["comparisons"]]
    for row, adjusted in zip(comparisons, holm_adjusted([row["p_value"] for row in comparisons]), strict=True):
        row["p_value_holm"] = adjusted
    return report


def _one(name: str, runs: Mapping[str, Run], published: str, resamples: int, seed: int) -> dict[str, Any]:
    scored = {run: entry.benchmarks[name] for run, entry in runs.items() if name in entry.benchmarks}
    first = next(iter(scored.values()))
    benchmark = stored_benchmark(first)
    columns = benchmark.columns or [benchmark.primary or next(iter(first["numbers"]))]
    keys = ("prompt", "total", "complete", "empty_answers", "dropped", "score_file", "question_set")
    comparisons, warnings = _compare(benchmark, scored, columns, resamples, seed)
    known = {column for row in benchmark.published for column in row.values}
    rows = [row for row in benchmark.published if published == "all" or (published == "main" and row.main)]
    return {
        "title": benchmark.title,
        "primary": benchmark.primary,
        "columns": columns,
        "compared": [c for c in columns if c in known or (known and c == benchmark.primary)] or columns,
        "summed": [column for column in columns if first["definition"]["numbers"].get(column, {}).get("sum")],
        "runs": {
            run: {"numbers": {column: scores["numbers"].get(column) for column in columns}}
            | {key: scores.get(key) for key in keys}
            for run, scores in scored.items()
        },
        "published": [{"model": row.model, "source": row.source, "values": dict(row.values)} for row in rows],
        "comparisons": comparisons,
        "warnings": warnings,
        "notes": benchmark.notes,
    }


def _compare(
    benchmark: Benchmark, scored: Mapping[str, Mapping[str, Any]], columns: list[str], resamples: int, seed: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every later run against the first, and why some are not compared or only with care."""
    reference, *others = scored
    base = scored[reference]
    units = Units.from_dict(base["per_question"], base["score_file"])
    comparisons: list[dict[str, Any]] = []
    warnings = [
        f"{run}: {scores['total']} questions, the complete set has {benchmark.data.count}"
        for run, scores in scored.items()
        if benchmark.data.count not in (None, scores["total"])
    ]
    for other in others:
        scores = scored[other]
        if scores["question_set"] != base["question_set"]:
            warnings.append(
                f"{reference} and {other} were scored on different question sets ({base['total']} and "
                f"{scores['total']} questions): not compared"
            )
            continue
        different = [key for key in ("metrics", "numbers") if scores["definition"][key] != base["definition"][key]]
        if different:
            warnings.append(
                f"{reference} and {other} were scored by different {' and '.join(different)}: not compared; score again"
            )
            continue
        if scores["prompt"] != base["prompt"]:
            warnings.append(
                f"{reference} was asked with prompt {base['prompt']['variant']}, {other} with "
                f"{scores['prompt']['variant']}: the comparison is of model and prompt together"
            )
        second = Units.from_dict(scores["per_question"], scores["score_file"])
        for column in columns:
            if base["numbers"][column]["value"] is None or scores["numbers"][column]["value"] is None:
                continue
            result = compare_units(benchmark, column, units, second, resamples=resamples, seed=seed)
            comparisons.append({"first": reference, "second": other, **result})
    return comparisons, warnings

"""Compares runs on benchmarks: the numbers beside published rows, and paired tests between the runs."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.benchmarks.benchmark import Benchmark
from llava_mole.eval.benchmarks.registry import read_definition
from llava_mole.eval.scoring.aggregate import Units, compare_units
from llava_mole.eval.scoring.intervals import RESAMPLES, SEED, holm_adjusted
from llava_mole.eval.scoring.score import SCORE_SUFFIX, read_score_file

Runs = Mapping[str, Mapping[str, dict[str, Any]]]
"""Run -> benchmark -> the content of its score file, with its path as `score_file`."""
SIGNIFICANT = 0.05


def split_argument(argument: str, *, named: bool) -> tuple[str, Path]:
    """Split `NAME=PATH`; a `PATH` alone is named after its directory or file.

    Raises:
        ConfigError: no name where one is needed (`named`).
    """
    name, separator, location = argument.partition("=")
    if separator and name and not Path(argument).exists():
        return name, Path(location)
    if named:
        raise ConfigError(f"--runs {argument!r}: give NAME=PATH, for example mole=answers/mole{SCORE_SUFFIX}")
    path = Path(argument)
    if path.name == "eval" and path.parent.name:  # where `llava-mole eval` puts a run's scores
        return path.parent.name, path
    return path.name.removesuffix(SCORE_SUFFIX) or argument, path


def read_run(name: str, path: Path) -> dict[str, dict[str, Any]]:
    """Read the score file `path`, or all score files of the directory `path` or its `eval`, by benchmark.

    Raises:
        ConfigError: no score file, or two of the same benchmark.
        DataError: a file that `read_score_file` refuses.
    """
    given = f"--runs {name}={path}"
    files = [path]
    if path.is_dir():
        folder = path if any(path.glob(f"*{SCORE_SUFFIX}")) else path / "eval"
        files = sorted(folder.glob(f"*{SCORE_SUFFIX}"))
        if not files:
            raise ConfigError(f"{given}: 0 files *{SCORE_SUFFIX} in {path}; `llava-mole eval` writes them")
    elif not path.is_file():
        raise ConfigError(f"{given}: {path} does not exist; `llava-mole eval` writes it")
    run: dict[str, dict[str, Any]] = {}
    for file in files:
        scores = read_score_file(file)
        benchmark = scores["benchmark"]
        if benchmark in run:
            other = run[benchmark]["score_file"]
            raise ConfigError(f"{given}: both {other} and {file} hold scores of {benchmark}; name the file")
        run[benchmark] = scores | {"score_file": str(file.resolve())}
    return run


def read_runs(named: Sequence[str], positional: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Read all runs by name, in order. Raises ConfigError if a name comes twice, and as `read_run` does."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for argument, must_name in [*((a, False) for a in positional), *((a, True) for a in named)]:
        name, path = split_argument(argument, named=must_name)
        if name in runs:
            raise ConfigError(f"{argument}: the name {name!r} is given twice; give NAME=PATH with different names")
        runs[name] = read_run(name, path)
    return runs


def stored_benchmark(scores: Mapping[str, Any]) -> Benchmark:
    """Return the definition that a score file was made with. Raises DataError if it is damaged."""
    where = scores["score_file"]
    try:
        benchmark = read_definition(scores["definition"], f"{where}: definition")
    except ConfigError as error:
        raise DataError(f"{where}: its definition is damaged ({error}); score the answers again") from None
    absent = [name for name in dict.fromkeys((*benchmark.columns, benchmark.primary)) if name not in scores["numbers"]]
    if absent:
        raise DataError(
            f"{where}: its definition shows {', '.join(map(str, absent))}, for which it has no number; score the "
            "answers again"
        )
    return benchmark


def build_benchmarks(
    runs: Runs, *, published: str = "main", reference: str | None = None, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """Build the report's content on each benchmark, as plain values.

    Args:
        published: Which published rows: `main`, `all` or `none`.
        reference: The run that the others are compared with. None compares every run with every earlier one.

    Returns:
        Benchmark -> {`title`, `primary`, `columns`, `compared` (the columns that were published), `summed` (those that
        are sums), `runs`: name -> {`numbers`, `prompt`, `total`, `empty_answers`, `model_path`, `answers`,
        `score_file` and so on}, `published`: rows, `comparisons`: rows, whose `p_value_holm` is over all tests of the
        report, `warnings`, `notes`}.

    Raises:
        ConfigError: there is no run `reference`.
    """
    if reference is not None and reference not in runs:
        raise ConfigError(f"--reference {reference!r}: no such run; there are {', '.join(runs)}")
    found = {name: stored_benchmark(scores) for run in runs.values() for name, scores in run.items()}
    names = sorted(found, key=lambda name: (found[name].position, name))
    report = {name: _one(name, runs, published, reference, resamples, seed) for name in names}
    comparisons = [row for entry in report.values() for row in entry["comparisons"]]
    for row, adjusted in zip(comparisons, holm_adjusted([row["p_value"] for row in comparisons]), strict=True):
        row["p_value_holm"] = adjusted
    return report


def _one(name: str, runs: Runs, published: str, reference: str | None, resamples: int, seed: int) -> dict[str, Any]:
    scored = {run: benchmarks[name] for run, benchmarks in runs.items() if name in benchmarks}
    first = next(iter(scored.values()))
    benchmark = stored_benchmark(first)
    columns = benchmark.columns or [benchmark.primary or next(iter(first["numbers"]))]
    keys = ["prompt", "total", "complete", "empty_answers", "dropped", "question_set"]
    keys += ["model_path", "answers", "routing", "score_file"]
    comparisons, warnings = _compare(benchmark, scored, columns, reference, resamples, seed)
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
    benchmark: Benchmark,
    scored: Mapping[str, Mapping[str, Any]],
    columns: list[str],
    reference: str | None,
    resamples: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare the runs in pairs. Returns the comparisons, and warnings about what limits them."""
    comparisons: list[dict[str, Any]] = []
    warnings = [
        f"{run}: {scores['total']} questions, the complete set has {benchmark.data.count}"
        for run, scores in scored.items()
        if benchmark.data.count not in (None, scores["total"])
    ]
    units = {run: Units.from_dict(scores["per_question"], scores["score_file"]) for run, scores in scored.items()}
    for one, other in _pairs(list(scored), reference):
        base, scores = scored[one], scored[other]
        problem, fatal = _mismatch(one, base, other, scores)
        warnings += [problem] if problem else []
        if fatal:
            continue
        for column in columns:
            if base["numbers"][column]["value"] is None or scores["numbers"][column]["value"] is None:
                continue
            result = compare_units(benchmark, column, units[one], units[other], resamples=resamples, seed=seed)
            comparisons.append({"first": one, "second": other, **result})
    return comparisons, warnings


def _pairs(names: Sequence[str], reference: str | None) -> list[tuple[str, str]]:
    """The pairs (first, second) to compare: all, the later run second, or those with the reference first."""
    if reference is None:
        return list(itertools.combinations(names, 2))
    return [(reference, name) for name in names if name != reference] if reference in names else []


def _mismatch(one: str, base: Mapping[str, Any], other: str, scores: Mapping[str, Any]) -> tuple[str | None, bool]:
    """What limits a comparison of two runs, if anything, and whether it forbids it."""
    if scores["question_set"] != base["question_set"]:
        counts = f"{base['total']} and {scores['total']} questions"
        return f"{one} and {other} were scored on different question sets ({counts}): not compared", True
    different = [key for key in ("metrics", "numbers") if scores["definition"][key] != base["definition"][key]]
    if different:
        what = " and ".join(different)
        return f"{one} and {other} were scored by different {what}: not compared; score again", True
    if scores["prompt"] != base["prompt"]:
        return (
            f"{one} was asked with prompt {base['prompt']['variant']}, {other} with {scores['prompt']['variant']}: "
            "the comparison is of model and prompt together"
        ), False
    return None, False

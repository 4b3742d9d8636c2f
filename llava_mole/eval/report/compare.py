"""Compares runs on benchmarks: the numbers side by side with published rows, and paired tests against the first run."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.benchmarks.benchmark import Benchmark, check_benchmark, read_value
from llava_mole.eval.scoring.aggregate import Units, compare_units
from llava_mole.eval.scoring.intervals import RESAMPLES, SEED, holm_adjusted
from llava_mole.eval.scoring.score import SCORE_SUFFIX

DOMAIN_KEYS = ("domains", "model_path", "questions", "image_folder", "answers", "routing")
BENCHMARK_KEYS = ("numbers", "primary", "definition", "per_question", "question_set", "prompt", "total")
TYPES = {
    **{"benchmark": str, "numbers": dict, "prompt": dict, "total": int, "empty_answers": int, "dropped": dict},
    **{"domains": dict, "questions": list},
}


@dataclass
class Run:
    """One run's scores."""

    name: str
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Benchmark -> score file."""
    domains: dict[str, Any] | None = None
    """The score file with accuracies per domain, if there is one."""


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises DataError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: {type(value).__name__} found, an object is needed")
    return value


def split_argument(argument: str, *, named: bool) -> tuple[str, Path]:
    """Name and path of `NAME=PATH`, or of `PATH`, which is named after its directory or file.

    Raises:
        ConfigError: no name where one is needed (`named`).
    """
    name, separator, location = argument.partition("=")
    if separator and name and not Path(argument).exists():
        return name, Path(location)
    if named:
        raise ConfigError(f"--runs {argument!r}: give NAME=PATH, for example mole=answers/mole{SCORE_SUFFIX}")
    path = Path(argument)
    if path.name == "eval" and path.parent.name:  # where `scripts/quickstart.sh` puts a run's scores
        return path.parent.name, path
    return path.name.removesuffix(SCORE_SUFFIX) or argument, path


def read_run(name: str, path: Path) -> Run:
    """The score file `path`, or all score files of the directory `path` or its `eval`.

    Raises:
        ConfigError: no score file, or two of the same benchmark.
        DataError: a file that neither `llava-mole eval` nor `llava-mole score` wrote.
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
    run = Run(name)
    for file in files:
        _add(run, file, read_json_object(file), given)
    return run


def _add(run: Run, path: Path, scores: dict[str, Any], given: str) -> None:
    benchmark = scores.get("benchmark")
    needed = DOMAIN_KEYS if benchmark is None else BENCHMARK_KEYS
    absent = [key for key in needed if key not in scores]
    if absent:
        raise DataError(f"{path}: no {', '.join(absent)} in it; give a score file that `llava-mole eval` wrote")
    _check_values(scores, path)
    scores = scores | {"score_file": str(path.resolve())}
    if benchmark is not None:
        if benchmark in run.benchmarks:
            other = run.benchmarks[benchmark]["score_file"]
            raise ConfigError(f"{given}: both {other} and {path} hold scores of {benchmark}; name the file")
        run.benchmarks[benchmark] = scores
    if "domains" in scores:
        if run.domains is not None:
            raise ConfigError(f"{given}: both {run.domains['score_file']} and {path} hold accuracies; name the file")
        run.domains = scores


def _check_values(scores: Mapping[str, Any], path: Path) -> None:
    """Raise DataError where what a report shows is not what `llava-mole eval` and `llava-mole score` write."""

    def check(name: str, whole: bool, value: Any) -> None:
        if not whole:
            raise DataError(f"{path}: {name} is damaged ({value!r}); score again")

    for key, kind in TYPES.items():
        if key in scores:
            check(key, isinstance(scores[key], kind), scores[key])
    for name, entry in scores.get("numbers", {}).items():
        ratio = ("k", "n") if isinstance(entry, dict) and "k" in entry else ()
        empty = isinstance(entry, dict) and entry.get("value", 0) is None
        check(f"number {name!r}", empty or _has_numbers(entry, "value", "low", "high", *ratio), entry)
    if "prompt" in scores:
        check("prompt", isinstance(scores["prompt"].get("variant"), str), scores["prompt"])
    if "domains" in scores:
        check("domains", bool(scores["domains"]), scores["domains"])
    for name, entry in scores.get("domains", {}).items():
        keys = ("correct", "total", "accuracy", "low", "high")
        whole = _has_numbers(entry, *keys) and _has_numbers(entry.get("majority"), *keys)
        check(f"domain {name!r}", whole, entry)


def _has_numbers(entry: Any, *keys: str) -> bool:
    """Whether these are finite numbers in it; NaN and infinity are no JSON."""
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), (int, float)) and abs(entry[key]) < math.inf for key in keys
    )


def read_runs(named: Sequence[str], positional: Sequence[str]) -> dict[str, Run]:
    """All runs by name, in order. Raises ConfigError where a name comes twice."""
    runs: dict[str, Run] = {}
    arguments = [(argument, False) for argument in positional] + [(argument, True) for argument in named]
    for argument, must_name in arguments:
        name, path = split_argument(argument, named=must_name)
        run = read_run(name, path)
        if name in runs:
            raise ConfigError(f"{argument}: the name {name!r} is given twice; give NAME=PATH with different names")
        runs[name] = run
    return runs


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

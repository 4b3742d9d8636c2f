"""Reads the score files that a report compares."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.score import SCORE_SUFFIX

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

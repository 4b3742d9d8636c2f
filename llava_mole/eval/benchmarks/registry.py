"""Finds benchmarks by name and checks everything that a definition names: metrics, numbers, converter, submission.

A new benchmark is a YAML file in `configs/benchmarks/`, a converter in `official/` if its official files are not
question files already, and a metric in `eval/metrics/` if none there fits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError
from llava_mole.eval.benchmarks.benchmark import ANY_GROUP, COUNTED, Benchmark, Number, load_yaml, read_value
from llava_mole.eval.benchmarks.official import CONVERTERS
from llava_mole.eval.benchmarks.submission import WRITERS
from llava_mole.eval.metrics.table import METRICS, get_metric

REPOSITORY = Path(__file__).parents[3]
FOLDER = Path("configs/benchmarks")


def benchmark_folders() -> list[Path]:
    """Return the folders to search: below the working directory, then below the repository."""
    return [folder for folder in (FOLDER, REPOSITORY / FOLDER) if folder.is_dir()]


def list_benchmarks() -> list[str]:
    """Return the names of the benchmarks that come with the project, sorted."""
    return sorted({path.stem for folder in benchmark_folders() for path in folder.glob("*.yaml")})


def get_benchmark(name_or_path: str) -> Benchmark:
    """Return the benchmark of that name, or of that YAML file.

    Raises:
        ConfigError: no such benchmark, or an invalid file.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        found = [folder / f"{name_or_path}.yaml" for folder in benchmark_folders()]
        existing = [file for file in found if file.is_file()]
        if not existing:
            known = ", ".join(list_benchmarks()) or f"none: {FOLDER} is not in the working directory"
            raise ConfigError(f"no benchmark {name_or_path!r}; there are {known}, or give a YAML file")
        path = existing[0]
    elif not path.is_file():
        raise ConfigError(f"{path}: no such file; known benchmarks are {', '.join(list_benchmarks())}")
    benchmark = load_yaml(path, Benchmark)
    if benchmark.name != path.stem:
        raise ConfigError(f"{path}: name is {benchmark.name!r}; it must be the file's, {path.stem!r}")
    check_benchmark(benchmark, f"{path}")
    return benchmark


def read_definition(value: Any, where: str) -> Benchmark:
    """Return the benchmark from the plain values stored with a result. Raises ConfigError if they are not valid."""
    benchmark = read_value(Benchmark, value, where)
    check_benchmark(benchmark, where)
    return benchmark


def check_benchmark(benchmark: Benchmark, where: str) -> None:
    """Raise ConfigError that names the first key of a definition that does not fit the others or the program."""

    def fail(problem: str) -> None:
        raise ConfigError(f"{where}: {problem}")

    data = benchmark.data
    if not data.questions or (data.converter and (len(data.questions) > 1 or "=" in data.questions[0])):
        fail(
            f"data.questions is {data.questions!r}; name at least one file, and with a converter just one, without a "
            "group"
        )
    for group, names in benchmark.metrics.items():
        if group != ANY_GROUP and group not in benchmark.groups:
            fail(f"metrics.{group}: no such group; groups are {', '.join(benchmark.groups) or 'not given'}")
        for name in names:
            get_metric(name)
    used = list(dict.fromkeys(name for names in benchmark.metrics.values() for name in names))
    if len({METRICS[name].unit_key for name in used}) > 1:
        units = ", ".join(f"{name}: {METRICS[name].unit_key or 'question'}" for name in used)
        fail(f"metrics: they count different units ({units}); a benchmark has one unit, so make it two files")
    if data.train_files is not None and used != ["plain_exact"]:
        fail(f"data.train_files: the majority baseline needs the one metric plain_exact; found {used}")
    expanded = benchmark.expand_numbers(benchmark.groups)
    for name, number in expanded.items():
        _check_number(benchmark, name, number, expanded, where)
    for name in (*benchmark.columns, *([benchmark.primary] if benchmark.primary else [])):
        if name not in expanded:
            fail(f"columns or primary name {name!r}; the numbers are {', '.join(expanded) or 'none'}")
    if benchmark.primary is None and benchmark.submission is None:
        fail("it has neither a primary number nor a submission format")
    for row in benchmark.published:
        for name in row.values:
            if name not in expanded:
                fail(f"published {row.model!r} gives {name!r}, which is not a number of this benchmark")
    if benchmark.submission not in (None, *WRITERS):
        fail(f"submission is {benchmark.submission!r}; allowed are {', '.join(WRITERS)}")
    if data.converter not in (None, *CONVERTERS):
        fail(f"data.converter is {data.converter!r}; allowed are {', '.join(CONVERTERS)}")


def _check_number(benchmark: Benchmark, name: str, number: Number, expanded: Mapping[str, Number], where: str) -> None:
    def fail(problem: str) -> None:
        raise ConfigError(f"{where}: numbers.{name}: {problem}")

    if sum(bool(part) for part in (number.value, number.sum, number.mean)) != 1:
        fail("it needs exactly one of value, sum and mean")
    for part in (*number.sum, *number.mean):
        if part not in expanded:
            fail(f"{part!r} is not a number; numbers are {', '.join(expanded)}")
        if list(expanded).index(part) >= list(expanded).index(name):
            fail(f"{part!r} must stand above it")
    for group in number.groups:
        if group not in benchmark.groups:
            fail(f"no group {group!r}; groups are {', '.join(benchmark.groups) or 'not given'}")
    used = {metric for names in benchmark.metrics.values() for metric in names}
    for reference in (*([number.value] if number.value else []), *number.of):
        metric, _, fieldname = reference.partition(".")
        if metric not in used:
            fail(f"{reference!r}: the benchmark does not use a metric {metric!r}")
        if fieldname not in (*METRICS[metric].fields, COUNTED):
            fail(f"{reference!r}: {metric} has {', '.join(METRICS[metric].fields)} and {COUNTED}")

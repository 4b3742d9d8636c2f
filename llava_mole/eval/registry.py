"""Benchmarks by name: each is one YAML file under `configs/benchmarks/` that holds everything that decides its numbers.

A new benchmark is a new file, and a new function in `eval/metrics/` if no metric there fits.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError
from llava_mole.eval.metrics.table import METRICS, get_metric
from llava_mole.eval.strict_yaml import load_yaml

ANY_GROUP = "*"
GROUP = "{group}"
COUNTED = "n"
"""Field that every metric has: 1 for a question in its denominator."""
REPOSITORY = Path(__file__).parent.parent.parent
FOLDER = Path("configs/benchmarks")


@dataclass(frozen=True, kw_only=True)
class BenchmarkData:
    """Where the questions lie and where they come from."""

    folder: str
    """Relative to the data root (`playground/data`)."""
    questions: list[str]
    """Question files in it, `FILE` or `GROUP=FILE`; without a group a question's `category` is its group."""
    images: str = "."
    """Image folder, relative to `folder`; `prepare-benchmark` records another one where the raw data has it."""
    count: int | None = None
    """Questions of the complete set; another number is reported, not refused."""
    train_files: list[str] = field(default_factory=list)
    """`GROUP=FILE` training splits for the majority baseline."""
    converter: str | None = None
    """What `prepare-benchmark` converts the official files with; None where they are question files already."""
    options: dict[str, str] = field(default_factory=dict)
    """The converter's options, such as file names."""
    source: str = ""
    """Where the official data is to be had and how it is laid out."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkPrompt:
    """What is added to a question, and how long an answer may be."""

    suffix: str = ""
    max_new_tokens: int = 128
    variants: dict[str, str] = field(default_factory=dict)
    """Other suffixes by name, for `--prompt-variant`; the name is stored with the result."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number of the benchmark, in percent: a ratio of sums over questions, or a sum or mean of other numbers."""

    value: str | None = None
    """Numerator, `metric.field`."""
    of: list[str] = field(default_factory=list)
    """Denominator, a sum of fields; default `metric.n`, the questions that count."""
    scale: float = 1.0
    """Factor of the numerator (2 for an F1 over predicted plus wanted)."""
    groups: list[str] = field(default_factory=list)
    """Groups whose questions it pools; default all."""
    sum: list[str] = field(default_factory=list)
    mean: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published row."""

    model: str
    source: str
    values: dict[str, float]
    main: bool = True
    """Whether a report shows it unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark."""

    name: str
    title: str
    data: BenchmarkData
    prompt: BenchmarkPrompt = field(default_factory=BenchmarkPrompt)
    groups: list[str] = field(default_factory=list)
    """All groups there may be; a question of another one is an error. Empty: whatever the questions have."""
    metrics: dict[str, list[str]] = field(default_factory=dict)
    """Group, or `*`, to the metrics its questions are scored with."""
    numbers: dict[str, Number] = field(default_factory=dict)
    """By name. A name with `{group}` in it stands for one number a group."""
    primary: str | None = None
    """The number that is compared. None where only a server can score."""
    columns: list[str] = field(default_factory=list)
    """The numbers shown in a report, in order; default the primary one."""
    position: int = 100
    """Place in a report, small ones first; equal ones by name."""
    submission: str | None = None
    """Format of the file that the benchmark's server takes."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the number must know."""
    published: list[Published] = field(default_factory=list)

    def metrics_of(self, group: str) -> list[str]:
        """Names of the metrics for questions of `group`."""
        return self.metrics.get(group, self.metrics.get(ANY_GROUP, []))

    def expand_numbers(self, groups: list[str]) -> dict[str, Number]:
        """The numbers with every `{group}` replaced by each of `groups`."""
        expanded: dict[str, Number] = {}
        for name, number in self.numbers.items():
            if GROUP not in name:
                expanded[name] = number
                continue
            for group in groups:
                expanded[name.replace(GROUP, group)] = dataclasses.replace(
                    number,
                    groups=[group] if number.value else [],
                    sum=[part.replace(GROUP, group) for part in number.sum],
                    mean=[part.replace(GROUP, group) for part in number.mean],
                )
        return expanded

    def to_dict(self) -> dict[str, Any]:
        """As plain values, to store with a result."""
        return dataclasses.asdict(self)


def benchmark_folders() -> list[Path]:
    """Where the files are looked for: below the working directory, then below the repository."""
    return [folder for folder in (FOLDER, REPOSITORY / FOLDER) if folder.is_dir()]


def list_benchmarks() -> list[str]:
    """Names of the benchmarks that come with the project, sorted."""
    return sorted({path.stem for folder in benchmark_folders() for path in folder.glob("*.yaml")})


def get_benchmark(name_or_path: str) -> Benchmark:
    """The benchmark of that name, or of that YAML file.

    Raises:
        ConfigError: no such benchmark, or a file that is not valid.
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


def check_benchmark(benchmark: Benchmark, where: str) -> None:
    """Raise ConfigError that names what refers to something that is not there."""
    from llava_mole.eval.converters import CONVERTERS
    from llava_mole.eval.submission import WRITERS

    def fail(problem: str) -> None:
        raise ConfigError(f"{where}: {problem}")

    questions = benchmark.data.questions
    if not questions or (benchmark.data.converter and (len(questions) > 1 or "=" in questions[0])):
        fail(f"data.questions is {questions!r}; name at least one file, and just one, without a group, for a converter")
    for group, names in benchmark.metrics.items():
        if group != ANY_GROUP and group not in benchmark.groups:
            fail(f"metrics.{group}: no such group; groups are {', '.join(benchmark.groups) or 'not given'}")
        for name in names:
            get_metric(name)
    used = dict.fromkeys(name for names in benchmark.metrics.values() for name in names)
    if len({METRICS[name].unit_key for name in used}) > 1:
        units = ", ".join(f"{name}: {METRICS[name].unit_key or 'question'}" for name in used)
        fail(f"metrics: they count different units ({units}); one benchmark has one unit, make it two files")
    expanded = benchmark.expand_numbers(benchmark.groups)
    for name, number in expanded.items():
        _check_number(benchmark, name, number, expanded, where)
    shown = [*benchmark.columns, *([benchmark.primary] if benchmark.primary else [])]
    for name in shown:
        if name not in expanded:
            fail(f"{name!r} is shown or primary and no number; numbers are {', '.join(expanded) or 'none'}")
    if benchmark.primary is None and benchmark.submission is None:
        fail("it has neither a primary number nor a submission format")
    for row in benchmark.published:
        for name in row.values:
            if name not in expanded:
                fail(f"published {row.model!r} gives {name!r}, which is no number of this benchmark")
    for key, given, known in (
        ("submission", benchmark.submission, WRITERS),
        ("data.converter", benchmark.data.converter, CONVERTERS),
    ):
        if given is not None and given not in known:
            fail(f"{key} is {given!r}; allowed are {', '.join(known)}")


def _check_number(benchmark: Benchmark, name: str, number: Number, expanded: dict[str, Number], where: str) -> None:
    def fail(problem: str) -> None:
        raise ConfigError(f"{where}: numbers.{name}: {problem}")

    if sum(bool(part) for part in (number.value, number.sum, number.mean)) != 1:
        fail("it needs exactly one of value, sum and mean")
    for part in (*number.sum, *number.mean):
        if part not in expanded:
            fail(f"{part!r} is no number; numbers are {', '.join(expanded)}")
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

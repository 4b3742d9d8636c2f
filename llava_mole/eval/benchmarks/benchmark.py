"""Benchmarks by name: each is one YAML file under `configs/benchmarks/` that holds everything that decides its numbers.

A new benchmark is a new file, and a new function in `eval/metrics/` if no metric there fits.
"""

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.metrics.table import METRICS, get_metric
from llava_mole.eval.questions import Question, parse_named_file, read_question_lines

T = TypeVar("T")
LARGEST = 1e308


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML's own reader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for n, key in enumerate(keys):
            if key in keys[:n]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path, kind: type[T]) -> T:
    """The dataclass `kind` from the file.

    Raises:
        ConfigError: unreadable file, unknown, repeated or missing key, or value of another type; the message names it.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    return read_value(kind, value, f"{path}")


def read_value(kind: type[T], value: Any, where: str) -> T:
    """The dataclass `kind` from plain values. Raises ConfigError as `load_yaml` does; `where` begins the message."""
    return typing.cast(T, _read(kind, value, where, ""))


def _read(kind: Any, value: Any, where: str, key: str) -> Any:
    """`value` as a `kind`, which is a dataclass, list[...], dict[str, ...], a union with None, or a plain type."""
    at = f"{where}: {key or 'the file'}"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(next(a for a in arguments if a is not type(None)), value, where, key)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where, key, at)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{at} must be a list; found {value!r}")
        return [_read(arguments[0], item, where, f"{key}[{n}]") for n, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{at} must map names to values; found {value!r}")
        return {name: _read(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) < LARGEST:  # NaN is no JSON
            raise ConfigError(f"{at} must be a finite number; found {value!r}")
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{at} must be {kind.__name__}; found {value!r}")
    return value


def _read_fields(kind: Any, value: Any, where: str, key: str, at: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{at} must map keys to values; found {value!r}")
    hints, prefix = typing.get_type_hints(kind), f"{key}." if key else ""
    fields = {known.name: known for known in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ConfigError(f"{where}: unknown key {prefix}{name}; allowed are {', '.join(fields)}")
    for name, known in fields.items():
        required = known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{where}: {prefix}{name} is missing")
    return kind(**{name: _read(hints[name], item, where, f"{prefix}{name}") for name, item in value.items()})


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
    from llava_mole.eval.benchmarks.official import CONVERTERS
    from llava_mole.eval.benchmarks.submission import WRITERS

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


DATA_ROOT = Path("playground/data")
PREPARED = "prepared.json"
"""Written by `prepare-benchmark` beside the questions: where the images are, and what was converted."""
DEFAULT_VARIANT = "default"
UNKNOWN_VARIANT = "unknown"


@dataclass(frozen=True)
class BenchmarkQuestions:
    """A benchmark's questions, without the prompt's suffix."""

    benchmark: Benchmark
    files: list[str]
    """`[GROUP=]FILE` each."""
    questions: list[Question]
    """Their domain is the group."""
    lines: list[dict[str, Any]]
    """Each question's whole line, in the same order."""
    image_folder: Path
    root: Path
    """The benchmark's folder."""

    def fingerprint(self) -> str:
        """Identity of the question set with its gold answers: sha256 over all lines."""
        digest = hashlib.sha256()
        for question, line in zip(self.questions, self.lines, strict=True):
            digest.update(json.dumps([question.domain, line], sort_keys=True).encode())
        return digest.hexdigest()

    def asked(self, variant: str = DEFAULT_VARIANT) -> list[Question]:
        """The questions with the suffix of a prompt variant at the end."""
        suffix = prompt_suffix(self.benchmark, variant)
        return [dataclasses.replace(question, text=question.text + suffix) for question in self.questions]


def prompt_suffixes(benchmark: Benchmark) -> dict[str, str]:
    """Suffix by variant, the default first."""
    return {DEFAULT_VARIANT: benchmark.prompt.suffix, **benchmark.prompt.variants}


def prompt_suffix(benchmark: Benchmark, variant: str) -> str:
    """Raises ConfigError for a variant the benchmark does not have."""
    suffixes = prompt_suffixes(benchmark)
    if variant not in suffixes:
        raise ConfigError(
            f"--prompt-variant {variant!r}: benchmark {benchmark.name} has the variants {', '.join(suffixes)}"
        )
    return suffixes[variant]


def load_questions(
    benchmark: Benchmark,
    *,
    data_root: Path = DATA_ROOT,
    files: list[str] | None = None,
    image_folder: Path | None = None,
) -> BenchmarkQuestions:
    """Read a benchmark's question files.

    Args:
        files: `[GROUP=]FILE` to read in place of the benchmark's own.
        image_folder: In place of the benchmark's own.

    Raises:
        DataError: no such file (the message says how to get it), a malformed line, a repeated id, a group that the
            benchmark does not have.
    """
    folder = data_root / benchmark.data.folder
    if files is None:
        files = [_below(folder, argument) for argument in benchmark.data.questions]
        for argument in files:
            path = parse_named_file(argument)[1]
            if not path.is_file():
                raise DataError(f"{path}: no such file; {_how_to_get(benchmark)}")
    found = read_question_lines(files)
    questions = [question for question, _ in found]
    for question in questions:
        if benchmark.groups and question.domain not in benchmark.groups:
            raise DataError(
                f"{question.where}: group {question.domain!r}; benchmark {benchmark.name} has the groups "
                f"{', '.join(benchmark.groups)} ('category' names it)"
            )
    if image_folder is None:
        image_folder = _prepared_images(parse_named_file(files[0])[1].parent) or folder / benchmark.data.images
    return BenchmarkQuestions(benchmark, files, questions, [line for _, line in found], image_folder, folder)


def _below(folder: Path, argument: str) -> str:
    group, separator, name = argument.rpartition("=")
    return f"{group}{separator}{folder / name}"


def _how_to_get(benchmark: Benchmark) -> str:
    if benchmark.data.converter:
        return f"`llava-mole prepare-benchmark {benchmark.name} --raw DIR` writes it from {benchmark.data.source}"
    return benchmark.data.source or "give --questions FILE"


def _prepared_images(folder: Path) -> Path | None:
    path = folder / PREPARED
    if not path.is_file():
        return None
    try:
        return Path(json.loads(path.read_text(encoding="utf-8"))["image_folder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error!r}); prepare the benchmark again, or give --image-folder"
        ) from None

"""A benchmark's definition and questions: everything that decides its numbers except the metrics' code.

A benchmark is a YAML file in `configs/benchmarks/` (`registry.get_benchmark`), or is made from your own question files
(`own_questions`).
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.common.files import read_json
from llava_mole.eval.questions import Question, parse_named_file, read_question_lines, resolve_argument

ANY_GROUP = "*"
GROUP = "{group}"
COUNTED = "n"
"""The field that every metric has: 1 for a question in its denominator."""
DATA_ROOT = Path("playground/data")
PREPARED = "prepared.json"
"""Written by `prepare-benchmark` beside the questions: where the images are, and what was converted."""
DEFAULT_VARIANT = "default"
UNKNOWN_VARIANT = "unknown"
OWN = "questions"
"""Name of the benchmark made from your own question files."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkData:
    """Where the questions are and where they come from."""

    folder: str
    """Relative to the data root (`playground/data`)."""
    questions: list[str]
    """Question files in it, `FILE` or `GROUP=FILE`; without a group, a question's `category` is its group."""
    images: str = "."
    """Image folder, relative to `folder`; `prepare-benchmark` records another one where the raw data has it."""
    count: int | None = None
    """Number of questions in the complete set; another number is reported, not refused."""
    train_files: list[str] | None = None
    """Training splits, `FILE` or `GROUP=FILE`, whose commonest answers are the majority baseline. An empty list takes
    them from the test itself; None leaves the baseline out."""
    converter: str | None = None
    """Converter of the official files for `prepare-benchmark`; None if they are question files already."""
    options: dict[str, str] = field(default_factory=dict)
    """The converter's options, such as file names."""
    source: str = ""
    """Where to get the official data and how it is laid out."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkPrompt:
    """The text appended to each question, and the limit on the answer's length."""

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
    """A row of a published table."""

    model: str
    source: str
    values: dict[str, float]
    main: bool = True
    """Whether a report shows it by default."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The definition of one benchmark."""

    name: str
    title: str
    data: BenchmarkData
    prompt: BenchmarkPrompt = field(default_factory=BenchmarkPrompt)
    groups: list[str] = field(default_factory=list)
    """All possible groups; a question of another group is an error. Empty: any group is allowed."""
    metrics: dict[str, list[str]] = field(default_factory=dict)
    """Group, or `*`, to the metrics its questions are scored with."""
    numbers: dict[str, Number] = field(default_factory=dict)
    """By name. A name with `{group}` in it stands for one number per group."""
    primary: str | None = None
    """The number that is compared. None if only a server can score."""
    columns: list[str] = field(default_factory=list)
    """The numbers shown in a report, in order; default the primary one."""
    position: int = 100
    """Place in a report: small ones first, equal ones by name."""
    submission: str | None = None
    """Format of the file that the benchmark's server takes."""
    notes: list[str] = field(default_factory=list)
    """Remarks that a reader of the numbers needs."""
    published: list[Published] = field(default_factory=list)

    def metrics_of(self, group: str) -> list[str]:
        """Return the names of the metrics for questions of `group`."""
        return self.metrics.get(group, self.metrics.get(ANY_GROUP, []))

    def expand_numbers(self, groups: Sequence[str]) -> dict[str, Number]:
        """Return the numbers with every `{group}` replaced by each of `groups`."""
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

    def prompt_suffixes(self) -> dict[str, str]:
        """Return the prompt suffix of each variant, the default first."""
        return {DEFAULT_VARIANT: self.prompt.suffix, **self.prompt.variants}

    def prompt_suffix(self, variant: str) -> str:
        """Return the suffix of a variant. Raises ConfigError if the benchmark does not have that variant."""
        suffixes = self.prompt_suffixes()
        if variant not in suffixes:
            raise ConfigError(
                f"--prompt-variant {variant!r}: benchmark {self.name} has the variants {', '.join(suffixes)}"
            )
        return suffixes[variant]


@dataclass(frozen=True)
class BenchmarkQuestions:
    """A benchmark's questions, without the prompt's suffix."""

    benchmark: Benchmark
    files: list[str]
    """`[GROUP=]FILE` each."""
    questions: list[Question]
    lines: list[dict[str, Any]]
    """Each question's complete line, in the same order."""
    image_folder: Path
    root: Path
    """The benchmark's folder."""

    @property
    def train_files(self) -> list[str] | None:
        """`[GROUP=]FILE` of each training split for the majority baseline; None if there is no such baseline."""
        files = self.benchmark.data.train_files
        return None if files is None else [_below(self.root, argument) for argument in files]

    def fingerprint(self) -> str:
        """Return the identity of the question set with its gold answers: sha256 over all lines."""
        digest = hashlib.sha256()
        for question, line in zip(self.questions, self.lines, strict=True):
            digest.update(json.dumps([question.group, line], sort_keys=True).encode())
        return digest.hexdigest()

    def asked(self, variant: str = DEFAULT_VARIANT) -> list[Question]:
        """Return the questions with the suffix of a prompt variant appended."""
        suffix = self.benchmark.prompt_suffix(variant)
        return [dataclasses.replace(question, text=question.text + suffix) for question in self.questions]


def load_questions(
    benchmark: Benchmark,
    *,
    data_root: Path = DATA_ROOT,
    files: list[str] | None = None,
    image_folder: Path | None = None,
) -> BenchmarkQuestions:
    """Read a benchmark's question files.

    Args:
        files: `[GROUP=]FILE` to read instead of the benchmark's own.
        image_folder: Used instead of the benchmark's own.

    Raises:
        DataError: no such file (the message says how to get it), a malformed line, a repeated id, or a group that the
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
        if benchmark.groups and question.group not in benchmark.groups:
            raise DataError(
                f"{question.where}: group {question.group!r}; benchmark {benchmark.name} has the groups "
                f"{', '.join(benchmark.groups)} ('category' names it)"
            )
    if image_folder is None:
        image_folder = _prepared_images(parse_named_file(files[0])[1].parent) or folder / benchmark.data.images
    return BenchmarkQuestions(benchmark, files, questions, [line for _, line in found], image_folder, folder)


def own_questions(
    files: Sequence[str], *, image_folder: Path, train_files: Sequence[str] | None = None
) -> BenchmarkQuestions:
    """Make a benchmark from your own question files: exact match by group, with the majority baseline.

    Args:
        files: `[GROUP=]FILE` each.
        train_files: `[GROUP=]FILE` each, for the baseline; a file without a group counts for every group. Without any,
            the baseline comes from the test itself.

    Raises:
        DataError: a file is missing or malformed.
    """
    for argument in train_files or ():
        path = parse_named_file(argument)[1]
        if not path.is_file():
            raise DataError(f"--train-file {argument}: no such file {path}")
    found = read_question_lines(files)
    groups = list(dict.fromkeys(question.group for question, _ in found))
    primary = groups[0]
    numbers = {GROUP: Number(value="plain_exact.hit")}
    if len(groups) > 1:
        primary = "overall"
        while primary in groups:
            primary += " (all groups)"
        numbers[primary] = Number(value="plain_exact.hit")
    train = list(map(resolve_argument, train_files or ()))
    benchmark = Benchmark(
        name=OWN,
        title="question files",
        data=BenchmarkData(folder="", questions=list(map(resolve_argument, files)), train_files=train),
        groups=groups,
        metrics={ANY_GROUP: ["plain_exact"]},
        numbers=numbers,
        primary=primary,
        columns=[*groups, *([primary] if len(groups) > 1 else [])],
    )
    lines = [line for _, line in found]
    return BenchmarkQuestions(benchmark, list(files), [question for question, _ in found], lines, image_folder, Path())


def _below(folder: Path, argument: str) -> str:
    """Return `[GROUP=]NAME` with `folder` in front of the name."""
    group, path = parse_named_file(argument)
    return f"{folder / path}" if group is None else f"{group}={folder / path}"


def _how_to_get(benchmark: Benchmark) -> str:
    if benchmark.data.converter:
        return f"`llava-mole prepare-benchmark {benchmark.name} --raw DIR` writes it from {benchmark.data.source}"
    return benchmark.data.source or "give --questions FILE"


def _prepared_images(folder: Path) -> Path | None:
    """Return the image folder that `prepare-benchmark` recorded beside the questions, if it did."""
    path = folder / PREPARED
    if not path.is_file():
        return None
    try:
        return Path(read_json(path)["image_folder"])
    except (DataError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); prepare the benchmark again, or give --image-folder"
        ) from None


T = TypeVar("T")
LARGEST = 1e308


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key; YAML's own reader would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for n, key in enumerate(keys):
            if key in keys[:n]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path, kind: type[T]) -> T:
    """Read the dataclass `kind` from a file.

    Raises:
        ConfigError: unreadable file, unknown, repeated or missing key, or value of another type; the message names it.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    return read_value(kind, value, f"{path}")


def read_value(kind: type[T], value: Any, where: str) -> T:
    """Build the dataclass `kind` from plain values. Raises ConfigError as `load_yaml` does, beginning with `where`."""
    return typing.cast(T, _read(kind, value, where, ""))


def _read(kind: Any, value: Any, where: str, key: str) -> Any:
    """Return `value` as a `kind`: a dataclass, list[...], dict[str, ...], a union with None, or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)

    def check(right: bool, must: str) -> None:
        if not right:
            raise ConfigError(f"{where}: {key or 'the file'} must {must}; found {value!r}")

    if kind is object:  # the reader checks it
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(arguments[0], value, where, key)
    if dataclasses.is_dataclass(kind):
        check(isinstance(value, dict), "map keys to values")
        return _read_fields(kind, value, where, f"{key}." if key else "")
    if origin is list:
        check(isinstance(value, list), "be a list")
        return [_read(arguments[0], item, where, f"{key}[{n}]") for n, item in enumerate(value)]
    if origin is dict:
        check(isinstance(value, dict) and all(isinstance(name, str) for name in value), "map names to values")
        return {name: _read(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        check(abs(value) < LARGEST, "be a finite number")  # JSON cannot represent NaN
        return float(value)
    check(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), f"be {kind.__name__}")
    return value


def _read_fields(kind: Any, value: dict[Any, Any], where: str, prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {known.name: known for known in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ConfigError(f"{where}: unknown key {prefix}{name}; allowed are {', '.join(fields)}")
    for name, known in fields.items():
        required = known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{where}: {prefix}{name} is missing")
    return kind(**{name: _read(hints[name], item, where, f"{prefix}{name}") for name, item in value.items()})

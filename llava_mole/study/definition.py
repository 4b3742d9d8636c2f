"""What a study is: the YAML files of studies and bases, and the arms they define.

A *study* names arms: settings of a run that are compared. A *base* says on what they run: models, sources by domain,
benchmarks, and the run configurations of both stages. A study therefore differs between two bases in nothing but the
key `base`. docs/studies.md lists the keys.
"""

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError
from llava_mole.common.files import sha256_of_json
from llava_mole.common.text import shorten
from llava_mole.eval.benchmarks.benchmark import load_yaml, read_value

SPLITS = ("test", "validation")
LAYOUT = ("mixture", "rank", "experts")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")
_TIMES = re.compile(r"(\d+(?:\.\d+)?)x")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number that the report shows."""

    domain: str
    """Domain that it measures."""
    number: str
    """`BENCHMARK.NUMBER`, with the base's own name of the benchmark."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """What the arms of a study run on."""

    name: str
    stage2: str
    """Run configuration of stage 2, relative to this file; arms change it."""
    stage1: str | None = None
    """Run configuration of stage 1, whose projector all arms start from."""
    projector: str | None = None
    """A projector to start from instead: a run directory or a `.safetensors` file."""
    set: dict[str, object] = field(default_factory=dict)
    """Configuration keys of stage 2 that differ from the file, e.g. `train.max_steps: 600`."""
    set_stage1: dict[str, object] = field(default_factory=dict)
    domains: dict[str, list[str]]
    """Domain -> its sources in stage 2's `data.sources`. The order is that of an arm's `mixture`."""
    rank: int
    """What `1x` means as an arm's `rank`."""
    seeds: list[int]
    """Seeds of every arm, unless the study or the arm names others."""
    benchmarks: dict[str, dict[str, str]]
    """Split (`test`, `validation`) -> own name -> benchmark (a name, or a YAML file)."""
    columns: dict[str, Column]
    routing: dict[str, str] = field(default_factory=dict)
    """Label in Figure 3 -> `BENCHMARK` or `BENCHMARK.GROUP`."""
    layers: list[int] = field(default_factory=list)
    """Layers in Figure 3, from 0; empty: all."""
    data_root: str = "playground/data"
    """Where the benchmarks' data is."""
    evaluate: list[str] = field(default_factory=list)
    """Further options of `llava-mole eval`."""
    source_of: dict[str, str] = field(default_factory=dict)
    """Group or benchmark -> source, for arms that route by source (`llava-mole eval --source-of`)."""
    launch: list[str] = field(default_factory=lambda: ["python", "-m"])
    """What starts a module of the package, e.g. `[torchrun, --standalone, --nproc_per_node, "8", -m]`."""
    gpus: int | None = None
    """GPUs of a command. With `--jobs`, each gets its own (CUDA_VISIBLE_DEVICES); None: all see the same."""
    threads: int | None = None
    """Threads of a process (OMP_NUM_THREADS). Sums depend on it in the last digits."""
    image_digests: bool = True
    """Whether the contents of images count as inputs. It reads every image once."""
    slurm: list[str] = field(default_factory=list)
    """Options of `sbatch` for `--submit slurm`, e.g. `--gpus-per-node=8`."""
    path: Path = Path()
    """Its file; filled in."""

    def beside(self, name: str) -> Path:
        """A path in this file: relative ones start at its folder."""
        return _beside(self.path, name)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Settings of runs that differ in the seed only."""

    label: str = ""
    """Its name in tables and figures; default: the arm's own name."""
    paper: str | None = None
    """The paper's row beside it, `TABLE.ROW` in the study's file of published numbers."""
    mixture: list[float] | None = None
    """Lambda of every domain, in the base's order; default 1 each. A domain with 0 is left out."""
    method: str = "lora"
    """`none`, `lora` or `mole` (`adapter.method`)."""
    preset: str = "paper"
    rank: object = "1x"
    """A number; `2x`: twice the base's; `{parameters_of: ARM}` or `{compute_of: ARM}`: the rank of plain LoRA with as
    many trained parameters, or as much computation a token, as the adapter of another arm."""
    steps: str = "1x"
    """`2x`: twice the base's steps: of `train.max_steps` if that is set, else of `train.epochs`."""
    experts: object = "domains"
    """K: a number; `domains` or `sources`: as many as the mixture has."""
    gate: str | None = None
    """`adapter.options.expert_scale`."""
    mode: str | None = None
    """`adapter.options.mode`."""
    options: dict[str, object] = field(default_factory=dict)
    """Further MoLE options (`adapter.options`)."""
    set: dict[str, object] = field(default_factory=dict)
    """Further keys of the run configuration."""
    seeds: list[int] | None = None
    base: str | None = None
    """Another base than the study's, with the same domains and columns."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """The YAML file of a study."""

    title: str
    base: str
    seeds: list[int] | None = None
    split: str = "test"
    paper: str | None = None
    paper_table: str | None = None
    layout: list[str] = field(default_factory=lambda: ["mixture", "experts"])
    arms: dict[str, Arm] = field(default_factory=dict)
    grid: list[dict[str, object]] = field(default_factory=list)
    compare: list[list[str]] = field(default_factory=list)
    figure1: list[str] | None = None
    figure3: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study, read and checked."""

    name: str
    path: Path
    title: str
    base: Base
    bases: Mapping[str, Base]
    """Arm -> its base."""
    split: str
    """Whose questions the arms answer: `test`, or `validation` to choose among them."""
    arms: Mapping[str, Arm]
    seeds: Mapping[str, list[int]]
    """Arm -> its seeds."""
    compare: Sequence[tuple[str, str]]
    """(second, first): the differences `second - first` that are tested."""
    layout: Sequence[str]
    figure1: Sequence[str]
    figure3: Sequence[str]
    notes: Sequence[str]
    published: "Published"
    settings: Mapping[str, object]
    """Keys set for every arm on the command line."""

    def label(self, arm: str) -> str:
        """The arm's name in tables and figures."""
        return self.arms[arm].label or arm

    def lambdas(self, arm: str) -> dict[str, float]:
        """Lambda of every domain."""
        domains = self.bases[arm].domains
        return dict(zip(domains, self.arms[arm].mixture or [1.0] * len(domains), strict=True))


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of a published table."""

    model: str
    mixture: list[float] | None = None
    rank: int | None = None
    experts: str | None = None
    values: dict[str, object]
    """Column -> number, or a text such as `OOM`."""


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A published table."""

    title: str
    rows: dict[str, PublishedRow]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A file of published numbers."""

    source: str = ""
    columns: list[str] = field(default_factory=list)
    domains: dict[str, str] = field(default_factory=dict)
    """Column -> domain."""
    tables: dict[str, PublishedTable] = field(default_factory=dict)
    shown: str | None = None
    """Table all of whose rows a study shows; filled in."""

    def row(self, reference: str) -> PublishedRow | None:
        """The row `TABLE.ROW`; None if there is none."""
        table, _, row = reference.partition(".")
        return self.tables[table].rows.get(row) if table in self.tables else None


def read_study(
    path: Path,
    *,
    base: str | None = None,
    seeds: Sequence[int] | None = None,
    split: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Study:
    """Read a study.

    Args:
        path: Its YAML file.
        base: Another base than the file's: a path, or the name of a file in the same folder as the file's base.
        seeds: Other seeds, for every arm.
        split: Another split than the file's.
        settings: Configuration keys to set for every arm.

    Raises:
        ConfigError: a file cannot be read, or says something that has no meaning; the message names file and key.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the shipped studies are in configs/studies/")
    found = load_yaml(path, _File)
    arms = dict(found.arms)
    for n, entry in enumerate(found.grid):
        for name, arm in expand_grid(entry, f"{path}: grid[{n}]").items():
            if name in arms:
                raise ConfigError(f"{path}: grid[{n}] makes the arm {name!r}, which exists; give it another `name`")
            arms[name] = arm
    if not arms:
        raise ConfigError(f"{path}: it has no arm; give `arms` or `grid`")
    own = read_base(base_file(path, found.base, base))
    bases = {name: read_base(_beside(path, arm.base)) if arm.base else own for name, arm in arms.items()}
    split = split or found.split
    published = Published()
    if found.paper is not None:
        published = load_yaml(_beside(path, found.paper), Published)
        published = dataclasses.replace(published, shown=found.paper_table)
    study = Study(
        name=path.stem,
        path=path,
        title=found.title,
        base=own,
        bases=bases,
        split=split,
        arms=arms,
        seeds={name: list(seeds or arm.seeds or found.seeds or bases[name].seeds) for name, arm in arms.items()},
        compare=[_pair(path, pair) for pair in found.compare] or [(name, next(iter(arms))) for name in [*arms][1:]],
        layout=found.layout,
        figure1=[*arms] if found.figure1 is None else found.figure1,
        figure3=found.figure3,
        notes=found.notes,
        published=published,
        settings=settings or {},
    )
    _check(study)
    return study


def base_file(study: Path, named: str, given: str | None) -> Path:
    """The file of the base: the one that the study names, or the one given in its place."""
    own = _beside(study, named)
    if given is None or Path(given).is_file():
        return own if given is None else Path(given)
    file = own.with_name(f"{given}.yaml")
    if not file.is_file():
        names = sorted(other.stem for other in own.parent.glob("*.yaml"))
        raise ConfigError(f"--base {given!r}: no such file, and {own.parent} has {', '.join(names) or 'none'}")
    return file


def _beside(file: Path, name: str) -> Path:
    return Path(name) if Path(name).is_absolute() else file.parent / name


def _pair(path: Path, pair: Sequence[str]) -> tuple[str, str]:
    if len(pair) != 2 or pair[0] == pair[1]:
        raise ConfigError(f"{path}: compare has {list(pair)!r}; give two different arms, [SECOND, FIRST]")
    return pair[0], pair[1]


def read_base(path: Path) -> Base:
    """Read a base. Raises ConfigError for a file that cannot be read, and for keys that contradict each other."""
    base = dataclasses.replace(load_yaml(path, Base), path=path)

    def fail(problem: str) -> None:
        raise ConfigError(f"{path}: {problem}")

    if not _NAME.fullmatch(base.name):
        fail(f"name is {base.name!r}; use letters, digits and any of . _ + -")
    if (base.stage1 is None) == (base.projector is None):
        fail("give either stage1, a run configuration, or projector, a trained one")
    if base.rank < 1 or not base.seeds or not base.domains or not base.columns or not base.launch:
        fail("rank must be at least 1, and domains, columns, seeds and launch must not be empty")
    for key in ("threads", "gpus"):
        if (value := getattr(base, key)) is not None and value < 1:
            fail(f"{key} is {value}; it must be at least 1")
    for split in base.benchmarks:
        if split not in SPLITS:
            fail(f"benchmarks.{split}: no such split; there are {', '.join(SPLITS)}")
    known = {name for names in base.benchmarks.values() for name in names}
    for name, column in base.columns.items():
        if column.domain not in base.domains:
            fail(f"columns.{name}.domain is {column.domain!r}; domains are {', '.join(base.domains)}")
        if column.number.partition(".")[0] not in known or not column.number.partition(".")[2]:
            fail(f"columns.{name}.number is {column.number!r}; write BENCHMARK.NUMBER, with one of {', '.join(known)}")
    for label, place in base.routing.items():
        if place.partition(".")[0] not in known:
            fail(f"routing.{label} is {place!r}; write BENCHMARK or BENCHMARK.GROUP, with one of {', '.join(known)}")
    return base


def expand_grid(entry: Mapping[str, Any], where: str) -> dict[str, Arm]:
    """The arms of a grid: every combination of the keys with several values.

    Args:
        entry: Key of an arm -> its value, or a list of values; `name`: a format such as `mole-r{rank}`; `exclude`: a
            list of partial settings whose combinations are left out; `include`: a list of arms to add, which take what
            they do not name from the grid's single values.
        where: Begins error messages.

    Raises:
        ConfigError: unknown key, or two arms of one name.
    """
    entry = dict(entry)
    template, exclude, include = entry.pop("name", None), entry.pop("exclude", []), entry.pop("include", [])
    lists = {f.name for f in dataclasses.fields(Arm) if str(f.type).startswith("list")}
    axes = {
        key: value
        for key, value in entry.items()
        if isinstance(value, list) and (key not in lists or (value and isinstance(value[0], list)))
    }
    single = {key: value for key, value in entry.items() if key not in axes}
    if not axes and not include:
        raise ConfigError(f"{where}: no key has a list of values; write it under `arms`")
    if not _are_mappings(exclude) or not _are_mappings(include):
        raise ConfigError(f"{where}: exclude and include are lists of settings, such as [{{rank: 2x}}]")
    combinations = (
        [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []
    )
    for part in exclude:
        unknown = [key for key in part if key not in {f.name for f in dataclasses.fields(Arm)}]
        if unknown or not any(c | single == c | single | part for c in combinations):
            reason = f"an arm has no {unknown[0]!r}" if unknown else "no combination of the grid has these values"
            raise ConfigError(f"{where}: exclude has {part!r}, which leaves nothing out: {reason}")
    kept = [c for c in combinations if not any(c | single == c | single | part for part in exclude)]
    arms: dict[str, Arm] = {}
    for values in [*kept, *include]:
        settings = {**single, **values}
        own = settings.pop("name", None)
        name = own or _grid_name(template, settings, axes, where)
        if name in arms:
            raise ConfigError(f"{where}: two combinations are called {name!r}; give a `name` with all that differs")
        arms[name] = read_value(Arm, settings, f"{where}, arm {name!r}")
    return arms


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _grid_name(template: object, settings: Mapping[str, Any], axes: Mapping[str, Any], where: str) -> str:
    texts = {key: _text(value) for key, value in settings.items()}
    if template is None:
        return ",".join(f"{key}={texts[key]}" for key in axes)
    try:
        return str(template).format(**texts)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"{where}: name is {template!r}, which cannot be filled in ({error!r})") from None


def _text(value: Any) -> str:
    """A setting as part of a name."""
    if isinstance(value, list):
        return "".join(f"{v:g}" if isinstance(v, float | int) else str(v) for v in value)
    if isinstance(value, dict):
        return "-".join(f"{k}-{_text(v)}" for k, v in value.items())
    return Path(value).stem if isinstance(value, str) and value.endswith(".yaml") else str(value)


def _check(study: Study) -> None:
    """Raise ConfigError for the first thing in a study that has no meaning."""

    def fail(problem: str) -> None:
        raise ConfigError(f"{study.path}: {problem}")

    if study.split not in SPLITS or study.split not in study.base.benchmarks:
        fail(f"split is {study.split!r}; {study.base.path} has benchmarks for {', '.join(study.base.benchmarks)}")
    for key in study.layout:
        if key not in LAYOUT:
            fail(f"layout has {key!r}; it may have {', '.join(LAYOUT)}")
    for name, arm in study.arms.items():
        base = study.bases[name]
        if not _NAME.fullmatch(name):
            fail(f"the arm {name!r}: use letters, digits and any of . _ + = , - in its name")
        for key in ("domains", "columns"):
            if _compared(getattr(base, key)) != _compared(getattr(study.base, key)):
                fail(f"arm {name!r}: {base.path} has other {key} than {study.base.path}, so no table could hold both")
        if list(base.benchmarks.get(study.split, ())) != list(study.base.benchmarks[study.split]):
            fail(
                f"arm {name!r}: {base.path} has other benchmarks for the split {study.split!r} than {study.base.path}, "
                "so no table could hold both"
            )
        if arm.mixture is not None and (
            len(arm.mixture) != len(base.domains) or min(arm.mixture) < 0 or not any(arm.mixture)
        ):
            fail(
                f"arm {name!r}: mixture is {arm.mixture}; give a lambda of at least 0 for each of "
                f"{', '.join(base.domains)}, not all 0"
            )
        check_arm(study, name, "arm")
        if arm.paper is not None and study.published.row(arm.paper) is None:
            fail(f"arm {name!r}: paper is {arm.paper!r}, and the file of published numbers has no such TABLE.ROW")
    if study.published.shown is not None and study.published.shown not in study.published.tables:
        fail(f"paper_table is {study.published.shown!r}; there are {', '.join(study.published.tables)}")
    named = [(n, key) for key in ("figure1", "figure3") for n in getattr(study, key)]
    named += [(name, "compare") for pair in study.compare for name in pair]
    for name, key in named:
        if name not in study.arms:
            fail(f"{key} names {name!r}; arms are {shorten(list(study.arms), 8)}")


def _compared(value: Mapping[str, Any]) -> list[Any]:
    """What must be equal for two bases to share a table: the names of domains; of columns, their numbers too."""
    return [(name, vars(item)) if isinstance(item, Column) else name for name, item in value.items()]


def check_arm(study: Study, name: str, word: str) -> None:
    """Raise ConfigError for settings of one arm that have no meaning; `word` is what the study calls an arm."""
    arm, where = study.arms[name], f"{word} {name!r}"

    def fail(problem: str) -> None:
        raise ConfigError(f"{study.path}: {where}: {problem}")

    if arm.method != "mole" and (arm.gate or arm.mode or arm.options or arm.preset != "paper"):
        fail(f"preset, gate, mode and options need method 'mole', not {arm.method!r}")
    if not study.seeds[name] or len(set(study.seeds[name])) < len(study.seeds[name]):
        fail(f"seeds are {shorten([str(s) for s in study.seeds[name]], 8)}; give at least one, each once")
    if not (arm.experts in ("domains", "sources") or (type(arm.experts) is int and arm.experts > 0)):
        fail(f"experts is {arm.experts!r}; give a number, `domains` or `sources`")
    times_of(arm.steps, "steps", f"{study.path}: {where}")
    rank = arm.rank
    if not isinstance(rank, dict):
        absolute_rank(rank, study.bases[name], f"{study.path}: {where}")
        return
    ((kind, other), *more) = rank.items() or [("", "")]
    target = study.arms.get(str(other))
    if more or kind not in ("parameters_of", "compute_of") or target is None or isinstance(target.rank, dict):
        fail(
            f"rank is {rank!r}; write {{parameters_of: NAME}} or {{compute_of: NAME}}, with the name of another {word} "
            "of this study whose rank is a number"
        )
    if arm.method != "lora":
        fail(f"rank {rank!r} is for method 'lora', not {arm.method!r}")


def absolute_rank(rank: object, base: Base, where: str) -> int:
    """The rank that an arm's `rank` means on a base. Raises ConfigError unless it is a whole number of at least 1."""
    times = _TIMES.fullmatch(rank) if isinstance(rank, str) else None
    value = Fraction(times[1]) * base.rank if times else rank
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction) or value < 1 or value != int(value):
        shown = f"{rank!r} = {float(value):g}" if isinstance(value, Fraction) else repr(rank)
        raise ConfigError(
            f"{where}: rank is {shown}; it must be a whole number of at least 1, or such a multiple of the base's rank "
            f"({base.rank}), as `2x`"
        )
    return int(value)


def times_of(text: str, key: str, where: str) -> Fraction:
    """The factor that `2x` means. Raises ConfigError unless it is a number above 0 with an `x`."""
    times = _TIMES.fullmatch(text)
    if times is None or not Fraction(times[1]):
        raise ConfigError(f"{where}: {key} is {text!r}; give a multiple of the base's, such as `2x`")
    return Fraction(times[1])


def variant(study: Study) -> str:
    """The name of a study's results: with the split if it is not `test`, and the keys set on the command line."""
    parts = [study.name, *([] if study.split == "test" else [study.split])]
    changed = ",".join(f"{key}={value}" for key, value in study.settings.items())
    if len(changed) > 60:
        changed = f"set-{sha256_of_json(dict(study.settings))[:10]}"
    return "-".join([*parts, *([re.sub(r"[^A-Za-z0-9._+=,-]", "-", changed)] if changed else [])])


def matching(study: Study, patterns: Sequence[str]) -> list[tuple[str, int]]:
    """The (arm, seed) whose `ARM` or `ARM/SEED` matches a pattern; all without patterns."""
    pairs = [(arm, seed) for arm in study.arms for seed in study.seeds[arm]]
    if not patterns:
        return pairs
    return [p for p in pairs if any(fnmatch.fnmatchcase(t, q) for q in patterns for t in (p[0], f"{p[0]}/{p[1]}"))]

"""From a study to its cells: ordinary runs of ordinary commands, identified by everything that their result depends on.

There are three kinds: stage 1 (`pretrain`), stage 2 (`finetune`) and a benchmark (`eval`). A cell's digest covers its
resolved configuration, the contents of its inputs and the digests of the cells it needs. Its folder bears the digest,
so arms and studies with a cell in common share it, and a changed input makes exactly the cells that depend on it new.
"""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from llava_mole import __version__
from llava_mole.common.errors import ConfigError, value_errors_as
from llava_mole.common.files import sha256_of_json
from llava_mole.config import MAY_CHANGE, RunConfig, TrainConfig, config_to_dict, parse_run_config
from llava_mole.eval.benchmarks.registry import get_benchmark
from llava_mole.eval.scoring.score import SCORE_SUFFIX
from llava_mole.study.definition import Base, Study, absolute_rank, times_of
from llava_mole.study.inputs import Inputs

Kind = Literal["pretrain", "finetune", "eval"]
RUN, CONFIG, LOG = "run", "config.yaml", "log.txt"
SHOWN_DIGITS = 10
"""Digits of the digest in a folder's name."""


@dataclass(frozen=True)
class Cell:
    """One run of one command."""

    kind: Kind
    name: str
    """Unique; its folder's name, with that of its run for an evaluation."""
    folder: Path
    identity: Mapping[str, Any]
    """All that its result depends on, as plain values."""
    needs: tuple[str, ...]
    """Names of the cells that must be finished before."""
    command: tuple[str, ...]
    config: RunConfig | None = None
    """The run's configuration, written to its folder before it starts."""
    benchmark: str = ""
    """Name of the benchmark it evaluates."""
    threads: int | None = None
    gpus: int | None = None
    missing: tuple[str, ...] = ()
    """Inputs of its own that do not exist, so its digest is provisional."""

    @functools.cached_property
    def digest(self) -> str:
        """Hex digest of `identity`."""
        return sha256_of_json(self.identity)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Files that exist once the command has succeeded."""
        if self.kind == "eval":
            return (self.folder / f"{self.benchmark}{SCORE_SUFFIX}",)
        return (self.folder / RUN / "summary.json",)

    @property
    def locks(self) -> tuple[Path, ...]:
        """Lock files that its command holds while it runs."""
        return (self.folder / RUN / ".lock", self.folder / f"{self.benchmark}.jsonl.lock")


@dataclass
class Plan:
    """The cells of a study."""

    cells: dict[str, Cell] = field(default_factory=dict)
    """By name; a cell stands after those that it needs."""
    runs: dict[tuple[str, int], str] = field(default_factory=dict)
    """(arm, seed) -> its stage-2 cell."""
    evaluations: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    """(arm, seed) -> the base's name of a benchmark -> its cell."""
    remarks: list[str] = field(default_factory=list)
    """What a reader of the results must know."""

    def add(self, cell: Cell) -> Cell:
        """Add a cell, or return the same one."""
        return self.cells.setdefault(cell.name, cell)

    def missing(self, names: Iterable[str] | None = None) -> list[str]:
        """Inputs of these cells, or of all, that do not exist."""
        cells = self.cells if names is None else names
        return list(dict.fromkeys(path for name in cells for path in self.cells[name].missing))

    def with_needs(self, names: Sequence[str]) -> dict[str, Cell]:
        """These cells and all that they need, in order."""
        wanted, queue = set[str](), list(names)
        while queue:
            name = queue.pop()
            if name not in wanted:
                wanted.add(name)
                queue += self.cells[name].needs
        return {name: cell for name, cell in self.cells.items() if name in wanted}


def plan_study(study: Study, out: Path, inputs: Inputs) -> Plan:
    """The cells of every arm and seed.

    Args:
        out: Folder of the base's cells.
        inputs: Computes the digests.

    Raises:
        ConfigError: an arm's configuration is refused; the message names the arm.
    """
    plan, configs = Plan(), dict[str, RunConfig]()
    for arm in study.arms:
        base = study.bases[arm]
        first = stage_one(base, out, inputs)
        if first is not None:
            plan.add(first)
        config = configs[arm] = arm_config(study, arm)
        for seed in study.seeds[arm]:
            run = plan.add(_stage_two(config, seed, base, first, out, inputs))
            plan.runs[arm, seed] = run.name
            evaluations = plan.evaluations.setdefault((arm, seed), {})
            for own, benchmark in base.benchmarks[study.split].items():
                evaluations[own] = plan.add(evaluation_cell(run, own, benchmark, base, inputs)).name
    plan.remarks = _equal_runs(configs)
    return plan


def _equal_runs(configs: Mapping[str, RunConfig]) -> list[str]:
    """What to say of arms whose lambdas are multiples of each other and whose number of steps is fixed.

    A mixture of [2, 2] is meant to train on twice the samples. With `train.max_steps` it trains on as many as [1, 1].
    """
    first: dict[str, str] = {}
    remarks = []
    for arm, config in configs.items():
        if config.train.max_steps is None:
            continue
        lambdas = config.data.mixture
        ratios = {name: round(value / max(lambdas.values()), 9) for name, value in lambdas.items()}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=ratios))
        other = first.setdefault(json.dumps(config_to_dict(config), sort_keys=True), arm)
        shown = [[f"{v:g}" for v in configs[name].data.mixture.values()] for name in (other, arm)]
        if shown[0] != shown[1]:
            remarks.append(
                f"the arms {other!r} and {arm!r} train alike: their lambdas are multiples, [{', '.join(shown[0])}] and "
                f"[{', '.join(shown[1])}], and train.max_steps {config.train.max_steps} fixes the steps of both; "
                "`steps: 2x` doubles an arm's steps"
            )
    return remarks


def arm_config(study: Study, arm: str) -> RunConfig:
    """The stage-2 configuration of an arm, without seed, output folder and projector.

    Raises:
        ConfigError: it is refused; the message names the arm.
    """
    settings, base = study.arms[arm], study.bases[arm]
    try:
        config = _read_config(base.beside(base.stage2), base.set)
        lambdas = study.lambdas(arm)
        unknown = [s for domain in base.domains for s in base.domains[domain] if s not in config.data.sources]
        if unknown:
            raise ConfigError(
                f"{base.path}: domains name the source {unknown[0]!r}; {base.beside(base.stage2)} has the sources "
                f"{', '.join(config.data.sources)}"
            )
        mixture = {source: lambdas[d] for d in base.domains for source in base.domains[d] if lambdas[d]}
        count = sum(value > 0 for value in lambdas.values())
        given = {"domains": max(2, count), "sources": len(mixture)}
        experts = given[settings.experts] if isinstance(settings.experts, str) else settings.experts
        rank = settings.rank
        if isinstance(rank, dict):
            from llava_mole.study.matching import matching_rank

            ((kind, other),) = rank.items()
            rank = matching_rank(config.model, arm_config(study, str(other)).adapter, str(kind))
        changes: dict[str, object] = {
            "adapter.method": settings.method,
            "adapter.rank": absolute_rank(rank, base, f"arm {arm!r}"),
        }
        if settings.method == "mole":
            scale = {} if settings.gate is None else {"expert_scale": settings.gate}
            mode = {} if settings.mode is None else {"mode": settings.mode}
            options = {**settings.options, **scale, **mode}
            changes |= {"adapter.preset": settings.preset, "adapter.num_experts": experts, "adapter.options": options}
        config = _read_config(base.beside(base.stage2), {**base.set, **changes, **settings.set, **study.settings})
        sources = {name: source for name, source in config.data.sources.items() if name in mixture}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources, mixture=mixture))
        config = dataclasses.replace(config, train=_more_steps(config.train, settings.steps))
        check_adapter(config)
        return config
    except ConfigError as error:
        raise ConfigError(f"{study.path}: arm {arm!r}: {error}") from None


def _more_steps(train: TrainConfig, steps: str) -> TrainConfig:
    """The training settings with `steps` (`2x`) times as many steps."""
    key = "epochs" if train.max_steps is None else "max_steps"
    value = times_of(steps, "steps", "steps") * getattr(train, key)
    if value != int(value):
        raise ConfigError(f"steps is {steps!r}, which makes train.{key} {float(value):g}; it must be a whole number")
    changed: dict[str, Any] = {key: int(value)}
    return dataclasses.replace(train, **changed)


def check_adapter(config: RunConfig) -> None:
    """Raise ConfigError for adapter options that the run would refuse, before any run of the study starts."""
    from llava_mole.model.adapters import adapter_config, check_sources

    with value_errors_as(ConfigError):
        check_sources(adapter_config(**vars(config.adapter)), config.data)


def _read_config(file: Path, settings: Mapping[str, object]) -> RunConfig:
    """The run configuration `file` with keys replaced."""
    if not file.is_file():
        raise ConfigError(f"run configuration {file} does not exist")
    arguments = [str(file)]
    for key, value in settings.items():
        arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return parse_run_config(arguments)


def stage_one(base: Base, out: Path, inputs: Inputs) -> Cell | None:
    if base.stage1 is None:
        return None
    config = _read_config(base.beside(base.stage1), base.set_stage1)
    return training_cell("pretrain", f"pretrain-s{config.train.seed}", config, base, None, out, inputs)


def _stage_two(config: RunConfig, seed: int, base: Base, first: Cell | None, out: Path, inputs: Inputs) -> Cell:
    adapter, lambdas = config.adapter, config.data.mixture
    parts = ["finetune", adapter.method if adapter.method != "mole" else f"mole-{adapter.preset}"]
    parts += [] if adapter.method == "none" else [f"r{adapter.rank}"]
    parts += [f"k{adapter.num_experts}"] if adapter.method == "mole" else []
    weights = [[lambdas.get(source, 0.0) for source in sources] for sources in base.domains.values()]
    parts += ["-".join(f"{max(values):g}" for values in weights), f"s{seed}"]
    start = str(first.folder / RUN) if first is not None else str(base.beside(base.projector or ""))
    config = dataclasses.replace(
        config, projector_weights=start, train=dataclasses.replace(config.train, seed=seed, resume="auto")
    )
    return training_cell("finetune", "-".join(parts), config, base, first, out, inputs)


def training_cell(
    kind: Kind, title: str, config: RunConfig, base: Base, first: Cell | None, out: Path, inputs: Inputs
) -> Cell:
    """The cell of a training run; `first` is the stage 1 that it starts from."""
    known = len(inputs.missing)
    read: dict[str, str] = {"language_model": inputs.model(config.model.language_model)}
    tower = config.model.vision_tower
    read["vision_tower"] = inputs.file(tower.weights)
    if tower.name.endswith(".json"):
        read["vision_tower.name"] = inputs.file(tower.name)
    for name, source in config.data.sources.items():
        read[f"data.sources.{name}"] = inputs.source(name, source, images=base.image_digests)
    if kind == "finetune" and first is None:
        read["projector"] = inputs.projector(str(config.projector_weights))
    values = {
        key: value
        for key, value in _flat(config_to_dict(config)).items()
        if not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
    }
    # The order of the sources numbers them, so it is part of the identity; that of a mapping is not.
    order = list(config.data.sources)
    identity = {"kind": kind, "version": __version__, "config": values, "sources": order, "inputs": read}
    if first is not None:
        identity["stage1"] = first.digest
    folder, name = _place(out / "cells", title, identity)
    train = dataclasses.replace(config.train, output_dir=str(folder / RUN), resume="auto")
    return Cell(
        kind=kind,
        name=name,
        folder=folder,
        identity=identity,
        needs=() if first is None else (first.name,),
        command=(*_launch(base), "llava_mole.train.train", str(folder / CONFIG)),
        config=dataclasses.replace(config, train=train),
        threads=base.threads,
        gpus=base.gpus,
        missing=tuple(inputs.missing[known:]),
    )


def evaluation_cell(run: Cell, own: str, benchmark: str, base: Base, inputs: Inputs) -> Cell:
    """The cell that evaluates a run on a benchmark."""
    config, known = run.config, len(inputs.missing)
    assert config is not None
    local = base.beside(benchmark)
    benchmark = str(local) if benchmark.endswith((".yaml", ".yml")) and local.is_file() else benchmark
    options = list(base.evaluate)
    routed = base.source_of if config.adapter.method == "mole" else {}
    given = [f"{name}={source}" for name, source in routed.items() if source in config.data.sources]
    identity = {
        "kind": "eval",
        "version": __version__,
        "run": run.digest,
        "benchmark": inputs.benchmark(benchmark, Path(base.data_root), images=base.image_digests),
        "options": options,
        "sources": given if needs_source(config) else [],
    }
    folder, name = _place(run.folder / "eval", own, identity)
    command = [*_launch(base), "llava_mole.eval.evaluate", str(run.folder / RUN), "--benchmarks", benchmark]
    command += ["--data-root", base.data_root, "--out", str(folder), *options]
    command += ["--source-of", *given] if given and needs_source(config) else []
    return Cell(
        kind="eval",
        name=f"{run.name}/{name}",
        folder=folder,
        identity=identity,
        needs=(run.name,),
        command=tuple(command),
        benchmark=get_benchmark(benchmark).name,
        threads=base.threads,
        gpus=base.gpus,
        missing=tuple(inputs.missing[known:]),
    )


def needs_source(config: RunConfig) -> bool:
    """Whether the run's adapter routes by the source of a sample, so that questions need one."""
    from llava_mole.model.adapters import adapter_config

    return getattr(adapter_config(**vars(config.adapter)), "required_input", None) is not None


def _place(parent: Path, title: str, identity: Mapping[str, Any]) -> tuple[Path, str]:
    name = f"{re.sub(r'[^A-Za-z0-9._+-]', '-', title)}-{sha256_of_json(identity)[:SHOWN_DIGITS]}"
    return parent / name, name


def _launch(base: Base) -> tuple[str, ...]:
    """The start of a command: `python` and `torchrun` are those of this environment."""
    known = {"python": (sys.executable,), "torchrun": (sys.executable, "-m", "torch.distributed.run")}
    program, *rest = base.launch
    return (*known.get(program, (program,)), *rest)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b` -> value. `adapter.options` stays one value, and empty mappings too."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict) and item and name != "adapter.options":
            flat |= _flat(item, f"{name}.")
        else:
            flat[name] = item
    return flat

"""Continual learning: tasks one after another, by several methods, as cells that `runner` runs.

A task is a domain of the study's base. Every step of a method is an ordinary run in its own folder, which starts from
the run before it (`init_from`); the first starts from stage 1. After each step the model answers the questions of all
tasks. docs/continual.md lists the keys of a study.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_mole.common.errors import ConfigError
from llava_mole.config import RunConfig
from llava_mole.eval.benchmarks.benchmark import load_yaml
from llava_mole.study.cells import RUN, Cell, Plan, arm_config, check_adapter, evaluation_cell, stage_one, training_cell
from llava_mole.study.definition import SPLITS, Arm, Base, Published, Study, base_file, check_arm, read_base
from llava_mole.study.inputs import Inputs

SCHEDULES = {
    "sequential": "one adapter, trained on one task after another",
    "grow": "a new expert for every task; those of finished tasks, and their rows of the router, do not train any more",
    "joint": "one run on the data of all tasks, the ceiling",
}


@dataclass(frozen=True, kw_only=True)
class Method(Arm):
    """How the tasks are learned: the settings of an arm, and a schedule."""

    schedule: str = "sequential"
    """One of `SCHEDULES`."""
    replay: float = 0.0
    """Lambda of every earlier task's sources: 0.1 trains again on a tenth of their samples in an epoch."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """The YAML file of a study of continual learning."""

    title: str
    base: str
    tasks: list[str] = field(default_factory=list)
    seeds: list[int] | None = None
    split: str = "test"
    methods: dict[str, Method]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Continual:
    """A study of continual learning, read and checked."""

    study: Study
    """The methods as its arms."""
    methods: Mapping[str, Method]
    tasks: Sequence[str]
    """Domains of the base, in the order in which they are learned."""

    @property
    def base(self) -> Base:
        """What the methods run on."""
        return self.study.base

    def numbers(self, task: str) -> list[str]:
        """`BENCHMARK.NUMBER` of every column that measures a task; its accuracy is their mean."""
        there = self.base.benchmarks[self.study.split]
        columns = [c for c in self.base.columns.values() if c.domain == task]
        return [c.number for c in columns if c.number.partition(".")[0] in there]

    def steps(self, method: str) -> list[str]:
        """What is trained on, step by step: a task, or all of them."""
        return ["+".join(self.tasks)] if self.methods[method].schedule == "joint" else list(self.tasks)


@dataclass
class Steps:
    """The cells of a study, and which of them are the steps of a method."""

    plan: Plan = field(default_factory=Plan)
    runs: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    """(method, seed) -> its runs in order."""
    evaluations: dict[str, dict[str, str]] = field(default_factory=dict)
    """Run -> the base's name of a benchmark -> its evaluation."""


def read_continual(
    path: Path,
    *,
    base: str | None = None,
    seeds: Sequence[int] | None = None,
    split: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Continual:
    """Read a study of continual learning; the arguments are those of `read_study`.

    Raises:
        ConfigError: a file cannot be read, or says something that has no meaning; the message names file and key.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the shipped ones are in configs/studies/continual/")
    found = load_yaml(path, _File)
    own = read_base(base_file(path, found.base, base))
    tasks = found.tasks or list(own.domains)
    split = split or found.split
    study = Study(
        name=path.stem,
        path=path,
        title=found.title,
        base=own,
        bases=dict.fromkeys(found.methods, own),
        split=split,
        arms=found.methods,
        seeds={name: list(seeds or m.seeds or found.seeds or own.seeds) for name, m in found.methods.items()},
        compare=(),
        layout=(),
        figure1=(),
        figure3=(),
        notes=found.notes,
        published=Published(),
        settings=settings or {},
    )
    continual = Continual(study, found.methods, tasks)
    _check(continual)
    mixture = [float(domain in tasks) for domain in own.domains]  # what `experts: domains` and `sources` count
    arms = {name: dataclasses.replace(method, mixture=mixture) for name, method in found.methods.items()}
    return dataclasses.replace(continual, study=dataclasses.replace(study, arms=arms))


def _check(continual: Continual) -> None:
    study, tasks = continual.study, continual.tasks

    def fail(problem: str) -> None:
        raise ConfigError(f"{study.path}: {problem}")

    if not continual.methods:
        fail("methods is empty; name at least one")
    if study.split not in SPLITS or study.split not in study.base.benchmarks:
        fail(f"split is {study.split!r}; {study.base.path} has questions for {', '.join(study.base.benchmarks)}")
    unknown = [task for task in tasks if task not in study.base.domains]
    if unknown or len(set(tasks)) < len(tasks) or len(tasks) < 2:
        fail(f"tasks are {list(tasks)}; give at least two different domains of {', '.join(study.base.domains)}")
    for task in tasks:
        if not continual.numbers(task):
            fail(f"task {task!r} has no column in {study.base.path} that the split {study.split!r} measures")
    for name, method in continual.methods.items():
        where = f"method {name!r}"
        if method.schedule not in SCHEDULES:
            fail(f"{where}: schedule is {method.schedule!r}; there are {', '.join(SCHEDULES)}")
        if method.mixture is not None or method.base is not None or method.paper is not None:
            fail(f"{where}: mixture, base and paper have no meaning here; the tasks are the mixture")
        if method.method == "none":
            fail(f"{where}: method 'none' has no adapter to hand on; use lora or mole")
        if method.schedule == "grow" and (method.method != "mole" or method.experts != "domains"):
            fail(
                f"{where}: schedule 'grow' needs method mole, and sets the number of experts itself; leave experts out"
            )
        if not 0 <= method.replay < float("inf") or (method.replay and method.schedule == "joint"):
            fail(f"{where}: replay is {method.replay}; it is a lambda, at least 0, and 0 for schedule 'joint'")
        check_arm(study, name, "method")


def plan_continual(continual: Continual, out: Path, inputs: Inputs) -> Steps:
    """The cells of every method and seed. Methods with a step in common share it.

    Args:
        out: Folder of the base's cells.
        inputs: Computes the digests.

    Raises:
        ConfigError: a step's configuration is refused; the message names the method.
    """
    steps, study, base = Steps(), continual.study, continual.base
    first = stage_one(base, out, inputs)
    if first is not None:
        steps.plan.add(first)
    for name in continual.methods:
        whole = arm_config(study, name)
        _check_sources(continual, name, whole)
        for seed in study.seeds[name]:
            before: Cell | None = None
            for number, trained in enumerate(continual.steps(name)):
                config = _step_config(continual, name, whole, number, seed)
                config = _started(config, base, before, first)
                run = steps.plan.add(
                    training_cell("finetune", _title(config, trained, number, seed), config, base, before or first, out,
                                  inputs)
                )  # fmt: skip
                steps.runs.setdefault((name, seed), []).append(run.name)
                for own, benchmark in base.benchmarks[study.split].items():
                    cell = steps.plan.add(evaluation_cell(run, own, benchmark, base, inputs))
                    steps.evaluations.setdefault(run.name, {})[own] = cell.name
                before = run
    return steps


def _check_sources(continual: Continual, name: str, whole: RunConfig) -> None:
    """Raise ConfigError if the adapter would take every task for the same source (`whole` has been checked).

    A run numbers its sources from 0, and a step has one task's. With replay, the earlier tasks come first, so each
    keeps its number.
    """
    from llava_mole.model.adapters import adapter_config

    method = continual.methods[name]
    built = adapter_config(**vars(whole.adapter))
    needed = getattr(built, "required_input", None) is not None
    learned = getattr(built, "source_coef", 0.0) > 0 and not method.replay
    if method.schedule == "joint" or not (needed or learned):
        return
    why = "routes by the number of a sample's source" if needed else "learns its router from a sample's source"
    raise ConfigError(
        f"{continual.study.path}: method {name!r}: the adapter {why}, and a step trains on the sources of one task, "
        f"which would all be number 0; use {'' if needed else 'replay above 0, or '}schedule: joint"
    )


def _step_config(continual: Continual, name: str, whole: RunConfig, number: int, seed: int) -> RunConfig:
    """The configuration of a method's step, without what it starts from; `whole` has the data of all tasks."""
    method, domains = continual.methods[name], continual.base.domains
    train, adapter = dataclasses.replace(whole.train, seed=seed), whole.adapter
    if method.schedule == "joint":
        lambdas = {task: 1.0 for task in continual.tasks}
        if train.max_steps is not None:  # as many steps as one task after another
            train = dataclasses.replace(train, max_steps=train.max_steps * len(continual.tasks))
    else:
        lambdas = {task: method.replay for task in continual.tasks[:number] if method.replay}
        lambdas[continual.tasks[number]] = 1.0
    if method.schedule == "grow":
        frozen = {"frozen_experts": number} if number else {}
        adapter = dataclasses.replace(adapter, num_experts=number + 1, options={**adapter.options, **frozen})
    mixture = {source: lambdas[task] for task in lambdas for source in domains[task]}
    sources = {source: whole.data.sources[source] for source in mixture}
    data = dataclasses.replace(whole.data, sources=sources, mixture=mixture)
    try:
        config = dataclasses.replace(whole, train=train, adapter=adapter, data=data)
        check_adapter(config)
    except ConfigError as error:
        raise ConfigError(f"{continual.study.path}: method {name!r}, step {number + 1}: {error}") from None
    return config


def _started(config: RunConfig, base: Base, before: Cell | None, first: Cell | None) -> RunConfig:
    """The configuration with what the run starts from: the step before, else stage 1."""
    if before is not None:
        return dataclasses.replace(config, init_from=str(before.folder / RUN), projector_weights=None)
    projector = str(first.folder / RUN) if first is not None else str(base.beside(base.projector or ""))
    return dataclasses.replace(config, projector_weights=projector)


def _title(config: RunConfig, trained: str, number: int, seed: int) -> str:
    adapter, lambdas = config.adapter, config.data.mixture
    parts = ["task", str(number + 1), trained, adapter.method if adapter.method != "mole" else f"mole-{adapter.preset}"]
    parts += [f"r{adapter.rank}"] + ([f"k{adapter.num_experts}"] if adapter.method == "mole" else [])
    again = {value for value in lambdas.values() if value != 1.0}
    return "-".join([*parts, *(f"replay{value:g}" for value in again), f"s{seed}"])

"""`python -m scripts.conflict.run`: run the grid of docs/conflict.md, job by job; a killed run continues.

A job is one cell and one seed with all arms of its group. Its result is one file, written at once, whose name is the
digest of everything that determines it: cell, seed, arms with their options, recipe, weights and data. A job that has
its file is not run again. Nothing here opens a file of the test split; see `scripts.conflict.score`.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_mole.common.errors import ConfigError, command
from llava_mole.common.files import atomic_path, sha256_of_json, write_json
from llava_mole.common.text import HELP_WIDTH
from scripts.conflict.grid import GRIDS, Job
from scripts.conflict.loop import Recipe, train
from scripts.conflict.world import World, load_world

FORMAT = 1
"""Increased when the same settings start to give other numbers."""
PACKAGES = ("torch", "transformers", "peft")
IMAGE_POSITIONS = 1


def describe(world: World, job: Job, recipe: Recipe) -> dict[str, Any]:
    """Everything that determines a job's result, as plain values."""
    return {
        "format": FORMAT,
        "world": world.digest,
        "cell": dataclasses.asdict(job.cell),
        "seed": job.seed,
        "recipe": dataclasses.asdict(recipe),
        "arms": {name: dataclasses.asdict(arm) for name, arm in job.arms.items()},
    }


def result_path(out: Path, described: dict[str, Any]) -> Path:
    """The file of a job's result."""
    return out / "jobs" / f"{sha256_of_json(described)[:16]}.json"


def run_job(world: World, job: Job, recipe: Recipe, out: Path) -> Path:
    """Run a job unless its result is there. Returns the result's path; the adapters lie beside it, as `.pt`."""
    described = describe(world, job, recipe)
    path = result_path(out, described)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    found, stacks = train(world, job.cell, job.seed, job.arms, recipe)
    with atomic_path(path.with_suffix(".pt")) as temporary:
        torch.save(stacks, temporary)
    versions = {name: version(name) for name in PACKAGES}
    write_json(path, {"settings": described, **found, "versions": versions, "threads": torch.get_num_threads()})
    return path


def add_world_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which models and data are used."""
    parser.add_argument(
        "--config", type=Path, default=Path("configs/tiny/finetune_mole.yaml"), help="its section `model` is used"
    )
    parser.add_argument("--stage1", type=Path, default=Path("runs/tiny/pretrain"), help="run of stage 1 (%(default)s)")
    parser.add_argument(
        "--data", type=Path, default=Path("playground/data/tiny"), help="folder of the data (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/conflict"), help="folder of results (%(default)s)")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.conflict.run",
        formatter_class=functools.partial(argparse.HelpFormatter, width=HELP_WIDTH),
        description=__doc__,
    )
    add_world_arguments(parser)
    parser.add_argument(
        "--grid", choices=GRIDS, nargs="+", default=["core"], help="which jobs, in this order (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[11, 12, 13], help="seeds (11 12 13, those of the protocol)"
    )
    parser.add_argument("--budget-minutes", type=float, help="begin no job after this time")
    parser.add_argument("--list", action="store_true", help="list the jobs and what is missing, and run nothing")
    given = parser.parse_args(arguments)
    if given.budget_minutes is not None and given.budget_minutes <= 0:
        raise ConfigError(f"--budget-minutes {given.budget_minutes}: it must be above 0")
    torch.set_num_threads(1)  # the digits depend on it, and a stack of this size gains nothing from a second
    started = time.monotonic()
    world = load_world(given.config, given.stage1, given.data, given.out / "cache", image_positions=IMAGE_POSITIONS)
    jobs = [job for name in given.grid for job in GRIDS[name](given.seeds)]
    recipe, missing = Recipe(), []
    for job in jobs:
        path = result_path(given.out, describe(world, job, recipe))
        if not path.is_file():
            missing.append(job)
        if given.list:
            state = "done   " if path.is_file() else "missing"
            print(f"{state} {path.stem}  {job.cell}, seed {job.seed}, {len(job.arms)} arms")
    print(f"world {world.digest}: {len(jobs) - len(missing)} of {len(jobs)} jobs are done")
    if given.list:
        return 0
    for number, job in enumerate(tqdm(missing, unit="job", mininterval=10)):
        if given.budget_minutes is not None and time.monotonic() - started > 60 * given.budget_minutes:
            print(
                f"the budget of {given.budget_minutes:g} minutes is used up; {len(missing) - number} jobs are missing"
            )
            break
        run_job(world, job, recipe, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m scripts.conflict.score`: answer the test images with the adapters of finished jobs, once, and log it.

The search chooses on validation images only. This command is separate, and each call adds one line to `scored.jsonl`
in the results' folder, so that everybody can see how often the test was looked at.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import DataError, command
from llava_mole.common.files import atomic_path, write_json
from llava_mole.common.text import HELP_WIDTH
from llava_mole.data.prepare.sources.tiny.facts import facts
from llava_mole.data.prepare.sources.tiny.samples import DOMAINS
from scripts.conflict.grid import GRIDS
from scripts.conflict.loop import Recipe, arms_of, build_stack, validate
from scripts.conflict.run import IMAGE_POSITIONS, add_world_arguments, describe, result_path
from scripts.conflict.world import load_world

SAMPLES = 1024
"""Test samples of a domain."""


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.conflict.score",
        formatter_class=functools.partial(argparse.HelpFormatter, width=HELP_WIDTH),
        description=__doc__,
    )
    add_world_arguments(parser)
    parser.add_argument("--grid", choices=GRIDS, nargs="+", default=["core"], help="which jobs (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="seeds (11 12 13)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    world = load_world(
        given.config, given.stage1, given.data, given.out / "cache", image_positions=IMAGE_POSITIONS, splits=("test",)
    )
    rows: list[dict[str, Any]] = []
    for name in given.grid:
        for job in GRIDS[name](given.seeds):
            path = result_path(given.out, describe(world, job, Recipe()))
            if not path.with_suffix(".pt").is_file() or not path.is_file():
                continue
            saved = torch.load(path.with_suffix(".pt"), weights_only=True)
            cell = job.cell
            asked = {d: facts(d, cell.load, cell.convention, job.seed, cell.agreed) for d in DOMAINS}
            for single, parameters in ((True, saved.get("single")), (False, saved.get("mixed"))):
                if parameters is None:
                    continue
                arms = arms_of(job.arms, single)
                stack = build_stack(world, cell, job.seed, arms)
                stack.load_state(parameters)
                for arm, accuracy in zip(arms, validate(world, stack, asked, SAMPLES, job.seed, "test"), strict=True):
                    rows.append(
                        {"job": path.stem, "cell": vars(cell), "seed": job.seed, "arm": arm, "accuracy": accuracy}
                    )
    if not rows:
        raise DataError(
            f"{given.out}: no finished job of the grid {' '.join(given.grid)} with this world; run it first"
        )
    write_json(given.out / "test.json", {"world": world.digest, "rows": rows}, indent=None)
    log = given.out / "scored.jsonl"
    earlier = log.read_text(encoding="utf-8") if log.is_file() else ""
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "grid": given.grid, "seeds": given.seeds}
    entry |= {"world": world.digest, "adapters": len(rows)}
    with atomic_path(log) as temporary:
        Path(temporary).write_text(earlier + json.dumps(entry) + "\n", encoding="utf-8")
    look = earlier.count("\n") + 1
    print(f"{len(rows)} adapters scored on test images; {given.out / 'test.json'}; look number {look}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`llava-mole plan CONFIG --gpus N --gpu NAME`: memory, FLOPs, hours and disk space of a run before it starts."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from llava_mole.common.errors import ConfigError, command
from llava_mole.common.files import write_json
from llava_mole.common.log import setup_logging
from llava_mole.config import parse_run_config

FIGURE = "plan.png"


def parse_source(text: str) -> tuple[str, tuple[int, float]]:
    """Parse `NAME=RECORDS,MEAN_TOKENS` of option `--source`. Raises ConfigError for any other form."""
    name, _, numbers = text.partition("=")
    try:
        records, mean = numbers.split(",")
        result = name, (int(records), float(mean))
    except ValueError:
        raise ConfigError(f"--source {text!r}: it must be NAME=RECORDS,MEAN_TOKENS, as in notes=20000,700") from None
    if not name or result[1][0] < 1 or not 1 <= result[1][1] < math.inf:
        raise ConfigError(f"--source {text!r}: give a name, and records and tokens of at least 1")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-mole plan",
        allow_abbrev=False,
        description="Estimate the cost of a run before it starts. Options --key.sub VALUE override the configuration.",
    )
    parser.add_argument("config", metavar="CONFIG", help="configuration of the run, as for `llava-mole train`")
    add = parser.add_argument
    add("--gpus", type=int, default=8, metavar="N", help="number of GPUs (default 8)")
    add("--gpu", default="a100-80g", metavar="NAME", help="GPU model (default a100-80g); an unknown name lists all")
    add("--utilisation", type=float, default=0.5, metavar="SHARE", help="share of the GPU's peak in use (default 0.5)")
    add("--source", action="append", default=[], metavar="NAME=RECORDS,MEAN_TOKENS", help="size of a source that is "
        "not on disk; repeatable")  # fmt: skip
    add("--sample", type=int, default=2000, metavar="N", help="records to tokenize per source (default 2000)")
    add("--steps", type=int, default=200, metavar="N", help="optimizer steps to simulate (default 200)")
    add("--out", type=Path, metavar="DIR", help=f"folder of {FIGURE} (default: the run directory if it exists, else "
        "no picture)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write all numbers to this file")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan and draw it. The exit code is 0 whether or not the run fits."""
    arguments, overrides = _parser().parse_known_args(argv)
    config = parse_run_config([arguments.config, *overrides], prog="llava-mole plan")
    setup_logging()  # before the imports, whose warnings do not concern a plan
    from llava_mole.analysis.plan.estimates import PlanOptions
    from llava_mole.analysis.plan.figure import draw_plan
    from llava_mole.analysis.plan.plan import make_plan
    from llava_mole.analysis.plan.text import plan_text, plan_values
    from llava_mole.model.flops import find_gpu

    options = PlanOptions(
        gpus=arguments.gpus,
        gpu=find_gpu(arguments.gpu),
        utilisation=arguments.utilisation,
        steps=arguments.steps,
        sample=arguments.sample,
        given=dict(parse_source(text) for text in arguments.source),
    )
    plan = make_plan(
        options,
        stage=config.stage,
        model=config.model,
        adapter=config.adapter,
        data=config.data,
        train=config.train,
        train_projector=config.train_projector,
    )
    print(plan_text(plan))
    if arguments.json is not None:
        write_json(arguments.json, plan_values(plan), indent=1)
    run_dir = Path(config.train.output_dir)
    out = arguments.out or (run_dir if run_dir.is_dir() else None)
    print(f"\npicture: {draw_plan(plan, out / FIGURE) if out is not None else 'none; --out DIR says where'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

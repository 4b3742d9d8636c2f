"""`llava-mole plan CONFIG --gpus N --gpu NAME`: what a run takes, before it starts: memory, FLOPs, hours, disk."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from llava_mole.config import parse_run_config
from llava_mole.errors import ConfigError, command
from llava_mole.hardware import find_gpu
from llava_mole.log import setup_logging

FIGURE = "plan.png"


def parse_source(text: str) -> tuple[str, tuple[int, float]]:
    """`NAME=RECORDS,MEAN_TOKENS` of option `--source`. Raises ConfigError where it is something else."""
    name, _, numbers = text.partition("=")
    try:
        records, mean = numbers.split(",")
        result = name, (int(records), float(mean))
    except ValueError:
        raise ConfigError(f"--source {text!r}: it must be NAME=RECORDS,MEAN_TOKENS, as in notes=20000,700") from None
    if not name or result[1][0] < 1 or result[1][1] < 1:
        raise ConfigError(f"--source {text!r}: name, records and tokens must be there and above 0")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-mole plan",
        allow_abbrev=False,
        description="What a run takes, before it starts. Further options are the configuration's own: --key.sub value.",
    )
    parser.add_argument("config", metavar="CONFIG", help="configuration of the run, as for `llava-mole train`")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default 8)")
    parser.add_argument("--gpu", default="a100-80g", help="kind of GPU (default a100-80g); a wrong one lists all")
    parser.add_argument("--utilisation", type=float, default=0.5, help="share of the peak in use (default 0.5)")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=RECORDS,MEAN_TOKENS")
    parser.add_argument("--sample", type=int, default=2000, help="records of a source to tokenize (default 2000)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps to simulate (default 200)")
    parser.add_argument("--out", type=Path, help="folder of plan.png (default: the run directory if it exists, else .)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan and draw it. The exit code is 0 whether it fits or not: both are answers."""
    arguments, overrides = _parser().parse_known_args(argv)
    gpu = find_gpu(arguments.gpu)
    config = parse_run_config([arguments.config, *overrides], prog="llava-mole plan")
    setup_logging()  # before libraries are imported that warn of what does not concern a plan
    from llava_mole.analysis.estimates import PlanOptions
    from llava_mole.analysis.plan import make_plan
    from llava_mole.analysis.plan_figure import draw_plan
    from llava_mole.analysis.plan_text import plan_text, plan_values

    options = PlanOptions(
        gpus=arguments.gpus,
        gpu=gpu,
        utilisation=arguments.utilisation,
        steps=arguments.steps,
        sample=arguments.sample,
        given=dict(parse_source(text) for text in arguments.source),
    )
    plan = make_plan(config, options)
    print(plan_text(plan))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(plan_values(plan), indent=1) + "\n", encoding="utf-8")
    run_dir = Path(config.train.output_dir)
    out = arguments.out or (run_dir if run_dir.is_dir() else Path())
    print(f"\npicture: {draw_plan(plan, out / FIGURE)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`llava-mole plan CONFIG --gpus N --gpu NAME`: memory, FLOPs, hours and disk space of a run before it starts."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from llava_mole.common.errors import ConfigError, command
from llava_mole.common.files import write_json
from llava_mole.common.log import setup_logging
from llava_mole.config import parse_run_config

FIGURE, SCALE_FIGURE = "plan.png", "scale.png"


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


def parse_slow(text: str) -> tuple[float, float]:
    """Parse `SHARE,FACTOR` of option `--slow`. Raises ConfigError for any other form."""
    try:
        share, factor = (float(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(f"--slow {text!r}: it must be SHARE,FACTOR, as in 0.01,1.2") from None
    return share, factor


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
    model = parser.add_argument_group("what trains, and images of several tiles (default: as configured)")
    add = model.add_argument
    add("--train-language-model", metavar="PART", help="full, adapters or none")
    add("--train-tower", metavar="BLOCKS", help="none, all or last_<n>, such as last_12")
    add("--tiles", type=float, metavar="N", help="squares an image is cut into, its overview included (default 1)")
    add("--image-tokens", type=int, metavar="N", help="tokens of an image (default: the tower's, for every tile)")
    cluster = parser.add_argument_group("how GPUs share the model, their network, and how equal they are")
    add = cluster.add_argument
    add("--strategy", choices=["zero2", "zero3", "fsdp2", "ddp"], help="default: train.distributed")
    add("--scale", action="store_true", help="also the same work for each GPU on 8 to 1,024 of them")
    add("--gpus-per-node", type=int, metavar="N", help="default 8")
    add("--link-gbs", type=float, metavar="GB/S", help="of a GPU within its node, one way (default: the GPU's NVLink)")
    add("--node-gbs", type=float, metavar="GB/S", help="of a node's network, one way (default 200)")
    add("--overlap", type=float, metavar="SHARE", help="of the compute that communication runs beside (default 0.8)")
    add("--jitter", type=float, default=0.0, metavar="SHARE", help="random delays of a GPU (default 0)")
    add("--slow", metavar="SHARE,FACTOR", help="share of GPUs that are slow throughout, and by which factor")
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help=f"folder of {FIGURE} and {SCALE_FIGURE} (default: the run directory if "
        "it exists, else no picture)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write all numbers to this file")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan and draw it. The exit code is 0 whether or not the run fits."""
    arguments, overrides = _parser().parse_known_args(argv)
    config = parse_run_config([arguments.config, *overrides], prog="llava-mole plan")
    setup_logging()  # before the imports, whose warnings do not concern a plan
    from llava_mole.analysis.plan.architecture import Trained
    from llava_mole.analysis.plan.estimates import PlanOptions
    from llava_mole.analysis.plan.figure import draw_plan, draw_scale
    from llava_mole.analysis.plan.network import network_of
    from llava_mole.analysis.plan.plan import ImageSize, make_plan
    from llava_mole.analysis.plan.scale import scale_rows, scale_text, scale_values
    from llava_mole.analysis.plan.text import plan_text, plan_values
    from llava_mole.model.flops import find_gpu

    gpu = find_gpu(arguments.gpu)
    slow_share, slow_factor = parse_slow(arguments.slow) if arguments.slow is not None else (0.0, 1.0)
    trains = getattr(config.model, "train", None)
    tower = getattr(trains, "tower", "none")
    tower = f"last_{trains.tower_blocks}" if tower == "last_n" else tower  # type: ignore[union-attr]
    options = PlanOptions(
        gpus=arguments.gpus,
        gpu=gpu,
        network=network_of(
            gpu,
            link=None if arguments.link_gbs is None else 1e9 * arguments.link_gbs,
            node=None if arguments.node_gbs is None else 1e9 * arguments.node_gbs,
            gpus_per_node=arguments.gpus_per_node,
            overlap=arguments.overlap,
        ),
        jitter=arguments.jitter,
        slow_share=slow_share,
        slow_factor=slow_factor,
        sharing=arguments.strategy,
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
        trained=Trained(
            arguments.train_language_model or getattr(trains, "language_model", "adapters"),
            arguments.train_tower or tower,
        ),
        image=ImageSize(arguments.tiles if arguments.tiles is not None else 1.0, arguments.image_tokens),
    )
    print(plan_text(plan))
    values = plan_values(plan)
    rows = scale_rows(plan) if arguments.scale else []
    if rows:
        print("\n" + scale_text(plan, rows))
        values["scale"] = scale_values(rows)
    if arguments.json is not None:
        write_json(arguments.json, values, indent=1)
    run_dir = Path(config.train.output_dir)
    out = arguments.out or (run_dir if run_dir.is_dir() else None)
    if rows and out is not None:
        print(f"\npicture: {draw_scale(plan, rows, out / SCALE_FIGURE)}")
    print(f"\npicture: {draw_plan(plan, out / FIGURE) if out is not None else 'none; --out DIR says where'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`llava-mole plan CONFIG --gpus N --gpu NAME`: memory, FLOPs, hours and disk space of a run before it starts."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.analysis.plan.estimates import Estimate
from llava_mole.analysis.plan.plan import Plan
from llava_mole.common.errors import ConfigError, command
from llava_mole.common.files import write_json
from llava_mole.common.log import setup_logging
from llava_mole.config import parse_run_config
from llava_mole.model.flops import GIB, find_gpu

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
    add("--out", type=Path, metavar="DIR", help=f"folder of {FIGURE} (default: the run directory if it exists, else .)")
    add("--json", type=Path, metavar="FILE", help="also write all numbers to this file")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan and draw it. The exit code is 0 whether or not the run fits."""
    arguments, overrides = _parser().parse_known_args(argv)
    gpu = find_gpu(arguments.gpu)
    config = parse_run_config([arguments.config, *overrides], prog="llava-mole plan")
    setup_logging()  # before the imports, whose warnings do not concern a plan
    from llava_mole.analysis.plan.estimates import PlanOptions
    from llava_mole.analysis.plan.figure import draw_plan
    from llava_mole.analysis.plan.plan import make_plan

    options = PlanOptions(
        gpus=arguments.gpus,
        gpu=gpu,
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
    out = arguments.out or (run_dir if run_dir.is_dir() else Path())
    print(f"\npicture: {draw_plan(plan, out / FIGURE)}")
    return 0


def plan_text(plan: Plan) -> str:
    """The plan as `llava-mole plan` prints it."""
    options, best = plan.options, plan.recommended
    gpu = options.gpu
    lines = [
        f"{plan.stage}: {plan.samples:,} samples, batch {plan.batch}, {plan.steps:,} steps on {options.gpus} x "
        f"{gpu.name} ({gpu.bf16_flops / 1e12:g} TFLOP/s dense bf16, {gpu.memory_bytes / GIB:g} GiB)",
        *(f"assumed: {assumption}" for assumption in plan.assumptions),
        f"assumed: a rank sustains {options.utilisation:.0%} of its GPU's peak while it computes (--utilisation)",
        "",
        f"{'part':<16}{'trainable':>16}{'all':>18}",
    ]
    totals = ("total", sum(part[1] for part in plan.parameters), sum(part[2] for part in plan.parameters))
    lines += [f"{name:<16}{trainable:>16,}{whole:>18,}" for name, trainable, whole in [*plan.parameters, totals]]
    lines += ["", f"{'source':<22}{'samples':>12}{'mean tokens':>13}{'longest':>9}{'TFLOP':>8}  lengths"]
    lines += [
        f"{s.name:<22}{s.samples:>12,}{s.mean_tokens:>13,.0f}{s.longest:>9,}{s.teraflops:>8.3g}  {s.basis}"
        for s in plan.sources
    ]
    lines += [
        f"{'':<22}{plan.samples:>12,}{'':>22}{plan.sample_teraflops:>8.3g}  a sample, forward and backward",
        "",
        f"memory of one GPU, recommended setting ({_words(best)})",
    ]
    lines += [f"  {name:<20}{size / GIB:>8.2f} GiB" for name, size in best.memory.items()]
    verdict = "fits" if plan.fits(best) else "DOES NOT FIT"
    lines += [
        f"  {'total':<20}{best.memory_bytes / GIB:>8.2f} GiB of {gpu.memory_bytes / GIB:g}: {verdict}",
        f"recommended: {best.setting}",
        f"because: {plan.reason}; {best.hours:.1f} h",
        f"as configured: {_words(plan.configured)}: {plan.configured.memory_bytes / GIB:.1f} GiB, "
        + ("fits" if plan.fits(plan.configured) else "DOES NOT FIT")
        + f"; {plan.configured.hours:.1f} h",
        f"a checkpoint takes {plan.checkpoint_bytes / 1e9:.2f} GB",
        "",
        f"{'GPUs':>5}  {'batching':<9}{'row':>8}  {'recompute':<10}{'GiB':>6}{'s/step':>8}{'hours':>8}{'GPU hours':>11}"
        f"{'ranks busy':>12}{'MFU':>6}",
    ]
    lines += [_estimate_line(estimate, plan) for estimate in plan.estimates]
    lines += [
        "* as configured, > recommended; padded with all recomputed is how LLaVA trains. row: tokens of the largest",
        "micro-batch. ranks busy: share of the time not spent waiting for the slowest rank. MFU: forward and backward",
        "FLOPs of real tokens over what the GPUs could do in the time.",
    ]
    return "\n".join(lines)


def _words(estimate: Estimate) -> str:
    return f"{estimate.batching}, rows of {estimate.row_tokens:,} tokens, recompute {estimate.policy.name}"


def _estimate_line(estimate: Estimate, plan: Plan) -> str:
    mark = "*" if estimate == plan.configured else ">" if estimate == plan.recommended else " "
    over = "" if plan.fits(estimate) else "  does not fit"
    return (
        f"{mark}{estimate.gpus:>4}  {estimate.batching:<9}{estimate.row_tokens:>8,}  {estimate.policy.name:<10}"
        f"{estimate.memory_bytes / GIB:>6.1f}{estimate.step.seconds:>8.3f}{estimate.hours:>8.1f}"
        f"{estimate.gpu_hours:>11,.0f}{estimate.step.straggler_efficiency:>12.0%}{estimate.mfu:>6.0%}{over}"
    )


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as nested plain values; keys of bytes end in `_bytes`, those of seconds in `_s`."""
    return {
        "stage": plan.stage,
        "gpu": plan.options.gpu.name,
        "gpus": plan.options.gpus,
        "utilisation": plan.options.utilisation,
        "assumptions": list(plan.assumptions),
        "parameters": {name: {"trainable": some, "all": whole} for name, some, whole in plan.parameters},
        "sources": [dataclasses.asdict(source) for source in plan.sources],
        "samples": plan.samples,
        "steps": plan.steps,
        "global_batch_size": plan.batch,
        "sample_teraflops": plan.sample_teraflops,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "fits": plan.fits(plan.recommended),
        "reason": plan.reason,
        "configured": _estimate_values(plan.configured),
        "recommended": _estimate_values(plan.recommended),
        "estimates": [_estimate_values(estimate) for estimate in plan.estimates],
    }


def _estimate_values(estimate: Estimate) -> dict[str, Any]:
    return {
        "gpus": estimate.gpus,
        "batching": estimate.batching,
        "row_tokens": estimate.row_tokens,
        "recompute": estimate.policy.name,
        "setting": estimate.setting,
        "recomputed_layers": estimate.policy.recomputed_layers,
        "memory_bytes": {name: round(size) for name, size in estimate.memory.items()},
        "total_memory_bytes": round(estimate.memory_bytes),
        "step_s": {key: getattr(estimate.step, key) for key in ("useful", "padding", "recompute", "stragglers")},
        "total_step_s": estimate.step.seconds,
        "hours": estimate.hours,
        "gpu_hours": estimate.gpu_hours,
        "straggler_efficiency": estimate.step.straggler_efficiency,
        "mfu": estimate.mfu,
    }


if __name__ == "__main__":
    raise SystemExit(main())

"""A plan as text and as plain values."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llava_mole.analysis.plan.estimates import Estimate
from llava_mole.analysis.plan.plan import Plan
from llava_mole.common.text import format_bytes, format_table
from llava_mole.model.flops import GIB


class Unit(NamedTuple):
    """A unit for a column of numbers."""

    name: str
    size: float
    """How many of the base unit it is."""


HOURS = (Unit("h", 1.0), Unit("min", 1 / 60), Unit("s", 1 / 3600), Unit("ms", 1 / 3.6e6))
SECONDS = (Unit("s", 1.0), Unit("ms", 1e-3), Unit("us", 1e-6))
TERAFLOPS = (Unit("TFLOP", 1.0), Unit("GFLOP", 1e-3), Unit("MFLOP", 1e-6))


def unit_for(values: Iterable[float], units: Sequence[Unit]) -> Unit:
    """The largest unit in which the largest value is at least 1, so that small runs do not read as zero."""
    largest = max(values, default=0.0)
    return next((unit for unit in units if largest >= unit.size), units[-1])


def in_unit(value: float, unit: Unit) -> str:
    """A value with its unit, to three digits: `11.6 h`, `1,097 h`, `36.0 ms`."""
    return f"{digits(value / unit.size)} {unit.name}"


def digits(value: float) -> str:
    """A number to three digits, without exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def plan_text(plan: Plan) -> str:
    """The plan as `llava-mole plan` prints it."""
    options, best = plan.options, plan.recommended
    gpu = options.gpu
    lines = [
        f"{plan.stage}: {plan.samples:,} samples, batch {plan.batch}, {plan.steps:,} steps on {options.gpus} x "
        f"{gpu.name} ({gpu.bf16_flops / 1e12:g} TFLOP/s dense bf16, {gpu.memory_bytes / GIB:g} GiB)",
        *(f"assumed: {assumption}" for assumption in plan.assumptions),
        f"assumed: a rank sustains {options.utilisation:.0%} of its GPU's peak while it computes (--utilisation)",
        f"assumed: {plan.options.connection.words}; strategy {plan.planner.sharing}",
    ]
    totals = ("total", sum(part[1] for part in plan.parameters), sum(part[2] for part in plan.parameters))
    parts = [(name, f"{some:,}", f"{whole:,}") for name, some, whole in [*plan.parameters, totals]]
    memory = [(name, "<0.01" if 0 < size < 0.005 * GIB else f"{size / GIB:.2f}") for name, size in best.memory.items()]
    memory.append(("total", f"{best.memory_bytes / GIB:.2f}"))
    verdict = "fits" if plan.fits(best) else "DOES NOT FIT"
    unit = unit_for([estimate.hours for estimate in (best, plan.configured)], HOURS)
    lines += [
        "",
        format_table([("part", "trainable", "all"), *parts], right={1, 2}),
        "",
        _sources_table(plan),
        "",
        f"memory of one GPU, recommended setting ({_words(best)})",
        format_table([("item", "GiB"), *memory], right={1}),
        f"of {gpu.memory_bytes / GIB:g} GiB: {verdict}",
        "",
        f"recommended: {best.setting}",
        f"because: {plan.reason}; {in_unit(best.hours, unit)}",
        f"as configured: {_words(plan.configured)}: {plan.configured.memory_bytes / GIB:.1f} GiB, "
        + ("fits" if plan.fits(plan.configured) else "DOES NOT FIT")
        + f"; {in_unit(plan.configured.hours, unit)}",
        f"a checkpoint takes {format_bytes(plan.checkpoint_bytes)}",
        "",
        _estimates_table(plan),
        "* as configured, > recommended; padded with all recomputed is how LLaVA trains. row: tokens of the largest",
        "micro-batch. ranks busy: share of the time in which ranks compute. MFU: forward and backward",
        "FLOPs of real tokens over what the GPUs could do in the time.",
    ]
    return "\n".join(lines)


def _sources_table(plan: Plan) -> str:
    unit = unit_for([source.teraflops for source in plan.sources], TERAFLOPS)
    rows = [("source", "samples", "mean tokens", "longest", unit.name, "lengths")]
    rows += [
        (s.name, f"{s.samples:,}", f"{s.mean_tokens:,.0f}", f"{s.longest:,}", digits(s.teraflops / unit.size), s.basis)
        for s in plan.sources
    ]
    each = digits(plan.sample_teraflops / unit.size)
    rows.append(("", f"{plan.samples:,}", "", "", each, "a sample, forward and backward"))
    return format_table(rows, right={1, 2, 3, 4})


def _words(estimate: Estimate) -> str:
    return f"{estimate.batching}, rows of {estimate.row_tokens:,} tokens, recompute {estimate.policy.name}"


def _estimates_table(plan: Plan) -> str:
    """All estimates, marked and compared; times in units in which the longest is at least 1."""
    run = unit_for([estimate.hours for estimate in plan.estimates], HOURS)
    gpu = unit_for([estimate.gpu_hours for estimate in plan.estimates], HOURS)
    one = unit_for([estimate.step.seconds for estimate in plan.estimates], SECONDS)
    header = ("", "GPUs", "batching", "row", "recompute", "GiB", f"{one.name}/step", run.name, f"GPU {gpu.name}")
    rows = [(*header, "ranks busy", "MFU", "")]
    for e in plan.estimates:
        mark = "*" if e == plan.configured else ">" if e == plan.recommended else ""
        step = f"{e.step.seconds / one.size:.3f}"
        memory, times = f"{e.memory_bytes / GIB:.1f}", (digits(e.hours / run.size), digits(e.gpu_hours / gpu.size))
        shares = f"{e.step.straggler_efficiency:.0%}", f"{e.mfu:.0%}"
        over = "" if plan.fits(e) else "does not fit"
        words = (mark, f"{e.gpus}", e.batching, f"{e.row_tokens:,}", e.policy.name)
        rows.append((*words, memory, step, *times, *shares, over))
    return format_table(rows, right={1, 3, 5, 6, 7, 8, 9, 10})


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
        "step_s": {
            key: getattr(estimate.step, key)
            for key in ("useful", "padding", "recompute", "stragglers", "slow", "communication")
        },
        "bytes_sent": round(estimate.bytes_sent),
        "total_step_s": estimate.step.seconds,
        "hours": estimate.hours,
        "gpu_hours": estimate.gpu_hours,
        "straggler_efficiency": estimate.step.straggler_efficiency,
        "mfu": estimate.mfu,
    }

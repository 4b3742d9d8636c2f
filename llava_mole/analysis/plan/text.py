"""A plan as text and as plain values."""

import dataclasses
from typing import Any

from llava_mole.analysis.plan.estimates import Estimate
from llava_mole.analysis.plan.plan import Plan
from llava_mole.model.flops import GIB


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

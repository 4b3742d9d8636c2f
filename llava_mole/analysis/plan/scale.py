"""The same work for each GPU on 8 to 1,024 of them: what is sent, what waits, and where communication binds."""

import math
from dataclasses import dataclass
from statistics import mean
from typing import Any

from llava_mole.analysis.plan.plan import Plan
from llava_mole.analysis.plan.simulation import StepTime, draw_steps, mean_step
from llava_mole.common.text import format_bytes, format_table
from llava_mole.model.flops import GIB

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
MOST_STEPS = 8
"""Steps simulated for each number of GPUs, at most: a step of 1,024 GPUs has thousands of samples."""


@dataclass(frozen=True)
class ScaleRow:
    """One number of GPUs; the batch grows with it."""

    gpus: int
    batch: int
    memory_bytes: float
    bytes_sent: float
    """By one rank in a step."""
    step: StepTime
    tokens_per_pass: float
    """Of the micro-batches that the other ranks wait for, on average; padding and recomputation count as tokens."""
    tokens_per_s: float
    """Of one GPU."""
    hours: float
    binds_below: float | None
    """`tokens_per_pass` below which communication takes longer than the compute it may run beside; None if it runs
    beside nothing."""

    @property
    def binds(self) -> bool:
        """Whether the run's micro-batches are that short."""
        return self.binds_below is not None and self.tokens_per_pass < self.binds_below

    @property
    def efficiency(self) -> float:
        """Share of the time that ranks compute."""
        return self.step.straggler_efficiency


def scale_rows(plan: Plan) -> list[ScaleRow]:
    """The recommended setting on each number of GPUs, with the samples a GPU of the configuration."""
    planner, options, best = plan.planner, plan.options, plan.recommended
    each = plan.batch / options.gpus
    network = options.connection
    rows = []
    for gpus in sorted({*GPUS, options.gpus}):
        batch = max(gpus, round(each * gpus))
        steps = min(options.steps, MOST_STEPS)
        drawn = list(draw_steps(plan.lengths, plan.counts, batch, steps, seed=planner.train.seed))
        batching: Any = best.batching
        step = mean_step(planner.step_times(drawn, gpus, batching, best.policy, best.row_tokens))
        tokens = mean(float(samples.tokens.sum()) for samples in drawn)
        passes = planner.passes(drawn, gpus, batching, best.row_tokens)
        traffic = planner.traffic(gpus)
        waits_for = traffic.pass_seconds(network, gpus)
        # Compute of a token, from the simulation itself.
        per_token = (step.useful + step.padding + step.recompute) * gpus / tokens
        hides = network.overlap * per_token if traffic.hidden else 0.0
        below = waits_for / hides if hides else None
        rows.append(
            ScaleRow(
                gpus=gpus,
                batch=batch,
                memory_bytes=sum(planner.memory(gpus, batching, best.policy, best.row_tokens).values()),
                bytes_sent=traffic.bytes_sent(gpus, passes),
                step=step,
                tokens_per_pass=(step.seconds - step.slow - step.communication) / passes / per_token,
                tokens_per_s=tokens / gpus / step.seconds,
                hours=step.seconds * math.ceil(plan.samples / batch) / 3600,
                binds_below=below,
            )
        )
    return rows


def scale_text(plan: Plan, rows: list[ScaleRow]) -> str:
    """The rows as a table with the network they assume."""
    options, network, batch = plan.options, plan.options.connection, plan.batch / plan.options.gpus
    header = ("GPUs", "batch", "GiB", "sent a step", "s/step", "h", "tokens/s", "busy", "work", "slow", "data", "binds")
    table: list[tuple[str, ...]] = [header]
    for row in rows:
        step = row.step
        shares = (row.efficiency, *(part / step.seconds for part in (step.stragglers, step.slow, step.communication)))
        below = "-" if row.binds_below is None else f"{row.binds_below:,.0f}" + " !" * row.binds
        table.append(
            (
                f"{row.gpus:,}", f"{row.batch:,}", f"{row.memory_bytes / GIB:.1f}", format_bytes(round(row.bytes_sent)),
                f"{step.seconds:.3f}", f"{row.hours:,.1f}", f"{row.tokens_per_s:,.0f}",
                *(f"{share:.1%}" for share in shares), below,
            )
        )  # fmt: skip
    first = next((row.gpus for row in rows if row.binds), None)
    slow = f"{options.slow_share:.1%} of the GPUs {options.slow_factor:g} x as slow" if options.slow_share else "none"
    return "\n".join(
        [
            f"{plan.planner.sharing} on {rows[0].gpus:,} to {rows[-1].gpus:,} GPUs, samples a GPU and step: {batch:g} "
            f"({plan.recommended.batching}, rows of {plan.recommended.row_tokens:,} tokens, recompute "
            f"{plan.recommended.policy.name})",
            f"network: {network.words}; communication runs beside {network.overlap:.0%} of the compute",
            f"GPUs: random delays of {options.jitter:.1%} (--jitter); permanently slow: {slow}",
            "",
            format_table(table, right=set(range(12))),
            "busy: share of the time in which ranks compute; the rest is waiting for the rank with the most work, for",
            "slow GPUs and for data. binds: tokens of a micro-batch, the one that the ranks wait for, below which",
            "communication takes longer than the compute that hides it; ! where the run is below.",
            f"communication binds from {first:,} GPUs on" if first else "communication binds on none of these numbers",
        ]
    )


def scale_values(rows: list[ScaleRow]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [
        {
            "gpus": row.gpus,
            "global_batch_size": row.batch,
            "memory_bytes": round(row.memory_bytes),
            "bytes_sent": round(row.bytes_sent),
            "step_s": {
                key: getattr(row.step, key)
                for key in ("useful", "padding", "recompute", "stragglers", "slow", "communication")
            },
            "total_step_s": row.step.seconds,
            "tokens_per_pass": row.tokens_per_pass,
            "tokens_per_s": row.tokens_per_s,
            "hours": row.hours,
            "efficiency": row.efficiency,
            "binds_below_tokens": row.binds_below,
            "binds": row.binds,
        }
        for row in rows
    ]

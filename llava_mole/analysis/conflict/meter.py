"""One measurement of the conflict meter, from a model and its probe to plain values."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from llava_mole.analysis.conflict.gradients import Reduction, measure_gradients
from llava_mole.analysis.conflict.interference import StepRule, measure_interference
from llava_mole.analysis.conflict.statistics import describe
from llava_mole.analysis.conflict.tokens import describe_tokens, measure_tokens
from llava_mole.analysis.probe import Advance, Probe, no_progress
from llava_mole.analysis.undisturbed import undisturbed
from llava_mole.model.llava_arch import LlavaMole


def passes_of(sources: int, batches: int, *, interference: bool, tokens: bool) -> int:
    """How many batches of a source a measurement goes through: the total of its progress."""
    each = 1 + (sources + 2 if interference else 0) + (1 if tokens else 0)
    return each * sources * batches


def measure_conflict(
    model: LlavaMole,
    probe: Probe,
    parameters: Mapping[str, torch.nn.Parameter],
    reduction: Reduction,
    *,
    rule: StepRule | None = None,
    tokens: bool = False,
    advance: Advance = no_progress,
) -> dict[str, Any]:
    """Measure, and leave the model as it was.

    Args:
        model: A model, also one in training.
        probe: Its batches.
        parameters: What trains.
        reduction: `train.loss_reduction`.
        rule: The step of the interference matrix; None leaves it out.
        tokens: Whether conflicts of tokens inside experts are measured too.

    Returns:
        What `describe` returns and, if asked for, `interference` and `tokens`; `seconds` has the duration of each.

    Raises:
        UserError: a sample cannot be read, or there are too few.
    """
    seconds, started = {}, time.perf_counter()
    arguments = (model, probe.batch, probe.sources, probe.batches)
    with undisturbed(model):
        result = describe(measure_gradients(*arguments, parameters, reduction, advance))
        seconds["gradients"] = time.perf_counter() - started
        if rule is not None:
            started = time.perf_counter()
            found = measure_interference(*arguments, parameters, reduction, rule, advance)
            result["interference"] = {
                "change": found.change.tolist(),
                "interval": found.interval.tolist(),
                "before": found.before.tolist(),
                "step": "AdamW without state" if rule.moments is None else "AdamW with the run's second moments",
                "rates": sorted(set(rule.rates.values())),
            }
            seconds["interference"] = time.perf_counter() - started
        if tokens:
            started = time.perf_counter()
            result["tokens"] = describe_tokens(measure_tokens(*arguments, reduction, advance))
            seconds["tokens"] = time.perf_counter() - started
    return {**result, "batch_size": probe.batch_size, "held_out": probe.held_out, "seconds": seconds}

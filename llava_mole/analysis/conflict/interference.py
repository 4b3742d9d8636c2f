"""The interference matrix: what one step on source i does to the loss of source j.

Shape legend: N batches, S sources.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from llava_mole.analysis.conflict.gradients import Reduction, row_losses, source_gradient
from llava_mole.analysis.conflict.statistics import half_width, mean_of
from llava_mole.analysis.probe import Advance, Row, no_progress
from llava_mole.model.llava_arch import LlavaMole

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of the optimizer that trains."""


@dataclass(frozen=True)
class StepRule:
    """What the gradient g of one source adds to an optimizer step: `-rate (1 - b1) g / (sqrt(v) + 1e-8)`.

    That is AdamW's step with g minus its step without, past the first few steps and without decay: g enters the first
    moment with the weight 1 - b1 = 0.1. v are the run's second moments, bias-corrected. Without them v is g squared, as
    in the first step of a fresh AdamW. As in training, g is clipped by its norm before.
    """

    rates: Mapping[str, float]
    """Parameter name -> learning rate."""
    max_grad_norm: float
    """0 turns clipping off."""
    moments: Mapping[str, torch.Tensor] | None = None
    """Parameter name -> v; None without a run's optimizer state."""

    def updates(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameter name -> what is added to it."""
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        scale = min(1.0, self.max_grad_norm / (float(norm) + 1e-6)) if self.max_grad_norm else 1.0
        result = {}
        for name, gradient in gradients.items():
            clipped = gradient * scale
            root = clipped.abs() if self.moments is None else self.moments[name].to(gradient).sqrt()
            result[name] = clipped / (root + EPSILON) * (-self.rates[name] * (1 - BETAS[0]))
        return result


@contextmanager
def stepped(parameters: Mapping[str, torch.nn.Parameter], updates: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Add the updates to the parameters for the block; afterwards they have the bits that they had."""
    before = {name: parameters[name].detach().clone() for name in updates}
    try:
        with torch.no_grad():
            for name, update in updates.items():
                parameters[name].add_(update.to(parameters[name].dtype))
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


@torch.no_grad()
def loss_of(model: LlavaMole, rows: Sequence[Row], reduction: Reduction, advance: Advance = no_progress) -> float:
    """The language-model loss of a training step that consists of these rows."""
    total = sum(float(loss) for loss in row_losses(model, rows, reduction))
    advance(1)
    return total


@dataclass(frozen=True)
class Interference:
    """What a step changes."""

    change: torch.Tensor
    """float64 `[S, S]`: the change of source j's loss after a step on source i, mean over batches; above 0 is harm."""
    interval: torch.Tensor
    """`[S, S]`: half its 95% interval over batches."""
    before: torch.Tensor
    """`[S]`: the mean loss before."""


def measure_interference(
    model: LlavaMole,
    batch: Callable[[int, int], Sequence[Row]],
    sources: Sequence[str],
    batches: int,
    parameters: Mapping[str, torch.nn.Parameter],
    reduction: Reduction,
    rule: StepRule,
    advance: Advance = no_progress,
) -> Interference:
    """Take a step on batch n of each source, and the losses of all sources on their batch n + 1; inside `undisturbed`.

    The step and the loss thus never share a sample, unless there is one batch only.

    Args:
        batch: Number of a batch and of a source -> its rows.
    """
    count = len(sources)
    change = torch.zeros(batches, count, count, dtype=torch.float64)
    before = torch.zeros(batches, count, dtype=torch.float64)
    for number in range(batches):
        held = [batch((number + 1) % batches, source) for source in range(count)]
        before[number] = torch.tensor([loss_of(model, rows, reduction, advance) for rows in held], dtype=torch.float64)
        for source in range(count):
            gradients, _ = source_gradient(model, batch(number, source), parameters, reduction, advance)
            with stepped(parameters, rule.updates(gradients)):
                after = [loss_of(model, rows, reduction, advance) for rows in held]
            change[number, source] = torch.tensor(after, dtype=torch.float64) - before[number]
    return Interference(mean_of(change), half_width(change), before.mean(dim=0))

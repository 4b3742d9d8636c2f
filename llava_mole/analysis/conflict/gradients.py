"""The gradient of each source on the same weights, reduced to inner products.

A gradient is never kept for longer than its batch. What is kept are the inner products of the sources' gradients, for
every unit of the adapter: a tensor, or an expert's slice of a stacked one. Inner products add up, so the numbers of a
layer, of a part or of the whole adapter are sums over units.

Shape legend: U units, N batches, S sources, P trainable parameters.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from llava_mole.analysis.probe import Advance, Row, no_progress, send
from llava_mole.common.distributed import all_reduce_sum, get_rank, get_world_size
from llava_mole.model.adapters import parameter_part
from llava_mole.model.batch_loss import forward_losses, next_token_targets, weigh
from llava_mole.model.llava_arch import LlavaMole

Reduction = Literal["sample_mean", "token_mean"]
_SIDE = re.compile(r"(_A|_B|\.A|\.B|lora_A\.\w+\.weight|lora_B\.\w+\.weight)$")
_LAYER = re.compile(r"language_model\..*?\.(\d+)\.")
"""The first number in the path of a module of the language model is that of its decoder layer."""


@dataclass(frozen=True)
class Unit:
    """A tensor of the adapter, or an expert's slice of it."""

    parameter: str
    """Name of the parameter in the `LlavaMole`."""
    part: str
    """`router`, `projector`, `modules_to_save`, or one side of the LoRA pairs of a part, such as `experts B`."""
    layer: int | None
    """Number of the decoder layer; None outside of them."""
    expert: int | None = None
    """Which expert's slice; None for a whole tensor."""


def units_of(parameters: Mapping[str, torch.Tensor]) -> list[Unit]:
    """The units of named parameters, in their order. Stacked experts, `[K, r, width]`, are K units."""
    units = []
    for name, parameter in parameters.items():
        part = parameter_part(name)
        side = _SIDE.search(name)
        if side and part in ("experts", "attention LoRA", "FFN LoRA"):
            shared = "shared expert" if "_shared_" in name else part.removesuffix(" LoRA")
            part = f"{shared} {'A' if 'A' in side[0] else 'B'}"
        layer = layer_of(name)
        stacked = part in ("experts A", "experts B") and parameter.dim() == 3
        experts: Sequence[int | None] = range(parameter.shape[0]) if stacked else [None]
        units += [Unit(name, part, layer, expert) for expert in experts]
    return units


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that a parameter or module of a `LlavaMole` is in; None outside of them."""
    found = _LAYER.match(f"{name}.")
    return None if found is None else int(found[1])


def slices(gradients: Mapping[str, torch.Tensor], units: Sequence[Unit]) -> Iterator[torch.Tensor]:
    """The gradient of every unit, flat."""
    for unit in units:
        gradient = gradients[unit.parameter]
        yield (gradient if unit.expert is None else gradient[unit.expert]).reshape(-1)


def row_losses(model: LlavaMole, rows: Sequence[Row], reduction: Reduction) -> Iterator[torch.Tensor]:
    """The share of every row in the language-model loss of a training step that consists of these rows."""
    samples = sum(len(row["ids"]) for row in rows)
    tokens = float(sum(int(next_token_targets(row["labels"])[0].sum()) for row in rows))
    for row in rows:
        sums_N, counts_N, _ = forward_losses(model, send(model, row))
        yield weigh(sums_N, counts_N, reduction, samples, tokens)


def source_gradient(
    model: LlavaMole,
    rows: Sequence[Row],
    parameters: Mapping[str, torch.nn.Parameter],
    reduction: Reduction,
    advance: Advance = no_progress,
) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient of the loss of some rows, and that loss. `.grad` stays as it is.

    Returns:
        Parameter name -> gradient in float32, or float64 for such a parameter; zeros where the loss does not depend on
        it.
    """
    names, values = list(parameters), list(parameters.values())
    total: dict[str, torch.Tensor] = {}
    loss_sum = 0.0
    for loss in row_losses(model, rows, reduction):
        found = torch.autograd.grad(loss, values, allow_unused=True)
        loss_sum += float(loss.detach())
        for name, value, gradient in zip(names, values, found, strict=True):
            if gradient is None:
                gradient = torch.zeros_like(value)
            gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
            total[name] = total[name].add_(gradient) if name in total else gradient
    advance(1)
    return total, loss_sum


@dataclass
class Grams:
    """Inner products of gradients."""

    sources: tuple[str, ...]
    units: list[Unit]
    batch: torch.Tensor
    """float64 `[U, N, S, S]`: of the gradients that the sources have in batch n."""
    total: torch.Tensor
    """float64 `[U, S, S]`: of the sums of the sources' gradients over the N batches."""
    losses: torch.Tensor
    """float64 `[N, S]`."""
    silent: torch.Tensor = field(init=False)
    """bool `[U, N, S]`: where a gradient is zero, such as that of an expert that none of the source's tokens uses."""

    def __post_init__(self) -> None:
        self.silent = self.batch.diagonal(dim1=2, dim2=3) == 0

    def select(self, **wanted: Any) -> list[int]:
        """The numbers of the units whose fields have these values."""
        return [
            number
            for number, unit in enumerate(self.units)
            if all(getattr(unit, key) == value for key, value in wanted.items())
        ]


def measure_gradients(
    model: LlavaMole,
    batch: Callable[[int, int], Sequence[Row]],
    sources: Sequence[str],
    batches: int,
    parameters: Mapping[str, torch.nn.Parameter],
    reduction: Reduction,
    advance: Advance = no_progress,
) -> Grams:
    """Take the gradients of all sources on N batches; call it inside `undisturbed`.

    With several ranks, rank r takes the batches r, r + ranks, ...; the result is the same on every rank. A collective.
    In memory there are at a time S gradients and S sums of gradients, in float32: 8 S P bytes.

    Args:
        batch: Number of a batch and of a source -> its rows.
    """
    units, count = units_of(parameters), len(sources)
    grams = torch.zeros(len(units), batches, count, count, dtype=torch.float64)
    losses = torch.zeros(batches, count, dtype=torch.float64)
    sums: list[dict[str, torch.Tensor]] = [{} for _ in sources]
    for number in range(get_rank(), batches, get_world_size()):
        gradients = []
        for source in range(count):
            found, loss = source_gradient(model, batch(number, source), parameters, reduction, advance)
            losses[number, source] = loss
            gradients.append(found)
        grams[:, number] = _gram(gradients, units)
        for total, own in zip(sums, gradients, strict=True):
            for name, gradient in own.items():
                total[name] = total[name].add_(gradient) if name in total else gradient
    for total in sums:  # a rank without a batch takes part with zeros
        for name, parameter in parameters.items():
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            total[name] = all_reduce_sum(total.get(name, torch.zeros_like(parameter, dtype=dtype)).contiguous())
    device = next(iter(parameters.values())).device
    grams, losses = (all_reduce_sum(value.to(device)).cpu() for value in (grams, losses))
    return Grams(tuple(sources), units, grams, _gram(sums, units), losses)


def _gram(gradients: Sequence[Mapping[str, torch.Tensor]], units: Sequence[Unit]) -> torch.Tensor:
    """Inner products of S gradients by unit, float64 `[U, S, S]` on the CPU. Products of float32 are summed in it."""
    result = []
    for values in zip(*(slices(own, units) for own in gradients), strict=True):
        stacked = torch.stack([value.double() for value in values])
        result.append(stacked @ stacked.T)
    return torch.stack(result).cpu()

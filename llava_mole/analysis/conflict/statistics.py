"""From inner products of gradients to cosines, their intervals, and the share of pairs that conflict.

Shape legend: U units, N batches, S sources.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_mole.analysis.conflict.gradients import Grams, Unit

T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5% quantiles of Student's t with 1 to 30 degrees of freedom; 1.96 stands for more."""


def half_width(values: Tensor) -> Tensor:
    """Half the 95% interval of the mean over the first dimension, by Student's t; NaN for fewer than two values.

    Values that are not finite are left out.
    """
    known = values.isfinite()
    count = known.sum(dim=0)
    mean = mean_of(values)
    squares = torch.where(known, (values - mean).square(), 0).sum(dim=0)
    quantiles = torch.tensor([math.nan, math.nan, *T_95], dtype=torch.float64)
    t = torch.where(count < len(quantiles), quantiles[count.clamp(max=len(quantiles) - 1)], 1.96)
    return t * (squares / (count - 1).clamp(min=1) / count.clamp(min=1)).sqrt()


def mean_of(values: Tensor) -> Tensor:
    """The mean of the finite values over the first dimension; NaN without any."""
    known = values.isfinite()
    return torch.where(known, values, 0).sum(dim=0) / known.sum(dim=0)


def cosines(grams: Tensor) -> Tensor:
    """Inner products `[..., S, S]` as cosines; NaN where a gradient is zero."""
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    return (grams / (norms.unsqueeze(-1) * norms.unsqueeze(-2))).clamp(-1, 1)


@dataclass(frozen=True)
class Alignment:
    """How the gradients of S sources lie to each other, over some units taken together as one vector."""

    cosine: Tensor
    """`[S, S]`: of the gradients of two sources on one batch each, mean over N batches. On the diagonal: of two
    different batches of the source, which is as high as noise allows."""
    interval: Tensor
    """`[S, S]`: half the 95% interval over batches; NaN on the diagonal and for N = 1."""
    noise_free: Tensor
    """`[S, S]`: estimate of the cosine of the expected gradients; NaN where noise hides them."""
    norm: Tensor
    """`[S]`: root of the mean squared norm of a batch's gradient."""
    signal: Tensor
    """`[S]`: the estimated norm of the expected gradient; NaN where noise hides it."""

    @classmethod
    def of(cls, batch: Tensor, total: Tensor) -> "Alignment":
        """From inner products of the units, `[U, N, S, S]` and `[U, S, S]` as in `Grams`, which are added up."""
        batch, total = batch.sum(dim=0), total.sum(dim=0)
        count = batch.shape[0]
        each = cosines(batch)
        norms = batch.diagonal(dim1=1, dim2=2).mean(dim=0)
        # The products of different batches have no noise in common: their mean is that of the expected gradients.
        signal = (total.diagonal() - count * norms) / max(1, count * (count - 1))
        signal = signal if count > 1 else torch.full_like(signal, math.nan)
        cosine, interval = mean_of(each), half_width(each)
        cosine.diagonal().copy_(signal / norms)
        interval.diagonal().fill_(math.nan)
        known = torch.where(signal > 0, signal, math.nan).sqrt()
        noise_free = total / count**2 / (known.unsqueeze(0) * known.unsqueeze(1))
        noise_free.diagonal().copy_(torch.where(signal > 0, 1.0, math.nan))
        return cls(cosine, interval, noise_free, norms.sqrt(), known)


@dataclass(frozen=True)
class Conflicts:
    """Over units, batches and pairs of sources: how many have gradients with a cosine below 0."""

    conflicting: int
    compared: int
    """Pairs in which both gradients are not zero."""
    clear: int
    """Of a unit and a pair of sources: how many have a mean cosine over batches whose 95% interval lies below 0."""
    judged: int
    """Units and pairs that have such an interval; chance alone makes 2.5% of them clear."""

    @property
    def share(self) -> float:
        """Share of conflicting pairs; NaN if none was compared."""
        return self.conflicting / self.compared if self.compared else math.nan


def conflicts(batch: Tensor) -> Conflicts:
    """Count the conflicts in inner products `[U, N, S, S]`."""
    pairs = list(itertools.combinations(range(batch.shape[-1]), 2))
    if not pairs or not len(batch):
        return Conflicts(0, 0, 0, 0)
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    found = cosines(batch)[..., first, second]
    known = found.isfinite()
    highest = mean_of(found.movedim(1, 0)) + half_width(found.movedim(1, 0))
    clear, judged = int((highest < 0).sum()), int(highest.isfinite().sum())
    return Conflicts(int((found[known] < 0).sum()), int(known.sum()), clear, judged)


def summary(grams: Grams, units: Sequence[int] | None = None) -> dict[str, Any]:
    """The numbers of some units (None: all), as plain values."""
    chosen = list(range(len(grams.units))) if units is None else list(units)
    batch = grams.batch[chosen]
    alignment, counted = Alignment.of(batch, grams.total[chosen]), conflicts(batch)
    return {
        "cosine": alignment.cosine.tolist(),
        "interval": alignment.interval.tolist(),
        "noise_free": alignment.noise_free.tolist(),
        "norm": alignment.norm.tolist(),
        "signal": alignment.signal.tolist(),
        "conflicting_pairs": counted.conflicting,
        "compared_pairs": counted.compared,
        "conflict_share": counted.share,
        "clear_conflicts": counted.clear,
        "judged_pairs": counted.judged,
        "units": len(chosen),
    }


def parts_of(units: Sequence[Unit]) -> list[str]:
    """The parts in the order of their first unit."""
    return list(dict.fromkeys(unit.part for unit in units))


def layers_of(units: Sequence[Unit]) -> list[int]:
    """The numbers of the decoder layers that have units."""
    return sorted({unit.layer for unit in units if unit.layer is not None})


def describe(grams: Grams) -> dict[str, Any]:
    """All numbers: of the whole, by part, by layer, by layer and part, and of every expert."""
    units = grams.units
    parts, layers = parts_of(units), layers_of(units)
    experts = sorted({(u.layer, u.expert) for u in units if u.expert is not None}, key=lambda e: (e[0] or 0, e[1]))
    return {
        "sources": list(grams.sources),
        "batches": grams.batch.shape[1],
        "loss": grams.losses.mean(dim=0).tolist(),
        "all": summary(grams),
        "parts": {part: summary(grams, grams.select(part=part)) for part in parts},
        "layers": {str(layer): summary(grams, grams.select(layer=layer)) for layer in layers},
        "layers_and_parts": [
            {"layer": layer, "part": part, **summary(grams, chosen)}
            for part in parts
            for layer in (*layers, None)
            if (chosen := grams.select(layer=layer, part=part))
        ],
        "experts": [
            {"layer": layer, "expert": expert, **summary(grams, grams.select(layer=layer, expert=expert))}
            for layer, expert in experts
        ],
    }

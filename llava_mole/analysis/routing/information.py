"""How much a token's expert says about its source or kind: mutual information, without the bias of small samples.

With p(k, c) the share of tokens of class c that expert k gets, `I = sum p(k, c) log(p(k, c) / (p(k) p(c)))`, in nats.
From a finite sample it is too high even where there is no relation. The baseline is its mean over random permutations
that destroy the relation and nothing else; the estimate is I minus the baseline.

Tokens of a sample resemble each other, so classes of whole samples (the source) are permuted among samples, and
classes of tokens (modality, role, form) among the tokens of each sample.

Shape legend: L routers, T tokens, K experts, C classes, N samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Information:
    """Mutual information of expert and class, `[L]` each, float64, in nats."""

    raw: Tensor
    baseline: Tensor
    """Mean over permutations."""
    p_value: Tensor
    """Share of permutations, the observation included, that reach `raw`."""
    class_entropy: float
    """H(class): what a router that tells the classes apart completely would have."""

    @property
    def estimate(self) -> Tensor:
        """`raw` minus `baseline`; around 0, and often below, without a relation."""
        return self.raw - self.baseline

    def values(self) -> dict[str, Any]:
        """As plain values; `share` is the estimate as a share of what the baseline leaves of H(class)."""
        room = (self.class_entropy - self.baseline).clamp(min=1e-12)
        return {
            "raw": self.raw.tolist(),
            "baseline": self.baseline.tolist(),
            "estimate": self.estimate.tolist(),
            "share": (self.estimate / room).tolist() if self.class_entropy > 0 else [float("nan")] * len(self.raw),
            "p_value": self.p_value.tolist(),
            "class_entropy": self.class_entropy,
        }


def mutual_information(joint: Tensor) -> Tensor:
    """I of joint counts `[..., K, C]`, `[...]`, float64, in nats."""
    shares = joint.double() / joint.double().sum(dim=(-2, -1), keepdim=True)
    expected = shares.sum(dim=-1, keepdim=True) * shares.sum(dim=-2, keepdim=True)
    return torch.where(shares > 0, shares * (shares / expected.clamp(min=1e-300)).log(), 0.0).sum(dim=(-2, -1))


def entropy(counts: Tensor) -> float:
    """Entropy of counts `[C]` in nats."""
    shares = counts.double() / counts.sum()
    return float(-torch.where(shares > 0, shares * shares.clamp(min=1e-300).log(), 0.0).sum())


def of_samples(
    expert: Tensor, sample: Tensor, classes: Tensor, *, experts: int, permutations: int, generator: torch.Generator
) -> Information:
    """Of expert and a class that all tokens of a sample share.

    Args:
        expert: int64 `[L, T]`.
        sample: int64 `[T]`, 0 to N - 1.
        classes: int64 `[N]`, the class of every sample.
        experts: K.
        permutations: How many.
        generator: Of the permutations.
    """
    count, number = len(classes), int(classes.max()) + 1
    cells = expert * count + sample
    by_sample = torch.zeros(len(expert), experts * count, dtype=torch.int64)
    by_sample = by_sample.scatter_add_(1, cells, torch.ones_like(cells)).view(len(expert), experts, count)

    def joint(order: Tensor | None) -> Tensor:
        chosen = classes if order is None else classes[order]
        return by_sample.new_zeros(*by_sample.shape[:2], number).index_add_(2, chosen, by_sample)

    return _compare(joint, permutations, lambda: torch.randperm(count, generator=generator))


def of_tokens(
    expert: Tensor, sample: Tensor, classes: Tensor, *, experts: int, permutations: int, generator: torch.Generator
) -> Information:
    """Of expert and a class of every token, int64 `[T]`; other arguments as in `of_samples`."""
    number = int(classes.max()) + 1

    def joint(order: Tensor | None) -> Tensor:
        chosen = classes if order is None else classes[order]
        cells = expert * number + chosen
        counts = torch.zeros(len(expert), experts * number, dtype=torch.int64)
        return counts.scatter_add_(1, cells, torch.ones_like(cells)).view(len(expert), experts, number)

    by_sample = sample.argsort(stable=True)

    def shuffled() -> Tensor:
        """An order of the tokens in which every sample has its own."""
        keys = sample.double() + torch.rand(len(sample), generator=generator, dtype=torch.float64)
        order = torch.empty_like(sample)
        order[by_sample] = keys.argsort()
        return order

    return _compare(joint, permutations, shuffled)


def _compare(joint: Callable[[Tensor | None], Tensor], permutations: int, draw: Callable[[], Tensor]) -> Information:
    observed = joint(None)
    raw = mutual_information(observed)
    random = torch.stack([mutual_information(joint(draw())) for _ in range(permutations)])
    reached = (random >= raw - 1e-12).sum(dim=0).double()
    p_value = (reached + 1) / (permutations + 1)
    return Information(raw, random.mean(dim=0), p_value, entropy(observed[0].sum(dim=0)))

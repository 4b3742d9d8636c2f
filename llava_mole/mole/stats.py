"""Routing statistics, by layer, modality and source; padding is never counted, nothing is synchronised.

Shape legend: L layers with experts, B samples, S positions, K experts, G groups.
"""

import torch
from torch import Tensor

from llava_mole.mole.loss import choice_counts
from llava_mole.mole.record import Routing


def routing_load(routing: Routing, mask: Tensor) -> Tensor:
    """Share of the tokens of `mask` (bool `[B, S]`) each expert got, float32 `[L, K]`; rows sum to 1, or are 0."""
    return _share(choice_counts(routing, mask).sum(dim=1))


def routing_entropy(routing: Routing, mask: Tensor) -> Tensor:
    """Mean entropy of the router's probabilities over the tokens of `mask`, in nats, float32 `[L]`."""
    logs = torch.stack(routing.logits).detach().log_softmax(dim=-1)
    return _masked_mean(-(logs.exp() * logs).sum(dim=-1), mask)


def routing_margin(routing: Routing, mask: Tensor) -> Tensor:
    """Mean gap between the two largest probabilities over the tokens of `mask`, float32 `[L]`; 1 for one expert."""
    probs = torch.stack(routing.logits).detach().softmax(dim=-1)
    if probs.shape[-1] == 1:
        return _masked_mean(probs[..., 0], mask)
    best = probs.topk(2, dim=-1).values
    return _masked_mean(best[..., 0] - best[..., 1], mask)


class RoutingMeter:
    """Adds up expert counts over forward passes, by modality and by source.

    `counts` is int64 `[modality, source, L, K]` on the model's device, modality 0 text and 1 image; None before the
    first update. Nothing is computed unless `update` is called, so evaluation pays only where it asks.
    """

    def __init__(self, num_sources: int = 1) -> None:
        self.num_sources = num_sources
        self.counts: Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        routing: Routing,
        token_mask: Tensor,
        image_mask: Tensor | None = None,
        source_index: Tensor | None = None,
    ) -> None:
        """Count one forward pass. Masks are bool `[B, S]`; `source_index` is int64 `[B]`, below `num_sources`."""
        if not routing.logits:
            return
        image = torch.zeros_like(token_mask) if image_mask is None else image_mask
        by_modality = [choice_counts(routing, token_mask & ~image), choice_counts(routing, token_mask & image)]
        counts_MLBK = torch.stack(by_modality)
        source = token_mask.new_zeros(token_mask.shape[0], dtype=torch.int64) if source_index is None else source_index
        if self.counts is None:
            layers, experts = counts_MLBK.shape[1], counts_MLBK.shape[3]
            self.counts = counts_MLBK.new_zeros(2, self.num_sources, layers, experts)
        self.counts.index_add_(1, source, counts_MLBK.movedim(2, 1))

    def load(self, *, modality: str | None = None, source: int | None = None) -> Tensor:
        """Share of tokens by layer and expert, float32 `[L, K]`, of one modality (`text`, `image`) or source, or all.

        Raises:
            ValueError: nothing was counted yet.
        """
        if self.counts is None:
            raise ValueError("no routing was counted yet: call update after a forward pass")
        counts = self.counts if modality is None else self.counts[["text", "image"].index(modality)].unsqueeze(0)
        counts = counts if source is None else counts[:, source : source + 1]
        return _share(counts.sum(dim=(0, 1)))

    def source_information(self) -> Tensor:
        """Mutual information between expert and source in each layer, in nats, float32 `[L]`: 0 where sources share."""
        if self.counts is None:
            raise ValueError("no routing was counted yet: call update after a forward pass")
        joint = self.counts.sum(dim=0).movedim(0, -1).to(torch.float32)
        joint = joint / joint.sum(dim=(1, 2), keepdim=True).clamp(min=1)
        product = joint.sum(dim=1, keepdim=True) * joint.sum(dim=2, keepdim=True)
        ratio = torch.where(joint > 0, joint / product.clamp(min=1e-30), torch.ones_like(joint))
        return (joint * ratio.log()).sum(dim=(1, 2))

    def reset(self) -> None:
        """Forget all counts."""
        self.counts = None


def _share(counts_LK: Tensor) -> Tensor:
    counts = counts_LK.to(torch.float32)
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def _masked_mean(values_LBS: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(values_LBS.dtype)
    return ((values_LBS * weight).sum(dim=(1, 2)) / weight.sum().clamp(min=1)).to(torch.float32)

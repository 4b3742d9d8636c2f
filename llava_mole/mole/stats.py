"""Routing statistics of the latest forward pass, by layer; padding is never counted."""

import torch
from torch import Tensor

from llava_mole.mole.loss import choice_counts
from llava_mole.mole.record import Routing


def routing_load(routing: Routing, mask: Tensor) -> Tensor:
    """Share of the tokens of `mask` (bool `[B, S]`) each expert got, float32 `[L, K]`; rows sum to 1, or are 0."""
    counts = choice_counts(routing, mask).sum(dim=1).to(torch.float32)
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)

"""What a forward pass leaves behind about its routing, and what it may need to know from outside.

Shape legend: L layers with experts, B samples, S positions, K experts, k experts a token uses.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from llava_mole.common.errors import ConfigError


class RoutingSlot:
    """Holds the latest routing of one FFN: float32 `logits` `[B, S, K]` with their graph, int64 `index` `[B, S, k]`.

    `prompt_logits` `[B, K]` are kept for the decoding steps of granularity `sequence`.
    Assigned by each forward pass, never appended to, and left alone by the recomputation of a checkpointed layer.
    Copies and pickles of a model start with an empty slot: graph tensors can be neither copied nor pickled.
    """

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        self.index: Tensor | None = None
        self.prompt_logits: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutingSlot":
        return RoutingSlot()

    def __getstate__(self) -> dict[str, None]:
        return {"logits": None, "index": None, "prompt_logits": None}


@dataclass
class RoutingInputs:
    """Facts about the batch that some gates need; all optional, all on the model's device.

    `experts`: for granularity `given`, int64 `[B]` or `[B, S]` (expert of a sample or token), or float weights
    `[B, K]` or `[B, S, K]`. `source`: int64 `[B]`, for router `oracle` the expert of each sample. `task`: int64
    `[B]`, for granularity `task`. `prompt_mask`: bool `[B, S]`, for granularity `sequence` the positions to average
    over, which must not include answers. Where rows hold several samples, `source` and `task` are `[B, S]` too, and
    `sample_index` int64 `[B, S]` numbers the sample of each position from 0. `decoding` (a cached prompt is being
    continued) and `attention_mask` are noted by the model itself. Whatever is set stays until replaced, because
    recomputation in the backward pass needs it again.
    """

    experts: Tensor | None = None
    source: Tensor | None = None
    task: Tensor | None = None
    prompt_mask: Tensor | None = None
    sample_index: Tensor | None = None
    decoding: bool = False
    attention_mask: Tensor | None = None
    check_finite: bool = True
    """Whether logits that are not finite raise; see `mole_let_non_finite_pass`."""

    def update(self, **values: Tensor | None) -> None:
        """Replace every field; those not named become None. Raises ConfigError for an unknown name."""
        names = {f.name for f in fields(self)} - {"decoding", "attention_mask", "check_finite"}
        for name in values:
            if name not in names:
                raise ConfigError(f"unknown routing input {name!r}; there are {', '.join(sorted(names))}")
        for name in names:
            setattr(self, name, values.get(name))

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutingInputs":
        # All layers share one object: a copied model must share one again, but not with the original.
        copy = RoutingInputs()
        memo[id(self)] = copy
        return copy


@dataclass(frozen=True)
class Routing:
    """The routing of the latest forward pass of a model.

    `logits[l]` is `[B, S, K]` in float32 with its graph, `index[l]` int64 `[B, S, k]`, for the L layers called
    `names[l]`. `layers` are the FFN wrappers themselves.
    """

    names: tuple[str, ...]
    logits: tuple[Tensor, ...]
    index: tuple[Tensor, ...]
    layers: tuple[Any, ...]

    def unpack(self, positions_NM: Tensor) -> "Routing":
        """The same routing with one row a sample, where rows held several.

        `positions_NM` is int64 `[N, M]`: for each of N samples the positions of its tokens in the flattened `[B S]`
        rows, padded to M with any valid position; masks say which count.
        """
        return replace(
            self,
            logits=tuple(logits.flatten(0, 1)[positions_NM] for logits in self.logits),
            index=tuple(index.flatten(0, 1)[positions_NM] for index in self.index),
        )

    @property
    def num_experts(self) -> int:
        """K; 0 where the model has no experts."""
        return self.logits[0].shape[-1] if self.logits else 0


def in_backward() -> bool:
    """Whether this thread is inside a backward pass: then a forward is the recomputation of a checkpointed layer."""
    return torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Whether a recomputation is that of a re-entrant checkpoint, which runs without saved-tensor hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


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


def choice_counts(routing: Routing, mask: Tensor) -> Tensor:
    """Tokens of `mask` (bool `[B, S]`) that use each expert, int64 `[L, B, K]`."""
    index = torch.stack(routing.index)
    counts = torch.zeros(*index.shape[:2], routing.num_experts, dtype=torch.int64, device=index.device)
    ones = mask.to(torch.int64).unsqueeze(-1).expand(index.shape[1:]).flatten(1)
    return counts.scatter_add_(-1, index.flatten(2), ones.unsqueeze(0).expand(index.shape[0], -1, -1))

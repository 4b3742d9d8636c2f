"""Routing of a forward pass: the inputs it may need, the record it leaves behind, and statistics of that record.

Shape legend: L layers with experts, B samples, S positions, K experts, k experts a token uses.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava_mole.mole.progress import TrainingProgress


class RoutingSlot:
    """The latest routing of one FFN: float32 `logits` `[B, S, K]` with their graph, int64 `index` `[B, S, k]`.

    `prompt_logits` `[B, K]` are kept for the decoding steps of granularity `sequence`. Each forward pass replaces the
    values; the recomputation of a checkpointed layer does not. Copies and pickles of a model start with an empty
    slot, because tensors of a graph can be neither copied nor pickled.

    `stand_in` is a leaf with the values of logits that a re-entrant checkpoint has computed without a graph. A loss
    computed from it leaves its gradient there, and the recomputation of the layer hands that to its own logits.

    `override` takes the layer's decision (a `router.Route`) and returns the one that is carried out: for experiments
    such as `access.apply_to_experts`, and for looking on. The logits and the index of the slot stay the router's own.
    """

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        self.index: Tensor | None = None
        self.prompt_logits: Tensor | None = None
        self.stand_in: Tensor | None = None
        self.override: Callable[[Any], Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutingSlot":
        return RoutingSlot()

    def __getstate__(self) -> dict[str, None]:
        return {"logits": None, "index": None, "prompt_logits": None, "stand_in": None, "override": None}


class ModelDecision:
    """The weights that a router of the whole model has given in the latest forward pass; None without one.

    Layers with experts only read them: `experts`, of any type, for T tokens, and those of the shared expert, `[T, 1]`
    or None for 1. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.experts: Any = None
        self.shared: Tensor | None = None

    def __reduce__(self) -> tuple[type["ModelDecision"], tuple[()]]:
        return ModelDecision, ()


@dataclass
class RoutingInputs:
    """Facts about the batch that some routers need; all optional, all on the model's device.

    They stay until they are replaced, because recomputation in the backward pass needs them again.
    """

    experts: Tensor | None = None
    """For granularity `given`: the expert of each sample or token, int64 `[B]` or `[B, S]`, or the weights of all
    experts, float `[B, K]` or `[B, S, K]`."""
    source: Tensor | None = None
    """For router `oracle` and `source_coef`: the expert of each sample, int64 `[B]`; `[B, S]` where rows hold several
    samples. For `balance_kind` `groups`: 1 or 0, the samples that the first or the second half of the experts
    serves."""
    task: Tensor | None = None
    """For granularity `task`: the task of each sample, int64 `[B]`; `[B, S]` where rows hold several samples."""
    prompt_mask: Tensor | None = None
    """For granularity `sequence`: the positions to average over, bool `[B, S]`. They must not include answers."""
    image_mask: Tensor | None = None
    """For `sequence_tokens` `image`: the positions of images, bool `[B, S]`. `LlavaMole` sets it when it embeds a
    prompt."""
    sample_index: Tensor | None = None
    """Where rows hold several samples: the sample of each position, counted from 0, int64 `[B, S]`."""
    decoding: bool = False
    """Whether the pass continues a cached prompt; set by the model itself."""
    attention_mask: Tensor | None = None
    """False at padding, `[B, S]`; set by the model itself."""
    forced: int | None = None
    """The expert that every token uses, whatever the router says; see `access.force_expert`."""
    check_finite: bool = True
    """Whether logits that are not finite raise; see `disable_finite_check`."""
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    """Not an input: the state of the training, which all layers share."""
    decision: ModelDecision = field(default_factory=ModelDecision)
    """Not an input: the decision of a router of the whole model."""

    def update(self, **values: Tensor | None) -> None:
        """Replace all inputs; those not named become None. Raises ValueError for an unknown name."""
        kept = {"decoding", "attention_mask", "forced", "check_finite", "progress", "decision"}
        names = {f.name for f in fields(self)} - kept
        for name in values:
            if name not in names:
                raise ValueError(f"unknown routing input {name!r}; there are {', '.join(sorted(names))}")
        for name in names:
            setattr(self, name, values.get(name))

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutingInputs":
        # All layers share one object. Those of a copied model must share one too, but not with the original.
        copy = RoutingInputs(check_finite=self.check_finite, progress=deepcopy(self.progress))
        memo[id(self)] = copy
        return copy


@dataclass(frozen=True)
class Routing:
    """The routing of a model's latest forward pass, layer by layer.

    `logits[l]` is float32 `[B, S, K]` with its graph and `index[l]` int64 `[B, S, k]`, for the L routers of the layers
    called `names[l]`. K may differ by layer. `layers` holds the `ExpertLayer` modules themselves. `source` is that of
    `RoutingInputs`.
    """

    names: tuple[str, ...]
    logits: tuple[Tensor, ...]
    index: tuple[Tensor, ...]
    layers: tuple[Any, ...]
    source: Tensor | None = None

    def unpack(self, positions_NM: Tensor) -> "Routing":
        """The same routing with one row per sample, for rows that hold several samples.

        `positions_NM` is int64 `[N, M]`: for each of N samples, the positions of its tokens in the flattened `[B S]`
        rows, padded to M with any valid position. Masks decide which positions count.
        """
        return replace(
            self,
            logits=tuple(logits.flatten(0, 1)[positions_NM] for logits in self.logits),
            index=tuple(index.flatten(0, 1)[positions_NM] for index in self.index),
            source=self._source_at(positions_NM[:, 0]),
        )

    def _source_at(self, positions_N: Tensor) -> Tensor | None:
        """The source of the sample at each of these positions in the flattened rows, `[N]`."""
        if self.source is None or not self.logits:
            return None
        rows, length, _ = self.logits[0].shape
        if self.source.dim() == 2:
            return self.source.flatten()[positions_N]
        return self.source[positions_N // length] if len(self.source) == rows else self.source

    @property
    def num_experts(self) -> int:
        """K, the largest if it differs by layer; 0 for a model without experts."""
        return max((logits.shape[-1] for logits in self.logits), default=0)

    def stacked_logits(self) -> Tensor:
        """All logits, `[L, B, S, K]`; minus infinity for the experts that a layer does not have."""
        most = self.num_experts
        ragged = any(logits.shape[-1] < most for logits in self.logits)
        missing = [most - logits.shape[-1] for logits in self.logits] if ragged else []
        padded = [pad(x, (0, n), value=-torch.inf) for x, n in zip(self.logits, missing, strict=False)]
        return torch.stack(padded or self.logits)


def in_backward() -> bool:
    """Whether this thread runs a backward pass; a forward pass is then the recomputation of a checkpointed layer."""
    return torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Whether the recomputation belongs to a re-entrant checkpoint, which runs without saved-tensor hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


class CarriedGradient(torch.autograd.Function):
    """`x` itself, whose backward pass also gives `logits` the gradient `grad`, of their shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_x, ctx.grad, None


def choice_counts(routing: Routing, mask: Tensor) -> Tensor:
    """Number of tokens of `mask` (bool `[B, S]`) that use each expert, int64 `[L, B, K]`."""
    index = torch.stack(routing.index)
    counts = torch.zeros(*index.shape[:2], routing.num_experts, dtype=torch.int64, device=index.device)
    ones = mask.to(torch.int64).unsqueeze(-1).expand(index.shape[1:]).flatten(1)
    return counts.scatter_add_(-1, index.flatten(2), ones.unsqueeze(0).expand(index.shape[0], -1, -1))


def routing_load(routing: Routing, mask: Tensor) -> Tensor:
    """Each expert's share of the tokens of `mask` (bool `[B, S]`), float32 `[L, K]`; rows sum to 1, or are 0."""
    return _share(choice_counts(routing, mask).sum(dim=1))


def routing_entropy(routing: Routing, mask: Tensor) -> Tensor:
    """Mean entropy of the router's probabilities over the tokens of `mask`, in nats, float32 `[L]`."""
    logs = routing.stacked_logits().detach().log_softmax(dim=-1)
    return _masked_mean(-(logs.exp() * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(dim=-1), mask)


def routing_margin(routing: Routing, mask: Tensor) -> Tensor:
    """Mean gap between the two largest probabilities over the tokens of `mask`, float32 `[L]`; 1 for one expert."""
    probs = routing.stacked_logits().detach().softmax(dim=-1)
    if probs.shape[-1] == 1:
        return _masked_mean(probs[..., 0], mask)
    best = probs.topk(2, dim=-1).values
    return _masked_mean(best[..., 0] - best[..., 1], mask)


def _share(counts_LK: Tensor) -> Tensor:
    counts = counts_LK.to(torch.float32)
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def _masked_mean(values_LBS: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(values_LBS.dtype)
    return ((values_LBS * weight).sum(dim=(1, 2)) / weight.sum().clamp(min=1)).to(torch.float32)


class RoutingMeter:
    """Expert counts summed over forward passes, by modality and by source.

    `counts` is int64 `[modality, source, L, K]` on the model's device, with modality 0 for text and 1 for image; None
    before the first update.
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
        counts = self._counted()
        counts = counts if modality is None else counts[["text", "image"].index(modality)].unsqueeze(0)
        counts = counts if source is None else counts[:, source : source + 1]
        return _share(counts.sum(dim=(0, 1)))

    def source_information(self) -> Tensor:
        """Mutual information of expert and source in each layer, in nats, float32 `[L]`; 0 if sources route alike.

        Raises:
            ValueError: nothing was counted yet.
        """
        joint = self._counted().sum(dim=0).movedim(0, -1).to(torch.float32)
        joint = joint / joint.sum(dim=(1, 2), keepdim=True).clamp(min=1)
        product = joint.sum(dim=1, keepdim=True) * joint.sum(dim=2, keepdim=True)
        ratio = torch.where(joint > 0, joint / product.clamp(min=1e-30), torch.ones_like(joint))
        return (joint * ratio.log()).sum(dim=(1, 2))

    def reset(self) -> None:
        """Forget all counts."""
        self.counts = None

    def _counted(self) -> Tensor:
        if self.counts is None:
            raise ValueError("no routing was counted yet: call update after a forward pass")
        return self.counts

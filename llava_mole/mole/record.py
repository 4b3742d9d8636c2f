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

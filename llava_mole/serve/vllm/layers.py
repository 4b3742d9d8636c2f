"""An FFN of vLLM with experts, and how its experts are split over the ranks of tensor parallelism. Needs no vLLM."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llava_mole.mole.static import StaticExperts

UP, DOWN = ("gate_proj", "up_proj"), "down_proj"


def _alone(h: Tensor) -> Tensor:
    return h


class StaticMlp(nn.Module):
    """`down(act([gate(x), up(x)]))` with the experts of each projection.

    It takes the parts of vLLM's `LlamaMLP` under their own names, so that the base weights load as usual. These linears
    return a pair, whose second value is unused. With tensor parallelism gate and up give this rank's columns, and down
    reads this rank's rows and gives the sum over all ranks.

    Args:
        mlp: Has `gate_up_proj`, `act_fn` and `down_proj`.
        experts: Cut to this rank by `shard`.
        reduce: Sums a tensor over the ranks; by default there is one.
    """

    def __init__(self, mlp: nn.Module, experts: StaticExperts, reduce: Callable[[Tensor], Tensor] = _alone) -> None:
        super().__init__()
        parts: Any = mlp
        self.gate_up_proj, self.act_fn, self.down_proj = parts.gate_up_proj, parts.act_fn, parts.down_proj
        self.mole = experts
        self._reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[T, D]` to `[T, D]`."""
        weight_TK, shared_T1 = self.mole.weights(x)
        columns, _ = self.gate_up_proj(x)
        outputs = columns.chunk(2, dim=-1)
        added = [
            y + self.mole.expand(name, self.mole.shrink(name, x), weight_TK, shared_T1)
            for name, y in zip(UP, outputs, strict=True)
        ]
        hidden = self.act_fn(torch.cat(added, dim=-1))
        y, _ = self.down_proj(hidden)
        # The hidden state is cut by columns, so each rank has a part of the sum in rank space: R numbers a token.
        h = self._reduce(self.mole.shrink(DOWN, hidden))
        return y + self.mole.expand(DOWN, h, weight_TK, shared_T1)


def shard(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """The part of a tensor of `StaticExperts` that rank `rank` of `size` holds: columns of gate and up, rows of down.

    Raises ValueError if the width cannot be divided.
    """
    projection, _, side = name.rpartition("_")
    projection = projection.removesuffix("_shared")
    cut = (projection in UP and side == "B") or (projection == DOWN and side == "A")
    if not cut or size == 1:
        return tensor
    if tensor.shape[-1] % size:
        raise ValueError(f"{name} has width {tensor.shape[-1]}, which {size} ranks cannot share equally")
    return tensor.chunk(size, dim=-1)[rank].contiguous()

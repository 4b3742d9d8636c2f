"""The two rank-space primitives of a LoRA mixture: `shrink` (x to rank activations) and `expand` (back to outputs).

`y = W x + s B'((A' x) * rep(G, r))` with A' `[K r, I]` and B' `[K r, O]`: the gate acts in rank space, where it costs
r numbers a token, so sparse and dense mixtures are the same two products.

Shape legend: T tokens, I input width, O output width, K experts, R rank, k experts a token uses.
"""

import torch
from torch import Tensor

from llava_mole.mole.router import Gate


def gate_matrix(gate: Gate, num_experts: int, like: Tensor) -> Tensor:
    """The gate as `[T, K]` in the dtype of `like`: zero for experts that were not chosen."""
    if gate.index is None:
        assert gate.weight is not None
        return gate.weight.to(like.dtype)
    weight = torch.ones_like(gate.index, dtype=like.dtype) if gate.weight is None else gate.weight.to(like.dtype)
    return torch.zeros(gate.index.shape[0], num_experts, dtype=like.dtype, device=like.device).scatter(
        -1, gate.index, weight
    )


def expert_delta(x_TI: Tensor, a_KRI: Tensor, b_KRO: Tensor, gate: Gate | None, scaling: float) -> Tensor:
    """`s B'((A' x) * rep(G, r))`, `[T, O]`; without a gate (K = 1) plain LoRA."""
    num_experts, rank, _ = a_KRI.shape
    a, b = a_KRI.flatten(0, 1).to(x_TI.dtype), b_KRO.flatten(0, 1).to(x_TI.dtype)
    h_TN = x_TI @ a.T * scaling
    if gate is not None:
        h_TN = (h_TN.unflatten(-1, (num_experts, rank)) * gate_matrix(gate, num_experts, h_TN).unsqueeze(-1)).flatten(1)
    return h_TN @ b

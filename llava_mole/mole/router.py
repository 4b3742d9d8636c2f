"""The router of one FFN: logits in float32, and how they become a gate.

Shape legend: T tokens, D model width, K experts, k experts a token uses.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def router_dtype(x_dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.float64 if x_dtype == torch.float64 else torch.float32


class Router(nn.Module):
    """`logits = x W^T (+ b)`, Eq. 3. `weight` is `[K, D]`, `bias` `[K]`; one for gate, up and down projection."""

    def __init__(self, width: int, num_experts: int, *, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[..., K]` of `x` `[..., D]`, in float32 whatever the dtype of `x`.

        In bfloat16 up to 0.7 % of tokens tie exactly at the top, which argmax resolves towards expert 0, and up to
        0.4 % choose another expert than in float32; so autocast is off here and the weights are widened.
        """
        dtype = router_dtype(x.dtype)
        with torch.autocast(device_type=x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


@dataclass(frozen=True)
class Gate:
    """Which experts each token uses, and with what weight.

    `index` is int64 `[T, k]`, or None where every token uses all K experts. `weight` is `[T, k]` (or `[T, K]`),
    or None where it is 1.
    """

    index: Tensor | None
    weight: Tensor | None


def choose(logits_TK: Tensor, top_k: int, selection_bias_K: Tensor | None = None) -> Tensor:
    """The `top_k` best experts of each token, int64 `[T, top_k]`, best first; the first one on ties for top 1.

    `selection_bias_K` is added for the choice only (loss-free balancing), never to probabilities.
    """
    scores = logits_TK.detach()
    if selection_bias_K is not None:
        scores = scores + selection_bias_K.to(scores.dtype)
    if top_k == 1:
        return scores.argmax(dim=-1, keepdim=True)
    return scores.topk(top_k, dim=-1).indices


def sparse_gate(logits_TK: Tensor, index_Tk: Tensor, expert_scale: str) -> Gate:
    """The gate of the chosen experts.

    `none`: weight 1, so no gradient reaches the router (Eq. 4). `straight_through`: value exactly 1, gradient of p.
    `prob`: p. `prob_times_k`: K p, whose mean is 1 at initialisation. `topk_renorm`: p over the chosen ones' sum.
    """
    if expert_scale == "none":
        return Gate(index_Tk, None)
    probs = logits_TK.softmax(dim=-1).gather(-1, index_Tk)
    if expert_scale == "straight_through":
        return Gate(index_Tk, 1 + (probs - probs.detach()))
    if expert_scale == "prob":
        return Gate(index_Tk, probs)
    if expert_scale == "prob_times_k":
        return Gate(index_Tk, probs * logits_TK.shape[-1])
    if expert_scale == "topk_renorm":
        return Gate(index_Tk, probs / probs.sum(dim=-1, keepdim=True))
    raise ValueError(f"unknown expert_scale {expert_scale!r}")


def dense_gate(logits_TK: Tensor, expert_scale: str) -> Gate:
    """Softmax weights over all experts; times K for `prob_times_k`."""
    probs = logits_TK.softmax(dim=-1)
    return Gate(None, probs * logits_TK.shape[-1] if expert_scale == "prob_times_k" else probs)

"""Cross-entropy through the language model's head without holding all logits at once.

The logits are computed a few hundred tokens at a time and turned into losses and, in the same pass, gradients of the
hidden states. Tensors of vocabulary size never outlive a chunk, and nothing is computed twice. Any frozen head works:
quantised, with a bias, or with Gemma's soft cap. A head that trains is computed again in the backward pass.

Shapes: n supervised positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 24
"""Logits held at a time: 64 MiB in float32."""


def head_losses(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_nD: torch.Tensor,
    targets_n: torch.Tensor,
    *,
    vocabulary: int,
    softcap: float | None = None,
) -> torch.Tensor:
    """Cross-entropy of every position, [n]; differentiable with respect to `hidden_nD` and a trained head.

    In float32, or float64 for a float64 model.

    Args:
        head: from hidden states [m, D] to logits [m, V]. Parameters that train must be those of a module.
        hidden_nD: hidden states at supervised positions.
        targets_n: the tokens that follow, int64.
        vocabulary: V, which decides how many positions a chunk has.
        softcap: c of `c tanh(logits / c)`, where the model has one.
    """
    chunk = max(1, CHUNK_ELEMENTS // vocabulary)
    trains = isinstance(head, nn.Module) and any(parameter.requires_grad for parameter in head.parameters())
    if not (trains and torch.is_grad_enabled()):
        return _HeadLosses.apply(hidden_nD, targets_n, head, chunk, softcap)
    # The gradient of the head's parameters depends on the weights of the losses, which are not known yet.
    parts = zip(hidden_nD.split(chunk), targets_n.split(chunk), strict=True)
    return torch.cat([checkpoint(_chunk_losses, head, *part, softcap, use_reentrant=False) for part in parts])


def _chunk_losses(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_mD: torch.Tensor,
    targets_m: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    logits_mV = head(hidden_mD)
    logits_mV = logits_mV if logits_mV.dtype == torch.float64 else logits_mV.float()
    if softcap is not None:
        logits_mV = softcap * torch.tanh(logits_mV / softcap)
    return cross_entropy(logits_mV, targets_m, reduction="none")


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nD: torch.Tensor,
        targets_n: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        chunk: int,
        softcap: float | None,
    ) -> torch.Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for hidden, targets in zip(hidden_nD.split(chunk), targets_n.split(chunk), strict=True):
            with torch.set_grad_enabled(wants_gradient):
                leaf = hidden.detach().requires_grad_(wants_gradient)
                loss = _chunk_losses(head, leaf, targets, softcap)
                if wants_gradient:
                    # A position's loss depends only on its own hidden state: the gradient of the sum holds them all.
                    gradients.append(torch.autograd.grad(loss.sum(), leaf)[0])
            losses.append(loss.detach())
        if wants_gradient:
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden_nD))
        return torch.cat(losses) if losses else hidden_nD.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses_n: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient_nD,) = ctx.saved_tensors
        return gradient_nD * dlosses_n.to(gradient_nD.dtype).unsqueeze(-1), None, None, None, None

"""Differentiable rank-space products, saving as little as they can.

`shrink` saves its input once for all projections that read it; `expand` adds in place onto the base output and saves
the compact rank activations; `activate_and_shrink` saves gate and up and recomputes their activation, so neither the
activation nor its product with up stays in memory. The chosen experts are saved like activations, so a checkpointed
layer uses those of its recomputation throughout.

Shape legend: T tokens, I input width, O output width, F FFN width, K experts, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llava_mole.mole.backends import Backend


def _cast(stacks: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    return [stack.to(like.dtype) for stack in stacks]


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: Backend, scaling: float, source: Tensor | None, x: Tensor, *stacks: Tensor
    ) -> tuple[Tensor, ...]:
        hs = backend.shrink(x, _cast(stacks, x))
        ctx.backend, ctx.scaling, ctx.sorted = backend, scaling, source is not None
        ctx.count = len(backend.tensors)
        ctx.save_for_backward(x if source is None else source, *backend.tensors, *stacks)
        return tuple(h.mul_(scaling) for h in hs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dhs: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        backend = ctx.backend.with_tensors(rest[: ctx.count])
        stacks = rest[ctx.count :]
        if ctx.sorted:
            x = x.index_select(0, backend.order)
        scaled = [dh * ctx.scaling for dh in dhs]
        dx, grads = backend.shrink_grad(x, _cast(stacks, x), scaled, ctx.needs_input_grad[3])
        return None, None, None, dx, *(g.to(s.dtype) for g, s in zip(grads, stacks, strict=True))


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        backend.expand_(y, h, b.to(y.dtype))
        ctx.mark_dirty(y)
        ctx.backend, ctx.count = backend, len(backend.tensors)
        ctx.save_for_backward(h, b, *backend.tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        h, b, *tensors = ctx.saved_tensors
        dh, db = ctx.backend.with_tensors(tensors).expand_grad(dy, h, b.to(dy.dtype))
        return None, dy, dh, db.to(b.dtype)


class _ActivateAndShrink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: Backend, scaling: float, act: Callable, gate: Tensor, up: Tensor | None, stack: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = act(gate)
        if up is not None:
            # An activation may return its very input, which must survive.
            hidden = hidden * up if hidden.data_ptr() == gate.data_ptr() else hidden.mul_(up)
        (h,) = backend.shrink(hidden, _cast([stack], hidden))
        ctx.backend, ctx.scaling, ctx.act, ctx.count = backend, scaling, act, len(backend.tensors)
        ctx.save_for_backward(gate, up, stack, *backend.tensors)
        return hidden, h.mul_(scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor, dh: Tensor) -> tuple[Any, ...]:
        gate, up, stack, *tensors = ctx.saved_tensors
        backend = ctx.backend.with_tensors(tensors)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.act(leaf)
        hidden = active.detach() if up is None else active.detach() * up
        dlow, (dstack,) = backend.shrink_grad(hidden, _cast([stack], hidden), [dh * ctx.scaling], True)
        assert dlow is not None
        dlow.add_(dhidden)
        del hidden
        dup = None
        if up is not None:
            dup = dlow * active.detach()
            dlow.mul_(up)
        (dgate,) = torch.autograd.grad(active, leaf, dlow)
        return None, None, None, dgate, dup, dstack.to(stack.dtype)


class _Permute(torch.autograd.Function):
    """`x[order]`; the backward is a gather by the inverse instead of index_select's scatter-add."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return dy.index_select(0, inverse(order)), None


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation, int32 `[T]`."""
    result = torch.empty_like(order)
    result[order.long()] = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    return result


def permute(x: Tensor, order: Tensor) -> Tensor:
    """Rows of `x` `[T, ...]` in `order`, a permutation, int32 `[T]`."""
    return _Permute.apply(x, order)


def shrink(
    backend: Backend, scaling: float, x: Tensor, stacks: Sequence[Tensor], source: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Rank activations `s A x` of `x` `[T, I]` for every stack `[K, R, I]` that reads it.

    `source` is the unsorted `x` where a sorting backend has sorted it: saved in its place, because the router saves
    it anyway.
    """
    if not torch.is_grad_enabled():
        return tuple(h.mul_(scaling) for h in backend.shrink(x, _cast(stacks, x)))
    return _Shrink.apply(backend, scaling, None if source is None else source.detach(), x, *stacks)


def expand(backend: Backend, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """`y + B h`, written over `y` `[T, O]`, which must be a fresh output that nobody else keeps."""
    if not torch.is_grad_enabled():
        backend.expand_(y, h, b.to(y.dtype))
        return y
    return _Expand.apply(backend, y, h, b)


def activate_and_shrink(
    backend: Backend, scaling: float, act: Callable, gate: Tensor, up: Tensor | None, stack: Tensor
) -> tuple[Tensor, Tensor]:
    """`act(gate) * up` (`act(gate)` without up), `[T, F]`, and its rank activations for `stack` `[K, R, F]`.

    `act` must be elementwise and own no parameters.
    """
    return _ActivateAndShrink.apply(backend, scaling, act, gate, up, stack)

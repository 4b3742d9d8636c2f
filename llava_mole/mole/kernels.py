"""Differentiable rank-space products, saving as little as they can.

`shrink` saves its input once for all projections that read it; `expand` adds in place onto the base output and saves
the compact rank activations; `activate_and_shrink` saves gate and up and recomputes their activation, so neither the
activation nor its product with up stays in memory. The chosen experts are saved like activations, so a checkpointed
layer uses those of its recomputation throughout.

Shape legend: T tokens, I input width, O output width, F FFN width, K experts, R rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import grouped_mm


@dataclass(frozen=True)
class Dense:
    """Every token uses all experts: plain products over the concatenated experts. Also K = 1."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the backward pass needs besides activations and weights."""
        return ()

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Dense":
        """The same backend around saved `tensors`."""
        return self

    def shrink(self, x_TI: Tensor, stacks: Sequence[Tensor]) -> list[Tensor]:
        """`x A^T` for each stack `[K, R, I]`: `[T, K R]` each, by one product."""
        return list((x_TI @ _concat(stacks).T).chunk(len(stacks), dim=-1))

    def shrink_grad(
        self, x_TI: Tensor, stacks: Sequence[Tensor], dhs: Sequence[Tensor], need_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients for x and for each stack."""
        dh = dhs[0] if len(dhs) == 1 else torch.cat(list(dhs), dim=-1)
        dx = dh @ _concat(stacks) if need_x else None
        return dx, [g.view(stacks[0].shape) for g in (dh.T @ x_TI).chunk(len(stacks))]

    def expand_(self, y_TO: Tensor, h: Tensor, b_KRO: Tensor) -> None:
        """`y += h B`, in place."""
        y_TO.addmm_(h, b_KRO.flatten(0, 1))

    def expand_grad(self, dy_TO: Tensor, h: Tensor, b_KRO: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients for h and B."""
        return dy_TO @ b_KRO.flatten(0, 1).T, (h.T @ dy_TO).view(b_KRO.shape)


@dataclass(frozen=True)
class Masked:
    """Products over all experts, of which each token keeps its own: no synchronisation, static shapes.

    K times plain LoRA's arithmetic, which is free where plain LoRA waits for memory (GPUs, small K R).
    `index` is uint8 `[T, k]`.
    """

    index: Tensor
    num_experts: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.index,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Masked":
        return Masked(tensors[0], self.num_experts)

    def _pick(self, full_TN: Tensor, stacks: int) -> list[Tensor]:
        tokens, picks = self.index.shape
        full = full_TN.view(tokens, stacks, self.num_experts, -1)
        where = self.index.long().view(tokens, 1, picks, 1).expand(-1, stacks, -1, full.shape[-1])
        return [part.flatten(1) for part in full.gather(2, where).unbind(1)]

    def _place(self, parts: Sequence[Tensor]) -> Tensor:
        tokens, picks = self.index.shape
        picked = torch.stack([part.view(tokens, picks, -1) for part in parts], dim=1)
        where = self.index.long().view(tokens, 1, picks, 1).expand_as(picked)
        full = picked.new_zeros(tokens, len(parts), self.num_experts, picked.shape[-1])
        return full.scatter_(2, where, picked).flatten(1)

    def shrink(self, x_TI: Tensor, stacks: Sequence[Tensor]) -> list[Tensor]:
        return self._pick(x_TI @ _concat(stacks).T, len(stacks))

    def shrink_grad(
        self, x_TI: Tensor, stacks: Sequence[Tensor], dhs: Sequence[Tensor], need_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        dh = self._place(dhs)
        dx = dh @ _concat(stacks) if need_x else None
        return dx, [g.view(stacks[0].shape) for g in (dh.T @ x_TI).chunk(len(stacks))]

    def expand_(self, y_TO: Tensor, h: Tensor, b_KRO: Tensor) -> None:
        y_TO.addmm_(self._place([h]), b_KRO.flatten(0, 1))

    def expand_grad(self, dy_TO: Tensor, h: Tensor, b_KRO: Tensor) -> tuple[Tensor, Tensor]:
        dh = self._pick(dy_TO @ b_KRO.flatten(0, 1).T, 1)[0]
        return dh, (self._place([h]).T @ dy_TO).view(b_KRO.shape)


@dataclass(frozen=True)
class Slices:
    """Tokens sorted by expert, one product a slice, experts in fixed order; plain LoRA's arithmetic, for top 1.

    The caller brings the tokens in `order` (int32 `[T]`); `ends` (int32 `[K]`) are the slices' ends. Reading them is
    a synchronisation on a GPU and nothing on a CPU. Empty slices give zero gradients, so that the gradient of a
    stack is whole on every rank.
    """

    order: Tensor
    ends: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.order, self.ends)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Slices":
        return Slices(tensors[0], tensors[1])

    def _slices(self) -> Iterator[tuple[int, slice]]:
        start = 0
        for k, end in enumerate(self.ends.tolist()):
            yield k, slice(start, end)
            start = end

    def shrink(self, x_TI: Tensor, stacks: Sequence[Tensor]) -> list[Tensor]:
        h = x_TI.new_empty(x_TI.shape[0], len(stacks) * stacks[0].shape[1])
        for k, part in self._slices():
            if part.stop > part.start:
                torch.mm(x_TI[part], _expert(stacks, k).T, out=h[part])
        return list(h.chunk(len(stacks), dim=-1))

    def shrink_grad(
        self, x_TI: Tensor, stacks: Sequence[Tensor], dhs: Sequence[Tensor], need_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        dh = dhs[0] if len(dhs) == 1 else torch.cat(list(dhs), dim=-1)
        dx = torch.empty_like(x_TI) if need_x else None
        grads = [torch.empty_like(stack) for stack in stacks]
        for k, part in self._slices():
            if dx is not None and part.stop > part.start:
                torch.mm(dh[part], _expert(stacks, k), out=dx[part])
            for grad, own in zip(grads, dhs, strict=True):
                torch.mm(own[part].T, x_TI[part], out=grad[k])
        return dx, grads

    def expand_(self, y_TO: Tensor, h: Tensor, b_KRO: Tensor) -> None:
        for k, part in self._slices():
            if part.stop > part.start:
                y_TO[part].addmm_(h[part], b_KRO[k])

    def expand_grad(self, dy_TO: Tensor, h: Tensor, b_KRO: Tensor) -> tuple[Tensor, Tensor]:
        dh, db = torch.empty_like(h), torch.empty_like(b_KRO)
        for k, part in self._slices():
            if part.stop > part.start:
                torch.mm(dy_TO[part], b_KRO[k].T, out=dh[part])
            torch.mm(h[part].T, dy_TO[part], out=db[k])
        return dh, db


@dataclass(frozen=True)
class GroupedGemm(Slices):
    """`Slices` by `torch.nn.functional.grouped_mm`, which reads the ends on the device: no synchronisation."""

    def with_tensors(self, tensors: Sequence[Tensor]) -> "GroupedGemm":
        return GroupedGemm(tensors[0], tensors[1])

    def shrink(self, x_TI: Tensor, stacks: Sequence[Tensor]) -> list[Tensor]:
        h = grouped_mm(x_TI, torch.cat(list(stacks), dim=1).transpose(1, 2), offs=self.ends)
        return list(h.chunk(len(stacks), dim=-1))

    def shrink_grad(
        self, x_TI: Tensor, stacks: Sequence[Tensor], dhs: Sequence[Tensor], need_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        dh = dhs[0] if len(dhs) == 1 else torch.cat(list(dhs), dim=-1)
        dx = grouped_mm(dh, torch.cat(list(stacks), dim=1), offs=self.ends) if need_x else None
        return dx, list(grouped_mm(dh.T, x_TI, offs=self.ends).chunk(len(stacks), dim=1))

    def expand_(self, y_TO: Tensor, h: Tensor, b_KRO: Tensor) -> None:
        y_TO.add_(grouped_mm(h.contiguous(), b_KRO, offs=self.ends))

    def expand_grad(self, dy_TO: Tensor, h: Tensor, b_KRO: Tensor) -> tuple[Tensor, Tensor]:
        return grouped_mm(dy_TO, b_KRO.transpose(1, 2), offs=self.ends), grouped_mm(h.T, dy_TO, offs=self.ends)


@dataclass(frozen=True)
class Pairs:
    """Token-expert pairs gathered by expert, for k > 1: each expert sees its tokens in one product.

    `index` is uint8 `[T, k]`. Finding the tokens of an expert is a synchronisation on a GPU.
    """

    index: Tensor
    num_experts: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.index,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Pairs":
        return Pairs(tensors[0], self.num_experts)

    def _members(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for k in range(self.num_experts):
            token, slot = (self.index == k).nonzero(as_tuple=True)
            yield k, token, slot

    def _view(self, h: Tensor) -> Tensor:
        return h.view(*self.index.shape, -1)

    def shrink(self, x_TI: Tensor, stacks: Sequence[Tensor]) -> list[Tensor]:
        hs = [x_TI.new_zeros(*self.index.shape, stack.shape[1]) for stack in stacks]
        for k, token, slot in self._members():
            both = (x_TI[token] @ _expert(stacks, k).T).chunk(len(stacks), dim=-1)
            for h, part in zip(hs, both, strict=True):
                h[token, slot] = part
        return [h.flatten(1) for h in hs]

    def shrink_grad(
        self, x_TI: Tensor, stacks: Sequence[Tensor], dhs: Sequence[Tensor], need_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        dx = torch.zeros_like(x_TI) if need_x else None
        grads = [torch.empty_like(stack) for stack in stacks]
        for k, token, slot in self._members():
            own = torch.cat([self._view(dh)[token, slot] for dh in dhs], dim=-1)
            if dx is not None:
                dx.index_add_(0, token, own @ _expert(stacks, k))
            for grad, part in zip(grads, (own.T @ x_TI[token]).chunk(len(stacks)), strict=True):
                grad[k] = part
        return dx, grads

    def expand_(self, y_TO: Tensor, h: Tensor, b_KRO: Tensor) -> None:
        for k, token, slot in self._members():
            y_TO.index_add_(0, token, self._view(h)[token, slot] @ b_KRO[k])

    def expand_grad(self, dy_TO: Tensor, h: Tensor, b_KRO: Tensor) -> tuple[Tensor, Tensor]:
        dh, db = torch.zeros_like(h), torch.empty_like(b_KRO)
        for k, token, slot in self._members():
            dy = dy_TO[token]
            self._view(dh)[token, slot] = dy @ b_KRO[k].T
            torch.mm(self._view(h)[token, slot].T, dy, out=db[k])
        return dh, db


@dataclass(frozen=True)
class Gathered:
    """The experts of each token copied side by side: for a few tokens, when decoding. `index` is uint8 `[T, k]`.

    Reads 3 k T experts' bytes instead of K, without synchronisation.
    """

    index: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.index,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Gathered":
        return Gathered(tensors[0])

    def _own(self, stack: Tensor) -> Tensor:
        return stack.index_select(0, self.index.flatten().int()).view(self.index.shape[0], -1, stack.shape[-1])

    def shrink(self, x_TI: Tensor, stacks: Sequence[Tensor]) -> list[Tensor]:
        return [torch.bmm(self._own(stack), x_TI.unsqueeze(-1)).squeeze(-1) for stack in stacks]

    def shrink_grad(
        self, x_TI: Tensor, stacks: Sequence[Tensor], dhs: Sequence[Tensor], need_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        dx = None
        if need_x:
            own = [torch.bmm(dh.unsqueeze(1), self._own(s)).squeeze(1) for dh, s in zip(dhs, stacks, strict=True)]
            dx = own[0] if len(own) == 1 else torch.stack(own).sum(0)
        return dx, [self._add_up(dh, x_TI, stack) for dh, stack in zip(dhs, stacks, strict=True)]

    def _add_up(self, left: Tensor, right: Tensor, stack: Tensor) -> Tensor:
        """Sum over tokens of the outer products of `left` `[T, k R]` and `right` `[T, I]`, by expert."""
        products = (left.unsqueeze(-1) * right.unsqueeze(1)).view(-1, *stack.shape[1:])
        return torch.zeros_like(stack).index_add_(0, self.index.flatten().int(), products)

    def expand_(self, y_TO: Tensor, h: Tensor, b_KRO: Tensor) -> None:
        y_TO.add_(torch.bmm(h.unsqueeze(1), self._own(b_KRO)).squeeze(1))

    def expand_grad(self, dy_TO: Tensor, h: Tensor, b_KRO: Tensor) -> tuple[Tensor, Tensor]:
        dh = torch.bmm(self._own(b_KRO), dy_TO.unsqueeze(-1)).squeeze(-1)
        return dh, self._add_up(h, dy_TO, b_KRO)


Backend = Dense | Masked | Slices | GroupedGemm | Pairs | Gathered


def _concat(stacks: Sequence[Tensor]) -> Tensor:
    """The experts of all stacks `[K, R, I]` below each other: `[n K R, I]`; a free view for one stack."""
    flat = [stack.flatten(0, 1) for stack in stacks]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _expert(stacks: Sequence[Tensor], k: int) -> Tensor:
    """Expert k of all stacks: `[n R, I]`."""
    return stacks[0][k] if len(stacks) == 1 else torch.cat([stack[k] for stack in stacks])


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

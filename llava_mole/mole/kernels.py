"""Products of stacked LoRA experts in rank space, and autograd functions around them that save as little as they can.

A backend is one function that returns three products; the backward pass of each is made of the other two. `shrink`
saves its input once for all projections that read it. `expand` adds in place to the output of the base linear and
saves the compact rank activations. `activate_and_shrink` saves gate and up and recomputes their activation, so
neither the activation nor its product with up stays in memory. The chosen experts are saved like activations, so a
checkpointed layer uses those of its recomputation throughout.

Shape legend: T tokens, K experts, k experts a token uses, J experts a token is computed for (K or k), R rank,
I input size, O output size, P = T k pairs of a token and an expert, N and M any size.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import grouped_mm, linear


class Products(NamedTuple):
    """The three products of a backend. Each expert has a matrix in the stacks `a_KRI` and `b_KRO`."""

    shrink: Callable[[Tensor, Sequence[Tensor]], Tensor]
    """`(x_TI, [a_KRI, ...]) -> h_TJR`: `A x` of every token, for each of its experts; R covers all stacks."""
    expand: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """`(h_TJR, b_KRO, onto_TO) -> y_TO`: `h B` summed over a token's experts, added in place to `onto` if given."""
    outer: Callable[[Tensor, Tensor], Tensor]
    """`(h_TJR, x_TI) -> g_KRI`: the outer products of h and x, summed over the tokens of each expert."""


class Backend(NamedTuple):
    """A backend for the tokens of one FFN: `dense`, `masked`, `wide` or `grouped`, and what it knows of the choice."""

    function: Callable[..., Products]
    tensors: tuple[Tensor, ...] = ()
    """Arguments of `function`; the backward pass saves them."""
    order: Tensor | None = None
    """Order in which the tokens must come, int32 `[T]`; None for their own."""

    def products(self) -> Products:
        """The products for these tokens."""
        return self.function(*self.tensors)


@cache
def dense() -> Products:
    """Products over all experts for tokens that use all of them: a dense mixture, or K = 1."""

    def shrink(x_TI: Tensor, stacks: Sequence[Tensor]) -> Tensor:
        a_KRI = _join(stacks, x_TI)
        return (x_TI @ a_KRI.flatten(0, 1).T).view(x_TI.shape[0], *a_KRI.shape[:2])

    def expand(h_TKR: Tensor, b_KRO: Tensor, onto_TO: Tensor | None) -> Tensor:
        h_TN, b_NO = h_TKR.flatten(1), b_KRO.flatten(0, 1)
        return h_TN @ b_NO if onto_TO is None else onto_TO.addmm_(h_TN, b_NO)

    def outer(h_TKR: Tensor, x_TI: Tensor) -> Tensor:
        return (h_TKR.flatten(1).T @ x_TI).unflatten(0, h_TKR.shape[1:])

    return Products(shrink, expand, outer)


def masked(index_Tk: Tensor, *, num_experts: int) -> Products:
    """Products over all experts, of which each token keeps its own: no synchronisation, static shapes.

    K times the arithmetic of plain LoRA, which is free while plain LoRA waits for memory (GPUs, small K R).
    `index_Tk` holds whole numbers of any size.
    """
    all_experts, where_Tk1 = dense(), index_Tk.long().unsqueeze(-1)

    def shrink(x_TI: Tensor, stacks: Sequence[Tensor]) -> Tensor:
        h_TKR = all_experts.shrink(x_TI, stacks)
        return h_TKR.gather(1, where_Tk1.expand(-1, -1, h_TKR.shape[-1]))

    def place(h_TkR: Tensor) -> Tensor:
        zeros_TKR = h_TkR.new_zeros(h_TkR.shape[0], num_experts, h_TkR.shape[-1])
        return zeros_TKR.scatter_(1, where_Tk1.expand_as(h_TkR), h_TkR)

    def expand(h_TkR: Tensor, b_KRO: Tensor, onto_TO: Tensor | None) -> Tensor:
        return all_experts.expand(place(h_TkR), b_KRO, onto_TO)

    def outer(h_TkR: Tensor, x_TI: Tensor) -> Tensor:
        return all_experts.outer(place(h_TkR), x_TI)

    return Products(shrink, expand, outer)


def wide(mask_TK: Tensor) -> Products:
    """What `masked` computes, with rank activations of all K experts (J = K) instead of a gather and scatters.

    `mask_TK` is 1 for the experts that a token uses, else 0. Small products of all experts at once are faster on a CPU
    than narrow ones for each, and they need no sorting.
    """
    all_experts, mask_TK1 = dense(), mask_TK.unsqueeze(-1)

    def own(h_TKR: Tensor) -> Tensor:
        return h_TKR * mask_TK1.to(h_TKR.dtype)

    def expand(h_TKR: Tensor, b_KRO: Tensor, onto_TO: Tensor | None) -> Tensor:
        return all_experts.expand(own(h_TKR), b_KRO, onto_TO)

    def outer(h_TKR: Tensor, x_TI: Tensor) -> Tensor:
        return all_experts.outer(own(h_TKR), x_TI)

    return Products(all_experts.shrink, expand, outer)


def grouped(order_P: Tensor, ends_K: Tensor, *, picks: int) -> Products:
    """Pairs sorted by expert, one product for each expert: the arithmetic of plain LoRA.

    `order_P` sorts the pairs by expert and `ends_K` holds the end of each expert's pairs, both int32. With `picks`
    (k) 1 the caller brings the tokens in this order, sorted once for the whole FFN; otherwise each product gathers.
    """
    token_P = order_P if picks == 1 else order_P // picks

    def by_token(x_TN: Tensor) -> Tensor:
        return x_TN if picks == 1 else x_TN.index_select(0, token_P)

    def by_pair(h_TkR: Tensor) -> Tensor:
        return h_TkR.flatten(0, 1) if picks == 1 else h_TkR.flatten(0, 1).index_select(0, order_P)

    def shrink(x_TI: Tensor, stacks: Sequence[Tensor]) -> Tensor:
        h_PR = _rows_by_expert(by_token(x_TI), stacks, ends_K, None, transposed=True)
        h_PR = h_PR if picks == 1 else h_PR.index_select(0, inverse(order_P))
        return h_PR.view(x_TI.shape[0], picks, h_PR.shape[1])

    def expand(h_TkR: Tensor, b_KRO: Tensor, onto_TO: Tensor | None) -> Tensor:
        if picks == 1:
            return _rows_by_expert(by_pair(h_TkR), [b_KRO], ends_K, onto_TO)
        y_TO = h_TkR.new_zeros(h_TkR.shape[0], b_KRO.shape[-1]) if onto_TO is None else onto_TO
        return y_TO.index_add_(0, token_P, _rows_by_expert(by_pair(h_TkR), [b_KRO], ends_K, None))

    def outer(h_TkR: Tensor, x_TI: Tensor) -> Tensor:
        return _outer_by_expert(by_pair(h_TkR), by_token(x_TI), ends_K)

    return Products(shrink, expand, outer)


def group_by_expert(index_Tk: Tensor, num_experts: int) -> Backend:
    """The backend `grouped` for the chosen experts, int64 `[T, k]`."""
    picks, expert_P = index_Tk.shape[-1], index_Tk.flatten()
    order_P = expert_P.argsort(stable=True).int()
    experts_K = torch.arange(num_experts, device=index_Tk.device)
    ends_K = (expert_P.unsqueeze(-1) <= experts_K).sum(dim=0, dtype=torch.int32)
    return Backend(partial(grouped, picks=picks), (order_P, ends_K), order_P if picks == 1 else None)


def _has_grouped_mm(x: Tensor) -> bool:
    """Whether one kernel computes all groups; it reads their ends on the device, without synchronisation."""
    return x.is_cuda and x.dtype == torch.bfloat16


def _rows_by_expert(
    x_PN: Tensor, stacks: Sequence[Tensor], ends_K: Tensor, onto_PM: Tensor | None, *, transposed: bool = False
) -> Tensor:
    """Each row times the matrix `[N, M]` of its expert, `[P, M]`, added in place to `onto_PM` if given.

    The matrices are those of the stacks side by side, or the transposes of what is stored. Of the experts that no row
    uses nothing is read.
    """
    if _has_grouped_mm(x_PN):
        w_KNM = _join(stacks, x_PN)
        y_PM = grouped_mm(x_PN.contiguous(), w_KNM.transpose(1, 2) if transposed else w_KNM, offs=ends_K)
        return y_PM if onto_PM is None else onto_PM.add_(y_PM)
    width = sum(stack.shape[1] for stack in stacks) if transposed else stacks[0].shape[2]
    y_PM = x_PN.new_empty(x_PN.shape[0], width) if onto_PM is None else onto_PM
    for k, rows in enumerate(_groups(ends_K)):
        if rows.stop > rows.start:
            w = _join([stack[k] for stack in stacks], x_PN)
            y_PM[rows].addmm_(x_PN[rows], w.T if transposed else w, beta=0 if onto_PM is None else 1)
    return y_PM


def _outer_by_expert(h_PR: Tensor, x_PI: Tensor, ends_K: Tensor) -> Tensor:
    """`h^T x` over the rows of each expert, `[K, R, I]`. An expert without rows gets zeros: its gradient is whole."""
    if _has_grouped_mm(x_PI):
        return grouped_mm(h_PR.contiguous().T, x_PI, offs=ends_K)
    g_KRI = x_PI.new_empty(ends_K.shape[0], h_PR.shape[-1], x_PI.shape[-1])
    for g_RI, rows in zip(g_KRI, _groups(ends_K), strict=True):
        torch.mm(h_PR[rows].T, x_PI[rows], out=g_RI)
    return g_KRI


def _groups(ends_K: Tensor) -> Iterator[slice]:
    """The rows of each expert. Reading the ends is a synchronisation on a GPU and costs nothing on a CPU."""
    start = 0
    for end in ends_K.tolist():
        yield slice(start, end)
        start = end


def shrink(
    backend: Backend, scaling: float, x_TI: Tensor, stacks: Sequence[Tensor], source: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Rank activations `s A x`, `[T, J, R]`, for every stack `[K, R, I]` that reads `x_TI`.

    `source` is the unsorted `x_TI` if the tokens come in `backend.order`. It is saved in place of the sorted copy,
    because the router saves it anyway.
    """
    if not torch.is_grad_enabled():
        return backend.products().shrink(x_TI, stacks).mul_(scaling).chunk(len(stacks), dim=-1)
    return _Shrink.apply(backend, scaling, None if source is None else source.detach(), x_TI, *stacks)


def expand(backend: Backend, y_TO: Tensor, h_TJR: Tensor, b_KRO: Tensor) -> Tensor:
    """`y + h B`, written over `y_TO`, which must be a fresh output that nothing else keeps."""
    if not torch.is_grad_enabled():
        return backend.products().expand(h_TJR, b_KRO.to(y_TO.dtype), y_TO)
    return _Expand.apply(backend, y_TO, h_TJR, b_KRO)


def lora_on_frozen(
    x_TI: Tensor,
    w_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_RO: Tensor,
    scaling: float,
    mask_TR: Tensor | None = None,
) -> Tensor:
    """`x W^T + bias + s (mask * x A^T) B`, `[T, O]`, for W, bias and mask that do not train; all of one dtype.

    One function instead of three: the backward pass adds the adapter's share of the input's gradient in place.
    """
    return _LoraOnFrozen.apply(x_TI, w_OI, bias_O, a_RI, b_RO, scaling, mask_TR)


def activate_and_shrink(
    backend: Backend, scaling: float, act: Callable, gate_TF: Tensor, up_TF: Tensor | None, a_KRF: Tensor
) -> tuple[Tensor, Tensor]:
    """`act(gate) * up` (`act(gate)` without up), `[T, F]` with F the FFN's hidden size, and its `s A x`, `[T, J, R]`.

    `act` must be elementwise and must not own parameters.
    """
    return _ActivateAndShrink.apply(backend, scaling, act, gate_TF, up_TF, a_KRF)


def permute(x: Tensor, order: Tensor) -> Tensor:
    """Rows of `x` `[T, ...]` in `order`, a permutation, int32 `[T]`."""
    return _Permute.apply(x, order)


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation, int32 `[T]`."""
    result = torch.empty_like(order)
    result[order.long()] = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    return result


def _join(stacks: Sequence[Tensor], like: Tensor) -> Tensor:
    """The stacks `[..., R, I]` side by side along the rank, `[..., n R, I]`, in the dtype of `like`."""
    cast = [stack.to(like.dtype) for stack in stacks]
    return cast[0] if len(cast) == 1 else torch.cat(cast, dim=-2)


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: Backend, scaling: float, source: Tensor | None, x: Tensor, *stacks: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.scaling, ctx.sorted = backend.function, scaling, source is not None
        ctx.count = len(backend.tensors)
        ctx.save_for_backward(x if source is None else source, *backend.tensors, *stacks)
        return backend.products().shrink(x, stacks).mul_(scaling).chunk(len(stacks), dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dhs: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        tensors, stacks = rest[: ctx.count], rest[ctx.count :]
        products = ctx.function(*tensors)
        if ctx.sorted:
            x = x.index_select(0, tensors[0])
        dh = (dhs[0] if len(dhs) == 1 else torch.cat(dhs, dim=-1)) * ctx.scaling
        dx = products.expand(dh, _join(stacks, x), None) if ctx.needs_input_grad[3] else None
        grads = [products.outer(own, x) for own in dh.chunk(len(stacks), dim=-1)]  # each contiguous, like its stack
        return None, None, None, dx, *(g.to(s.dtype) for g, s in zip(grads, stacks, strict=True))


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        backend.products().expand(h, b.to(y.dtype), y)
        ctx.mark_dirty(y)
        ctx.function = backend.function
        ctx.save_for_backward(h, b, *backend.tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        h, b, *tensors = ctx.saved_tensors
        products = ctx.function(*tensors)
        return None, dy, products.shrink(dy, [b]), products.outer(h, dy).to(b.dtype)


class _LoraOnFrozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_OI: Tensor,
        bias: Tensor | None,
        a_RI: Tensor,
        b_RO: Tensor,
        scaling: float,
        mask_TR: Tensor | None,
    ) -> Tensor:
        h_TR = (x @ a_RI.T).mul_(scaling)
        h_TR = h_TR if mask_TR is None else h_TR.mul_(mask_TR)
        ctx.scaling = scaling
        ctx.save_for_backward(x, w_OI, a_RI, b_RO, h_TR, mask_TR)
        return linear(x, w_OI, bias).addmm_(h_TR, b_RO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, w_OI, a_RI, b_RO, h_TR, mask_TR = ctx.saved_tensors
        dh_TR = (dy @ b_RO.T).mul_(ctx.scaling)
        dh_TR = dh_TR if mask_TR is None else dh_TR.mul_(mask_TR)
        dx = (dy @ w_OI).addmm_(dh_TR, a_RI) if ctx.needs_input_grad[0] else None
        return dx, None, None, dh_TR.T @ x, h_TR.T @ dy, None, None


class _ActivateAndShrink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: Backend, scaling: float, act: Callable, gate: Tensor, up: Tensor | None, stack: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = act(gate)
        if up is not None:
            # An activation may return its very input, which must survive.
            hidden = hidden * up if hidden.data_ptr() == gate.data_ptr() else hidden.mul_(up)
        ctx.function, ctx.scaling, ctx.act = backend.function, scaling, act
        ctx.save_for_backward(gate, up, stack, *backend.tensors)
        return hidden, backend.products().shrink(hidden, [stack]).mul_(scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor, dh: Tensor) -> tuple[Any, ...]:
        gate, up, stack, *tensors = ctx.saved_tensors
        products = ctx.function(*tensors)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.act(leaf)
        hidden = active.detach() if up is None else active.detach() * up
        dh = dh * ctx.scaling
        dstack = products.outer(dh, hidden).to(stack.dtype)
        dlow = products.expand(dh, stack.to(hidden.dtype), None).add_(dhidden)
        del hidden
        dup = None
        if up is not None:
            dup = dlow * active.detach()
            dlow.mul_(up)
        (dgate,) = torch.autograd.grad(active, leaf, dlow)
        return None, None, None, dgate, dup, dstack


class _Permute(torch.autograd.Function):
    """`x[order]`; the backward pass is a gather by the inverse instead of index_select's scatter-add."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return dy.index_select(0, inverse(order)), None

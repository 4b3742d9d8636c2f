"""The trainable parts, and an FFN or a linear with them: stacked LoRA experts, and a plain LoRA pair.

The experts of one projection are one Parameter each for A and B. With a module per expert, ZeRO-1/2 reduces wrong
gradients without an error as soon as ranks use different experts, because its buckets follow the order in which
autograd reaches the parameters. A stacked Parameter always receives its whole gradient.

Shape legend: T tokens, D hidden size, K experts, k experts a token uses, J experts a token is computed for (K or k),
R rank, N = K R, I input size, O output size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mole.mole.config import MoleConfig
from llava_mole.mole.ffn import FfnLayout, activate
from llava_mole.mole.kernels import (
    Backend,
    activate_and_shrink,
    dense,
    expand,
    group_by_expert,
    inverse,
    lora_on_frozen,
    masked,
    permute,
    shrink,
    wide,
)
from llava_mole.mole.router import ExpertWeights, trained_part

DENSE = Backend(dense)


def _pair(
    lead: tuple[int, ...],
    in_width: int,
    out_width: int,
    init: bool | str | float,
    device: torch.device,
    dtype: torch.dtype,
    shared_a: bool = False,
) -> tuple[nn.Parameter, nn.Parameter]:
    """A `[*lead, I]` and B `[*lead, O]`, started as `init` says (see `a_start`); `lead` ends with the rank.

    With `shared_a`, A is `[R, I]`.
    """
    a = nn.Parameter(torch.empty(*(lead[-1:] if shared_a else lead), in_width, device=device, dtype=dtype))
    b = nn.Parameter(torch.zeros(*lead, out_width, device=device, dtype=dtype))
    # The bounds are those of kaiming_uniform_(a=sqrt(5)) for a fan-in of `in_width` or the rank. The function itself
    # would take r * in_width as the fan-in of a stacked tensor.
    if init == "gaussian":
        nn.init.normal_(a, std=1 / lead[-1])
    elif isinstance(init, float):
        nn.init.normal_(a, std=init)
    else:
        nn.init.uniform_(a, -1 / math.sqrt(in_width), 1 / math.sqrt(in_width))
    if init is False:
        nn.init.uniform_(b, -1 / math.sqrt(lead[-1]), 1 / math.sqrt(lead[-1]))
    return a, b


def a_start(config: MoleConfig) -> bool | str | float:
    """How LoRA pairs start: PEFT's `init_lora_weights`, or the standard deviation of a normal A."""
    return config.init_weights if config.init_std is None else float(config.init_std)


class LoraPair(nn.Module):
    """Plain LoRA of one linear: `A` `[R, I]` and `B` `[R, O]` (PEFT's lora_B transposed)."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        r: int,
        init: bool | str | float,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.A, self.B = _pair((r,), in_width, out_width, init, device, dtype)


class ExpertStack(nn.Module):
    """K LoRA experts of rank `r` for each projection of one FFN: `<name>_A` `[K, R, I]` and `<name>_B` `[K, R, O]`.

    With `shared_a` the experts of a projection have one A, `<name>_A` `[R, I]`. With `shared_r` each projection has one
    more pair, which every token uses: `<name>_shared_A` `[shared_r, I]` and `<name>_shared_B` `[shared_r, O]`. `widths`
    maps projections to their input and output size. The first `frozen` experts do not train.
    """

    def __init__(
        self,
        widths: dict[str, tuple[int, int]],
        config: MoleConfig,
        r: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        init = a_start(config)
        self.rank, self.frozen = r, config.frozen_experts
        for name, (in_width, out_width) in widths.items():
            a, b = _pair((config.num_experts, r), in_width, out_width, init, device, dtype, config.shared_a)
            self.register_parameter(f"{name}_A", a)
            self.register_parameter(f"{name}_B", b)
            if config.shared_r:
                a, b = _pair((config.shared_r,), in_width, out_width, init, device, dtype)
                self.register_parameter(f"{name}_shared_A", a)
                self.register_parameter(f"{name}_shared_B", b)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A `[K, R, I]` (`[1, R, I]` if the experts share it) and B `[K, R, O]` of projection `name`."""
        a, b = (trained_part(getattr(self, f"{name}_{side}"), self.frozen) for side in "AB")
        return (a if a.dim() == 3 else a.unsqueeze(0)), b

    def expert_pair(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """A `[R, I]` and B `[R, O]` of one expert of projection `name`."""
        a_KRI, b_KRO = self.pair(name)
        return a_KRI[expert if len(a_KRI) > 1 else 0], b_KRO[expert]

    def shared_pair(self, name: str) -> tuple[Tensor, Tensor]:
        """`(A, B)` of the shared expert of projection `name`."""
        return getattr(self, f"{name}_shared_A"), getattr(self, f"{name}_shared_B")


def lora_linear(base: nn.Module, x_TI: Tensor, a_RI: Tensor, b_RO: Tensor, scaling: float, dropout: float) -> Tensor:
    """`base(x) + s B A dropout(x)`: plain LoRA, with one pass over x and one over the output."""
    if torch.is_grad_enabled() and not dropout and _is_frozen_linear(base, x_TI, a_RI, b_RO):
        return lora_on_frozen(x_TI, base.weight, base.bias, a_RI, b_RO, scaling)
    y_TO = base(x_TI)
    x_TI = (F.dropout(x_TI, dropout) if dropout else x_TI).to(y_TO.dtype)
    a_1RI, b_1RO = a_RI.unsqueeze(0), b_RO.unsqueeze(0)
    if torch.compiler.is_compiling():
        return y_TO + all_experts_delta(x_TI, a_1RI, b_1RO, None, scaling)
    if not torch.is_grad_enabled():  # a step of decoding waits for calls, not for arithmetic: as few as possible
        return y_TO.addmm_((x_TI @ a_RI.to(x_TI.dtype).T).mul_(scaling), b_RO.to(y_TO.dtype))
    (h_T1R,) = shrink(DENSE, scaling, x_TI, [a_1RI])
    return expand(DENSE, y_TO, h_T1R, b_1RO)


def _is_frozen_linear(base: nn.Module, *operands: Tensor) -> TypeGuard[nn.Linear]:
    """Whether `base` is torch's own linear, without hooks or gradients, and computes in the dtype of the operands."""
    if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter or torch.compiler.is_compiling():
        return False
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    if any(hooks) or "forward" in vars(base):  # accelerate puts its own forward there
        return False
    own = [base.weight] if base.bias is None else [base.weight, base.bias]
    weight = base.weight
    return (
        not any(parameter.requires_grad for parameter in own)
        and all(t.dtype == weight.dtype and t.device == weight.device for t in (*own, *operands))
        and not torch.is_autocast_enabled(weight.device.type)
    )


MASKED_WIDTH_LIMIT = 256
"""Largest K R for which a GPU computes all experts: plain LoRA waits for memory there, so arithmetic is free."""
CPU_WIDTH_LIMIT = 32
"""The same for a CPU, where a product of few columns costs nearly as much as one of so many."""


def choose_backend(requested: str, weights: ExpertWeights | None, num_experts: int, r: int, x_TD: Tensor) -> str:
    """The name of the backend for the tokens `x_TD`: the one requested, or for `auto` the documented rule.

    If every token uses all experts (mode `dense`, K = 1): `dense`. CPU: `masked` while K R is at most
    `CPU_WIDTH_LIMIT`, else `grouped`, because larger products are bound by arithmetic there. GPU: `masked` while K R is
    at most `MASKED_WIDTH_LIMIT`, `grouped` above (in bfloat16 with top 1 and a rank in multiples of 8; else `masked`).
    """
    if weights is None or weights.index is None:
        return "loop" if requested == "loop" else "dense"
    if requested != "auto":
        return requested
    if x_TD.device.type == "cpu":
        return "masked" if num_experts * r <= CPU_WIDTH_LIMIT else "grouped"
    fits = weights.index.shape[-1] == 1 and x_TD.dtype == torch.bfloat16 and r % 8 == 0
    return "grouped" if num_experts * r > MASKED_WIDTH_LIMIT and fits else "masked"


def build_backend(name: str, weights: ExpertWeights | None, num_experts: int) -> Backend:
    """The backend `name` for the tokens of one FFN."""
    if name == "dense" or weights is None or weights.index is None:
        return DENSE
    if name == "masked":
        number = torch.uint8 if num_experts <= 256 else torch.int32  # the backward pass saves them
        return Backend(partial(masked, num_experts=num_experts), (weights.index.to(number),))
    return group_by_expert(weights.index, num_experts)


@dataclass(frozen=True)
class ExpertMix:
    """The experts of one FFN in one forward pass, and their weights.

    `weights` is None for one expert. `shared_weight` is `[T, 1]`, or None for 1. `dropout` is 0 in evaluation.
    `scaling` is the factor on every expert's update.
    """

    experts: ExpertStack
    config: MoleConfig
    scaling: float
    weights: ExpertWeights | None
    shared_weight: Tensor | None
    dropout: float


def ffn_with_experts(base: nn.Module, layout: FfnLayout, x_TD: Tensor, mix: ExpertMix) -> Tensor:
    """`down(act(gate(x)) * up(x))`, `[T, D]`, where each projection adds the experts of its own input (Eq. 5)."""
    config = mix.config
    name = choose_backend(config.backend, mix.weights, config.num_experts, mix.experts.rank, x_TD)
    if name == "loop" or torch.compiler.is_compiling():
        return _composed_ffn(base, layout, x_TD, mix)
    projections, order = _projections(name, mix, x_TD)
    source = None
    if order is not None:
        source = None if mix.dropout else x_TD
        x_TD = permute(x_TD, order)

    inputs = [layout.up] if layout.gate is None else [layout.gate, layout.up]
    outputs = projections.project([getattr(base, projection) for projection in inputs], inputs, x_TD, source)
    assert layout.activation is not None
    act = getattr(base, layout.activation)
    if layout.fused or mix.dropout or config.shared_r or _owns_parameters(act):
        hidden = activate(layout, base, outputs[-1], outputs[0] if layout.gate is not None else None)
        (y_TD,) = projections.project([getattr(base, layout.down)], [layout.down], hidden, None)
    else:
        y_TD = projections.down(base, layout.down, act, *outputs)
    return y_TD if order is None else permute(y_TD, inverse(order))


def _projections(name: str, mix: ExpertMix, x_TI: Tensor) -> tuple["_Projections", Tensor | None]:
    """What adds the experts by the backend `name`, and the order in which it needs the tokens `x_TI` (None: any)."""
    config, weights, shared_weight = mix.config, mix.weights, mix.shared_weight
    if name == "masked" and x_TI.device.type == "cpu" and not config.shared_a:
        return _wide_projections(mix, x_TI), None
    backend = build_backend(name, weights, config.num_experts)
    weight = None if weights is None else weights.weight
    order = backend.order if x_TI.shape[0] > 1 else None  # one token needs no sorting
    if order is not None:
        weight = None if weight is None else permute(weight, order)
        shared_weight = None if shared_weight is None else permute(shared_weight, order)
    return _Projections(backend, mix, weight, shared_weight), order


def _wide_projections(mix: ExpertMix, x_TI: Tensor) -> "_Projections":
    """`masked` on a CPU: a row of weights for all experts, of which a shared expert of their rank is one more."""
    config, weights, shared_weight = mix.config, mix.weights, mix.shared_weight
    assert weights is not None
    assert weights.index is not None
    joins = config.shared_r == mix.experts.rank
    mask = x_TI.new_zeros(x_TI.shape[0], config.num_experts + joins)
    mask[:, config.num_experts :] = 1
    mask.scatter_(1, weights.index, 1)
    weight = None if weights.weight is None else weight_matrix(weights, config.num_experts, x_TI)
    if joins and (weight is not None or shared_weight is not None):
        weight = mask[:, : config.num_experts] if weight is None else weight
        own = mask[:, config.num_experts :] if shared_weight is None else shared_weight.to(weight.dtype)
        weight = torch.cat([weight, own], dim=1)
    complete = joins or not config.shared_r
    mask_TN = mask.repeat_interleave(mix.experts.rank, dim=1) if weight is None and complete else None
    return _Projections(Backend(wide, (mask,)), mix, weight, shared_weight, joins_shared=joins, mask_TN=mask_TN)


def mixed_ffns(base: nn.Module, layout: FfnLayout, x_TD: Tensor, mix: ExpertMix) -> Tensor:
    """`sum_k w_k FFN_k(x)`, `[T, D]`, where `FFN_k` uses expert k alone in all its projections (MixLoRA).

    Each token is computed once for each of its k experts.
    """
    if mix.weights is None:  # one expert
        return ffn_with_experts(base, layout, x_TD, mix)
    index_Tk, weight_Tk = mix.weights.index, mix.weights.weight
    assert index_Tk is not None
    assert weight_Tk is not None
    picks, shared = index_Tk.shape[-1], mix.shared_weight
    one = replace(
        mix,
        weights=ExpertWeights(index_Tk.view(-1, 1), None),
        shared_weight=None if shared is None else shared.repeat_interleave(picks, dim=0),
    )
    y_PD = ffn_with_experts(base, layout, x_TD.repeat_interleave(picks, dim=0), one)
    return (y_PD.unflatten(0, (-1, picks)) * weight_Tk.to(y_PD.dtype).unsqueeze(-1)).sum(dim=1)


@dataclass(frozen=True)
class _Projections:
    """Adds the experts to the outputs of an FFN's projections; tokens and weights in the order of the backend."""

    backend: Backend
    mix: ExpertMix
    weight_TJ: Tensor | None
    shared_weight_T1: Tensor | None
    joins_shared: bool = False
    """Whether the shared expert is one more expert of the backend, which every token uses."""
    mask_TN: Tensor | None = None
    """For `wide` without weights: 1 at the ranks of a token's experts, all experts side by side."""

    def project(self, linears: list[nn.Module], names: list[str], x: Tensor, source: Tensor | None) -> list[Tensor]:
        """The projections `names` of x, with their experts, given the base linears. See `shrink` for `source`."""
        mask_TN = self.mask_TN
        if mask_TN is not None and torch.is_grad_enabled() and not self.mix.dropout:
            pairs = [self._pair(name) for name in names]
            both = zip(linears, pairs, strict=True)
            frozen = [base for base, pair in both if _is_frozen_linear(base, x, mask_TN, *pair)]
            if len(frozen) == len(linears):
                scaling = self.mix.scaling
                return [
                    lora_on_frozen(x, base.weight, base.bias, a.flatten(0, 1), b.flatten(0, 1), scaling, mask_TN)
                    for base, (a, b) in zip(frozen, pairs, strict=True)
                ]
        return self.add_experts(names, [base(x) for base in linears], x, source)

    def add_experts(self, names: list[str], outputs: list[Tensor], x: Tensor, source: Tensor | None) -> list[Tensor]:
        """The outputs of the projections `names`, which all read `x`, plus their experts. See `shrink` for `source`."""
        experts, scaling = self.mix.experts, self.mix.scaling
        x = F.dropout(x, self.mix.dropout) if self.mix.dropout else x
        x = x.to(outputs[0].dtype)
        source = None if source is None or self.mix.config.shared_a else source.to(x.dtype)
        stacks = [self._pair(name) for name in names]
        hs = shrink(self._reader(), scaling, x, [a for a, _ in stacks], source)
        outputs = [expand(self.backend, y, self._weigh(h), b) for y, h, (_, b) in zip(outputs, hs, stacks, strict=True)]
        if not self.mix.config.shared_r or self.joins_shared:
            return outputs
        pairs = [experts.shared_pair(name) for name in names]
        hs = shrink(DENSE, scaling, x, [a.unsqueeze(0) for a, _ in pairs])
        if self.shared_weight_T1 is not None:
            hs = tuple(h * self.shared_weight_T1.to(h.dtype).unsqueeze(-1) for h in hs)
        return [expand(DENSE, y, h, b.unsqueeze(0)) for y, h, (_, b) in zip(outputs, hs, pairs, strict=True)]

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of a projection's experts, with the shared one last if it joins them."""
        pair = self.mix.experts.pair(name)
        if not self.joins_shared:
            return pair
        both = zip(pair, self.mix.experts.shared_pair(name), strict=True)
        a, b = (torch.cat([experts, shared.unsqueeze(0)]) for experts, shared in both)
        return a, b

    def down(
        self, base: nn.Module, name: str, act: Callable[[Tensor], Tensor], first: Tensor, up: Tensor | None = None
    ) -> Tensor:
        """The down projection of `act(first) * up`, plus its experts, without keeping the activation in memory."""
        a_KRI, b_KRO = self._pair(name)
        hidden, h = activate_and_shrink(self._reader(), self.mix.scaling, act, first, up, a_KRI)
        return expand(self.backend, getattr(base, name)(hidden), self._weigh(h), b_KRO)

    def _reader(self) -> Backend:
        """The backend of the A side: there is nothing to choose if the experts share A."""
        return DENSE if self.mix.config.shared_a else self.backend

    def _weigh(self, h_TJR: Tensor) -> Tensor:
        """The weights applied in rank space, where they cost R numbers for each token and expert.

        What a shared A gives, `[T, 1, R]`, becomes one row for each expert of the token.
        """
        if self.weight_TJ is not None:
            return h_TJR * self.weight_TJ.to(h_TJR.dtype).unsqueeze(-1)
        repeats = self.mix.config.top_k if self.mix.config.shared_a else 1
        return h_TJR if repeats == 1 else h_TJR.repeat(1, repeats, 1)


def _owns_parameters(act: Callable) -> bool:
    return isinstance(act, nn.Module) and next(act.parameters(), None) is not None


def linear_with_experts(base: nn.Module, name: str, x_TI: Tensor, mix: ExpertMix) -> Tensor:
    """`base(x)`, `[T, O]`, plus the experts of projection `name`, from differentiable operations alone."""
    delta, scaling = loop_delta if mix.config.backend == "loop" else all_experts_delta, mix.scaling
    y_TO = base(x_TI)
    x_TI = (F.dropout(x_TI, mix.dropout) if mix.dropout else x_TI).to(y_TO.dtype)
    y_TO = y_TO + delta(x_TI, *mix.experts.pair(name), mix.weights, scaling)
    if not mix.config.shared_r:
        return y_TO
    a_RI, b_RO = mix.experts.shared_pair(name)
    shared_TO = all_experts_delta(x_TI, a_RI.unsqueeze(0), b_RO.unsqueeze(0), None, scaling)
    return y_TO + (shared_TO if mix.shared_weight is None else shared_TO * mix.shared_weight.to(y_TO.dtype))


def adapted_linear(base: nn.Module, name: str, x_TI: Tensor, mix: ExpertMix) -> Tensor:
    """What `linear_with_experts` computes, by the backend of the configuration and with less memory."""
    config = mix.config
    backend_name = choose_backend(config.backend, mix.weights, config.num_experts, mix.experts.rank, x_TI)
    if backend_name == "loop" or torch.compiler.is_compiling():
        return linear_with_experts(base, name, x_TI, mix)
    projections, order = _projections(backend_name, mix, x_TI)
    x_TI = x_TI if order is None else permute(x_TI, order)
    (y_TO,) = projections.project([base], [name], x_TI, None)
    return y_TO if order is None else permute(y_TO, inverse(order))


def _composed_ffn(base: nn.Module, layout: FfnLayout, x_TD: Tensor, mix: ExpertMix) -> Tensor:
    """The same FFN without kernels of its own: what `torch.compile` traces, and the reference `loop`."""

    def project(name: str, x: Tensor) -> Tensor:
        return linear_with_experts(getattr(base, name), name, x, mix)

    gate = None if layout.gate is None else project(layout.gate, x_TD)
    return project(layout.down, activate(layout, base, project(layout.up, x_TD), gate))


def all_experts_delta(
    x_TI: Tensor, a_KRI: Tensor, b_KRO: Tensor, weights: ExpertWeights | None, scaling: float
) -> Tensor:
    """`s B'((A' x) * rep(G, R))`, `[T, O]`, by two products over all experts; plain LoRA without weights (K = 1)."""
    num_experts = b_KRO.shape[0]
    a_NI, b_NO = a_KRI.flatten(0, 1).to(x_TI.dtype), b_KRO.flatten(0, 1).to(x_TI.dtype)
    h_TN = x_TI @ a_NI.T * scaling
    if weights is not None:
        weight_TK1 = weight_matrix(weights, num_experts, h_TN).unsqueeze(-1)
        h_TN = (h_TN.unflatten(-1, a_KRI.shape[:2]) * weight_TK1).flatten(1)  # a shared A is repeated by the weights
    return h_TN @ b_NO


def loop_delta(x_TI: Tensor, a_KRI: Tensor, b_KRO: Tensor, weights: ExpertWeights | None, scaling: float) -> Tensor:
    """The same, `[T, O]`, one expert after the other as in the equations: the reference for the other backends."""
    y_TO = x_TI.new_zeros(x_TI.shape[0], b_KRO.shape[-1])
    weight_TK = None if weights is None else weight_matrix(weights, b_KRO.shape[0], x_TI)
    a_KRI = a_KRI.expand(b_KRO.shape[0], -1, -1)
    for k, (a_RI, b_RO) in enumerate(zip(a_KRI.to(x_TI.dtype), b_KRO.to(x_TI.dtype), strict=True)):
        delta_TO = scaling * (x_TI @ a_RI.T) @ b_RO
        y_TO = y_TO + (delta_TO if weight_TK is None else delta_TO * weight_TK[:, k : k + 1])
    return y_TO


def weight_matrix(weights: ExpertWeights, num_experts: int, like: Tensor) -> Tensor:
    """The weights as G `[T, K]` in the dtype of `like`: zero for experts that were not chosen."""
    index, weight = weights.index, weights.weight
    if index is None:
        assert weight is not None
        return weight.to(like.dtype)
    weight = torch.ones_like(index, dtype=like.dtype) if weight is None else weight.to(like.dtype)
    zeros_TK = torch.zeros(index.shape[0], num_experts, dtype=like.dtype, device=like.device)
    return zeros_TK.scatter(-1, index, weight)

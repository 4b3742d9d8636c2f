"""The trainable parts: stacked LoRA experts of an FFN, and a plain LoRA pair for a linear.

The experts of one projection are one Parameter each for A and B. With a module per expert, ZeRO-1/2 reduces wrong
gradients without an error as soon as ranks use different experts, because its buckets follow the order in which
autograd reaches the parameters; a stacked Parameter always receives its whole gradient.

Shape legend: K experts, r rank, I input width, O output width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mole.mole.ffn import FfnLayout, activate
from llava_mole.mole.kernels import (
    Backend,
    Dense,
    Gathered,
    GroupedGemm,
    Masked,
    Pairs,
    Slices,
    activate_and_shrink,
    expand,
    inverse,
    permute,
    shrink,
)
from llava_mole.mole.router import Gate


def _pair(lead: tuple[int, ...], in_width: int, out_width: int, device, dtype) -> tuple[nn.Parameter, nn.Parameter]:
    a = nn.Parameter(torch.empty(*lead, in_width, device=device, dtype=dtype))
    b = nn.Parameter(torch.zeros(*lead, out_width, device=device, dtype=dtype))
    # The bound of kaiming_uniform_(a=sqrt(5)) over fan-in `in_width`, PEFT's initialisation of lora_A; the function
    # itself would take r * in_width for the fan-in of a stacked tensor.
    nn.init.uniform_(a, -1 / math.sqrt(in_width), 1 / math.sqrt(in_width))
    return a, b


class LoraPair(nn.Module):
    """Plain LoRA of one linear: `A` `[r, I]`, `B` `[r, O]` (PEFT's lora_B transposed); B starts at zero."""

    def __init__(self, in_width: int, out_width: int, r: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.A, self.B = _pair((r,), in_width, out_width, device, dtype)


class ExpertStack(nn.Module):
    """K LoRA experts for each projection of one FFN: `<name>_A` `[K, r, I]` and `<name>_B` `[K, r, O]`.

    With `shared_r` there is one more pair a projection that every token uses: `<name>_shared_A` `[shared_r, I]`,
    `<name>_shared_B` `[shared_r, O]`.
    """

    def __init__(
        self,
        widths: dict[str, tuple[int, int]],
        num_experts: int,
        r: int,
        *,
        shared_r: int = 0,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.r = r
        self.shared_r = shared_r
        for name, (in_width, out_width) in widths.items():
            a, b = _pair((num_experts, r), in_width, out_width, device, dtype)
            self.register_parameter(f"{name}_A", a)
            self.register_parameter(f"{name}_B", b)
            if shared_r:
                a, b = _pair((shared_r,), in_width, out_width, device, dtype)
                self.register_parameter(f"{name}_shared_A", a)
                self.register_parameter(f"{name}_shared_B", b)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """`(A, B)` of projection `name`."""
        return getattr(self, f"{name}_A"), getattr(self, f"{name}_B")

    def shared_pair(self, name: str) -> tuple[Tensor, Tensor]:
        """`(A, B)` of the shared expert of projection `name`."""
        return getattr(self, f"{name}_shared_A"), getattr(self, f"{name}_shared_B")


MASKED_WIDTH_LIMIT = 256
"""Largest K r for which a GPU computes all experts: below it plain LoRA waits for memory, so arithmetic is free."""


def choose_backend(requested: str, gate: Gate | None, num_experts: int, r: int, x: Tensor) -> str:
    """The name of the backend for tokens `x` `[T, D]`: what was requested, or the documented rule.

    All experts (dense gate, one expert): `dense`. CPU: `grouped`, since products of rank width are bound by
    arithmetic there. GPU: `gather` while 3 k T < K, `masked` while K r is at most `MASKED_WIDTH_LIMIT`, `grouped`
    above (bfloat16, top 1 and widths in multiples of 8; else `masked`).
    """
    if gate is None or gate.index is None:
        return "loop" if requested == "loop" else "dense"
    if requested != "auto":
        return requested
    if x.device.type == "cpu":
        return "grouped"
    picks = gate.index.shape[-1]
    if 3 * picks * x.shape[0] < num_experts:
        return "gather"
    fits = picks == 1 and x.dtype == torch.bfloat16 and r % 8 == 0
    return "grouped" if num_experts * r > MASKED_WIDTH_LIMIT and fits else "masked"


def build_backend(name: str, gate: Gate | None, num_experts: int, x: Tensor) -> Backend:
    """The backend `name` for one FFN's tokens; `grouped` sorts them (top 1) or gathers pairs (k > 1)."""
    if name == "dense" or gate is None or gate.index is None:
        return Dense()
    index = gate.index.to(torch.uint8)
    if name == "masked":
        return Masked(index, num_experts)
    if name == "gather":
        return Gathered(index)
    if index.shape[-1] > 1:
        return Pairs(index, num_experts)
    expert_T = gate.index.squeeze(-1)
    order = expert_T.argsort(stable=True).int()
    experts = torch.arange(num_experts, device=x.device)
    ends = (expert_T.unsqueeze(-1) <= experts).sum(dim=0, dtype=torch.int32)
    return GroupedGemm(order, ends) if x.is_cuda and x.dtype == torch.bfloat16 else Slices(order, ends)


def lora_linear(base: nn.Module, x_TI: Tensor, a_RI: Tensor, b_RO: Tensor, scaling: float, dropout: float) -> Tensor:
    """`base(x) + s B A dropout(x)`: plain LoRA, one pass over x and one over the output."""
    y = base(x_TI)
    x_TI = F.dropout(x_TI, dropout) if dropout else x_TI
    if torch.compiler.is_compiling():
        return y + expert_delta(x_TI.to(y.dtype), a_RI.unsqueeze(0), b_RO.unsqueeze(0), None, scaling)
    (h,) = shrink(Dense(), scaling, x_TI.to(y.dtype), [a_RI.unsqueeze(0)])
    return expand(Dense(), y, h, b_RO.unsqueeze(0))


@dataclass(frozen=True)
class ExpertMix:
    """The experts of one FFN for one forward pass: who goes where, at what weight.

    `shared_weight` is `[T, 1]`, or None for 1.
    """

    experts: ExpertStack
    gate: Gate | None
    shared_weight: Tensor | None
    scaling: float
    dropout: float
    backend: str


def ffn_with_experts(base: nn.Module, layout: FfnLayout, x_TD: Tensor, mix: ExpertMix) -> Tensor:
    """`down(act(gate(x)) * up(x))` where each projection adds the experts of its own input (Eq. 5), `[T, D]`."""
    name = choose_backend(mix.backend, mix.gate, mix.experts.num_experts, mix.experts.r, x_TD)
    if name == "loop" or torch.compiler.is_compiling():
        return _composed_ffn(base, layout, x_TD, mix, loop=name == "loop")
    backend = build_backend(name, mix.gate, mix.experts.num_experts, x_TD)
    weight = None if mix.gate is None else mix.gate.weight
    shared_weight = mix.shared_weight
    source = None
    order = getattr(backend, "order", None)
    if order is not None and x_TD.shape[0] == 1:
        order = None  # one token needs no sorting
    if order is not None:
        source = None if mix.dropout else x_TD
        x_TD = permute(x_TD, order)
        weight = None if weight is None else permute(weight, order)
        shared_weight = None if shared_weight is None else permute(shared_weight, order)
    low = _LowRank(backend, mix, weight, shared_weight)

    inputs = [layout.up] if layout.gate is None else [layout.gate, layout.up]
    outputs = [getattr(base, projection)(x_TD) for projection in inputs]
    outputs = low.add(inputs, outputs, x_TD, source)
    gated = outputs[0] if layout.gate is not None else None
    act = getattr(base, layout.activation)
    if layout.fused or mix.dropout or mix.experts.shared_r or _owns_parameters(act):
        hidden = activate(layout, base, outputs[-1], gated)
        y = low.add([layout.down], [getattr(base, layout.down)(hidden)], hidden, None)[0]
    else:
        y = low.down(base, layout.down, act, *outputs)
    return y if order is None else permute(y, inverse(order))


@dataclass(frozen=True)
class _LowRank:
    """Adds experts to the outputs of projections that share an input."""

    backend: Backend
    mix: ExpertMix
    weight: Tensor | None
    shared_weight: Tensor | None

    def weigh(self, h_TN: Tensor) -> Tensor:
        """The gate in rank space: r numbers a token and expert."""
        if self.weight is None:
            return h_TN
        weight = self.weight.to(h_TN.dtype)
        return (h_TN.unflatten(-1, (weight.shape[-1], -1)) * weight.unsqueeze(-1)).flatten(1)

    def add(self, names: list[str], outputs: list[Tensor], x: Tensor, source: Tensor | None) -> list[Tensor]:
        mix, experts = self.mix, self.mix.experts
        x = F.dropout(x, mix.dropout) if mix.dropout else x
        x = x.to(outputs[0].dtype)
        source = None if source is None else source.to(x.dtype)
        hs = shrink(self.backend, mix.scaling, x, [experts.pair(name)[0] for name in names], source)
        outputs = [
            expand(self.backend, y, self.weigh(h), experts.pair(name)[1])
            for name, y, h in zip(names, outputs, hs, strict=True)
        ]
        if not experts.shared_r:
            return outputs
        pairs = [experts.shared_pair(name) for name in names]
        hs = shrink(Dense(), mix.scaling, x, [a.unsqueeze(0) for a, _ in pairs])
        if self.shared_weight is not None:
            hs = tuple(h * self.shared_weight.to(h.dtype) for h in hs)
        return [expand(Dense(), y, h, b.unsqueeze(0)) for y, h, (_, b) in zip(outputs, hs, pairs, strict=True)]

    def down(
        self, base: nn.Module, name: str, act: Callable[[Tensor], Tensor], first: Tensor, up: Tensor | None = None
    ) -> Tensor:
        a, b = self.mix.experts.pair(name)
        hidden, h = activate_and_shrink(self.backend, self.mix.scaling, act, first, up, a)
        return expand(self.backend, getattr(base, name)(hidden), self.weigh(h), b)


def _owns_parameters(act: Callable) -> bool:
    return isinstance(act, nn.Module) and next(act.parameters(), None) is not None


def _composed_ffn(base: nn.Module, layout: FfnLayout, x_TD: Tensor, mix: ExpertMix, loop: bool) -> Tensor:
    """The same from differentiable operations alone: what `torch.compile` traces, and the `loop` reference."""
    delta = _loop_delta if loop else expert_delta

    def project(name: str, x: Tensor) -> Tensor:
        y = getattr(base, name)(x)
        x = (F.dropout(x, mix.dropout) if mix.dropout else x).to(y.dtype)
        y = y + delta(x, *mix.experts.pair(name), mix.gate, mix.scaling)
        if mix.experts.shared_r:
            a, b = mix.experts.shared_pair(name)
            shared = expert_delta(x, a.unsqueeze(0), b.unsqueeze(0), None, mix.scaling)
            y = y + (shared if mix.shared_weight is None else shared * mix.shared_weight.to(y.dtype))
        return y

    gate = None if layout.gate is None else project(layout.gate, x_TD)
    return project(layout.down, activate(layout, base, project(layout.up, x_TD), gate))


def gate_matrix(gate: Gate, num_experts: int, like: Tensor) -> Tensor:
    """The gate as `[T, K]` in the dtype of `like`: zero for experts that were not chosen."""
    if gate.index is None:
        assert gate.weight is not None
        return gate.weight.to(like.dtype)
    weight = torch.ones_like(gate.index, dtype=like.dtype) if gate.weight is None else gate.weight.to(like.dtype)
    zeros = torch.zeros(gate.index.shape[0], num_experts, dtype=like.dtype, device=like.device)
    return zeros.scatter(-1, gate.index, weight)


def expert_delta(x_TI: Tensor, a_KRI: Tensor, b_KRO: Tensor, gate: Gate | None, scaling: float) -> Tensor:
    """`s B'((A' x) * rep(G, r))`, `[T, O]`, by two products over all experts; without a gate (K = 1) plain LoRA."""
    num_experts, rank, _ = a_KRI.shape
    a, b = a_KRI.flatten(0, 1).to(x_TI.dtype), b_KRO.flatten(0, 1).to(x_TI.dtype)
    h_TN = x_TI @ a.T * scaling
    if gate is not None:
        h_TN = (h_TN.unflatten(-1, (num_experts, rank)) * gate_matrix(gate, num_experts, h_TN).unsqueeze(-1)).flatten(1)
    return h_TN @ b


def _loop_delta(x_TI: Tensor, a_KRI: Tensor, b_KRO: Tensor, gate: Gate | None, scaling: float) -> Tensor:
    """The same, one whole expert after the other, as in the equations: the reference the others are tested against."""
    total = x_TI.new_zeros(x_TI.shape[0], b_KRO.shape[-1])
    gate_TK = None if gate is None else gate_matrix(gate, a_KRI.shape[0], x_TI)
    for k, (a, b) in enumerate(zip(a_KRI.to(x_TI.dtype), b_KRO.to(x_TI.dtype), strict=True)):
        delta = scaling * (x_TI @ a.T) @ b
        total = total + (delta if gate_TK is None else delta * gate_TK[:, k : k + 1])
    return total

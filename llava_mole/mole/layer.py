"""The PEFT layers: `MoleMlp` wraps a whole FFN, `MoleLinear` one linear.

Wrapping the FFN module, not its linears, lets one router serve gate, up and down projection and lets the base
linears be of any kind, since they are only called.

Shape legend: B samples, S positions, D model width, T = B S tokens, K experts, F FFN width.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llava_mole.common.errors import ConfigError
from llava_mole.mole.experts import ExpertMix, ExpertStack, LoraPair, ffn_with_experts, lora_linear
from llava_mole.mole.ffn import FfnLayout, linear_widths
from llava_mole.mole.router import Gate, GateOptions, Router, RouterState, make_gate, router_dtype
from llava_mole.mole.routing import RoutingInputs, RoutingSlot, in_backward, in_reentrant_checkpoint

_NO_MERGE = (
    "a mixture of experts cannot be merged into the base weights: which expert acts depends on the token. Export a "
    "plain LoRA with llava_mole.mole.surgery.to_lora(model, expert=k | 'uniform' | 'usage') and merge that, or use "
    "unload() for the base model"
)

_NO_REENTRANT = (
    "re-entrant gradient checkpointing runs the forward pass without a graph, so the balance loss would give the "
    "router no gradient; use gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
)


@dataclass(frozen=True)
class FfnOptions:
    """What one adapter does in an FFN, as plain values."""

    gate: GateOptions
    r: int
    scaling: float
    dropout: float
    shared_r: int
    shared_scale: str
    backend: str


class AdaptedLayer(BaseTunerLayer):
    """What both layers share: the choice of the active adapter, and the refusal to merge."""

    adapter_options: dict[str, Any]
    base_layer: nn.Module

    def current_adapter(self) -> str | None:
        """The adapter this forward pass uses; None for the base. Raises ConfigError when several are active."""
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.adapter_options]
        if len(names) > 1:
            raise ConfigError(f"the adapters {names} are active together; a MoLE model uses one at a time: set_adapter")
        return names[0] if names else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises ConfigError, naming the alternatives."""
        raise ConfigError(_NO_MERGE)

    def unmerge(self) -> None:
        """Always raises ConfigError: nothing is ever merged."""
        raise ConfigError(_NO_MERGE)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: the update depends on the token; `surgery.to_lora` says what can be exported."""
        return False

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        target = device or base_placement(self.base_layer)[0]
        for container in self.adapter_layer_names + self.other_param_names:
            adapters = getattr(self, container)
            if adapter_name in adapters and isinstance(adapters, nn.ModuleDict):
                adapters[adapter_name].to(target)


def base_placement(base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of a base module, and the dtype its adapter starts in: the base's where it is float, else float32."""
    parameters = list(base.parameters())
    if not parameters:
        return torch.device("cpu"), torch.float32
    floating = [p.dtype for p in parameters if p.is_floating_point()]
    return parameters[0].device, floating[0] if floating else torch.float32


class MoleLinear(nn.Module, AdaptedLayer):
    """Plain LoRA on one linear: `y = base(x) + (alpha / r) B A dropout(x)`."""

    adapter_layer_names = ("mole_lora",)
    other_param_names = ("adapter_options",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mole_lora = nn.ModuleDict()
        self.adapter_options: dict[str, tuple[float, float]] = {}

    def add_adapter(self, name: str, *, r: int, scaling: float, dropout: float) -> None:
        """Add a LoRA pair of rank `r`, whose B is zero."""
        widths = linear_widths(self.base_layer)
        assert widths is not None
        device, dtype = base_placement(self.base_layer)
        self.mole_lora[name] = LoraPair(*widths, r, device=device, dtype=dtype)
        self.adapter_options[name] = (scaling, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., I]` to `[..., O]`, in the base linear's output dtype."""
        name = self.current_adapter()
        if name is None:
            return self.base_layer(x)
        scaling, dropout = self.adapter_options[name]
        pair = self.pair(name)
        y = lora_linear(self.base_layer, x.flatten(0, -2), pair.A, pair.B, scaling, dropout if self.training else 0.0)
        return y.view(x.shape[:-1] + y.shape[-1:])

    def pair(self, name: str) -> LoraPair:
        """The LoRA pair of adapter `name`. Raises KeyError where it is not on this layer."""
        return cast(LoraPair, self.mole_lora[name])


class MoleMlp(nn.Module, AdaptedLayer):
    """An FFN with K LoRA experts in each of its projections and one router for all of them.

    After a forward pass `routing` holds its float32 logits and chosen experts; see `record.RoutingSlot`.
    """

    adapter_layer_names = ("mole_router", "mole_experts")
    other_param_names = ("mole_state", "adapter_options")

    def __init__(self, base_layer: nn.Module, layout: FfnLayout, inputs: RoutingInputs) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layout = layout
        self.inputs = inputs
        self.routing = RoutingSlot()
        self.mole_router = nn.ModuleDict()
        self.mole_experts = nn.ModuleDict()
        self.mole_state = nn.ModuleDict()
        self.adapter_options: dict[str, FfnOptions] = {}
        # PEFT's own attribute: what stays frozen when an adapter is (re)activated. Its class default is shared.
        self.frozen_peft_weight_names = {}

    def add_adapter(
        self,
        name: str,
        options: FfnOptions,
        *,
        router_bias: bool,
        num_tasks: int,
        has_router: bool,
        router_trains: bool,
        counts: bool,
        count_sets: int,
        bias_update_rate: float,
    ) -> None:
        """Add router, experts (whose B is zero) and, where the balancing needs them, counters."""
        device, dtype = base_placement(self.base_layer)
        widths = {}
        for projection in self.layout.projections:
            pair = linear_widths(getattr(self.base_layer, projection))
            assert pair is not None
            widths[projection] = pair
        num_experts = options.gate.num_experts
        if has_router:
            task = options.gate.granularity == "task"
            rows = num_tasks if task else num_experts
            width = num_experts if task else widths[self.layout.projections[0]][0]
            self.mole_router[name] = Router(
                width, rows, bias=router_bias and not task, device=device, dtype=router_dtype(dtype)
            )
            if not router_trains:
                self.frozen_peft_weight_names[name] = ("mole_router",)
        self.mole_experts[name] = ExpertStack(
            widths, num_experts, options.r, shared_r=options.shared_r, device=device, dtype=dtype
        )
        if counts:
            self.mole_state[name] = RouterState(num_experts, count_sets, bias_update_rate, device)
        self.adapter_options[name] = options

    def current_state(self) -> RouterState | None:
        """Counters of the adapter in use, where it keeps any."""
        name = self.current_adapter()
        return None if name is None else self._state(name)

    def router(self, name: str) -> Router | None:
        """The router of adapter `name`, where it has one."""
        return cast(Router, self.mole_router[name]) if name in self.mole_router else None

    def experts(self, name: str) -> ExpertStack:
        """The experts of adapter `name`. Raises KeyError where it is not on this layer."""
        return cast(ExpertStack, self.mole_experts[name])

    @torch.no_grad()
    def select_experts(self, name: str, index: Tensor, *, first_new: int, noise: float) -> None:
        """Rebuild adapter `name` from its experts `index` (int64 on the CPU), some of them maybe twice.

        From position `first_new` on they are copies; `noise` (relative standard deviation) goes on their B and router
        rows. Counters start anew.
        """
        experts, router, state = self.experts(name), self.router(name), self._state(name)
        options = self.adapter_options[name]
        assert router is not None

        def pick(parameter: nn.Parameter, noisy: bool, dim: int = 0) -> nn.Parameter:
            value = parameter.index_select(dim, index.to(parameter.device))
            if noisy and noise > 0:
                new = value.narrow(dim, first_new, len(index) - first_new)
                new += torch.randn_like(new) * noise * parameter.std()
            return nn.Parameter(value, requires_grad=parameter.requires_grad)

        for key, parameter in list(experts.named_parameters()):
            if "_shared_" not in key:
                setattr(experts, key, pick(parameter, key.endswith("_B")))
        experts.num_experts = len(index)
        router.weight = pick(router.weight, True, dim=1 if options.gate.granularity == "task" else 0)
        if router.bias is not None:
            router.bias = pick(router.bias, False)
        if state is not None:
            sets = state.load.shape[0]
            self.mole_state[name] = RouterState(len(index), sets, state.rate, state.load.device)
        self.adapter_options[name] = replace(options, gate=replace(options.gate, num_experts=len(index)))

    def _state(self, name: str) -> RouterState | None:
        return cast(RouterState, self.mole_state[name]) if name in self.mole_state else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., D]` to the FFN's output, in the base's dtype. Raises what `gating.make_gate` raises."""
        name = self.current_adapter()
        if name is None:
            self.routing.logits = self.routing.index = None
            return self.base_layer(x)
        options = self.adapter_options[name]
        gate, shared_weight = self._route(x, name, options)
        mix = ExpertMix(
            experts=self.experts(name),
            gate=gate,
            shared_weight=shared_weight,
            scaling=options.scaling,
            dropout=options.dropout if self.training else 0.0,
            backend=options.backend,
        )
        y_TD = ffn_with_experts(self.base_layer, self.layout, x.flatten(0, -2), mix)
        if self.layout.dropout:
            y_TD = getattr(self.base_layer, self.layout.dropout)(y_TD)
        return y_TD.view(x.shape[:-1] + y_TD.shape[-1:])

    def _route(self, x: Tensor, name: str, options: FfnOptions) -> tuple[Gate | None, Tensor | None]:
        """The gate, and the weight `[T, 1]` of the shared expert (None: 1); the routing goes into its slot."""
        x_BSD = x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x.unsqueeze(0)
        state = self._state(name)
        bias = None if state is None else state.selection_bias()
        gate, logits, index = make_gate(
            x_BSD, self.router(name), options.gate, self.inputs, self.routing, bias, self.training
        )
        if torch.compiler.is_compiling() or not in_backward():
            self.routing.logits, self.routing.index = logits, index
        elif in_reentrant_checkpoint():
            raise ConfigError(_NO_REENTRANT)
        if not options.shared_r or options.shared_scale == "one":
            return gate, None
        chosen = logits.softmax(dim=-1).gather(-1, index)
        return gate, 1 - chosen.flatten(0, 1)

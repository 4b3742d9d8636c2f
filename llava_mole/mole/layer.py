"""The PEFT layers: `MoleMlp` wraps a whole FFN, `MoleLinear` one linear with plain LoRA.

Wrapping the FFN module instead of its linears lets one router serve all its projections. The base linears may be of
any kind, because they are only called. Code common to all layers with experts is in `ExpertLayer`.

Shape legend: B samples, S positions, T = B S tokens, D hidden size, I input size, O output size, K experts.
"""

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from llava_mole.mole.config import MoleConfig
from llava_mole.mole.experts import (
    ExpertMix,
    ExpertStack,
    LoraPair,
    a_start,
    ffn_with_experts,
    lora_linear,
    mixed_ffns,
)
from llava_mole.mole.ffn import FfnLayout, linear_widths
from llava_mole.mole.router import ExpertWeights, Router, RouterState, forced_route, route
from llava_mole.mole.routing import CarriedGradient, RoutingInputs, RoutingSlot, in_backward, in_reentrant_checkpoint

_NO_MERGE = (
    "a mixture of several experts cannot be merged into the base weights, because each token chooses its expert. "
    "Export a plain LoRA with llava_mole.mole.surgery.to_lora(model, expert=k | 'uniform' | 'usage') and merge that, "
    "or use unload() for the base model"
)

_NO_REENTRANT = (
    "re-entrant gradient checkpointing runs the forward pass without a graph, so the balance loss would give the "
    "router no gradient here: it is only supported where the model adds that loss itself (add_balance_loss=True) and a "
    "backward pass follows every forward pass. Else use "
    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
)


class AdaptedLayer(BaseTunerLayer):
    """A base layer with adapters, of which one at a time is active. Adapters without a choice of experts can be merged.

    Merging keeps the original weights, so unmerging restores them bit for bit.
    """

    configs: dict[str, MoleConfig]
    """The configuration of each adapter on this layer: the tuner's own object, or a copy with this layer's K."""
    r: dict[str, int]
    """Rank of each adapter on this layer."""
    scaling: dict[str, float]
    """Factor on the update of each adapter."""
    base_layer: nn.Module
    in_features: int
    """Width of the input."""
    out_features: int
    """Width of the output."""

    def start_adapters(self) -> None:
        """Begin with no adapter. PEFT's own attributes have defaults that all layers would share."""
        self.configs, self.r, self.scaling = {}, {}, {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names = {}
        self._originals: list[tuple[nn.Parameter, Tensor]] = []

    def note_adapter(self, name: str, config: MoleConfig, r: int, scaling: float | None) -> None:
        """Enter an adapter with its rank and scaling (None: the configuration's)."""
        self.configs[name], self.r[name] = config, r
        self.scaling[name] = config.scaling if scaling is None else scaling

    def forget_adapter(self, name: str) -> None:
        """Undo `add_adapter`, whatever is left of it."""
        for container in self.adapter_layer_names + self.other_param_names:
            adapters = getattr(self, container)
            if name in adapters:
                del adapters[name]
        self.frozen_peft_weight_names.pop(name, None)

    def current_adapter(self) -> str | None:
        """The adapter this forward pass uses; None for the base. Raises ValueError if several are active.

        As in PEFT, merged adapters are unmerged once they are disabled.
        """
        if self.disable_adapters or self.merged_adapters:
            if self.disable_adapters and self.merged_adapters:
                self.unmerge()
            return None
        names = [name for name in self.active_adapters if name in self.configs]
        if len(names) > 1:
            raise ValueError(f"the adapters {names} are all active; a MoLE model uses one at a time: set_adapter")
        return names[0] if names else None

    def updates(self, name: str) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """The linears that adapter `name` changes, each with A `[R, I]` and B `[R, O]`; its rows are not scaled."""
        raise NotImplementedError

    def check_mergeable(self, name: str) -> None:
        """Raise ValueError if adapter `name`, which this layer may lack, cannot be merged into its weights."""
        if name not in self.configs:
            return
        for linear, _, _ in self.updates(name):
            weight = getattr(linear, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.element_size() < 2:
                raise ValueError(
                    f"an adapter cannot be merged into the quantised weights of a {type(linear).__name__}; load the "
                    "base model without quantisation and merge there"
                )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters (None: the active ones) to the base weights.

        Raises:
            ValueError: a mixture of several experts, quantised weights or, with `safe_merge`, a result that is not
                finite; this layer is then unchanged.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            self.check_mergeable(name)
            if name not in self.configs:
                continue
            merged: list[tuple[nn.Parameter, Tensor]] = []
            for linear, a_RI, b_RO in self.updates(name):
                update_OI = b_RO.T @ a_RI * self.scaling[name]
                update = update_OI.T if hasattr(linear, "nf") else update_OI  # transformers' Conv1D
                parameter = cast(nn.Parameter, linear.weight)
                earlier = next((w for p, w in merged if p is parameter), parameter.data)
                value = (earlier + update.to(parameter.device)).to(parameter.dtype)
                if safe_merge and not value.isfinite().all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: its weights or "
                        "those of the base are not finite"
                    )
                merged = [(p, w) for p, w in merged if p is not parameter] + [(parameter, value)]
            for parameter, value in merged:
                if not any(parameter is kept for kept, _ in self._originals):
                    self._originals.append((parameter, parameter.data))
                parameter.data = value
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the original weights back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for parameter, original in self._originals:
            parameter.data = original.to(parameter.device, parameter.dtype)
        self._originals, self.merged_adapters = [], []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: `surgery.to_lora` exports what can be exported."""
        return False

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        target = device or base_placement(self.base_layer)[0]
        for container in self.adapter_layer_names + self.other_param_names:
            adapters = getattr(self, container)
            if adapter_name in adapters and isinstance(adapters, nn.ModuleDict):
                adapters[adapter_name].to(target)


def base_placement(base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and initial dtype of an adapter: those of its base, with float32 for a base without float weights."""
    parameters = list(base.parameters())
    if not parameters:
        return torch.device("cpu"), torch.float32
    floating = [p.dtype for p in parameters if p.is_floating_point()]
    return parameters[0].device, floating[0] if floating else torch.float32


class MoleLinear(nn.Module, AdaptedLayer):
    """Plain LoRA on one linear: `y = base(x) + (alpha / r) B A dropout(x)`."""

    adapter_layer_names = ("mole_lora",)
    other_param_names = ("configs", "r", "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        widths = linear_widths(base_layer)
        assert widths is not None
        self.in_features, self.out_features = widths
        self.mole_lora = nn.ModuleDict()
        self.start_adapters()

    def add_adapter(self, name: str, config: MoleConfig, r: int | None = None, scaling: float | None = None) -> None:
        """Add a LoRA pair of rank `r` (None: `attention_r`, else `config.r`); `scaling` None takes the config's."""
        device, dtype = base_placement(self.base_layer)
        r = r or config.attention_r or config.r
        widths = self.in_features, self.out_features
        self.mole_lora[name] = LoraPair(*widths, r, a_start(config), device=device, dtype=dtype)
        self.note_adapter(name, config, r, scaling)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., I]` to `[..., O]`, in the output dtype of the base linear."""
        name = self.current_adapter()
        if name is None:
            return self.base_layer(x)
        config, pair = self.configs[name], self.pair(name)
        dropout = config.dropout if self.training else 0.0
        y_TO = lora_linear(self.base_layer, x.flatten(0, -2), pair.A, pair.B, self.scaling[name], dropout)
        return y_TO.view(x.shape[:-1] + y_TO.shape[-1:])

    def pair(self, name: str) -> LoraPair:
        """The LoRA pair of adapter `name`. Raises KeyError if this layer does not have it."""
        return cast(LoraPair, self.mole_lora[name])

    def updates(self, name: str) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """The linear itself with its pair."""
        pair = self.pair(name)
        yield self.base_layer, pair.A.detach(), pair.B.detach()


class ExpertLayer(nn.Module, AdaptedLayer):
    """A base layer whose linears carry K LoRA experts each, and the router that chooses for them.

    After a forward pass `routing` holds the router's float32 logits and the chosen experts; see `RoutingSlot`.
    """

    adapter_layer_names = ("mole_router", "mole_experts")
    other_param_names = ("mole_state", "configs", "r", "scaling")

    def __init__(self, base_layer: nn.Module, projections: tuple[str, ...], inputs: RoutingInputs) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.projections = projections
        self.inputs = inputs
        self.routing = RoutingSlot()
        self.batch: int | None = None
        self.mole_router = nn.ModuleDict()
        self.mole_experts = nn.ModuleDict()
        self.mole_state = nn.ModuleDict()
        self.start_adapters()
        self.widths = {name: linear_widths(self.linear(name)) or (0, 0) for name in projections}
        self.in_features = self.widths[projections[0]][0]
        self.out_features = self.widths[projections[-1]][1]

    def add_adapter(self, name: str, config: MoleConfig, r: int | None = None, scaling: float | None = None) -> None:
        """Add router, experts of rank `r` and, if the balancing needs them, counters.

        `r` and `scaling` are the configuration's if they are None.
        """
        self.add_router(name, config, self.in_features)
        device, dtype = base_placement(self.base_layer)
        self.mole_experts[name] = ExpertStack(self.widths, config, r or config.r, device=device, dtype=dtype)
        self.note_adapter(name, config, r or config.r, scaling)

    def add_router(self, name: str, config: MoleConfig, width: int) -> None:
        """Add the router of adapter `name` for inputs of size `width`, if it has one, and its counters."""
        device, dtype = base_placement(self.base_layer)
        if config.has_router:
            self.mole_router[name] = Router.of(config, width, device, dtype)
            if not config.router_trains:
                self.frozen_peft_weight_names[name] = ("mole_router",)
        if config.counts_load:
            self.mole_state[name] = _new_state(config, config.num_experts, device)

    def linear(self, projection: str) -> nn.Module:
        """The base linear of a projection."""
        return getattr(self.base_layer, projection)

    def linear_path(self, path: str, projection: str) -> str:
        """The path of that linear in the base model, where `path` is the path of this layer."""
        return f"{path}.{projection}"

    def note_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a module around this layer: notes the batch size, if it reads flattened tokens."""
        values = (*args, *kwargs.values())
        self.batch = next((v.shape[0] for v in values if isinstance(v, Tensor) and v.dim() == 3), None)

    def current_state(self) -> RouterState | None:
        """Counters of the adapter in use, if it keeps any."""
        name = self.current_adapter()
        return None if name is None else self._state(name)

    def router(self, name: str) -> Router | None:
        """The router of adapter `name`, if it has one."""
        return cast(Router, self.mole_router[name]) if name in self.mole_router else None

    def experts(self, name: str) -> ExpertStack:
        """The experts of adapter `name`. Raises KeyError if this layer does not have it."""
        return cast(ExpertStack, self.mole_experts[name])

    @torch.no_grad()
    def select_experts(self, name: str, index: Tensor, *, first_new: int, noise: float) -> None:
        """Rebuild adapter `name` from its experts `index` (int64 on the CPU), some of which may be repeated.

        The experts from position `first_new` on are copies; `noise` (relative standard deviation) is added to their B
        and router rows. Counters start anew. The caller replaces the configuration afterwards.
        """
        experts, router, state, config = self.experts(name), self.router(name), self._state(name), self.configs[name]

        def pick(parameter: nn.Parameter, noisy: bool, dim: int = 0) -> nn.Parameter:
            value = parameter.index_select(dim, index.to(parameter.device))
            if noisy and noise > 0:
                new = value.narrow(dim, first_new, len(index) - first_new)
                new += torch.randn_like(new) * noise * parameter.std()
            return nn.Parameter(value, requires_grad=parameter.requires_grad)

        for key in [f"{projection}_{side}" for projection in self.projections for side in "AB"]:
            parameter = getattr(experts, key)
            if parameter.dim() == 3:  # a shared A belongs to no expert
                setattr(experts, key, pick(parameter, key.endswith("_B")))
        if router is not None:
            by_task = config.granularity == "task" and router.embedding is None
            router.weight = pick(router.weight, True, dim=1 if by_task else 0)
            if router.bias is not None:
                router.bias = pick(router.bias, False)
        if state is not None:
            self.mole_state[name] = _new_state(config, len(index), state.load.device)

    def updates(self, name: str) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """The projections with their pairs, for one expert, and the shared expert's. Raises ValueError for several."""
        config, experts = self.configs[name], self.experts(name)
        if config.num_experts > 1:
            raise ValueError(_NO_MERGE)
        for projection in self.projections:
            linear = self.linear(projection)
            a_RI, b_RO = experts.expert_pair(projection, 0)
            yield linear, a_RI.detach(), b_RO.detach()
            if config.shared_r:
                a_RI, b_RO = experts.shared_pair(projection)
                yield linear, a_RI.detach(), b_RO.detach()

    def _state(self, name: str) -> RouterState | None:
        return cast(RouterState, self.mole_state[name]) if name in self.mole_state else None

    def _mix(self, x: Tensor, name: str) -> tuple[Tensor, ExpertMix]:
        """The FFN's input `x`, from which it must be computed, and the experts of adapter `name` for it."""
        config = self.configs[name]
        x, weights, shared_weight = self._route(x, name, config)
        return x, ExpertMix(
            experts=self.experts(name),
            config=config,
            scaling=self.scaling[name],
            weights=weights,
            shared_weight=shared_weight,
            dropout=config.dropout if self.training else 0.0,
        )

    def _route(self, x: Tensor, name: str, config: MoleConfig) -> tuple[Tensor, ExpertWeights | None, Tensor | None]:
        """`x`, the experts' weights, and that of the shared expert, `[T, 1]` (None: 1); stores the routing in its slot.

        In the recomputation of a re-entrant checkpoint `x` carries the gradient of the balance loss to the logits.
        """
        if x.dim() == 2:  # flattened tokens: [T, D]
            x_BSD = x.view(self.batch, -1, x.shape[1]) if self.batch and x.shape[0] % self.batch == 0 else x[None]
        else:
            x_BSD = x.reshape(-1, *x.shape[-2:])
        state = self._state(name)
        bias = None if state is None else state.selection_bias()
        found = route(x_BSD, self.router(name), config, self.inputs, self.routing, bias, self.training)
        if self.inputs.forced is not None:
            found = forced_route(found, self.inputs.forced, config)
        if torch.compiler.is_compiling() or not in_backward():
            self.routing.logits, self.routing.index = found.logits, found.index
        elif config.loss_needs_graph and in_reentrant_checkpoint():
            x = CarriedGradient.apply(x, found.logits, self._balance_gradient(found.logits))
        if self.routing.override is not None:
            found = self.routing.override(found)
        if not config.shared_r or config.shared_scale == "one" or self.inputs.forced is not None:
            return x, found.weights, None
        chosen = found.logits.softmax(dim=-1).gather(-1, found.index)
        return x, found.weights, 1 - chosen.flatten(0, 1)

    def _balance_gradient(self, logits: Tensor) -> Tensor:
        """The gradient of the balance loss for recomputed `logits`, which is taken out of the slot.

        Raises ValueError if there is none, or if it belongs to the logits of another forward pass.
        """
        stand_in, self.routing.stand_in = self.routing.stand_in, None
        if stand_in is None or stand_in.grad is None or stand_in.shape != logits.shape:
            raise ValueError(_NO_REENTRANT)
        difference, scale = (logits.detach() - stand_in).abs().max(), stand_in.abs().max()
        if difference > 1e-2 * scale:  # kernels need not be deterministic, but another batch differs by far more
            raise ValueError(_NO_REENTRANT)
        return stand_in.grad


class MoleMlp(ExpertLayer):
    """An FFN with K LoRA experts in each of its projections and one router for all of them.

    The parts of the FFN keep their names: `mlp.up_proj` is the base linear.
    """

    def __init__(self, base_layer: nn.Module, layout: FfnLayout, inputs: RoutingInputs) -> None:
        super().__init__(base_layer, layout.projections, inputs)
        self.layout = layout

    def __getattr__(self, name: str) -> Any:
        """Parts of the FFN by their own names, for code that was written for the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            # Private attributes belong to whoever set them: accelerate's hooks must find their own module.
            if base is None or name.startswith("_") or not hasattr(base, name):
                raise
            return getattr(base, name)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., D]` to the FFN's output, in the base's dtype. Raises what `router.route` raises."""
        name = self.current_adapter()
        if name is None:
            self.routing.logits = self.routing.index = None
            return self.base_layer(x)
        x, mix = self._mix(x, name)
        compute = mixed_ffns if mix.config.mix == "ffn_output" else ffn_with_experts
        y_TD = compute(self.base_layer, self.layout, x.flatten(0, -2), mix)
        if self.layout.dropout:
            y_TD = getattr(self.base_layer, self.layout.dropout)(y_TD)
        return y_TD.view(x.shape[:-1] + y_TD.shape[-1:])


def _new_state(config: MoleConfig, num_experts: int, device: torch.device) -> RouterState:
    num_sets = 2 if config.balance_tokens == "stratified" else 1
    return RouterState(num_experts, num_sets, config.bias_update_rate, device)

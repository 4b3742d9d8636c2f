"""Experts on a single linear, for `router_scope` `linear` and `model`."""

from typing import Any

from torch import Tensor, nn

from llava_mole.mole.config import MoleConfig
from llava_mole.mole.experts import adapted_linear
from llava_mole.mole.layer import ExpertLayer
from llava_mole.mole.router import ExpertWeights
from llava_mole.mole.routing import RoutingInputs, in_backward, in_reentrant_checkpoint

_LINEAR = "linear"
"""Name of the only projection."""


class MoleExpertLinear(ExpertLayer):
    """A linear with K LoRA experts: `y = base(x) + s sum_k w_k B_k A_k x`.

    The weights w come from a router of its own that reads x, or from the router of the whole model, which the first
    such layer of an adapter owns and `route_whole_model` runs.
    """

    def __init__(self, base_layer: nn.Module, inputs: RoutingInputs) -> None:
        super().__init__(base_layer, (_LINEAR,), inputs)

    def add_router(self, name: str, config: MoleConfig, width: int) -> None:
        """As `ExpertLayer.add_router`; for `router_scope` `model` nothing, because `add_model_router` does it."""
        if config.router_scope == "linear":
            super().add_router(name, config, width)

    def add_model_router(self, name: str, config: MoleConfig, width: int) -> None:
        """Make this layer the owner of the model's router in adapter `name`, for token embeddings of size `width`."""
        super().add_router(name, config, width)

    def linear(self, projection: str) -> nn.Module:
        """The base linear."""
        return self.base_layer

    def linear_path(self, path: str, projection: str) -> str:
        """Its path in the base model, which is the path of this layer."""
        return path

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., I]` to `[..., O]`, in the output dtype of the base. Raises what `router.route` raises."""
        name = self.current_adapter()
        if name is None:
            self.routing.logits = self.routing.index = None
            return self.base_layer(x)
        x, mix = self._mix(x, name)
        y_TO = adapted_linear(self.base_layer, _LINEAR, x.flatten(0, -2), mix)
        return y_TO.view(x.shape[:-1] + y_TO.shape[-1:])

    def _route(self, x: Tensor, name: str, config: MoleConfig) -> tuple[Tensor, ExpertWeights | None, Tensor | None]:
        if config.router_scope != "model" or config.num_experts == 1:
            return super()._route(x, name, config)
        decision = self.inputs.decision
        if name not in self.mole_router:
            self.routing.logits = self.routing.index = None  # what a router of this layer has left of another adapter
        if decision.experts is None:
            raise ValueError(
                "router_scope 'model': this forward pass did not go through the decoder of the base model, whose "
                "token embeddings decide for all layers; call the model as a whole"
            )
        if config.router_trains and in_backward() and in_reentrant_checkpoint():
            raise ValueError(
                "router_scope 'model' with re-entrant gradient checkpointing: the recomputed layers give no gradient "
                "to the router of the model; use "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        tokens = next(value for value in (decision.experts.index, decision.experts.weight) if value is not None)
        if len(tokens) != x.shape[:-1].numel():
            raise ValueError(
                f"router_scope 'model' decided for {len(tokens)} tokens, but a linear with experts reads "
                f"{x.shape[:-1].numel()}: it is not part of the decoder that embeds them; leave it out with "
                "exclude_modules"
            )
        index, weight, shared = (
            None if value is None else value.to(x.device)  # the layers may be spread over devices
            for value in (decision.experts.index, decision.experts.weight, decision.shared)
        )
        return x, ExpertWeights(index, weight), shared

    def decide(self, x_BSD: Tensor, name: str) -> None:
        """Let the model's router, which this layer owns, decide for the token embeddings `x_BSD`."""
        decision = self.inputs.decision
        _, decision.experts, decision.shared = super()._route(x_BSD, name, self.configs[name])


def route_whole_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a decoder: the router of the active adapter decides for all layers, if it is the model's."""
    layers = [layer for layer in module.modules() if isinstance(layer, MoleExpertLinear)]
    if not layers:
        return
    decision = layers[0].inputs.decision
    decision.experts = decision.shared = None
    for layer in layers:
        name = layer.current_adapter()
        if name is not None and name in layer.mole_router and layer.configs[name].router_scope == "model":
            layer.decide(_embeddings(module, args, kwargs), name)
            return


def _embeddings(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The token embeddings `[B, S, D]` of a decoder's forward pass."""
    embedded = kwargs.get("inputs_embeds")
    if embedded is not None:
        return embedded
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise ValueError("router_scope 'model' needs the decoder's input_ids or inputs_embeds")
    return module.get_input_embeddings()(ids)  # type: ignore[operator]

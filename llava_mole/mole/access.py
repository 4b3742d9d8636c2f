"""From a model to its MoLE layers: routing inputs in, routing results and the active configuration out.

`kept_routing` and `apply_to_experts` serve measurements: the first puts everything back, the second changes which
experts act.

Everything is found through the layers. `inject_adapter_in_model` of PEFT and `model.add_adapter` of transformers leave
no tuner in the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from llava_mole.mole.config import MoleConfig
from llava_mole.mole.layer import AdaptedLayer, ExpertLayer
from llava_mole.mole.router import ExpertWeights, Route
from llava_mole.mole.routing import Routing, RoutingInputs


def shared_inputs(model: nn.Module) -> RoutingInputs | None:
    """The object that all layers with experts in `model` share; None without such a layer."""
    return next((module.inputs for module in model.modules() if isinstance(module, ExpertLayer)), None)


def active_config(model: nn.Module) -> MoleConfig | None:
    """The configuration of the active adapter; None without MoLE."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            for name in module.active_adapters:
                if name in module.configs:
                    return module.configs[name]
    return None


def set_routing_inputs(model: nn.Module, **values: Tensor | None) -> None:
    """Set the facts about a batch that the routers need; `RoutingInputs` lists them.

    Call it before the forward pass. The values hold for later passes too, until the next call. Without MoLE it does
    nothing.

    Raises:
        ValueError: unknown name, or an expert, source or task id outside its range.
    """
    inputs, config = shared_inputs(model), active_config(model)
    if inputs is None or config is None:
        return
    name, limit = config.numbered_input or (None, 0)
    value = None if name is None else values.get(name)
    if value is not None and not value.is_floating_point() and value.numel() > 0:
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} holds {low if low < 0 else high}; this adapter knows 0 to {limit - 1}")
    inputs.update(**values)


def note_images(model: nn.Module, image_mask: Tensor) -> None:
    """Set the routing input `image_mask`, bool `[B, S]`, and keep the others. Without MoLE it does nothing."""
    inputs = shared_inputs(model)
    if inputs is not None:
        inputs.image_mask = image_mask


def missing_input(model: nn.Module) -> str | None:
    """The routing input (`experts`, `source` or `task`) that the active adapter needs and that is not set, or None."""
    inputs, config = shared_inputs(model), active_config(model)
    name = None if config is None else config.required_input
    return name if inputs is not None and name is not None and getattr(inputs, name) is None else None


def disable_finite_check(model: nn.Module) -> None:
    """Let NaN and infinity in a router's logits reach the loss, as they do on a GPU, instead of raising.

    For training loops that check the loss: an exception in the forward pass of one rank would leave the other ranks
    waiting for its gradients.
    """
    inputs = shared_inputs(model)
    if inputs is not None:
        inputs.check_finite = False


def leave_balance_loss_to_caller(model: nn.Module) -> None:
    """Switch `add_balance_loss` off for this model object, whatever its configurations say and load later.

    For training loops that add `mole_auxiliary_loss` with weights of their own and call `mole_after_step`. The
    configuration does not change, so the adapter they save still trains under any Trainer.
    """
    inputs = shared_inputs(model)
    if inputs is not None:
        inputs.progress.left_to_caller = True


def collect_routing(model: nn.Module, part: str | None = None) -> Routing:
    """The routing of every router in the latest forward pass; empty without MoLE or with adapters disabled.

    Call it once after a forward pass. The logits carry their graph, so a loss computed from them trains the router.
    `part` names a module, such as `encoder` or `decoder`, and selects the layers in it: the two stacks of an
    encoder-decoder model route different tokens, so each is read and balanced by itself, with its own `token_mask`.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ExpertLayer) and module.routing.logits is not None
        if part is None or part in name.split(".")
    ]
    return Routing(
        names=tuple(name for name, _ in layers),
        logits=tuple(module.routing.logits for _, module in layers if module.routing.logits is not None),
        index=tuple(module.routing.index for _, module in layers if module.routing.index is not None),
        layers=tuple(module for _, module in layers),
        source=layers[0][1].inputs.source if layers else None,
    )


@contextmanager
def force_expert(model: nn.Module, expert: int | None) -> Iterator[None]:
    """Let every token use expert `expert` (from 0) inside the block, as if the routers were certain of it.

    Its weight is 1, or K with `expert_scale` `prob_times_k`; None as `expert` changes nothing. That is the LoRA that
    `surgery.to_lora(model, directory, expert=expert)` exports. Router logits are computed and collected as usual; the
    collected choice is `expert`. Without MoLE only None is allowed.

    Raises:
        ValueError: the active adapter does not have this expert in every layer.
    """
    if expert is None:
        yield
        return
    inputs, config = shared_inputs(model), active_config(model)
    count = 0 if inputs is None or config is None else min(config.experts_by_layer or [config.num_experts])
    if inputs is None or not 0 <= expert < count:
        held = f"the adapter has the experts 0 to {count - 1} in every layer" if count else "the model has no experts"
        raise ValueError(f"expert {expert} cannot be forced: {held}")
    before, inputs.forced = inputs.forced, expert
    try:
        yield
    finally:
        inputs.forced = before


def prompt_decisions(model: nn.Module) -> list[Tensor]:
    """For granularity `sequence`: what each router has decided for the prompts of the latest pass, logits `[B, K]`.

    Empty for the other granularities, whose tokens are routed one by one.
    """
    slots = [module.routing for module in model.modules() if isinstance(module, ExpertLayer)]
    return [slot.prompt_logits for slot in slots if slot.prompt_logits is not None]


def set_prompt_decisions(model: nn.Module, logits: Sequence[Tensor]) -> None:
    """Give the routers the decisions that the next decoding step uses, in the order of `prompt_decisions`.

    For batches whose rows change between the steps of decoding.
    """
    slots = [module.routing for module in model.modules() if isinstance(module, ExpertLayer)]
    for slot, value in zip([s for s in slots if s.prompt_logits is not None], logits, strict=True):
        slot.prompt_logits = value


@contextmanager
def kept_routing(model: nn.Module) -> Iterator[None]:
    """Put back the routing inputs and what every router has left, so that passes in the block leave no trace.

    Counters for the balance loss are not touched: a pass that must not count runs without gradients, or after
    `leave_balance_loss_to_caller`.
    """
    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
    slots = [dict(vars(layer.routing)) for layer in layers]
    inputs = shared_inputs(model)
    before = None if inputs is None else dict(vars(inputs))
    decided = None if inputs is None else dict(vars(inputs.decision))
    try:
        yield
    finally:
        for layer, slot in zip(layers, slots, strict=True):
            vars(layer.routing).update(slot)
        if inputs is not None and before is not None and decided is not None:
            vars(inputs).update(before)
            vars(inputs.decision).update(decided)


@contextmanager
def overridden(model: nn.Module, functions: Mapping[str, Callable[[Route], Route]]) -> Iterator[None]:
    """Let a function of each layer named in `functions` replace the layer's decisions inside the block.

    Raises:
        ValueError: `model` has no layer with a router of its own under a name.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, ExpertLayer)}
    unknown = [name for name in functions if name not in layers]
    if unknown:
        raise ValueError(f"no layer with experts is called {unknown[0]!r}; there are {', '.join(layers) or 'none'}")
    before = {name: layers[name].routing.override for name in functions}
    try:
        for name, function in functions.items():
            layers[name].routing.override = function
        yield
    finally:
        for name, earlier in before.items():
            layers[name].routing.override = earlier


def all_weights(route: Route) -> Tensor:
    """The weight that every token gives to each of the K experts, `[T, K]`, in the dtype of the logits.

    With expert weights None (one expert) it is 1.
    """
    logits_TK = route.logits.flatten(0, 1)
    if route.weights is None:
        return torch.ones_like(logits_TK)
    index, weight = route.weights.index, route.weights.weight
    if index is None:
        assert weight is not None
        return weight.to(logits_TK.dtype)
    chosen = torch.ones_like(index, dtype=logits_TK.dtype) if weight is None else weight.to(logits_TK.dtype)
    return torch.zeros_like(logits_TK).scatter_add(-1, index, chosen)


@contextmanager
def apply_to_experts(model: nn.Module, matrices: Mapping[str, Tensor]) -> Iterator[None]:
    """Carry out `W P` instead of the experts' weights `W` inside the block.

    `W` is `[T, K]`, the weights of all experts (0 for those that a token does not use), and `P` `[K, K]` is the matrix
    of a layer: row j says where the weight of expert j goes. Ones in column k force expert k, a permutation exchanges
    experts, a row of zeros switches one off. Every token is computed for all experts, so any P will do.

    Args:
        model: The model.
        matrices: P of each layer, by the names of `collect_routing`.

    Raises:
        ValueError: a name is unknown, or the FFN is computed once for each expert (`mix` `ffn_output`), which needs a
            choice.
    """
    config = active_config(model)
    if config is not None and config.mix == "ffn_output":
        raise ValueError("the experts' weights cannot be replaced with mix 'ffn_output', which computes chosen FFNs")

    def carried_out(p_KK: Tensor) -> Callable[[Route], Route]:
        def change(route: Route) -> Route:
            w_TK = all_weights(route)
            return replace(route, weights=ExpertWeights(None, w_TK @ p_KK.to(w_TK)))

        return change

    with overridden(model, {name: carried_out(p_KK) for name, p_KK in matrices.items()}):
        yield

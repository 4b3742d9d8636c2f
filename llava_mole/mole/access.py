"""From a model to its MoLE layers: routing inputs in, routing results and the active configuration out.

Everything is found through the layers. `inject_adapter_in_model` of PEFT and `model.add_adapter` of transformers leave
no tuner in the model.
"""

from torch import Tensor, nn

from llava_mole.mole.config import MoleConfig
from llava_mole.mole.layer import AdaptedLayer, ExpertLayer
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
    name = config.required_input
    limit = config.num_tasks if name == "task" else config.num_experts
    if name is None and config.balance_kind == "groups":
        name, limit = "source", 2
    elif name is None and config.source_coef > 0:
        name = "source"
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

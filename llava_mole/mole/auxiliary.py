"""From a model that has run a forward pass to its routing, its auxiliary loss and its per-step bookkeeping."""

import torch
from torch import Tensor, nn

from llava_mole.common.distributed import all_reduce_sum
from llava_mole.common.errors import ConfigError
from llava_mole.mole.config import MoleConfig
from llava_mole.mole.layer import MoleMlp
from llava_mole.mole.loss import balance_loss, choice_counts, token_sets, z_loss
from llava_mole.mole.model import MoleModel
from llava_mole.mole.record import Routing


def find_tuner(model: nn.Module) -> MoleModel | None:
    """The MoLE tuner inside `model` (a PeftModel, or anything that contains one), or None."""
    return next((module for module in model.modules() if isinstance(module, MoleModel)), None)


def active_config(model: nn.Module) -> MoleConfig | None:
    """The configuration of the active adapter; None without MoLE."""
    tuner = find_tuner(model)
    if tuner is None:
        return None
    names = tuner.active_adapters
    config = tuner.peft_config.get(names[0]) if names else None
    return config if isinstance(config, MoleConfig) else None


def collect_routing(model: nn.Module) -> Routing:
    """The routing of every FFN with experts in the latest forward pass; empty without MoLE or with adapters disabled.

    Call it once after a forward pass. The logits carry their graph, so what is computed from them trains the router.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, MoleMlp) and module.routing.logits is not None
    ]
    return Routing(
        names=tuple(name for name, _ in layers),
        logits=tuple(module.routing.logits for _, module in layers if module.routing.logits is not None),
        index=tuple(module.routing.index for _, module in layers if module.routing.index is not None),
        layers=tuple(module for _, module in layers),
    )


def mole_auxiliary_loss(
    model: nn.Module,
    *,
    token_mask: Tensor,
    supervised_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Balance loss and z-loss of the latest forward pass, times their coefficients: add it to the LM loss as it is.

    Args:
        model: what ran the forward pass.
        token_mask: bool `[B, S]`, false on padding.
        supervised_mask: bool `[B, S]`, for `balance_tokens='supervised'`.
        image_mask: bool `[B, S]`, for `balance_tokens` `text` and `stratified`.
        sample_weights: `[B]`, see `loss.balance_loss`; None averages over the samples given. It must be divided by
            the accumulation steps like the LM loss, never multiplied by the world size.
        routing: what `collect_routing` gave, if it was unpacked: then B and S are those of the unpacked samples.

    Returns:
        A scalar; 0 without MoLE, for one expert, and where no router with parameters chooses.

    Raises:
        ConfigError: a mask is missing or has the wrong shape, or the logits carry no gradient in training
            (re-entrant gradient checkpointing, which would leave the router untrained), or the layers were injected
            without their tuner.
    """
    config = active_config(model)
    routing = collect_routing(model) if routing is None else routing
    if config is None and routing.logits:
        raise ConfigError(
            "this model has MoLE layers but not their tuner, so their coefficients are unknown: use get_peft_model "
            "instead of inject_adapter_in_model, or balance_loss with your own coefficient"
        )
    if config is None or not routing.logits or not config.has_router:
        return torch.zeros((), device=token_mask.device)
    if token_mask.shape != routing.logits[0].shape[:2]:
        raise ConfigError(
            f"token_mask has shape {tuple(token_mask.shape)}, but the routed batch is "
            f"{tuple(routing.logits[0].shape[:2])} samples x positions"
        )
    if torch.is_grad_enabled():
        _check_gradient(model, config, routing)
    masks = token_sets(config.balance_tokens, token_mask.bool(), supervised_mask, image_mask)
    loss = torch.zeros((), device=token_mask.device, dtype=routing.logits[0].dtype)
    if config.balance_coef > 0:
        loads = _global_loads(routing, config, len(masks))
        weights = _set_weights(masks, sample_weights)
        for mask, load, weight in zip(masks, loads, weights, strict=True):
            loss = loss + config.balance_coef * balance_loss(
                routing,
                mask,
                scale=config.balance_scale,
                layers=config.balance_layers,
                group=config.balance_group,
                sample_weights=weight,
                global_load=load,
            )
    if config.z_loss_coef > 0:
        loss = loss + config.z_loss_coef * z_loss(routing, token_mask.bool(), sample_weights)
    if torch.is_grad_enabled() and config.counts_load:
        _count(model, routing, masks)
    return loss


def _set_weights(masks: tuple[Tensor, ...], sample_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """Sample weights of each token set: modalities a sample has share its weight equally."""
    if len(masks) == 1:
        return (sample_weights,)
    present = torch.stack([mask.any(dim=1) for mask in masks]).float()
    share = present / present.sum(dim=0, keepdim=True).clamp(min=1)
    batch = masks[0].shape[0]
    base = torch.full((batch,), 1 / max(1, batch), device=share.device) if sample_weights is None else sample_weights
    return tuple(share * base)


def _global_loads(routing: Routing, config: MoleConfig, num_sets: int) -> list[Tensor | None]:
    if config.balance_group != "global_batch":
        return [None] * num_sets
    loads_LMK = torch.stack([layer.current_state().load for layer in routing.layers])
    return list(loads_LMK.unbind(dim=1))


def _count(model: nn.Module, routing: Routing, masks: tuple[Tensor, ...]) -> None:
    tuner = find_tuner(model)
    assert tuner is not None
    counts_LMK = torch.stack([choice_counts(routing, mask).sum(dim=1) for mask in masks], dim=1)
    tuner.pending_counts = counts_LMK if tuner.pending_counts is None else tuner.pending_counts + counts_LMK


def mole_after_step(model: nn.Module) -> None:
    """Finish an optimizer step: sum the step's expert counts over ranks, keep them, move loss-free biases.

    Call it on every rank after each optimizer step. It is needed by `balance_group='global_batch'` and
    `bias_update_rate`; otherwise it does nothing. The `global_batch` loss of a step weighs by the load of the step
    before: that makes it independent of how the samples are spread over ranks and accumulation, at no second pass.
    """
    tuner = find_tuner(model)
    if tuner is None or tuner.pending_counts is None:
        return
    counts_LMK = all_reduce_sum(tuner.pending_counts)
    tuner.pending_counts = None
    states = [m.current_state() for m in model.modules() if isinstance(m, MoleMlp)]
    for state, counts_MK in zip([s for s in states if s is not None], counts_LMK, strict=True):
        state.step(counts_MK)


def mole_drop_step(model: nn.Module) -> None:
    """Forget the expert counts of an optimizer step that is not taken. Call it instead of `mole_after_step`."""
    tuner = find_tuner(model)
    if tuner is not None:
        tuner.pending_counts = None


def mole_let_non_finite_pass(model: nn.Module) -> None:
    """Let NaN and infinity in a router's logits run on into the loss, as they do on a GPU, instead of raising.

    For training loops, which check the loss: an exception in the forward pass of one rank would leave the others
    waiting for its gradients.
    """
    tuner = find_tuner(model)
    if tuner is not None:
        tuner.routing_inputs.check_finite = False


def set_routing_inputs(model: nn.Module, **values: Tensor | None) -> None:
    """Tell gates what they cannot see: `experts`, `source`, `task`, `prompt_mask` (see `record.RoutingInputs`).

    Call it before the forward pass; it holds for later passes too, until called again. Without MoLE it does nothing.

    Raises:
        ConfigError: unknown name, or an expert, source or task id outside its range.
    """
    tuner = find_tuner(model)
    config = active_config(model)
    if tuner is None or config is None:
        return
    limits = {"experts": config.num_experts, "source": config.num_experts, "task": config.num_tasks}
    used = {"experts": config.granularity == "given", "source": config.router == "oracle"}
    used["task"] = config.granularity == "task"
    for name, limit in limits.items():
        value = values.get(name)
        if value is None or not used[name] or value.is_floating_point() or value.numel() == 0:
            continue
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= limit:
            raise ConfigError(f"{name} holds {low if low < 0 else high}; this adapter knows 0 to {limit - 1}")
    tuner.routing_inputs.update(**values)


def _check_gradient(model: nn.Module, config: MoleConfig, routing: Routing) -> None:
    if not config.router_trains or not routing.layers[0].training:
        return
    routers = [layer.router(layer.current_adapter()) for layer in routing.layers]
    for name, logits, router in zip(routing.names, routing.logits, routers, strict=True):
        if router is not None and router.weight.requires_grad and not logits.requires_grad:
            raise ConfigError(
                f"{name}: the router's logits carry no gradient. Re-entrant gradient checkpointing does this and would "
                "leave the router untrained: use gradient_checkpointing_kwargs={'use_reentrant': False} (or run the "
                "forward pass outside torch.no_grad)"
            )

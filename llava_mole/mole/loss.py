"""The balance loss (Eq. 6-8) in all its readings and the z-loss, from logits to the term that a trainer adds.

`balance_loss`, `group_loss`, `source_loss` and `z_loss` are pure functions of logits, choices and masks;
`mole_auxiliary_loss` reads them from a model and applies its coefficients.

Shape legend: L routers (layers with one each), B samples, S positions, K experts, k experts a token uses, M token sets.
"""

import re
import warnings
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from llava_mole.mole.access import active_config, collect_routing, shared_inputs
from llava_mole.mole.config import MoleConfig
from llava_mole.mole.layer import ExpertLayer
from llava_mole.mole.routing import Routing, choice_counts


def token_sets(
    which: str, token_mask: Tensor, supervised_mask: Tensor | None = None, image_mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The masks, bool `[B, S]`, of the tokens that `balance_tokens=which` balances: image and text for `stratified`.

    Raises:
        ValueError: `which` needs a mask that was not given.
    """
    if which == "all":
        return (token_mask,)
    if which == "supervised":
        if supervised_mask is None:
            raise ValueError("balance_tokens 'supervised' needs supervised_mask")
        return (token_mask & supervised_mask,)
    if image_mask is None:
        raise ValueError(f"balance_tokens {which!r} needs image_mask")
    text = token_mask & ~image_mask
    return (text,) if which == "text" else (token_mask & image_mask, text)


def balance_loss(
    routing: Routing,
    token_mask: Tensor,
    *,
    scale: str = "mean",
    layers: str = "mean_of_layers",
    group: str = "sample",
    sample_weights: Tensor | None = None,
    global_load: Tensor | None = None,
) -> Tensor:
    """`sum_j f_j P_j` over the tokens of `token_mask` (bool `[B, S]`); a float32 scalar without `balance_coef`.

    f_j is the share of tokens that chose expert j (a constant), P_j the mean probability of j. `token_mask` is false
    at padding. With `scale='mean'` a uniform load gives 1 / K. A sample or batch without tokens contributes 0.

    Args:
        scale: `mean`: as above. `switch`: times K. `raw`: counts times summed probabilities, Eq. 7-8 read literally,
            which grows with the square of the number of tokens.
        layers: `mean_of_layers`: one product per layer, averaged. `pooled`: f and P over the tokens of all layers
            together, so that imbalances of different layers can cancel (released code). `blocks`: pooled over the
            routers of a decoder layer, whose number is in their names, and summed over the decoder layers (MoLA).
        group: which tokens share f and P. `sample`: one loss per sample, averaged with `sample_weights`.
            `micro_batch`: all tokens given. `global_batch`: f from `global_load`; P is the mean over samples.
        sample_weights: `[B]`; None means 1 / B each. The result does not depend on how samples are split over
            micro-batches and ranks if the weights add up over the global batch. In `micro_batch` their sum
            multiplies the loss.
        global_load: for `global_batch`, tokens per layer and expert `[L, K]`; zeros mean a uniform load.

    Raises:
        ValueError: `global_batch` without `global_load`.
    """
    if not routing.logits:
        return torch.zeros((), device=token_mask.device)
    parts = _parts(routing, layers)
    if len(parts) > 1 or layers == "blocks":
        values = [
            balance_loss(
                _select(routing, part),
                token_mask,
                scale=scale,
                layers="pooled" if layers == "blocks" else layers,
                group=group,
                sample_weights=sample_weights,
                global_load=None if global_load is None else global_load[part, : routing.logits[part[0]].shape[-1]],
            )
            * (1 if layers == "blocks" else len(part) / len(routing.logits))
            for part in parts
        ]
        return torch.stack(values).sum()
    logits = torch.stack(routing.logits)
    mask = token_mask.to(logits.dtype)
    counts_LBK = choice_counts(routing, token_mask).to(logits.dtype) / routing.index[0].shape[-1]
    probs_LBK = torch.einsum("lbsk,bs->lbk", logits.softmax(dim=-1), mask)
    tokens_B = mask.sum(dim=1)
    weights_B = _sample_weights(sample_weights, tokens_B)
    num_layers, _, num_experts = counts_LBK.shape
    if group == "global_batch":
        if global_load is None:
            raise ValueError("balance_group 'global_batch' needs global_load")
        return _global_balance(probs_LBK, tokens_B, weights_B, global_load, scale, layers)
    if group == "micro_batch":
        counts_LBK, probs_LBK = counts_LBK.sum(1, keepdim=True), probs_LBK.sum(1, keepdim=True)
        tokens_B, weights_B = tokens_B.sum(0, keepdim=True), weights_B.sum(0, keepdim=True)
    if layers == "pooled":
        counts_LBK, probs_LBK = counts_LBK.sum(0, keepdim=True), probs_LBK.sum(0, keepdim=True)
        tokens_B = tokens_B * num_layers
    if scale != "raw":
        tokens_B1 = tokens_B.clamp(min=1).unsqueeze(-1)
        counts_LBK, probs_LBK = counts_LBK / tokens_B1, probs_LBK / tokens_B1
    value_B = (counts_LBK * probs_LBK).sum(dim=-1).mean(dim=0)
    return (value_B * weights_B).sum() * (num_experts if scale == "switch" else 1)


def _parts(routing: Routing, layers: str) -> list[list[int]]:
    """The routers whose losses are computed together: of one decoder layer for `blocks`, else with one K."""
    parts: dict[object, list[int]] = {}
    for position, (name, logits) in enumerate(zip(routing.names, routing.logits, strict=True)):
        key: object = decoder_layer(name) if layers == "blocks" else logits.shape[-1]
        parts.setdefault(key, []).append(position)
    return list(parts.values())


def decoder_layer(name: str) -> str:
    """The name of the decoder layer that the module `name` is in, up to its number; `name` itself without a number."""
    found = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
    return name if found is None else found[0]


def _select(routing: Routing, part: list[int]) -> Routing:
    return replace(
        routing,
        names=tuple(routing.names[i] for i in part),
        logits=tuple(routing.logits[i] for i in part),
        index=tuple(routing.index[i] for i in part),
        layers=tuple(routing.layers[i] for i in part) if routing.layers else (),
    )


def group_loss(routing: Routing, token_mask: Tensor, delta: float, sample_weights: Tensor | None = None) -> Tensor:
    """LoRAMoE's loss of two groups of experts, summed over all routers: `var(Z) / (mean(Z)^2 + 1e-10)` with Z = I Q.

    `I[n, k]` is the sum of p_k over the tokens of sample n, and `Q[n, k]` is 1 + delta if expert k serves samples of
    that source, else 1 - delta: the first K / 2 experts serve source 1, the others source 0. Variance (unbiased) and
    mean are over all B K entries. `token_mask` is bool `[B, S]`, false at padding. The sum of `sample_weights`
    multiplies the loss. A float32 scalar without `balance_coef`. Source: arXiv 2312.09979 and its code.

    Raises:
        ValueError: the routing has no source, or one of another number of samples.
    """
    source, tokens = routing.source, token_mask
    if len(tokens) == 0:
        return torch.zeros((), device=tokens.device)
    if source is None or source.dim() not in (1, 2) or len(source) != len(tokens):
        given = None if source is None else tuple(source.shape)
        raise ValueError(
            f"balance_kind 'groups' needs set_routing_inputs(model, source=...) with 0 or 1 for each of {len(tokens)} "
            f"samples; it has {given}"
        )
    kind_B1 = (source if source.dim() == 1 else source[:, 0]).to(tokens.device).view(-1, 1)
    total = torch.zeros((), device=tokens.device)
    for logits in routing.logits:
        importance_BK = torch.einsum("bsk,bs->bk", logits.softmax(dim=-1), tokens.to(logits.dtype))
        experts = logits.shape[-1]
        serves_K = (torch.arange(experts, device=tokens.device) < experts // 2).long()
        z_BK = importance_BK * (1 + delta * (2 * (kind_B1 == serves_K).to(logits.dtype) - 1))
        total = total + z_BK.var() / (z_BK.mean().square() + 1e-10)
    return total if sample_weights is None else total * sample_weights.sum()


def _sample_weights(sample_weights: Tensor | None, tokens_B: Tensor) -> Tensor:
    if sample_weights is None:
        return torch.full_like(tokens_B, 1 / max(1, tokens_B.shape[0]))
    return sample_weights.to(tokens_B)


def _global_balance(
    probs_LBK: Tensor, tokens_B: Tensor, weights_B: Tensor, load_LK: Tensor, scale: str, layers: str
) -> Tensor:
    num_experts = probs_LBK.shape[-1]
    load_LK = load_LK.to(probs_LBK)
    if scale != "raw":
        probs_LBK = probs_LBK / tokens_B.clamp(min=1).view(1, -1, 1)
        total = load_LK.sum(dim=-1, keepdim=True)
        load_LK = torch.where(total > 0, load_LK / total.clamp(min=1), torch.full_like(load_LK, 1 / num_experts))
    probs_LK = (probs_LBK * weights_B.view(1, -1, 1)).sum(dim=1)
    if layers == "pooled":
        load_LK, probs_LK = load_LK.mean(0, keepdim=True), probs_LK.mean(0, keepdim=True)
    return (load_LK * probs_LK).sum(dim=-1).mean() * (num_experts if scale == "switch" else 1)


def z_loss(routing: Routing, token_mask: Tensor, sample_weights: Tensor | None = None) -> Tensor:
    """Mean of `logsumexp(logits)^2` over a sample's tokens and all layers, summed with `sample_weights` (None: 1 / B).

    A float32 scalar without `z_loss_coef`. `token_mask` is bool `[B, S]`.
    """
    if not routing.logits:
        return torch.zeros((), device=token_mask.device)
    squares_BS = torch.stack([logits.logsumexp(dim=-1) for logits in routing.logits]).square().mean(dim=0)
    mask = token_mask.to(squares_BS.dtype)
    tokens_B = mask.sum(dim=1)
    value_B = (squares_BS * mask).sum(dim=1) / tokens_B.clamp(min=1)
    return (value_B * _sample_weights(sample_weights, tokens_B)).sum()


def source_loss(routing: Routing, token_mask: Tensor, sample_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy `-log p_s` of each token's expert probabilities and its sample's source s.

    The mean over a sample's tokens and all layers, summed with `sample_weights` (None: 1 / B). A float32 scalar without
    `source_coef`. `token_mask` is bool `[B, S]`, false at padding. Source: ours; docs/conflict.md.

    Raises:
        ValueError: the routing has no source, or one of another number of samples.
    """
    if not routing.logits or len(token_mask) == 0:
        return torch.zeros((), device=token_mask.device)
    source = routing.source
    if source is None or source.dim() not in (1, 2) or len(source) != len(token_mask):
        given = None if source is None else tuple(source.shape)
        raise ValueError(
            f"source_coef needs set_routing_inputs(model, source=...) with the expert of each of {len(token_mask)} "
            f"samples; it has {given}"
        )
    source_B = (source if source.dim() == 1 else source[:, 0]).to(token_mask.device, torch.int64)
    logs_BSK = torch.stack([logits.log_softmax(dim=-1) for logits in routing.logits]).mean(dim=0)
    index_BS1 = source_B.view(-1, 1, 1).expand(-1, logs_BSK.shape[1], 1)
    mask = token_mask.to(logs_BSK.dtype)
    tokens_B = mask.sum(dim=1)
    value_B = -(logs_BSK.gather(-1, index_BS1).squeeze(-1) * mask).sum(dim=1) / tokens_B.clamp(min=1)
    return (value_B * _sample_weights(sample_weights, tokens_B)).sum()


def mole_auxiliary_loss(
    model: nn.Module,
    *,
    token_mask: Tensor,
    supervised_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Balance loss and z-loss of the latest forward pass, times their coefficients: the term to add to the LM loss.

    For training loops of one's own, with `add_balance_loss=False`. Where that is True, the loss of a training pass
    holds this term already. A call with gradients then takes its place, with a warning: this term has the gradient, and
    the one that the model's loss shows has none. Under `torch.no_grad()` the call only returns the value.

    Args:
        model: the model that ran the forward pass.
        token_mask: bool `[B, S]`, false at padding.
        supervised_mask: bool `[B, S]`, for `balance_tokens='supervised'`.
        image_mask: bool `[B, S]`, for `balance_tokens` `text` and `stratified`.
        sample_weights: `[B]`, see `balance_loss`; None averages over the samples given. Divide them by the
            accumulation steps like the LM loss, and never multiply them by the world size.
        routing: from `collect_routing`, if it was unpacked; B and S are then those of the unpacked samples.

    Returns:
        A scalar; 0 without MoLE, for one expert, and if no router with parameters chooses.

    Raises:
        ValueError: a mask is missing or has the wrong shape, the model has an encoder and a decoder and `routing` does
            not say which, or the logits carry no gradient in training (re-entrant gradient checkpointing, which would
            leave the router untrained).
    """
    config, inputs = active_config(model), shared_inputs(model)
    if routing is None:
        _check_one_stack(model)
        routing = collect_routing(model)
    if config is None or inputs is None or not routing.logits or not config.has_router:
        return torch.zeros((), device=token_mask.device)
    loss, counts = auxiliary_loss(
        config,
        routing,
        token_mask=token_mask,
        supervised_mask=supervised_mask,
        image_mask=image_mask,
        sample_weights=sample_weights,
    )
    progress = inputs.progress
    if torch.is_grad_enabled() and progress.claim():
        warnings.warn(
            "mole_auxiliary_loss was called in a training pass whose loss already holds the balance loss "
            "(add_balance_loss=True). Its own gradient counts, the automatic one does not, but the model's loss shows "
            "both. Set add_balance_loss=False in MoleConfig, or use torch.no_grad() to look at the value",
            stacklevel=2,
        )
    if counts is not None:
        progress.add_counts(counts_of_all_layers(model, routing, counts))
    return loss


def auxiliary_loss(
    config: MoleConfig,
    routing: Routing,
    *,
    token_mask: Tensor,
    supervised_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `mole_auxiliary_loss` returns, for a routing with logits of a configuration with a router.

    Also the tokens that each expert got, int64 `[L, M, K]`, in a pass with gradients of a configuration that counts
    them; else None. Raises what `mole_auxiliary_loss` does.
    """
    if token_mask.shape != routing.logits[0].shape[:2]:
        raise ValueError(
            f"token_mask has shape {tuple(token_mask.shape)}, but the routed batch is "
            f"{tuple(routing.logits[0].shape[:2])} samples x positions"
        )
    if torch.is_grad_enabled():
        _check_gradient(config, routing)
    masks = token_sets(config.balance_tokens, token_mask.bool(), supervised_mask, image_mask)
    loss = torch.zeros((), device=token_mask.device, dtype=routing.logits[0].dtype)
    if config.balance_coef > 0:
        loads = _global_loads(routing, config, len(masks))
        weights = _set_weights(masks, sample_weights)
        for mask, load, weight in zip(masks, loads, weights, strict=True):
            if config.balance_kind == "groups":
                loss = loss + config.balance_coef * group_loss(routing, mask, config.group_delta, weight)
                continue
            loss = loss + config.balance_coef * balance_loss(
                routing,
                mask,
                scale=config.balance_scale,
                layers=config.balance_layers,
                group=config.balance_group,
                sample_weights=weight,
                global_load=load,
            )
    if config.source_coef > 0 and torch.is_grad_enabled():
        loss = loss + config.source_coef * source_loss(routing, token_mask.bool(), sample_weights)
    if config.z_loss_coef > 0:
        loss = loss + config.z_loss_coef * z_loss(routing, token_mask.bool(), sample_weights)
    if not torch.is_grad_enabled() or not config.counts_load:
        return loss, None
    return loss, torch.stack([choice_counts(routing, mask).sum(dim=1) for mask in masks], dim=1)


def _check_one_stack(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "an encoder-decoder model routes different tokens in its two stacks: compute this loss for each, with "
            "routing=collect_routing(model, 'encoder') and the encoder's token_mask, then 'decoder' and the decoder's"
        )


def counts_of_all_layers(model: nn.Module, routing: Routing, counts_LMK: Tensor) -> Tensor:
    """Expert counts of all routers of the model, int64 `[L, M, K]`, from those of the routers in `routing`.

    A pass leaves routers out where it skips layers (LayerDrop), or where the caller reads one stack at a time: their
    counts are zero. K is that of the router with the most experts.
    """
    layers = {}
    for module in model.modules():
        if isinstance(module, ExpertLayer) and (state := module.current_state()) is not None:
            layers[module] = state.load.shape[-1]
    row_of = {layer: row for row, layer in enumerate(layers)}
    counts = counts_LMK.new_zeros(len(layers), counts_LMK.shape[1], max(layers.values()))
    counts[[row_of[layer] for layer in routing.layers], :, : counts_LMK.shape[-1]] = counts_LMK
    return counts


def _check_gradient(config: MoleConfig, routing: Routing) -> None:
    if not config.loss_needs_graph or not routing.layers[0].training:
        return
    routers = [layer.router(layer.current_adapter()) for layer in routing.layers]
    for name, logits, router in zip(routing.names, routing.logits, routers, strict=True):
        if router is not None and router.weight.requires_grad and not logits.requires_grad:
            raise ValueError(
                f"{name}: the router's logits carry no gradient. Re-entrant gradient checkpointing does this and would "
                "leave the router untrained: use gradient_checkpointing_kwargs={'use_reentrant': False} (or run the "
                "forward pass outside torch.no_grad)"
            )


def _set_weights(masks: tuple[Tensor, ...], sample_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """Sample weights of each token set: the modalities of a sample share its weight equally."""
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
    device = routing.logits[0].device
    loads = [layer.current_state().load.to(device) for layer in routing.layers]
    loads_LMK = torch.stack([pad(load, (0, routing.num_experts - load.shape[-1])) for load in loads])
    return list(loads_LMK.unbind(dim=1))


def mole_after_step(model: nn.Module) -> None:
    """Finish an optimizer step: sum its expert counts over all ranks, store them, and move the loss-free biases.

    With `add_balance_loss` it is called automatically when an optimizer that holds the adapter's parameters has
    stepped; a further call then does nothing. A loop that adds `mole_auxiliary_loss` itself calls it on every rank
    after each optimizer step. `balance_group='global_batch'` and `bias_update_rate` need it; otherwise it does
    nothing. The `global_batch` loss of a step weighs by the load of the step before. That makes it independent of how
    samples are spread over ranks and accumulation steps, without a second pass.
    """
    inputs = shared_inputs(model)
    counts_LMK = None if inputs is None else inputs.progress.take_counts()
    if counts_LMK is None:
        return
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts_LMK)
    states = [m.current_state() for m in model.modules() if isinstance(m, ExpertLayer)]
    for state, counts_MK in zip([s for s in states if s is not None], counts_LMK, strict=True):
        state.step(counts_MK[:, : state.load.shape[-1]])


def mole_drop_step(model: nn.Module) -> None:
    """Forget the expert counts of a skipped optimizer step. Call it instead of `mole_after_step`."""
    inputs = shared_inputs(model)
    if inputs is not None:
        inputs.progress.take_counts()

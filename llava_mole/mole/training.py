"""The balance loss under any training loop: hooks on the model's forward pass and on the optimizer's step.

A forward hook on the base model computes the auxiliary loss of every training pass. It adds it to the loss that the
model returns. Many trainers compute their loss from another output instead: the logits, or log-probabilities. These
outputs therefore carry the auxiliary loss too: they keep their values, and their backward pass starts that of the
auxiliary loss. A backward pass that reaches several of them takes the gradient once.

Shape legend: B samples, S positions, K experts.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast
from weakref import WeakSet

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from llava_mole.mole.access import active_config, collect_routing, shared_inputs
from llava_mole.mole.config import MoleConfig
from llava_mole.mole.layer import AdaptedLayer, ExpertLayer
from llava_mole.mole.loss import auxiliary_loss, counts_of_all_layers, mole_after_step
from llava_mole.mole.progress import TrainingPass, TrainingProgress
from llava_mole.mole.routing import Routing, in_backward

IGNORE_INDEX = -100
"""Label of a token without a target in transformers."""
BLIND_STEPS = 10
"""Optimizer steps after which a trainable router without a gradient is reported."""
_HIDDEN_OPTIMIZERS = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
"""They may step on flattened copies of the parameters, which do not show whose they are."""

_models: "WeakSet[nn.Module]" = WeakSet()
"""Base models that have been given an adapter or have trained one."""


def watch_training(model: nn.Module) -> None:
    """Add the balance loss to every training pass of the base model `model`, and follow its optimizer steps.

    Further calls for the same model change nothing.
    """
    _models.add(model)
    if _after_forward not in model._forward_hooks.values():
        # Before the hook that routes for the whole model, which a bare decoder has too.
        model.register_forward_pre_hook(_before_forward, prepend=True)
        model.register_forward_hook(_after_forward, with_kwargs=True)


def unwatch_training(model: nn.Module) -> None:
    """Undo `watch_training` for a model without adapters."""
    _models.discard(model)
    for key in [key for key, hook in model._forward_hooks.items() if hook is _after_forward]:
        del model._forward_hooks[key], model._forward_hooks_with_kwargs[key]
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _before_forward]:
        del model._forward_pre_hooks[key]


def _before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a base model: forgets the routing of layers that a training pass may skip (LayerDrop)."""
    if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not in_backward():
        for layer in module.modules():
            if isinstance(layer, ExpertLayer):
                layer.routing.logits = layer.routing.index = None


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a base model. In a pass with gradients it returns the output with the auxiliary loss attached.

    In evaluation mode, in which some training loops leave a model, the loss has a gradient but changes no value; a
    compiled model gets none there, so that it stays one graph.
    """
    if torch.is_grad_enabled() and (module.training or not torch.compiler.is_compiling()):
        return _pass_with_gradients(module, args, kwargs, output)
    return None


@torch.compiler.disable
def _pass_with_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    inputs, config = shared_inputs(module), active_config(module)
    if inputs is None or config is None or not config.has_router:
        return None
    _models.add(module)  # a copied or unpickled model has its hook but is not in the list
    progress = inputs.progress
    if progress.left_to_caller or not config.add_balance_loss:
        return None
    if getattr(module, "_is_replica", False):
        raise ValueError(
            "torch.nn.DataParallel runs the replicas of a MoLE model in threads that overwrite each other's routing; "
            "start one process per GPU with torchrun or accelerate launch, or show the process one GPU only"
        )
    routing = _with_stand_ins(collect_routing(module), config)
    if not routing.logits:
        return None
    if progress.passes and progress.announced_last and _optimizer_is_hidden():
        _end_step(module, progress)
    arguments = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
    if not module.training:
        return _evaluation_pass(module, arguments, config, routing, output)
    outside = progress.begin_pass(GradientState().sync_gradients if GradientState._shared_state else None)
    loss, counts_LMK = _pass_loss(module, arguments, config, routing)
    if counts_LMK is not None:
        progress.add_counts(counts_LMK)
    if not loss.requires_grad:
        progress.latest = None  # nothing is added that a caller could add again
    if progress.latest is None:
        return None
    inside = _share_of_step(arguments, _is_encoder_decoder(module))
    return _attach(output, loss, progress.latest, inside, outside, arguments.get("labels") is not None)


def _evaluation_pass(
    module: nn.Module, arguments: dict[str, Any], config: MoleConfig, routing: Routing, output: Any
) -> Any:
    """The output of a model in evaluation mode with the auxiliary loss attached; None if no router can train."""
    routers = [layer.router(name) for layer in routing.layers if (name := layer.current_adapter()) is not None]
    if not any(router is not None and router.weight.requires_grad for router in routers):
        return None  # somebody wants gradients of the inputs
    try:
        loss, counts_LMK = _pass_loss(module, arguments, config, routing)
    except MissingArgument:  # a model that may not be trained needs no masks
        return None
    if not loss.requires_grad:
        return None
    progress = cast(ExpertLayer, routing.layers[0]).inputs.progress
    this_pass, outside = progress.pass_in_evaluation(counts_LMK)
    return _attach(output, loss, this_pass, None, outside, arguments.get("labels") is not None)


def _with_stand_ins(routing: Routing, config: MoleConfig) -> Routing:
    """The same routing, with leaves for logits that a re-entrant checkpoint has computed without a graph."""
    logits = []
    for layer, value in zip(routing.layers, routing.logits, strict=True):
        name = layer.current_adapter()
        router = None if name is None else layer.router(name)
        layer.routing.stand_in = None
        if config.loss_needs_graph and router is not None and router.weight.requires_grad and not value.requires_grad:
            value = layer.routing.stand_in = value.detach().requires_grad_()
        logits.append(value)
    return replace(routing, logits=tuple(logits))


def _optimizer_is_hidden() -> bool:
    return bool(AcceleratorState._shared_state) and AcceleratorState().distributed_type in _HIDDEN_OPTIMIZERS


def _is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _pass_loss(
    module: nn.Module, arguments: dict[str, Any], config: MoleConfig, routing: Routing
) -> tuple[Tensor, Tensor | None]:
    """The auxiliary loss of a pass, and the expert counts of all L routers, int64 `[L, M, K]`, if they are needed.

    FFNs of an encoder and of a decoder count by their number.
    """
    groups: dict[tuple[bool, torch.Size], list[int]] = {}
    for index, (name, logits) in enumerate(zip(routing.names, routing.logits, strict=True)):
        in_decoder = _is_encoder_decoder(module) and "decoder" in name.split(".")
        groups.setdefault((in_decoder, logits.shape[:2]), []).append(index)
    if config.balance_kind == "groups" and config.balance_coef > 0 and routing.source is None:
        raise MissingArgument("balance_kind 'groups' needs set_routing_inputs(model, source=...) with 0 or 1 by sample")
    if config.source_coef > 0 and routing.source is None:
        raise MissingArgument("source_coef needs set_routing_inputs(model, source=...) with the expert of each sample")
    device = routing.logits[0].device
    total = torch.zeros((), device=device)
    counts: Tensor | None = None
    for (in_decoder, shape), layers in groups.items():
        part = replace(
            routing,
            names=tuple(routing.names[i] for i in layers),
            logits=tuple(routing.logits[i].to(device) for i in layers),
            index=tuple(routing.index[i].to(device) for i in layers),
            layers=tuple(routing.layers[i] for i in layers),
        )
        masks = _masks(module, arguments, config, shape, device, in_decoder)
        if (packed := _packed_samples(arguments, shape, device)) is not None:
            positions_NM, exists_NM = packed
            part = part.unpack(positions_NM)
            masks = {name: mask.flatten()[positions_NM] & exists_NM for name, mask in masks.items()}
        with torch.autocast(device_type=device.type, enabled=False):
            loss, count = auxiliary_loss(config, part, **masks)
        summed = config.balance_layers == "blocks" or config.balance_kind == "groups"
        total = total + loss * (1 if summed else len(layers) / len(routing.logits))
        if count is not None:
            count = counts_of_all_layers(module, part, count)
            counts = count if counts is None else counts + count
    return total, counts


def _packed_samples(arguments: dict[str, Any], shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Where a single row holds several samples: their positions, int64 `[N, M]`, and which of these exist; else None.

    Packing and padding-free collators give no attention mask. They give the samples' ends (`cu_seq_lens_q`, with the
    length of the longest in `max_length_q`), or positions that start from 0 in each sample.
    """
    if shape[0] != 1 or arguments.get("attention_mask") is not None:
        return None
    ends, positions = arguments.get("cu_seq_lens_q"), arguments.get("position_ids")
    if isinstance(ends, Tensor):
        ends = ends.to(device, torch.int64)
    elif isinstance(positions, Tensor) and positions.shape == shape:
        starts = (positions[0] == 0).nonzero().flatten().to(device)
        ends = torch.cat([starts, torch.tensor([shape[1]], device=device)])
    else:
        return None
    lengths = ends.diff()
    longest = arguments.get("max_length_q") or (int(lengths.max()) if len(lengths) else 0)
    offsets = torch.arange(int(longest), device=device)
    return (ends[:-1, None] + offsets).clamp(max=shape[1] - 1), offsets < lengths[:, None]


def _masks(
    module: nn.Module,
    arguments: dict[str, Any],
    config: MoleConfig,
    shape: torch.Size,
    device: torch.device,
    in_decoder: bool,
) -> dict[str, Tensor]:
    """The masks of `mole_auxiliary_loss` `[B, S]`, from the arguments of the model's forward pass.

    Raises:
        ValueError: `balance_tokens` needs an argument that was not given.
    """

    def given(name: str) -> Tensor | None:
        value = arguments.get(name)
        return value.to(device) if isinstance(value, Tensor) and value.shape == shape else None

    labels = given("labels")
    mask = given("decoder_attention_mask" if in_decoder else "attention_mask")
    if mask is None and in_decoder and labels is not None:
        mask = labels != IGNORE_INDEX
    every = torch.ones(shape, dtype=torch.bool, device=device)
    masks = {"token_mask": every if mask is None else mask.bool()}
    if config.balance_tokens == "supervised":
        if labels is None:
            raise _refusal(config, f"labels of shape {list(shape)}")
        targets = labels != IGNORE_INDEX
        masks["supervised_mask"] = targets if in_decoder else nn.functional.pad(targets[:, 1:], (0, 1))
    if config.balance_tokens in ("text", "stratified"):
        base_config = getattr(module, "config", None)
        names = ("image_token_id", "image_token_index", "video_token_id")
        image_ids = [value for name in names if isinstance(value := getattr(base_config, name, None), int)]
        ids = given("input_ids")
        if image_ids and ids is None:
            raise _refusal(config, f"input_ids of shape {list(shape)}")
        masks["image_mask"] = ~every
        if ids is not None:
            masks["image_mask"] = torch.isin(ids, torch.tensor(image_ids, device=device, dtype=ids.dtype))
    return masks


class MissingArgument(ValueError):
    """The forward pass was not given what `balance_tokens` needs."""


def _refusal(config: MoleConfig, what: str) -> MissingArgument:
    return MissingArgument(
        f"balance_tokens {config.balance_tokens!r} needs the model's forward pass to be given {what}; give them, take "
        "another balance_tokens, or set add_balance_loss=False and add mole_auxiliary_loss with masks of your own"
    )


def _share_of_step(arguments: dict[str, Any], is_encoder_decoder: bool) -> Tensor | float:
    """The weight of this pass beside a loss that transformers divides by `num_items_in_batch`; 1 without it.

    A loss that is the mean of its own tokens is divided by the training loop, the auxiliary loss with it. With
    `num_items_in_batch`, the targets of the whole optimizer step, the loop divides no more. The share of those targets
    that this pass has then weighs the auxiliary loss as well, so the weights of a step add up to 1.
    """
    num_items, targets = arguments.get("num_items_in_batch"), arguments.get("shift_labels")
    if targets is None and isinstance(labels := arguments.get("labels"), Tensor):
        targets = labels if is_encoder_decoder else labels[..., 1:]
    if num_items is None or targets is None:
        return 1.0
    own = (targets != IGNORE_INDEX).sum()
    return own / torch.as_tensor(num_items, device=own.device).clamp(min=1)


class _Attached(torch.autograd.Function):
    """An output of the model that starts the backward pass of the auxiliary loss."""

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, loss: Tensor, this_pass: TrainingPass, weight: Tensor | float | None, outside: float
    ) -> Tensor:
        """`carrier + weight * loss`, or `carrier` itself for weight None, whose gradient is then `outside`."""
        ctx.this_pass, ctx.weight, ctx.outside = this_pass, weight, outside
        ctx.shape_like = loss.detach()
        ctx.half = torch.float16 in (carrier.dtype, _autocast_dtype(carrier.device.type))
        # Not `carrier` itself: autograd forbids in-place changes of an input that is returned as it is.
        return carrier.detach() if weight is None else carrier + (weight * loss).to(carrier.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.this_pass.take(torch._C._current_graph_task_id()):
            return grad, None, None, None, None
        if ctx.weight is not None:
            return grad, (grad * ctx.weight).to(ctx.shape_like), None, None, None
        if ctx.half:
            _warn_once(
                "a loss computed outside the model trains in float16: its loss scale is unknown here, so the balance "
                "loss is weighed far too low. Train in bfloat16, give the model labels and use its loss, or set "
                "add_balance_loss=False and add mole_auxiliary_loss to your loss"
            )
        return grad, torch.full_like(ctx.shape_like, ctx.outside), None, None, None


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _attach(
    output: Any, loss: Tensor, this_pass: TrainingPass, inside: Tensor | float | None, outside: float, has_labels: bool
) -> Any:
    """The model's output, whose loss contains `inside * loss` and whose other tensors carry `outside * loss`.

    With `inside` None its loss carries `outside * loss` too.
    """
    own_loss = None if inside is None else _own_loss(output, has_labels)
    carriers = [tensor for tensor in _floating(output) if tensor is not own_loss]
    trained = [tensor for tensor in carriers if tensor.requires_grad]
    chosen = {id(tensor) for tensor in trained or carriers[:1]}

    def carry(tensor: Tensor) -> Tensor:
        if id(tensor) not in chosen:
            return tensor
        return _Attached.apply(tensor, loss, this_pass, None, outside)

    # The loss comes last: autograd runs the youngest nodes first, so where a backward pass meets both, the weight of
    # the loss holds.
    output = _mapped(output, carry)
    if own_loss is None:
        return output
    with_loss = _Attached.apply(own_loss, loss, this_pass, inside, outside)
    return _mapped(output, lambda tensor: with_loss if tensor is own_loss else tensor)


def _own_loss(output: Any, has_labels: bool) -> Tensor | None:
    found = output.get("loss") if isinstance(output, dict) else None
    if isinstance(output, tuple) and output and has_labels:
        found = output[0]
    return found if isinstance(found, Tensor) and found.dim() == 0 else None


def _floating(value: Any) -> Iterator[Tensor]:
    """The floating tensors of an output, those in its tuples and lists included."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _floating(item)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with its tensors changed. Dictionaries, transformers' outputs among them, are changed in place."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        for key, item in list(value.items()):
            if (new := _mapped(item, change)) is not item:
                value[key] = new
        return value
    if isinstance(value, tuple | list):
        items = [_mapped(item, change) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Step hook of all optimizers: finishes the step of each adapter whose parameters `optimizer` holds."""
    held: set[int] | None = None
    for model in list(_models):
        inputs, config = shared_inputs(model), active_config(model)
        if inputs is None or config is None or not config.has_router:
            continue
        progress = inputs.progress
        if not progress.passes and (progress.blind_steps is None or not config.router_trains):
            continue
        if held is None:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in _adapter_parameters(model)):
            continue
        if progress.blind_steps is not None and config.router_trains:
            _watch_routers(model, held, progress)
        if progress.passes:
            _end_step(model, progress)


def _end_step(model: nn.Module, progress: TrainingProgress) -> None:
    progress.end_step()
    mole_after_step(model)


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer):
            for container in layer.adapter_layer_names:
                yield from getattr(layer, container).parameters()


def _watch_routers(model: nn.Module, held: set[int], progress: TrainingProgress) -> None:
    """Warn once about trainable routers that `BLIND_STEPS` optimizer steps have left without a gradient."""
    waiting = {}
    for name, layer in model.named_modules():
        current = layer.current_adapter() if isinstance(layer, ExpertLayer) else None
        router = None if current is None else cast(ExpertLayer, layer).router(current)
        if router is not None and router.weight.requires_grad and id(router.weight) in held:
            waiting[name] = router.weight.grad
    if not waiting:
        return
    waiting = {name: grad for name, grad in waiting.items() if name not in progress.moved_routers}
    grads = {name: grad for name, grad in waiting.items() if grad is not None}
    progress.moved_routers.update(name for name, grad in grads.items() if bool(grad.any()))
    blind = [name for name in waiting if name not in progress.moved_routers]
    if not blind:
        progress.blind_steps = None
        return
    progress.blind_steps = (progress.blind_steps or 0) + 1
    if progress.blind_steps == BLIND_STEPS:
        progress.blind_steps = None
        warnings.warn(
            f"{len(blind)} trainable routers, {blind[0]} first, have had no gradient in {BLIND_STEPS} optimizer steps "
            "and stay as they were initialised. Leave MoleConfig's add_balance_loss at True and use the loss or the "
            "logits of the model's own forward pass, or add mole_auxiliary_loss(model, ...) to the loss; to keep them "
            "so on purpose, set train_router=False",
            stacklevel=2,
        )


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


register_optimizer_step_post_hook(_after_step)

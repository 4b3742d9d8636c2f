"""The router of one FFN: its logits in float32, the experts they choose, and the weight of each expert.

Shape legend: B samples, S positions, T = B S tokens, D hidden size, K experts, k experts a token uses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mole.mole.config import MoleConfig
from llava_mole.mole.routing import RoutingInputs, RoutingSlot


def router_dtype(x_dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.float64 if x_dtype == torch.float64 else torch.float32


def trained_part(parameter: Tensor, frozen: int) -> Tensor:
    """`parameter`, through whose first `frozen` rows no gradient flows."""
    if not frozen or not torch.is_grad_enabled():
        return parameter
    return torch.cat([parameter[:frozen].detach(), parameter[frozen:]])


class Router(nn.Module):
    """`logits = x W^T (+ b)`, Eq. 3. `weight` is `[K, D]`, `bias` `[K]`; one router serves all projections of an FFN.

    For granularity `task`, `weight` is `[num_tasks, K]`: the logits of every task. With `task_dim` E, `embedding` is
    `[num_tasks, E]`, `weight` `[K, E]`, and the logits of a task are those of its embedding. `std` is the standard
    deviation of the initial weight; None starts it like a linear of PyTorch. The first `frozen` rows do not train.
    """

    def __init__(
        self,
        width: int,
        rows: int,
        *,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
        std: float | None = None,
        num_tasks: int = 0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.embedding = nn.Parameter(torch.empty(num_tasks, width, device=device, dtype=dtype)) if num_tasks else None
        self.frozen = 0
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(width), 1 / math.sqrt(width))
        if std is not None:
            nn.init.normal_(self.weight, std=std)
        if self.embedding is not None:
            nn.init.normal_(self.embedding)

    @classmethod
    def of(cls, config: MoleConfig, width: int, device: torch.device, dtype: torch.dtype) -> "Router":
        """The router of an adapter for inputs of size `width`, `dtype` being that of the base."""
        by_task, rows, bias = config.granularity == "task", config.num_experts, config.router_bias
        if by_task and config.task_dim:
            width = config.task_dim
        elif by_task:
            width, rows, bias = config.num_experts, config.num_tasks, False
        router = cls(
            width,
            rows,
            bias=bias,
            device=device,
            dtype=router_dtype(dtype),
            std=config.router_init_std,
            num_tasks=config.num_tasks if by_task and config.task_dim else 0,
        )
        router.frozen = config.frozen_experts
        return router

    def task_logits(self, dtype: torch.dtype) -> Tensor:
        """The logits of all tasks, `[num_tasks, K]`, in float32, or float64 if `dtype` is."""
        if self.embedding is None:
            return self.weight.to(router_dtype(dtype))
        return self(self.embedding.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[..., K]` of `x` `[..., D]`, in float32 whatever the dtype of `x`.

        In bfloat16 up to 0.7% of tokens tie exactly at the top, which argmax resolves towards expert 0, and up to
        0.4% choose another expert than in float32. Autocast is therefore off here and the weights are widened.
        """
        dtype = router_dtype(x.dtype)
        with torch.autocast(device_type=x.device.type, enabled=False):
            bias = None if self.bias is None else trained_part(self.bias, self.frozen).to(dtype)
            return F.linear(x.to(dtype), trained_part(self.weight, self.frozen).to(dtype), bias)


class RouterState(nn.Module):
    """Integer buffers of a router, saved with the adapter.

    They are integers because `model.to(bfloat16)` and DeepSpeed's bf16 mode cast every float buffer, which would
    round a bias of many small steps to nothing. `bias_steps` `[K]`: steps up minus steps down that each expert's
    selection bias has taken. `load` `[M, K]`: tokens each expert got in the last optimizer step, over all ranks, in
    each of M token sets (one, or image and text); all zero before the first step.
    """

    def __init__(self, num_experts: int, num_sets: int, rate: float, device: torch.device) -> None:
        super().__init__()
        self.rate = rate
        self.bias_steps: Tensor
        self.load: Tensor
        self.register_buffer("bias_steps", torch.zeros(num_experts, dtype=torch.int64, device=device))
        self.register_buffer("load", torch.zeros(num_sets, num_experts, dtype=torch.int64, device=device))

    def selection_bias(self) -> Tensor | None:
        """float32 `[K]`, added to the logits for the choice only; None if loss-free balancing is off."""
        return self.bias_steps.to(torch.float32) * self.rate if self.rate > 0 else None

    def step(self, counts_MK: Tensor) -> None:
        """Store the counts of a finished optimizer step and move the bias towards experts below the mean load.

        A router that the step has skipped (LayerDrop) keeps its load.
        """
        self.load.copy_(torch.where(counts_MK.any(), counts_MK, self.load))
        if self.rate > 0:
            total_K = counts_MK.sum(dim=0).double()
            self.bias_steps += torch.sign(total_K.mean() - total_K).to(torch.int64)


@dataclass(frozen=True)
class ExpertWeights:
    """Which experts each token uses, and with what weight.

    `index` is int64 `[T, k]`, or None if every token uses all K experts. `weight` is `[T, k]` (or `[T, K]`), or None
    for a weight of 1.
    """

    index: Tensor | None
    weight: Tensor | None


@dataclass(frozen=True)
class Route:
    """The decision of one FFN for all tokens of a batch."""

    weights: ExpertWeights | None
    """None for one expert, which every token uses with weight 1."""
    logits: Tensor
    """float32 `[B, S, K]`, after the temperature; the probabilities are their softmax. Zeros without a router."""
    index: Tensor
    """The chosen experts, int64 `[B, S, k]`; in mode `dense` the most probable one."""


def certain_weight(config: MoleConfig) -> float:
    """The weight of an expert whose probability is 1: K for `prob_times_k`, otherwise 1."""
    has_probabilities = config.granularity != "given" and config.router not in CONTROLS
    return float(config.num_experts) if has_probabilities and config.expert_scale == "prob_times_k" else 1.0


def forced_route(found: Route, expert: int, config: MoleConfig) -> Route:
    """The same logits with another choice: every token uses `expert`, as if the router were certain of it."""
    if found.weights is None:  # one expert
        return found
    index_BS1 = torch.full_like(found.index[..., :1], expert)
    index_T1 = index_BS1.flatten(0, 1)
    weight_T1 = torch.full_like(index_T1, certain_weight(config), dtype=found.logits.dtype)
    return Route(ExpertWeights(index_T1, weight_T1), found.logits, index_BS1)


def route(
    x_BSD: Tensor,
    router: Router | None,
    config: MoleConfig,
    inputs: RoutingInputs,
    slot: RoutingSlot,
    selection_bias_K: Tensor | None,
    training: bool,
) -> Route:
    """Decide which experts each token uses.

    Raises:
        ValueError: the router needs a routing input that was not set, or one has the wrong shape.
        FloatingPointError: the logits are not finite. This is checked on the CPU only, because on a GPU the check
            would synchronise, and not after `disable_finite_check`.
    """
    num_experts, dtype = config.num_experts, router_dtype(x_BSD.dtype)
    if num_experts == 1:
        zeros = torch.zeros(*x_BSD.shape[:2], 1, dtype=dtype, device=x_BSD.device)
        return Route(None, zeros, zeros.long())
    choose_without_logits = _given_experts if config.granularity == "given" else CONTROLS.get(config.router)
    if choose_without_logits is not None:
        weights, index_BSk = choose_without_logits(x_BSD, num_experts, inputs)
        return Route(weights, torch.zeros(*x_BSD.shape[:2], num_experts, dtype=dtype, device=x_BSD.device), index_BSk)
    assert router is not None
    logits_BSK = _logits(x_BSD, router, config, inputs, slot, training)
    checks = inputs.check_finite and logits_BSK.device.type == "cpu" and not torch.compiler.is_compiling()
    if checks and not logits_BSK.isfinite().all():
        raise FloatingPointError(
            "the router's logits are not finite: its input or its weights hold NaN or infinity; "
            "look for a diverged loss or a damaged checkpoint"
        )
    index_BSk = choose(logits_BSK, config.top_k, selection_bias_K)
    logits_TK = logits_BSK.flatten(0, 1)
    if config.mode == "dense":
        return Route(dense_weights(logits_TK, config.expert_scale), logits_BSK, index_BSk)
    return Route(sparse_weights(logits_TK, index_BSk.flatten(0, 1), config.expert_scale), logits_BSK, index_BSk)


def choose(logits_TK: Tensor, top_k: int, selection_bias_K: Tensor | None = None) -> Tensor:
    """The `top_k` best experts of each token, int64 `[T, top_k]`, best first. For top 1, the first expert wins ties.

    `selection_bias_K` is added for the choice only (loss-free balancing), never to the probabilities.
    """
    scores = logits_TK.detach()
    if selection_bias_K is not None:
        scores = scores + selection_bias_K.to(scores.dtype)
    if top_k == 1:
        return scores.argmax(dim=-1, keepdim=True)
    return scores.topk(top_k, dim=-1).indices


def sparse_weights(logits_TK: Tensor, index_Tk: Tensor, expert_scale: str) -> ExpertWeights:
    """The weights of the chosen experts, by `expert_scale`, from their probabilities p.

    `none`: 1, so no gradient reaches the router (Eq. 4). `straight_through`: the value is exactly 1, the gradient
    that of p. `prob`: p. `prob_squared`: p^2. `prob_times_k`: K p, whose mean is 1 at initialisation. `topk_renorm`:
    p divided by the sum over the chosen experts.
    """
    if expert_scale == "none":
        return ExpertWeights(index_Tk, None)
    probs = logits_TK.softmax(dim=-1).gather(-1, index_Tk)
    if expert_scale == "straight_through":
        return ExpertWeights(index_Tk, 1 + (probs - probs.detach()))
    if expert_scale == "prob":
        return ExpertWeights(index_Tk, probs)
    if expert_scale == "prob_squared":
        return ExpertWeights(index_Tk, probs.square())
    if expert_scale == "prob_times_k":
        return ExpertWeights(index_Tk, probs * logits_TK.shape[-1])
    if expert_scale == "topk_renorm":
        return ExpertWeights(index_Tk, probs / probs.sum(dim=-1, keepdim=True))
    raise ValueError(f"unknown expert_scale {expert_scale!r}")


def dense_weights(logits_TK: Tensor, expert_scale: str) -> ExpertWeights:
    """Softmax weights of all experts; times K for `prob_times_k`."""
    probs = logits_TK.softmax(dim=-1)
    return ExpertWeights(None, probs * logits_TK.shape[-1] if expert_scale == "prob_times_k" else probs)


def _logits(
    x_BSD: Tensor, router: Router, config: MoleConfig, inputs: RoutingInputs, slot: RoutingSlot, training: bool
) -> Tensor:
    """Logits `[B, S, K]` of every granularity that has a router, divided by the temperature."""
    batch, length, _ = x_BSD.shape
    noise = config.logit_noise if training else 0.0
    if config.granularity == "task":
        logits_BSK = router.task_logits(x_BSD.dtype)[_per_position(inputs.task, "task", batch, length)]
        if noise:
            logits_BSK = logits_BSK + noise * _sample_noise(logits_BSK, inputs)
        return logits_BSK / config.temperature
    if config.router_detach_input or config.router == "hash":
        x_BSD = x_BSD.detach()
    if training and config.jitter > 0:
        x_BSD = x_BSD * torch.empty_like(x_BSD).uniform_(1 - config.jitter, 1 + config.jitter)
    if config.granularity == "sequence":
        if inputs.sample_index is not None and training:
            logits_BSK = _packed_sequence_logits(x_BSD, router, config, inputs)
        else:
            logits_BK = _sequence_logits(x_BSD, router, config, inputs, slot, training)
            logits_BSK = logits_BK.unsqueeze(1).expand(-1, length, -1)
        if noise:
            logits_BSK = logits_BSK + noise * _sample_noise(logits_BSK, inputs)
        return logits_BSK / config.temperature
    logits_BSK = router(x_BSD)
    if noise:
        logits_BSK = logits_BSK + noise * torch.randn_like(logits_BSK)
    return logits_BSK if config.temperature == 1 else logits_BSK / config.temperature


def _sample_noise(logits_BSK: Tensor, inputs: RoutingInputs) -> Tensor:
    """Normal noise that all positions of a sample share, `[B, S, K]`, for rows of one sample or of several."""
    batch, length, num_experts = logits_BSK.shape
    if inputs.sample_index is None:
        return torch.randn_like(logits_BSK[:, :1]).expand(-1, length, -1)
    # There are at most as many samples as positions.
    noise_TK = torch.randn(batch * length, num_experts, dtype=logits_BSK.dtype, device=logits_BSK.device)
    return noise_TK[_per_position(inputs.sample_index, "sample_index", batch, length)]


def _sequence_logits(
    x_BSD: Tensor, router: Router, config: MoleConfig, inputs: RoutingInputs, slot: RoutingSlot, training: bool
) -> Tensor:
    """Mean logits over the prompt or its images, `[B, K]`; a decoding step reuses those of its prompt."""
    if inputs.decoding and not training and slot.prompt_logits is not None:
        return slot.prompt_logits
    mask_BS = inputs.prompt_mask
    if mask_BS is None and not training:
        mask_BS = inputs.attention_mask
    if mask_BS is None and training:
        raise ValueError(
            "granularity 'sequence' needs set_routing_inputs(model, prompt_mask=...) in training: an average over "
            "the answers would let tokens see later ones"
        )
    if mask_BS is not None and mask_BS.shape != x_BSD.shape[:2]:
        raise ValueError(
            f"prompt_mask has shape {tuple(mask_BS.shape)}, but the batch is {tuple(x_BSD.shape[:2])} samples x "
            "positions"
        )
    if config.sequence_tokens == "image":
        image_BS = _image_positions(x_BSD, inputs)
        prompt_BS = torch.ones_like(image_BS) if mask_BS is None else mask_BS.bool()
        mask_BS = torch.where(image_BS.any(dim=1, keepdim=True), image_BS, prompt_BS)
    logits_BSK = router(x_BSD)
    if mask_BS is None:
        pooled_BK = logits_BSK.mean(dim=1)
    else:
        weight_BS1 = mask_BS.to(logits_BSK.dtype).unsqueeze(-1)
        pooled_BK = (logits_BSK * weight_BS1).sum(dim=1) / weight_BS1.sum(dim=1).clamp(min=1)
    if not training:
        slot.prompt_logits = pooled_BK.detach()
    return pooled_BK


def _image_positions(x_BSD: Tensor, inputs: RoutingInputs) -> Tensor:
    """The routing input `image_mask` as bool `[B, S]`. Beam search repeats each sample, and so does this."""
    mask_BS = inputs.image_mask
    if mask_BS is None:
        raise ValueError(
            "sequence_tokens 'image' needs set_routing_inputs(model, image_mask=...) before the forward pass"
        )
    mask_BS = _repeat(mask_BS.bool(), x_BSD.shape[0], "image_mask")
    if mask_BS.shape != x_BSD.shape[:2]:
        raise ValueError(
            f"image_mask has shape {tuple(mask_BS.shape)}, but the batch is {tuple(x_BSD.shape[:2])} samples x "
            "positions"
        )
    return mask_BS


def _packed_sequence_logits(x_BSD: Tensor, router: Router, config: MoleConfig, inputs: RoutingInputs) -> Tensor:
    """Mean logits over each sample's prompt or images, at every position of the sample, `[B, S, K]`."""
    sample_BS, mask_BS = inputs.sample_index, inputs.prompt_mask
    shapes = [None if value is None else tuple(value.shape) for value in (sample_BS, mask_BS)]
    if sample_BS is None or mask_BS is None or set(shapes) != {tuple(x_BSD.shape[:2])}:
        raise ValueError(
            "granularity 'sequence' on packed rows needs sample_index and prompt_mask of shape "
            f"{tuple(x_BSD.shape[:2])}; they have {shapes[0]} and {shapes[1]}"
        )
    logits_TK = router(x_BSD).flatten(0, 1)
    # There are at most as many samples as positions, so sums of that size need no host synchronisation.
    sample_T, weight_T1 = sample_BS.flatten(), mask_BS.to(logits_TK.dtype).view(-1, 1)
    if config.sequence_tokens == "image":
        image_T1 = _image_positions(x_BSD, inputs).to(logits_TK.dtype).view(-1, 1)
        shown_T1 = torch.zeros_like(image_T1).index_add(0, sample_T, image_T1)[sample_T]
        weight_T1 = torch.where(shown_T1 > 0, image_T1, weight_T1)
    sums = torch.zeros_like(logits_TK).index_add(0, sample_T, logits_TK * weight_T1)
    counts = torch.zeros_like(weight_T1).index_add(0, sample_T, weight_T1)
    return (sums / counts.clamp(min=1))[sample_T].view(*x_BSD.shape[:2], -1)


def _given_experts(x_BSD: Tensor, num_experts: int, inputs: RoutingInputs) -> tuple[ExpertWeights, Tensor]:
    """Granularity `given`: experts or weights from outside."""
    experts, (batch, length, _) = inputs.experts, x_BSD.shape
    if experts is None or not experts.is_floating_point():
        return _one_expert(_per_position(experts, "experts", batch, length))
    weights = _repeat(experts, batch, "experts")
    if weights.dim() == 2:
        weights = weights.unsqueeze(1).expand(-1, length, -1)
    if weights.shape != (batch, length, num_experts):
        raise ValueError(
            f"experts holds weights of shape {tuple(experts.shape)}; [B, K] or [B, S, K] = "
            f"[{batch}, {length}, {num_experts}] is needed"
        )
    return ExpertWeights(None, weights.flatten(0, 1)), weights.argmax(dim=-1, keepdim=True)


def _random_expert(x_BSD: Tensor, num_experts: int, inputs: RoutingInputs) -> tuple[ExpertWeights, Tensor]:
    """Router `random`: a new expert for every token and pass, all equally likely."""
    return _one_expert(torch.randint(num_experts, x_BSD.shape[:2], device=x_BSD.device))


def _expert_of_source(x_BSD: Tensor, num_experts: int, inputs: RoutingInputs) -> tuple[ExpertWeights, Tensor]:
    """Router `oracle`: the number of a sample's source is its expert."""
    return _one_expert(_per_position(inputs.source, "source", *x_BSD.shape[:2]))


CONTROLS: dict[str, Callable[[Tensor, int, RoutingInputs], tuple[ExpertWeights, Tensor]]] = {
    "random": _random_expert,
    "oracle": _expert_of_source,
}
"""Routers without logits, by `MoleConfig.router`: (x `[B, S, D]`, K, inputs) -> weights and int64 `[B, S, 1]`."""


def _one_expert(index_BS: Tensor) -> tuple[ExpertWeights, Tensor]:
    """Every token uses one expert, with weight 1."""
    index_BS1 = index_BS.unsqueeze(-1)
    return ExpertWeights(index_BS1.flatten(0, 1), None), index_BS1


def _per_position(value: Tensor | None, name: str, batch: int, length: int) -> Tensor:
    """The routing input `name`, int64 `[B]` (by sample) or `[B, S]`, as `[B, S]`."""
    if value is None:
        raise ValueError(f"this router needs set_routing_inputs(model, {name}=...) before the forward pass")
    repeated = _repeat(value, batch, name).long()
    repeated = repeated.unsqueeze(1).expand(-1, length) if repeated.dim() == 1 else repeated
    if repeated.shape != (batch, length):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; [B] or [B, S] = [{batch}, {length}] is needed")
    return repeated


def _repeat(value: Tensor, batch: int, name: str) -> Tensor:
    """`value` for `batch` rows. Beam search repeats each sample, and so does this."""
    if batch % value.shape[0]:
        raise ValueError(f"{name} describes {value.shape[0]} samples, but the batch has {batch}")
    return value if value.shape[0] == batch else value.repeat_interleave(batch // value.shape[0], dim=0)

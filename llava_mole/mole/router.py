"""The router of one FFN: logits in float32, and how they become a gate.

Shape legend: T tokens, D model width, K experts, k experts a token uses.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mole.common.errors import ConfigError
from llava_mole.mole.routing import RoutingInputs, RoutingSlot


def router_dtype(x_dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.float64 if x_dtype == torch.float64 else torch.float32


class Router(nn.Module):
    """`logits = x W^T (+ b)`, Eq. 3. `weight` is `[K, D]`, `bias` `[K]`; one for gate, up and down projection."""

    def __init__(self, width: int, num_experts: int, *, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[..., K]` of `x` `[..., D]`, in float32 whatever the dtype of `x`.

        In bfloat16 up to 0.7 % of tokens tie exactly at the top, which argmax resolves towards expert 0, and up to
        0.4 % choose another expert than in float32; so autocast is off here and the weights are widened.
        """
        dtype = router_dtype(x.dtype)
        with torch.autocast(device_type=x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


@dataclass(frozen=True)
class Gate:
    """Which experts each token uses, and with what weight.

    `index` is int64 `[T, k]`, or None where every token uses all K experts. `weight` is `[T, k]` (or `[T, K]`),
    or None where it is 1.
    """

    index: Tensor | None
    weight: Tensor | None


def choose(logits_TK: Tensor, top_k: int, selection_bias_K: Tensor | None = None) -> Tensor:
    """The `top_k` best experts of each token, int64 `[T, top_k]`, best first; the first one on ties for top 1.

    `selection_bias_K` is added for the choice only (loss-free balancing), never to probabilities.
    """
    scores = logits_TK.detach()
    if selection_bias_K is not None:
        scores = scores + selection_bias_K.to(scores.dtype)
    if top_k == 1:
        return scores.argmax(dim=-1, keepdim=True)
    return scores.topk(top_k, dim=-1).indices


def sparse_gate(logits_TK: Tensor, index_Tk: Tensor, expert_scale: str) -> Gate:
    """The gate of the chosen experts.

    `none`: weight 1, so no gradient reaches the router (Eq. 4). `straight_through`: value exactly 1, gradient of p.
    `prob`: p. `prob_times_k`: K p, whose mean is 1 at initialisation. `topk_renorm`: p over the chosen ones' sum.
    """
    if expert_scale == "none":
        return Gate(index_Tk, None)
    probs = logits_TK.softmax(dim=-1).gather(-1, index_Tk)
    if expert_scale == "straight_through":
        return Gate(index_Tk, 1 + (probs - probs.detach()))
    if expert_scale == "prob":
        return Gate(index_Tk, probs)
    if expert_scale == "prob_times_k":
        return Gate(index_Tk, probs * logits_TK.shape[-1])
    if expert_scale == "topk_renorm":
        return Gate(index_Tk, probs / probs.sum(dim=-1, keepdim=True))
    raise ValueError(f"unknown expert_scale {expert_scale!r}")


def dense_gate(logits_TK: Tensor, expert_scale: str) -> Gate:
    """Softmax weights over all experts; times K for `prob_times_k`."""
    probs = logits_TK.softmax(dim=-1)
    return Gate(None, probs * logits_TK.shape[-1] if expert_scale == "prob_times_k" else probs)


@dataclass(frozen=True)
class GateOptions:
    """The options of `MoleConfig` that decide the gate, as plain values."""

    num_experts: int
    mode: str
    top_k: int
    granularity: str
    router: str
    expert_scale: str
    temperature: float
    jitter: float
    detach_input: bool


def make_gate(
    x_BSD: Tensor,
    router: Router | None,
    options: GateOptions,
    inputs: RoutingInputs,
    slot: RoutingSlot,
    selection_bias_K: Tensor | None,
    training: bool,
) -> tuple[Gate | None, Tensor, Tensor]:
    """The gate of all tokens (None for one expert), the logits `[B, S, K]` and the chosen experts int64 `[B, S, k]`.

    The logits are those the probabilities come from (after the temperature), float32. Gates without probabilities
    report zeros. In mode `dense` the chosen expert is the most probable one, for statistics and the balance loss.

    Raises:
        ConfigError: the gate needs a routing input that was not set, or it has the wrong shape.
        FloatingPointError: the logits are not finite (checked on the CPU only: on a GPU it would synchronise;
            and not where a training loop checks the loss, see `mole_let_non_finite_pass`).
    """
    batch, length, _ = x_BSD.shape
    num_experts = options.num_experts
    if num_experts == 1:
        zeros = torch.zeros(batch, length, 1, dtype=router_dtype(x_BSD.dtype), device=x_BSD.device)
        return None, zeros, zeros.long()
    if options.granularity == "given":
        return _given(inputs.experts, x_BSD, num_experts)
    if options.router in ("random", "oracle"):
        index_BS1 = _control(x_BSD, options, inputs)
        logits = torch.zeros(batch, length, num_experts, dtype=router_dtype(x_BSD.dtype), device=x_BSD.device)
        return Gate(index_BS1.flatten(0, 1), None), logits, index_BS1
    assert router is not None
    logits_BSK = _logits(x_BSD, router, options, inputs, slot, training)
    checks = inputs.check_finite and logits_BSK.device.type == "cpu" and not torch.compiler.is_compiling()
    if checks and not logits_BSK.isfinite().all():
        raise FloatingPointError(
            "the router's logits are not finite: its input holds NaN or infinity, or its weights do; "
            "look for a diverged loss or a damaged checkpoint"
        )
    index_BSk = choose(logits_BSK, options.top_k, selection_bias_K)
    logits_TK = logits_BSK.flatten(0, 1)
    if options.mode == "dense":
        return dense_gate(logits_TK, options.expert_scale), logits_BSK, index_BSk
    return sparse_gate(logits_TK, index_BSk.flatten(0, 1), options.expert_scale), logits_BSK, index_BSk


def _logits(
    x_BSD: Tensor, router: Router, options: GateOptions, inputs: RoutingInputs, slot: RoutingSlot, training: bool
) -> Tensor:
    batch, length, _ = x_BSD.shape
    if options.granularity == "task":
        task_BS = _per_position(inputs.task, "task", batch, length)
        return router.weight.to(router_dtype(x_BSD.dtype))[task_BS] / options.temperature
    if options.detach_input or options.router == "hash":
        x_BSD = x_BSD.detach()
    if training and options.jitter > 0:
        x_BSD = x_BSD * torch.empty_like(x_BSD).uniform_(1 - options.jitter, 1 + options.jitter)
    if options.granularity == "sequence":
        if inputs.sample_index is not None and training:
            return _packed_sequence_logits(x_BSD, router, inputs) / options.temperature
        logits_BK = _sequence_logits(x_BSD, router, inputs, slot, training)
        return (logits_BK / options.temperature).unsqueeze(1).expand(-1, length, -1)
    logits = router(x_BSD)
    return logits if options.temperature == 1 else logits / options.temperature


def _sequence_logits(x_BSD: Tensor, router: Router, inputs: RoutingInputs, slot: RoutingSlot, training: bool) -> Tensor:
    """Mean logits over the prompt, `[B, K]`; a decoding step reuses those of its prompt."""
    if inputs.decoding and slot.prompt_logits is not None:
        return slot.prompt_logits
    mask = inputs.prompt_mask
    if mask is None and not training:
        mask = inputs.attention_mask
    if mask is None and training:
        raise ConfigError(
            "granularity 'sequence' needs set_routing_inputs(model, prompt_mask=...) in training: an average over "
            "the answers would let tokens see later ones"
        )
    if mask is not None and mask.shape != x_BSD.shape[:2]:
        raise ConfigError(
            f"prompt_mask has shape {tuple(mask.shape)}, but the batch is {tuple(x_BSD.shape[:2])} samples x positions"
        )
    logits_BSK = router(x_BSD)
    if mask is None:
        pooled = logits_BSK.mean(dim=1)
    else:
        weight = mask.to(logits_BSK.dtype).unsqueeze(-1)
        pooled = (logits_BSK * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    if not training:
        slot.prompt_logits = pooled.detach()
    return pooled


def _packed_sequence_logits(x_BSD: Tensor, router: Router, inputs: RoutingInputs) -> Tensor:
    """Mean logits over each sample's prompt, at every position of the sample, `[B, S, K]`."""
    sample_BS, mask_BS = inputs.sample_index, inputs.prompt_mask
    shapes = [None if value is None else tuple(value.shape) for value in (sample_BS, mask_BS)]
    if sample_BS is None or mask_BS is None or set(shapes) != {tuple(x_BSD.shape[:2])}:
        raise ConfigError(
            "granularity 'sequence' on packed rows needs sample_index and prompt_mask of shape "
            f"{tuple(x_BSD.shape[:2])}; they have {shapes[0]} and {shapes[1]}"
        )
    logits_TK = router(x_BSD).flatten(0, 1)
    # Every position numbers its sample, so there are at most as many samples as positions: no host synchronisation.
    sample_T, weight_T1 = sample_BS.flatten(), mask_BS.to(logits_TK.dtype).view(-1, 1)
    sums = torch.zeros_like(logits_TK).index_add(0, sample_T, logits_TK * weight_T1)
    counts = torch.zeros_like(weight_T1).index_add(0, sample_T, weight_T1)
    return (sums / counts.clamp(min=1))[sample_T].view(*x_BSD.shape[:2], -1)


def _given(experts: Tensor | None, x_BSD: Tensor, num_experts: int) -> tuple[Gate, Tensor, Tensor]:
    if experts is None:
        raise ConfigError("granularity 'given' needs set_routing_inputs(model, experts=...) before the forward pass")
    batch, length, _ = x_BSD.shape
    dtype = router_dtype(x_BSD.dtype)
    if experts.is_floating_point():
        weights = _repeat(experts, batch, "experts")
        if weights.dim() == 2:
            weights = weights.unsqueeze(1).expand(-1, length, -1)
        if weights.shape != (batch, length, num_experts):
            raise ConfigError(
                f"experts holds weights of shape {tuple(experts.shape)}; [B, K] or [B, S, K] = "
                f"[{batch}, {length}, {num_experts}] is needed"
            )
        index = weights.argmax(dim=-1, keepdim=True)
        return Gate(None, weights.flatten(0, 1)), torch.zeros_like(weights, dtype=dtype), index
    index = _repeat(experts, batch, "experts")
    index = index.unsqueeze(1).expand(-1, length) if index.dim() == 1 else index
    if index.shape != (batch, length):
        raise ConfigError(f"experts has shape {tuple(experts.shape)}; [B] or [B, S] = [{batch}, {length}] is needed")
    index = index.long().unsqueeze(-1)
    logits = torch.zeros(batch, length, num_experts, dtype=dtype, device=x_BSD.device)
    return Gate(index.flatten(0, 1), None), logits, index


def _control(x_BSD: Tensor, options: GateOptions, inputs: RoutingInputs) -> Tensor:
    batch, length, _ = x_BSD.shape
    if options.router == "random":
        return torch.randint(options.num_experts, (batch, length, 1), device=x_BSD.device)
    return _per_position(inputs.source, "source", batch, length).unsqueeze(-1)


def _per_position(value: Tensor | None, name: str, batch: int, length: int) -> Tensor:
    """`value` int64 `[B]` (of each sample) or `[B, S]` as `[B, S]`."""
    if value is None:
        raise ConfigError(f"this gate needs set_routing_inputs(model, {name}=...) before the forward pass")
    value = _repeat(value, batch, name).long()
    value = value.unsqueeze(1).expand(-1, length) if value.dim() == 1 else value
    if value.shape != (batch, length):
        raise ConfigError(f"{name} has shape {tuple(value.shape)}; [B] or [B, S] = [{batch}, {length}] is needed")
    return value


def _repeat(value: Tensor, batch: int, name: str) -> Tensor:
    """`value` for `batch` rows; beam search repeats each sample, and so does this."""
    if batch % value.shape[0]:
        raise ConfigError(f"{name} describes {value.shape[0]} samples, but the batch has {batch}")
    return value if value.shape[0] == batch else value.repeat_interleave(batch // value.shape[0], dim=0)


class RouterState(nn.Module):
    """Integer buffers, saved with the adapter.

    They are integers because `model.to(bfloat16)` and DeepSpeed's bf16 mode cast every float buffer, which would
    round a bias of many small steps to nothing. `bias_steps` `[K]`: how many steps up minus down each expert's
    selection bias has taken. `load` `[M, K]`: tokens each expert got in the last optimizer step, over all ranks, in
    each of M token sets (one, or image and text); all zero before the first.
    """

    def __init__(self, num_experts: int, num_sets: int, rate: float, device: torch.device) -> None:
        super().__init__()
        self.rate = rate
        self.bias_steps: Tensor
        self.load: Tensor
        self.register_buffer("bias_steps", torch.zeros(num_experts, dtype=torch.int64, device=device))
        self.register_buffer("load", torch.zeros(num_sets, num_experts, dtype=torch.int64, device=device))

    def selection_bias(self) -> Tensor | None:
        """float32 `[K]`, added to the logits for the choice only; None where loss-free balancing is off."""
        return self.bias_steps.to(torch.float32) * self.rate if self.rate > 0 else None

    def step(self, counts_MK: Tensor) -> None:
        """Take over the counts of a finished optimizer step and move the bias towards experts below the mean load."""
        self.load.copy_(counts_MK)
        if self.rate > 0:
            total_K = counts_MK.sum(dim=0).double()
            self.bias_steps += torch.sign(total_K.mean() - total_K).to(torch.int64)

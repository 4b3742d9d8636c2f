"""A stack of adapters that train side by side: the same frozen language model, R adapters, R batches, one pass.

A tiny model spends most of a step in the calls between products, not in the products. Here the adapters of all arms are
stacked along a first axis, so that R runs cost little more calls than one. Each adapter is described by a `MoleConfig`
and computes what `get_peft_model` with that configuration computes; tests/scripts/test_conflict.py compares losses and
parameters after several steps with the package's own layers. Rows of one stack do not influence one another: every
loss, clipping norm and update belongs to one adapter. The one exception are the experts that router `random` draws: one
generator serves all rows and all passes, so its draws depend on the other arms and on how often the meters look.

Shape legend: R adapters, L layers, B samples, S positions, T = B S tokens, D hidden size, F size inside the FFN,
K experts, N rank slots (all experts' ranks and the shared expert's, side by side), V words.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from llava_mole.mole import MoleConfig

SCALES = ("none", "straight_through", "prob", "prob_times_k")
SUPPORTED = {
    "r", "alpha", "attention_r", "num_experts", "mode", "granularity", "router_scope", "router", "expert_scale",
    "temperature", "shared_r", "balance_coef", "balance_scale", "balance_group", "bias_update_rate",
    "router_init_std", "router_detach_input", "add_balance_loss", "train_router", "sequence_tokens", "source_coef",
}  # fmt: skip
"""Options of `MoleConfig` that a stack computes; all others must have their default value."""


@dataclass(frozen=True)
class Member:
    """One adapter of a stack: its configuration and what only its training knows."""

    config: MoleConfig
    rate: float = 1.0
    """Factor on the learning rate of everything."""
    router_rate: float = 1.0
    """Factor on the learning rate of the router, beside `rate`."""
    source_coef: float = 0.0
    """Coefficient of the cross-entropy between the router's probabilities and the sample's source, in training only."""
    image_only: bool = False
    """Granularity `sequence`: average the router's logits over the image's positions alone."""
    anneal_from: float = 1.0
    """Temperature at the start of training; it falls to 1 in a geometric row over the first half of the steps."""
    balance_until: float = 1.0
    """Share of the steps in which the balance loss counts."""
    separate_until: float = 0.0
    """Share of the steps in which each sample uses the expert of its source, as if experts began as single-domain
    adapters; the router learns from `source_coef` and the balance loss meanwhile."""


@dataclass
class Routed:
    """What the routers of a pass decided: `logits`, `probs` and `chosen` (one-hot) by layer, each `[R, B, S, K]`."""

    logits: list[Tensor] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)


class FrozenLlama:
    """The frozen weights of a Llama in float32 and its rotary tables for `length` positions."""

    def __init__(self, model: LlamaForCausalLM, length: int) -> None:
        config = model.config
        if config.num_key_value_heads != config.num_attention_heads:
            raise ValueError("the fast loop computes models whose attention heads have keys and values of their own")
        self.heads, self.epsilon = config.num_attention_heads, config.rms_norm_eps
        model = model.float().requires_grad_(False)
        self.layers = list(model.model.layers)
        self.norm, self.vocabulary = model.model.norm.weight, model.lm_head.weight
        self.embeddings = model.get_input_embeddings().weight
        cos, sin = model.model.rotary_emb(self.embeddings[:1, None], torch.arange(length)[None])
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
        self.width, self.inner = config.hidden_size, config.intermediate_size

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding of `x` `[..., S, D / heads]`."""
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-right, left), dim=-1) * self.sin


class Stack:
    """R adapters on one frozen language model. `parameters` holds all of them, by kind, `[L, ..., R, ...]`."""

    def __init__(self, base: FrozenLlama, members: Sequence[Member], seeds: Sequence[int]) -> None:
        self.base, self.members = base, list(members)
        configs = [member.config for member in members]
        for config in configs:
            _check(config)
        self.num_experts = max(config.num_experts for config in configs)
        self.attention_slots = max(config.attention_r or config.r for config in configs)
        self.ffn_slots = max(config.num_experts * config.r + config.shared_r for config in configs)
        self.parameters = _start(self, seeds)
        self.scaling = configs[0].scaling
        R, K, N = len(configs), self.num_experts, self.ffn_slots
        self.slots_of_expert, self.always = torch.zeros(R, K, N), torch.zeros(R, 1, N)
        for row, config in enumerate(configs):
            ranks = config.num_experts * config.r
            for expert in range(config.num_experts if config.num_experts > 1 else 0):
                self.slots_of_expert[row, expert, expert * config.r : (expert + 1) * config.r] = 1
            if config.num_experts == 1:
                self.always[row, 0, :ranks] = 1
            self.always[row, 0, ranks : ranks + config.shared_r] = 1
        learned = [c.num_experts > 1 and c.router == "learned" for c in configs]
        self.learned = torch.tensor(learned)
        self.dense = _flags(configs, lambda c: c.mode == "dense")
        self.scale = {s: _flags(configs, lambda c, s=s: c.mode == "sparse" and c.expert_scale == s) for s in SCALES}
        self.sequence = _flags(configs, lambda c: c.granularity == "sequence").unsqueeze(-1)
        self.one_router = _flags(configs, lambda c: c.router_scope == "model").unsqueeze(-1)
        self.detached = _flags(configs, lambda c: c.router_detach_input)
        self.oracle = _flags(configs, lambda c: c.router == "oracle")
        self.random = _flags(configs, lambda c: c.router == "random")
        self.temperature = torch.tensor([c.temperature for c in configs]).view(-1, 1, 1, 1)
        layers = len(base.layers)
        self.load = torch.zeros(layers, R, K)
        self.bias = torch.zeros(layers, R, 1, 1, K)
        self.bias_rate = torch.tensor([c.bias_update_rate for c in configs]).view(-1, 1)
        self.generator = torch.Generator().manual_seed(seeds[0])

    def forward(self, x_RBSD: Tensor, source_RB: Tensor, images: int, progress: float = 1.0) -> tuple[Tensor, Routed]:
        """Logits at the last position, `[R, B, V]`, and the routing.

        `source_RB` is int64; the first `images` positions hold the image. `progress` is the share of the training that
        is over, for what changes along it.
        """
        base, R, routed = self.base, len(self.members), Routed()
        B, S, D = x_RBSD.shape[1:]
        heads, p = base.heads, {name: value.unbind(0) for name, value in self.parameters.items()}
        n_attention = self.attention_slots
        first, x = x_RBSD, x_RBSD.reshape(R, B * S, D)
        for number, layer in enumerate(base.layers):
            normed = F.rms_norm(x, (D,), layer.input_layernorm.weight, base.epsilon)
            rows, attention = normed.view(R * B * S, D), layer.self_attn
            z = torch.bmm(normed, p["qkv_A"][number].transpose(1, 2))
            parts = []
            for place, linear in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
                own = z[..., place * n_attention : (place + 1) * n_attention]
                y = torch.baddbmm(
                    (rows @ linear.weight.T).view(R, -1, D), own, p["qkv_B"][number][place], alpha=self.scaling
                )
                parts.append(y.view(R * B, S, heads, D // heads).transpose(1, 2))
            q, k, v = base.rotate(parts[0]), base.rotate(parts[1]), parts[2]
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(R, B * S, D)
            z = torch.bmm(a, p["o_A"][number].transpose(1, 2))
            y = (a.view(-1, D) @ attention.o_proj.weight.T).view(R, -1, D)
            x = x + torch.baddbmm(y, z, p["o_B"][number], alpha=self.scaling)
            normed = F.rms_norm(x, (D,), layer.post_attention_layernorm.weight, base.epsilon)
            gates = self._gates(number, normed, first, source_RB, images, progress, p["router"], routed)
            x = x + self._ffn(layer.mlp, normed, gates, number, p)
        last = F.rms_norm(x.view(R, B, S, D)[:, :, -1], (D,), base.norm, base.epsilon)
        return last @ base.vocabulary.T, routed

    def _ffn(
        self, mlp: torch.nn.Module, x: Tensor, gates: Tensor, number: int, p: dict[str, tuple[Tensor, ...]]
    ) -> Tensor:
        R, _, D = x.shape
        N, rows = self.ffn_slots, x.view(-1, D)
        z = torch.bmm(x, p["in_A"][number].transpose(1, 2))
        gate, up = (
            torch.baddbmm(
                (rows @ linear.weight.T).view(R, -1, self.base.inner),
                z[..., place * N : (place + 1) * N] * gates,
                p["in_B"][number][place],
                alpha=self.scaling,
            )
            for place, linear in enumerate((mlp.gate_proj, mlp.up_proj))
        )
        inner = F.silu(gate) * up
        z = torch.bmm(inner, p["down_A"][number].transpose(1, 2)) * gates
        y = (inner.view(-1, self.base.inner) @ mlp.down_proj.weight.T).view(R, -1, D)
        return torch.baddbmm(y, z, p["down_B"][number], alpha=self.scaling)

    def _gates(
        self, number: int, x: Tensor, first: Tensor, source_RB: Tensor, images: int, progress: float,
        routers: Sequence[Tensor], routed: Routed,
    ) -> Tensor:  # fmt: skip
        """The weight of every rank slot for every token, `[R, T, N]`."""
        R, B, S, _ = first.shape
        K = self.num_experts
        if K == 1:
            return self.always
        if self.detached.any():
            x = torch.where(self.detached, x.detach(), x)
        logits = torch.bmm(x, routers[number].transpose(1, 2)).view(R, B, S, K)
        if self.one_router.any():
            by_model = torch.bmm(first.reshape(R, B * S, -1), routers[0].transpose(1, 2)).view(R, B, S, K)
            logits = torch.where(self.one_router, by_model, logits)
        if self.sequence.any():
            weight = torch.full((R, 1, S, 1), 1 / S)
            for row, member in enumerate(self.members):
                if member.image_only or member.config.sequence_tokens == "image":
                    weight[row] = 0
                    weight[row, :, :images] = 1 / images
            pooled = (logits * weight).sum(dim=2, keepdim=True).expand(-1, -1, S, -1)
            logits = torch.where(self.sequence, pooled, logits)
        logits = logits / self._temperature(progress)
        probs = logits.softmax(dim=-1)
        index = (logits.detach() + self.bias[number]).argmax(dim=-1)
        chosen = F.one_hot(index, K).to(x.dtype)
        own = F.one_hot(source_RB, K).to(x.dtype).unsqueeze(2).expand(-1, -1, S, -1)
        p, scale = probs.view(R, B * S, K), self.scale
        weight = (
            scale["none"]
            + scale["straight_through"] * (1 + p - p.detach())
            + (scale["prob"] + K * scale["prob_times_k"]) * p
        )
        separate = torch.tensor([progress < m.separate_until for m in self.members]).view(-1, 1, 1)
        by_source = self.oracle | separate
        drawn = None
        if self.random.any():
            drawn = F.one_hot(torch.randint(K, (R, B, S), generator=self.generator), K).to(x.dtype)
            chosen = torch.where(self.random.unsqueeze(-1), drawn, chosen)
        chosen = torch.where(by_source.unsqueeze(-1), own, chosen)
        mixed = torch.where(by_source | self.random, chosen.view(R, B * S, K), chosen.view(R, B * S, K) * weight)
        mixed = torch.where(self.dense, p, mixed)
        routed.logits.append(logits)
        routed.probs.append(probs)
        routed.chosen.append(chosen)
        return torch.baddbmm(self.always, mixed, self.slots_of_expert)

    def state(self) -> dict[str, Tensor]:
        """What a trained stack answers with: its parameters, and the routers' biases of load-free balancing."""
        return {"bias": self.bias, **{name: p.detach() for name, p in self.parameters.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned. Raises KeyError for a state without biases."""
        self.bias = state["bias"]
        self.parameters = {name: value for name, value in state.items() if name != "bias"}

    def _temperature(self, progress: float) -> Tensor:
        over = min(1.0, progress * 2)
        start = torch.tensor([m.anneal_from for m in self.members]).view(-1, 1, 1, 1)
        return self.temperature * start ** (1 - over)

    def auxiliary_loss(self, routed: Routed, source_RB: Tensor, progress: float = 1.0) -> Tensor:
        """Balance loss and source loss of all adapters, `[R]`, as `mole_auxiliary_loss` defines the first."""
        total = torch.zeros(len(self.members))
        if not routed.probs:
            return total
        K = self.num_experts
        values = []
        for row, member in enumerate(self.members):
            config, value = member.config, torch.zeros(())
            if self.learned[row] and config.balance_coef > 0 and progress <= member.balance_until:
                # probabilities and loads of a layer's sample, [L, B, K]
                P = torch.stack([probs[row].mean(dim=1) for probs in routed.probs])
                f = torch.stack([chosen[row].mean(dim=1) for chosen in routed.chosen])
                if config.balance_group == "sample":
                    product = (f * P).sum(-1).mean()
                elif config.balance_group == "micro_batch":
                    product = (f.mean(1) * P.mean(1)).sum(-1).mean()
                else:
                    load = self.load[:, row]
                    share = torch.where(load.sum(-1, keepdim=True) > 0, load, torch.full_like(load, 1 / K))
                    product = (share * P.mean(1)).sum(-1).mean()
                value = config.balance_coef * product * (K if config.balance_scale == "switch" else 1)
            source_coef = member.source_coef + config.source_coef
            if source_coef > 0:
                B, S = source_RB.shape[1], routed.logits[0].shape[2]
                target = source_RB[row].repeat_interleave(S)
                each = [F.cross_entropy(logits[row].reshape(B * S, K), target) for logits in routed.logits]
                value = value + source_coef * torch.stack(each).mean()
            values.append(value)
        return torch.stack(values)

    def after_step(self, routed: Routed) -> None:
        """Store the loads of a finished step, and move the biases of load-free balancing."""
        if not routed.chosen:
            return
        self.load = torch.stack([chosen.detach().mean(dim=(1, 2)) for chosen in routed.chosen])
        step = torch.sign(self.load.mean(-1, keepdim=True) - self.load) * self.bias_rate
        self.bias += step.view(*self.bias.shape)


def _check(config: MoleConfig) -> None:
    """Raise ValueError for an option that a stack does not compute."""
    plain = MoleConfig(r=config.r)
    for name, value in config.to_dict().items():
        if name not in SUPPORTED and getattr(plain, name, None) != value:
            raise ValueError(f"the fast loop does not compute {name}={value!r}")
    if config.expert_scale not in SCALES:
        raise ValueError(f"the fast loop does not compute expert_scale={config.expert_scale!r}")


def _flags(configs: Iterable[MoleConfig], test: Callable[[MoleConfig], bool]) -> Tensor:
    """A bool `[R, 1, 1]`: which configurations pass `test`."""
    return torch.tensor([test(config) for config in configs]).view(-1, 1, 1)


def _start(stack: Stack, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Initial parameters: A uniform and B zero, routers as PyTorch's linear, zeros in slots that an adapter lacks.

    An adapter's values depend on its seed and its own size alone, so that arms of one rank start alike.
    """
    base, R = stack.base, len(stack.members)
    L, D, inner = len(base.layers), base.width, base.inner
    n, N, K = stack.attention_slots, stack.ffn_slots, stack.num_experts
    p = {
        "qkv_A": torch.zeros(L, R, 3 * n, D), "qkv_B": torch.zeros(L, 3, R, n, D),
        "o_A": torch.zeros(L, R, n, D), "o_B": torch.zeros(L, R, n, D),
        "in_A": torch.zeros(L, R, 2 * N, D), "in_B": torch.zeros(L, 2, R, N, inner),
        "down_A": torch.zeros(L, R, N, inner), "down_B": torch.zeros(L, R, N, D),
        "router": torch.zeros(L, R, K, D),
    }  # fmt: skip
    for row, (member, seed) in enumerate(zip(stack.members, seeds, strict=True)):
        config, generator = member.config, torch.Generator().manual_seed(seed)

        def uniform(*shape: int, generator: torch.Generator = generator) -> Tensor:
            bound = 1 / math.sqrt(shape[-1])
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        own, slots = config.attention_r or config.r, config.num_experts * config.r + config.shared_r
        for layer in range(L):
            for place in range(3):
                p["qkv_A"][layer, row, place * n : place * n + own] = uniform(own, D)
            p["o_A"][layer, row, :own] = uniform(own, D)
        for layer in range(L):
            for place in range(2):
                p["in_A"][layer, row, place * N : place * N + slots] = uniform(slots, D)
            p["down_A"][layer, row, :slots] = uniform(slots, inner)
        for layer in range(L):
            weight = uniform(config.num_experts, D)
            if config.router_init_std is not None:
                weight = torch.empty_like(weight).normal_(std=config.router_init_std, generator=generator)
            p["router"][layer, row, : config.num_experts] = weight
    return {name: value.requires_grad_() for name, value in p.items()}


ROW_AXIS = {"qkv_B": 2, "in_B": 2}
"""The axis of the adapters in a parameter; 1 where it is not named."""


class Adam:
    """Adam for a stack: clipping, learning rate and update are each adapter's own. No weight decay."""

    def __init__(self, stack: Stack, clip: float = 1.0, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.stack, self.clip, self.betas, self.steps = stack, clip, betas, 0
        self.first = {name: torch.zeros_like(p) for name, p in stack.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in stack.parameters.items()}
        rates = [m.router_rate if m.config.router_trains else 0.0 for m in stack.members]
        self.rate, self.router_rate = torch.tensor([m.rate for m in stack.members]), torch.tensor(rates)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with the gradients in the parameters, which are cleared."""
        parameters, R = self.stack.parameters, len(self.stack.members)
        self.steps += 1
        correct = [1 - beta**self.steps for beta in self.betas]
        squares = torch.zeros(R)
        for name, p in parameters.items():
            if p.grad is not None:
                axis = ROW_AXIS.get(name, 1)
                squares += p.grad.square().sum(dim=[d for d in range(p.dim()) if d != axis])
        factor = (self.clip / (squares.sqrt() + 1e-6)).clamp(max=1)
        for name, p in parameters.items():
            if p.grad is None:
                continue
            shape = [1] * p.dim()
            shape[ROW_AXIS.get(name, 1)] = R
            grad = p.grad * factor.view(shape)
            self.first[name].lerp_(grad, 1 - self.betas[0])
            self.second[name].mul_(self.betas[1]).addcmul_(grad, grad, value=1 - self.betas[1])
            divisor = (self.second[name] / correct[1]).sqrt_().add_(1e-8)
            factors = self.rate * self.router_rate if name == "router" else self.rate
            p -= self.first[name] / divisor * (factors * (rate / correct[0])).view(shape)
            p.grad = None

"""The fast loop of the search for conflict computes what the package's own layers compute, adapter by adapter."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava_mole.mole import MoleConfig, mole_after_step, mole_auxiliary_loss, set_routing_inputs
from scripts.conflict.stack import Adam, FrozenLlama, Member, Stack

B, S, D, K, STEPS, RATE = 6, 4, 32, 3, 5, 2e-2
LEAD = {"balance_scale": "switch", "balance_group": "global_batch"}
OPTIONS: dict[str, dict[str, object]] = {
    "LoRA": {"num_experts": 1},
    "LoRA of rank 3": {"num_experts": 1, "r": 3},
    "paper": {},
    "straight_through": {"expert_scale": "straight_through", **LEAD},
    "prob_times_k": {"expert_scale": "prob_times_k", **LEAD, "balance_coef": 0.1},
    "prob": {"expert_scale": "prob", "balance_group": "micro_batch", "temperature": 0.5},
    "dense": {"mode": "dense"},
    "shared": {"shared_r": 4},
    "oracle": {"router": "oracle", "balance_coef": 0.0},
    "sequence": {"granularity": "sequence", "expert_scale": "prob_times_k", "balance_group": "micro_batch"},
    "model": {
        "granularity": "sequence", "router_scope": "model", "expert_scale": "prob_times_k", "balance_coef": 0.0,
    },
    "image": {
        "granularity": "sequence", "sequence_tokens": "image", "expert_scale": "prob_times_k", "balance_coef": 1e-3,
        **LEAD,
    },
    "source": {"source_coef": 0.1, "expert_scale": "prob_times_k", **LEAD},
    "bias": {"expert_scale": "prob_times_k", "balance_coef": 0.0, "bias_update_rate": 0.05},
    "detached": {"expert_scale": "prob_times_k", "router_detach_input": True},
    "frozen": {"train_router": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40,
        max_position_embeddings=16, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def values_of(stack: Stack, row: int, names: list[str]) -> dict[str, Tensor]:
    """Row `row` of a stack under the names that the package's layers give its parameters."""
    p, config, n, found = stack.parameters, stack.members[row].config, stack.attention_slots, {}
    own, N, ranks = config.attention_r or config.r, stack.ffn_slots, config.num_experts * config.r
    for name in names:
        parts = name.split(".")
        layer = int(parts[parts.index("layers") + 1])
        linear = next((x for x in ("q_proj", "k_proj", "v_proj", "o_proj") if x in parts), None)
        if "mole_router" in parts:
            found[name] = p["router"][layer, row, : config.num_experts]
        elif linear == "o_proj":
            found[name] = p[f"o_{parts[-1]}"][layer, row, :own]
        elif linear is not None:
            place = ("q_proj", "k_proj", "v_proj").index(linear)
            at = slice(place * n, place * n + own)
            found[name] = p["qkv_A"][layer, row, at] if parts[-1] == "A" else p["qkv_B"][layer, place, row, :own]
        else:
            projection, side = next(x for x in ("gate", "up", "down") if f"{x}_proj" in name), parts[-1][-1]
            slots = slice(ranks, ranks + config.shared_r) if "shared" in parts[-1] else slice(0, ranks)
            if projection == "down":
                value = p[f"down_{side}"][layer, row, slots]
            else:
                place = ("gate", "up").index(projection)
                both = p["in_A"][layer, row, place * N : (place + 1) * N]
                value = both[slots] if side == "A" else p["in_B"][layer, place, row, slots]
            found[name] = value if "shared" in parts[-1] else value.view(config.num_experts, config.r, -1)
    return found


def train_package(net: nn.Module, config: MoleConfig, batches: list[tuple[Tensor, Tensor, Tensor]]) -> list[float]:
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE, weight_decay=0), []
    mask = torch.ones(B, S, dtype=torch.bool)
    net.train()
    for x, answer, source in batches:
        set_routing_inputs(net, source=source, prompt_mask=mask, image_mask=mask & (torch.arange(S) < 1))
        loss = nn.functional.cross_entropy(net(inputs_embeds=x, use_cache=False).logits[:, -1], answer)
        losses.append(loss.item())
        (loss + mole_auxiliary_loss(net, token_mask=mask)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mole_after_step(net)
    return losses


def test_equals_the_package(base: LlamaForCausalLM) -> None:
    """Losses and parameters of all adapters of one stack after several steps, against one model for each."""
    configs = {
        name: MoleConfig(**{"r": 1, "num_experts": K, "add_balance_loss": False, **options})  # type: ignore[arg-type]
        for name, options in OPTIONS.items()
    }
    stack = Stack(FrozenLlama(copy.deepcopy(base), S), [Member(c) for c in configs.values()], list(range(len(configs))))
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(B, S, D, generator=generator), torch.randint(40, (B,), generator=generator), torch.arange(B) % K)
        for _ in range(STEPS)
    ]
    nets = {}
    for row, (name, config) in enumerate(configs.items()):
        nets[name] = get_peft_model(copy.deepcopy(base), config)
        own = {n: p for n, p in nets[name].named_parameters() if "mole_" in n}
        start = values_of(stack, row, list(own))
        with torch.no_grad():
            for parameter, value in zip(own.values(), start.values(), strict=True):
                assert parameter.shape == value.shape
                parameter.copy_(value)
    R, losses = len(configs), []
    optimizer = Adam(stack)
    for x, answer, source in batches:
        logits, routed = stack.forward(x.expand(R, *x.shape), source.expand(R, -1), 1)
        each = nn.functional.cross_entropy(logits.flatten(0, 1), answer.repeat(R), reduction="none").view(R, B).mean(1)
        losses.append(each.tolist())
        (each + stack.auxiliary_loss(routed, source.expand(R, -1))).sum().backward()
        optimizer.step(RATE)
        stack.after_step(routed)
    for row, (name, config) in enumerate(configs.items()):
        expected = train_package(nets[name], config, batches)
        assert [step[row] for step in losses] == pytest.approx(expected, rel=1e-3), name
        own = {n: p for n, p in nets[name].named_parameters() if "mole_" in n}
        for key, value in values_of(stack, row, list(own)).items():
            torch.testing.assert_close(value, own[key], rtol=0, atol=2e-3, msg=f"{name} {key}")


def test_an_option_that_is_not_computed_is_refused(base: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="shared_a"):
        Stack(FrozenLlama(copy.deepcopy(base), S), [Member(MoleConfig(shared_a=True))], [0])


def test_a_state_answers_as_the_stack_that_it_was_taken_from(base: LlamaForCausalLM) -> None:
    """Its parameters alone do not: load-free balancing keeps biases outside of them."""
    options = OPTIONS["bias"] | {"add_balance_loss": False, "r": 2}
    members = [Member(MoleConfig(**{"num_experts": K, **options}))]  # type: ignore[arg-type]
    stack, again = (Stack(FrozenLlama(copy.deepcopy(base), S), members, [0]) for _ in range(2))
    stack.bias = torch.randn(stack.bias.shape, generator=torch.Generator().manual_seed(0))
    for value in stack.parameters.values():
        value.data.normal_(generator=torch.Generator().manual_seed(1))
    x, source = torch.randn(1, B, S, D, generator=torch.Generator().manual_seed(2)), torch.zeros(1, B, dtype=torch.long)
    with torch.no_grad():
        logits, _ = stack.forward(x, source, images=1)
        again.load_state(stack.state())
        assert torch.equal(again.forward(x, source, images=1)[0], logits)
        again.bias = torch.zeros_like(again.bias)
        assert not torch.equal(again.forward(x, source, images=1)[0], logits)

"""The schedule's values and the optimizer's groups."""

import pytest
import torch

from llava_mole.config import TrainConfig
from llava_mole.train.optim import build_optimizer, schedule_factor, set_learning_rates


def test_schedule_warms_up_linearly_and_ends_at_the_floor() -> None:
    factors = [schedule_factor(step, total_steps=101, warmup_steps=4, floor=0.1) for step in range(101)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[-1] == pytest.approx(0.1)
    assert factors[52] == pytest.approx(0.55)  # half-way of the cosine
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_schedule_shorter_than_its_warm_up() -> None:
    assert [schedule_factor(s, 3, 500, 0.1) for s in range(3)] == pytest.approx([0.002, 0.004, 0.006])


def parameters() -> dict[str, torch.nn.Parameter]:
    names = [
        "projector.0.weight",
        "projector.0.bias",
        "language_model.layers.0.self_attn.q_proj.mole_lora.default.A",
        "language_model.layers.0.mlp.mole_experts.default.gate_proj_A",
        "language_model.layers.0.mlp.mole_router.default.weight",
    ]
    return {n: torch.nn.Parameter(torch.zeros(2) if n.endswith("bias") else torch.zeros(2, 2)) for n in names}


def test_groups_have_their_own_rates_and_floors() -> None:
    config = TrainConfig(
        output_dir="x", learning_rate=1e-2, min_learning_rate=1e-3, projector_learning_rate=4e-2,
        router_learning_rate=2e-3, warmup_steps=0,
    )  # fmt: skip
    optimizer = build_optimizer(parameters(), config)
    assert set_learning_rates(optimizer, 0, 11, config) == {"projector": 4e-2, "adapter": 1e-2, "router": 2e-3}
    last = set_learning_rates(optimizer, 10, 11, config)
    assert last == pytest.approx({"projector": 4e-3, "adapter": 1e-3, "router": 2e-4})


def test_decay_spares_experts_routers_and_biases() -> None:
    named = parameters()
    optimizer = build_optimizer(named, TrainConfig(output_dir="x", weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in named.items() if id(p) in decayed} == {
        "projector.0.weight",
        "language_model.layers.0.self_attn.q_proj.mole_lora.default.A",
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)

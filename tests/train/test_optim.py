"""The schedule's values and the optimizer's groups."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_mole.common.errors import ConfigError
from llava_mole.config import TrainConfig, load_config
from llava_mole.train.optim import (
    LONG_WARMUP,
    announce_schedule,
    build_optimizer,
    schedule_factor,
    set_learning_rates,
    warmup_steps,
)

ROOT = Path(__file__).parents[2]


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


SCHEDULES = [
    # settings, steps, logged
    ({"warmup_steps": 50}, 1000, "schedule: 1,000 steps, 50 of them warm-up (5.0%), rate 0.01 down to 0.001"),
    ({"warmup_ratio": 0.03}, 1000, "schedule: 1,000 steps, 30 of them warm-up (3.0%), rate 0.01 down to 0.001"),
    ({"warmup_ratio": 0.03}, 101, "schedule: 101 steps, 4 of them warm-up"),
    ({"warmup_ratio": 0.03}, 1, "schedule: 1 step, 1 of them warm-up (100.0%), rate 0.01 down to 0.01"),
    ({"warmup_steps": 0}, 2, "schedule: 2 steps, 0 of them warm-up (0.0%), rate 0.01 down to 0.001"),
    ({"warmup_steps": 0, "projector_learning_rate": 0.5}, 9, "rate 0.01 down to 0.001, projector 0.5 down to 0.05"),
]


@pytest.mark.parametrize(("values", "steps", "expected"), SCHEDULES)
def test_the_schedule_is_announced(
    values: dict[str, Any], steps: int, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(output_dir="x", learning_rate=1e-2, min_learning_rate=1e-3, **values)
    with caplog.at_level(logging.INFO):
        announce_schedule(config, steps, begun=False)
    assert expected in caplog.text
    assert "the warm-up takes" not in caplog.text


@pytest.mark.parametrize(("warmup", "steps"), [(500, 50), (50, 49), (2, 1), (500, 72)])
def test_a_warm_up_longer_than_the_data_is_refused(warmup: int, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    config = TrainConfig(output_dir="x", warmup_steps=warmup)
    with pytest.raises(ConfigError, match=rf"warmup_steps is {warmup}, but the run has {steps} steps? .*warmup_ratio"):
        announce_schedule(config, steps, begun=False)
    announce_schedule(config, steps, begun=True)  # an earlier version let it start
    announce_schedule(TrainConfig(output_dir="x", warmup_steps=warmup, max_steps=steps), steps, begun=False)
    assert caplog.text.count(f"the warm-up takes {steps} of {steps} step") == 2


@pytest.mark.parametrize(("values", "steps", "warned"), [
    ({"warmup_steps": 20}, 100, False), ({"warmup_steps": 21}, 100, True), ({"warmup_ratio": 0.2}, 100, False),
    ({"warmup_ratio": 0.5}, 100, True), ({"warmup_steps": 1}, 3, False), ({"warmup_steps": 100}, 100, True),
])  # fmt: skip
def test_a_warm_up_above_a_fifth_is_warned_about(
    values: dict[str, Any], steps: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    announce_schedule(TrainConfig(output_dir="x", **values), steps, begun=False)
    assert ("the warm-up takes" in caplog.text) == warned


def test_shipped_configurations_arrive() -> None:
    """The schedule of every shipped run, with the records of its data, or 300 of the user's own for a task."""
    mixture = ("finetune_mole", "finetune_lora", "finetune_mole_siglip", "finetune_mole_anyres", "finetune_mole_native",
               "finetune")  # fmt: skip
    captions = ("pretrain", "pretrain_siglip", "pretrain_native", "pretrain_sharegpt4v")
    sizes = dict.fromkeys(mixture, 3_000_000 // 64) | dict.fromkeys(captions, 1_000_000 // 256)
    for path in [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/tiny").glob("*.yaml")]:
        train = load_config(path).train
        steps = train.max_steps or sizes.get(path.stem, 300 // train.global_batch_size)
        assert warmup_steps(train, steps) <= max(1, LONG_WARMUP * steps), path

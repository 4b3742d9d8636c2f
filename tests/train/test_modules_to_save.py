"""Modules of the language model that train beside the adapter, and the parameters that weight decay reaches."""

from pathlib import Path

import pytest
import torch
from torch import nn
from worlds.tiny_models import make_world

from llava_mole.common.errors import CheckpointError, ConfigError
from llava_mole.config import TrainConfig, parse_run_config
from llava_mole.model.builder import load_pretrained_model
from llava_mole.train.optim import build_optimizer
from llava_mole.train.train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=8)
    return directory


def run(world: Path, name: str, saved: str, *more: str) -> Path:
    options = ["--adapter.options", f"{{modules_to_save: {saved}}}", "--train.output_dir", str(world / name)]
    steps = ["--train.max_steps", "2", "--train.warmup_steps", "0", "--device", "cpu"]
    return train(parse_run_config([str(world / "config.yaml"), *options, *steps, *more]))


@pytest.mark.parametrize("saved", ["[lm_head]", "[norm]", "[embed_tokens]", "[lm_head, post_attention_layernorm]"])
def test_they_train_are_saved_and_load(saved: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run(world, saved.strip("[]").replace(", ", "-"), saved)
    assert "modules_to_save" in capsys.readouterr().err, "the table of parameters counts them"
    model = load_pretrained_model(run_dir, device="cpu").model
    state = model.language_model.state_dict()
    copies = {name: value for name, value in state.items() if ".modules_to_save." in name}
    assert copies
    for name, value in copies.items():
        original = state[name.replace("modules_to_save.default", "original_module")]
        assert not torch.equal(value, original), f"{name} has not been trained"


def test_a_run_starts_from_another_with_the_same_modules_only(world: Path) -> None:
    first = run(world, "first", "[lm_head]")
    run(world, "second", "[lm_head]", "--init-from", str(first))
    for other in ("[norm]", "[]", "[lm_head, norm]"):
        with pytest.raises(CheckpointError, match=r"another adapter: modules_to_save \['lm_head'\] there"):
            run(world, "third", other, "--init-from", str(first))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ("[nowhere]", "modules_to_save names 'nowhere', but no module name ends with it"),
        ("[mlp]", "modules_to_save names 'mlp', but .*mlp gets adapters; take it out"),
        ("[up_proj]", "modules_to_save names 'up_proj'"),
        ("[self_attn]", "modules_to_save names 'self_attn'"),
        ("[lm_head, q_proj]", "modules_to_save names 'q_proj'"),
        ("[layers]", "modules_to_save names 'layers'"),
    ],
)
def test_modules_that_would_not_train_as_said_are_refused(saved: str, message: str, world: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(world, "refused", saved)


@pytest.mark.parametrize(
    ("name", "shape", "decays"),
    [
        ("projector.0.weight", (4, 4), True),
        ("projector.0.bias", (4,), False),
        ("language_model.base_model.model.layers.0.self_attn.q_proj.mole_lora.default.A", (2, 4), True),
        ("language_model.base_model.model.layers.0.mlp.up_proj.lora_A.default.weight", (2, 4), True),
        ("language_model.base_model.model.layers.0.mlp.mole_experts.default.up_proj_A", (3, 2, 4), False),
        ("language_model.base_model.model.layers.0.mlp.mole_router.default.weight", (3, 4), False),
        ("language_model.base_model.model.lm_head.modules_to_save.default.weight", (9, 4), False),
        ("language_model.base_model.model.embed_tokens.modules_to_save.default.weight", (9, 4), False),
        ("language_model.base_model.model.norm.modules_to_save.default.weight", (4,), False),
    ],
)
def test_weight_decay_by_kind_of_module(name: str, shape: tuple[int, ...], decays: bool) -> None:
    optimizer = build_optimizer(
        {name: nn.Parameter(torch.zeros(shape))}, TrainConfig(output_dir="run", weight_decay=0.1)
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1 if decays else 0.0]

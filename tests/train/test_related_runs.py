"""Training runs with the presets of related methods: they train, save, resume and answer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds.tiny_models import make_world

from llava_mole.common.errors import ConfigError
from llava_mole.config import parse_run_config
from llava_mole.inference.predictor import Predictor
from llava_mole.mole import ExpertLayer, set_routing_inputs
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train

OPTIONS = {
    "hydralora": {},
    "asymlora": {},
    "coin-moelora": {},
    "moelora-task": {"num_tasks": 2},
    "loramoe": {"balance_coef": 0.1, "group_delta": 0.1},
    "mocle": {"task_dim": 4},
    "octavius": {},
    "mixlora": {},
    "mola": {"experts_by_layer": [2, 4]},
    "molora": {},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=8, text_only_every=5)
    return directory


def arguments(world: Path, preset: str, *more: str) -> list[str]:
    options = ["--adapter.options", json.dumps(OPTIONS[preset])]
    return [str(world / "config.yaml"), "--train.output_dir", str(world / preset), "--adapter.preset", preset,
            "--adapter.num_experts", "4", "--train.max_steps", "2", *options, *more]  # fmt: skip


@pytest.mark.parametrize("preset", OPTIONS)
def test_a_run_trains_saves_and_answers(preset: str, world: Path) -> None:
    run = train(parse_run_config(arguments(world, preset)))
    entries = read_metrics(run / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2]
    balanced = preset in ("asymlora", "loramoe", "mixlora", "mola")
    assert all((entry["auxiliary_loss"] > 0) == balanced for entry in entries)
    saved = load_file(run / "checkpoint-2" / "adapter" / "adapter_model.safetensors")
    assert any("mole_router" in name for name in saved)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    predictor = Predictor.from_pretrained(run, device="cpu")
    model = predictor.loaded.model.language_model
    layer = next(module for module in model.modules() if isinstance(module, ExpertLayer))
    assert (layer.configs["default"].r, layer.configs["default"].num_experts) == (2, 2 if preset == "mola" else 4)
    if preset in ("moelora-task", "mocle"):
        with pytest.raises(ConfigError, match="routes by the routing input 'task'"):
            predictor.generate([None], ["What?"], max_new_tokens=1)
        set_routing_inputs(model, task=torch.tensor([1]))
    assert len(predictor.generate([None], ["What?"], max_new_tokens=2)) == 1


def test_packed_and_padded_rows_give_the_same_losses(world: Path) -> None:
    losses = {}
    for batching in ("packed", "padded"):
        more = ("--train.batching", batching, "--train.output_dir", str(world / batching), "--adapter.dropout", "0")
        run = train(parse_run_config(arguments(world, "octavius", *more)))
        losses[batching] = [entry["loss"] for entry in read_metrics(run / "metrics.jsonl")]
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-4)


def test_answers_in_validation_are_refused_for_presets_that_need_a_task(world: Path) -> None:
    more = ("--data.validation_samples", "2", "--train.validate_every", "1", "--train.validation_answers", "1")
    with pytest.raises(ConfigError, match="cannot be used with adapter.options.granularity 'task'"):
        parse_run_config(arguments(world, "mocle", *more))


def three_sources(world: Path) -> list[str]:
    """A third source: the records of the first again."""
    data = world / "red" / "red.json"
    return ["--data.sources", json.dumps({
        name: {"annotations": str(data), "image_folder": str(world / "red")} for name in ("red", "blue", "green")
    })]  # fmt: skip


def test_groups_without_their_loss_ask_for_no_types(world: Path) -> None:
    """The preset's `balance_coef` is 0, so a mixture of three sources trains, though LoRAMoE knows two types."""
    given = [*arguments(world, "loramoe", *three_sources(world)), "--adapter.options", "{}"]
    run = train(parse_run_config([*given, "--train.output_dir", str(world / "three")]))
    assert all(entry["auxiliary_loss"] == 0 for entry in read_metrics(run / "metrics.jsonl"))


MORE_SOURCES = {
    "types": (["--adapter.preset", "loramoe", "--adapter.options", '{"balance_coef": 0.1}'], "set balance_coef to 0"),
    "tasks": (["--adapter.preset", "moelora-task", "--adapter.options", '{"num_tasks": 2}'], "raise num_tasks"),
    "source loss": (["--adapter.preset", "by-source", "--adapter.num_experts", "2"], "raise num_experts"),
    "oracle": (
        ["--adapter.options", '{"router": "oracle", "balance_coef": 0.0}', "--adapter.num_experts", "2"],
        "raise num_experts",
    ),
}


@pytest.mark.parametrize("name", MORE_SOURCES)
def test_more_sources_than_the_adapter_knows_are_refused_at_the_start(world: Path, name: str) -> None:
    options, advice = MORE_SOURCES[name]
    out = world / name.replace(" ", "-")
    start = [str(world / "config.yaml"), "--train.output_dir", str(out), "--adapter.num_experts", "4"]
    with pytest.raises(ConfigError, match=f"can tell 2 apart, but the mixture has 3 .*; {advice}"):
        train(parse_run_config([*start, "--adapter.preset", "paper", *three_sources(world), *options]))
    assert not list(out.glob("checkpoint*"))
    left_out = ["--data.mixture", '{"red": 1, "blue": 1, "green": 0}', "--train.max_steps", "1"]
    train(parse_run_config([*start, "--adapter.preset", "paper", *three_sources(world), *options, *left_out]))

"""Which parts train, in one process: rates, checkpoints that load by themselves, pieces, and what is refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from worlds.tiny_models import make_world

from llava_mole.cli import main
from llava_mole.common.errors import CheckpointError, ConfigError
from llava_mole.config import TrainConfig, config_to_dict, parse_run_config
from llava_mole.inference.predictor import Predictor
from llava_mole.interop.cli import main as convert
from llava_mole.model.adapters import parameter_part
from llava_mole.model.builder import build_parts, load_pretrained_model
from llava_mole.model.checkpoint import read_manifest
from llava_mole.model.trainable import unfreeze
from llava_mole.mole import MoleConfig
from llava_mole.train.optim import build_optimizer, set_learning_rates
from llava_mole.train.resume import changed_keys
from llava_mole.train.strategy import check_routers
from llava_mole.train.train import train
from llava_mole.train.trained_parts import base_name
from llava_mole.train.trainer_state import TrainerState

FULL = ["--model.train.language_model", "full", "--model.train.tower", "last_n", "--model.train.tower_blocks", "1",
        "--train.learning_rate", "1e-3", "--train.max_steps", "4", "--train.save_every", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=10, text_only_every=3)
    return directory


def arguments(world: Path, name: str, *more: str) -> list[str]:
    return [str(world / "config.yaml"), "--train.output_dir", str(world / name), *more]


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """Language model, one block of the tower, projector and experts have trained for four steps."""
    return train(parse_run_config(arguments(world, "full", *FULL)))


@pytest.fixture(scope="module")
def plain(world: Path) -> Path:
    """The same without an adapter, written in pieces."""
    options = [*FULL, "--adapter.method", "none", "--train.checkpoint_files", "sharded", "--train.weight_decay", "0.1"]
    return train(parse_run_config(arguments(world, "plain", *options)))


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """The same, written whole."""
    options = [*FULL, "--adapter.method", "none", "--train.weight_decay", "0.1"]
    return train(parse_run_config(arguments(world, "whole", *options)))


def test_what_trains(world: Path) -> None:
    def trained(*options: str) -> set[str]:
        config = parse_run_config(arguments(world, "x", *options))
        model, _, _ = build_parts(config.model)
        model.requires_grad_(False)
        unfreeze(model, config.model.train)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained() == set()  # today's configurations: adapter and projector only
    model, _, _ = build_parts(parse_run_config(arguments(world, "x")).model)
    everything = {name for name, _ in model.named_parameters()}
    assert trained("--model.train.language_model", "full") == {n for n in everything if n.startswith("language_model.")}
    assert trained("--model.train.tower", "all") == {n for n in everything if n.startswith("vision_tower.")}
    # Of three blocks the last one does not run (select_layer -2).
    last = trained("--model.train.tower", "last_n", "--model.train.tower_blocks", "1")
    assert last == {n for n in everything if ".resblocks.1." in n}
    with pytest.raises(ConfigError, match="tower_blocks is 3, but 2 blocks of the tower run"):
        trained("--model.train.tower", "last_n", "--model.train.tower_blocks", "3")


def test_rates_of_parts_and_of_the_blocks_of_a_tower() -> None:
    config = TrainConfig(
        output_dir="x", learning_rate=1e-2, min_learning_rate=0, warmup_steps=0, projector_learning_rate=4e-2,
        language_model_learning_rate=1e-3, tower_learning_rate=8e-4, tower_layer_decay=0.5,
    )  # fmt: skip
    names = [
        *(f"vision_tower.visual.transformer.resblocks.{n}.mlp.c_fc.weight" for n in range(3)),
        "vision_tower.visual.conv1.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.mole_experts.default.up_proj_A",
        "projector.0.weight",
    ]
    parameters = {name: torch.nn.Parameter(torch.zeros(2, 2)) for name in names}
    optimizer = build_optimizer(parameters, config)
    rates = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    found = [rates[id(parameters[name])] for name in names]
    assert found == pytest.approx([2e-4, 4e-4, 8e-4, 1e-4, 1e-3, 1e-2, 4e-2])
    shown = set_learning_rates(optimizer, 0, 10, config)
    assert shown == {"vision tower": 8e-4, "language model": 1e-3, "adapter": 1e-2, "projector": 4e-2}


def test_a_checkpoint_has_the_trained_parts_and_loads_by_itself(world: Path, run: Path) -> None:
    checkpoint = run / "checkpoint-4"
    manifest = read_manifest(checkpoint)
    assert manifest["paths"]["language_model"] == "language_model"
    assert manifest["paths"]["vision_tower_weights"] == "vision_tower/model.safetensors"
    loaded = load_pretrained_model(run, device="cpu").model
    state, seen = TrainerState(checkpoint), set()
    for name, parameter in loaded.named_parameters():
        if parameter_part(name) in ("language model", "vision tower") and f"master/{name}" in state:
            assert torch.equal(parameter, state[f"master/{name}"]), name
            seen.add(name)
    assert any(".resblocks.1." in name for name in seen)
    original, _, _ = build_parts(parse_run_config(arguments(world, "x")).model)
    assert {base_name(name) for name in seen if name.startswith("language_model.")} == {
        name for name, _ in original.language_model.named_parameters()
    }
    frozen = "visual.conv1.weight"
    assert torch.equal(loaded.vision_tower.get_parameter(frozen), original.vision_tower.get_parameter(frozen))
    moved = world / "moved" / "checkpoint-4"
    shutil.copytree(checkpoint, moved)
    ask = [[str(world / "red" / "images" / "red-1.png")]], ["What color is this?"]
    assert Predictor.from_pretrained(moved, device="cpu").generate(*ask, max_new_tokens=4) == Predictor.from_pretrained(
        run, device="cpu"
    ).generate(*ask, max_new_tokens=4)


def test_a_resumed_run_is_the_undisturbed_one(world: Path, run: Path) -> None:
    shutil.copytree(run, world / "resumed")
    shutil.rmtree(world / "resumed" / "checkpoint-4")
    train(parse_run_config(arguments(world, "resumed", *FULL, "--train.resume", "auto")))
    ends = [TrainerState(directory / "checkpoint-4") for directory in (run, world / "resumed")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert (
        read_manifest(run / "checkpoint-4")["fingerprints"]
        == (read_manifest(world / "resumed" / "checkpoint-4")["fingerprints"])
    )


def test_a_later_run_starts_from_the_parts(world: Path, run: Path) -> None:
    checkpoint = run / "checkpoint-4"
    options = ["--model.language_model", str(checkpoint / "language_model"), "--init-from", str(checkpoint),
               "--model.vision_tower.name", str(checkpoint / "vision_tower/config.json"),
               "--model.vision_tower.weights", str(checkpoint / "vision_tower/model.safetensors")]  # fmt: skip
    train(parse_run_config(arguments(world, "later", *options, "--train.max_steps", "1")))
    # From the original language model the adapter would mean something else.
    with pytest.raises(CheckpointError, match="trained on another language model .*--model.language_model"):
        train(parse_run_config(arguments(world, "other", "--init-from", str(checkpoint), "--train.max_steps", "1")))


def test_pieces_are_made_whole(world: Path, plain: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, pieces = (TrainerState(directory / "checkpoint-4") for directory in (whole, plain))
    assert expected.is_whole
    assert not pieces.is_whole
    assert pieces.shapes == expected.shapes
    assert all(torch.equal(pieces[key], expected[key]) for key in expected)
    with pytest.raises(CheckpointError, match="model and vision tower in the pieces .* `llava-mole consolidate"):
        load_pretrained_model(plain, device="cpu")
    assert main(["consolidate", str(plain), "--out", str(world / "made")]) == 0
    assert "language model, vision tower, adapter and projector, optimizer" in capsys.readouterr().out
    made = TrainerState(world / "made")
    assert all(torch.equal(made[key], expected[key]) for key in expected)
    models = [load_pretrained_model(path, device="cpu").model for path in (whole, world / "made")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
    assert main(["consolidate", str(whole), "--out", str(world / "again")]) == 2
    assert "is whole already" in capsys.readouterr().err
    assert main(["consolidate", str(plain), "--out", str(world / "made")]) == 2
    assert "exists; give another --out" in capsys.readouterr().err
    assert main(["consolidate", str(plain), "--out", str(world / "small"), "--inference"]) == 0
    assert not (world / "small" / "trainer").exists()


def test_a_lost_piece_is_named(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "checkpoint-4", tmp_path / "checkpoint-4")
    (file,) = (tmp_path / "checkpoint-4" / "trainer").glob("optimizer-*")
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as handle:
        tensors, places = {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata()
    key = next(iter(tensors))
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, file, metadata=places)
    with pytest.raises(CheckpointError, match=f"lacks pieces of 1 tensors \\(first: {key}"):
        TrainerState(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("layout", ["llava-hf", "llava", "inference"])
def test_exports_hold_the_trained_weights(world: Path, whole: Path, layout: str) -> None:
    source, out = whole, world / f"as-{layout}"
    assert convert([str(source), "--to", layout, "--out", str(out)]) == 0
    expected = load_pretrained_model(source, device="cpu").model.causal_lm
    if layout == "inference":
        assert read_manifest(out)["paths"]["vision_tower_weights"] == "vision_tower/model.safetensors"
        found = load_pretrained_model(out, device="cpu").model.causal_lm
    else:
        back = world / f"from-{layout}"
        tower = ["--vision-tower", str(source / "checkpoint-4/vision_tower")] if layout == "llava" else []
        assert convert([str(out), "--to", "checkpoint", "--out", str(back), *tower]) == 0
        found = load_pretrained_model(back, device="cpu").model.causal_lm
    for name, parameter in expected.named_parameters():
        rows = parameter.shape[0]  # llava-hf adds a row for <image>
        assert torch.equal(found.get_parameter(name)[:rows], parameter), name


def test_old_configurations_mean_what_they_meant(world: Path, run: Path) -> None:
    config = parse_run_config(arguments(world, "x"))
    assert (config.model.train.language_model, config.model.train.tower, config.train_projector) == (
        "adapters", "none", True,
    )  # fmt: skip
    frozen = parse_run_config(arguments(world, "x", "--model.train.projector", "false"))
    assert not frozen.train_projector
    same = parse_run_config(arguments(world, "full", *FULL, "--model.train.projector", "true"))
    assert changed_keys(run / "checkpoint-4", config_to_dict(same)) == {}


def test_one_router_for_all_layers_is_refused_where_weights_are_spread() -> None:
    model = SimpleNamespace(language_model=SimpleNamespace(peft_config={"default": MoleConfig(router_scope="ffn")}))
    check_routers(model)
    model.language_model.peft_config["default"] = MoleConfig.from_preset("octavius")
    with pytest.raises(ConfigError, match="router_scope 'model', .*; use 'zero2' or 'ddp'"):
        check_routers(model)


REFUSED = {
    "quantised": (["--model.train.language_model", "full", "--model.quantization", "4bit"],
                  "language_model is 'full' and model.quantization is '4bit': quantised weights are frozen"),
    "no blocks": (["--model.train.tower", "last_n"], "tower is 'last_n' and model.train.tower_blocks is None"),
    "blocks of all": (["--model.train.tower", "all", "--model.train.tower_blocks", "2"], "'last_n' needs the number"),
    "none": (["--model.train.language_model", "none"], "is 'none' and adapter.method is 'mole': use 'adapters'"),
    "projector": (["--model.train.projector", "true", "--train_projector", "false"], "leave one of them out"),
    "saved": (["--model.train.language_model", "full", "--adapter.options.modules_to_save", "[lm_head]"],
              "which trains these modules already"),
    "tower rate": (["--train.tower_learning_rate", "1e-4"], "model.train.tower is 'none', so nothing would use it"),
    "model rate": (["--train.language_model_learning_rate", "1e-4"], "model.train.language_model is 'adapters'"),
    "decay": (["--train.tower_layer_decay", "0"], "tower_layer_decay is 0.0; it must be above 0 and at most 1"),
    "spelling": (["--train.distributed", "fsdp"], "zero2.*ddp.*zero3.*fsdp2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_combinations_without_sense_are_refused(world: Path, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as refused:
        parse_run_config(arguments(world, "x", *options))
    assert "\n" not in str(refused.value)

"""What was brought in is used like our own: by training, by chat, on another base, with a tower in place."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds.foreign_models import make_clip, make_llava, make_llava_lora, projector_state
from worlds.interop_tools import close, convert, load, our_logits, reference_logits
from worlds.tiny_models import make_language_model, make_vision_tower, make_world

from llava_mole import cli
from llava_mole.common.errors import CheckpointError
from llava_mole.config import load_config, parse_run_config
from llava_mole.model.builder import locate_parts
from llava_mole.model.checkpoint import read_manifest
from llava_mole.train.train import train


def test_training_starts_from_an_imported_lora_and_projector(tmp_path: Path) -> None:
    config = make_world(tmp_path, samples=4)
    make_llava_lora(tmp_path / "lora", tmp_path / "language_model")
    base = ("--model-base", tmp_path / "language_model", "--vision-tower", tmp_path / "vision_tower")
    assert convert(tmp_path / "lora", "--to", "checkpoint", "--out", tmp_path / "imported", *base) == 0
    assert sorted(path.name for path in (tmp_path / "imported").iterdir()) == ["checkpoint-0", "llava_mole.json"]
    common = [str(config), "--train.max_steps", "1", "--train.warmup_steps", "0"]
    lora = ["--adapter.method", "lora", "--adapter.rank", "4", "--adapter.alpha", "8"]
    frozen = ["--train.learning_rate", "0", "--train.min_learning_rate", "0"]
    options = [*common, *lora, *frozen, "--init_from", str(tmp_path / "imported")]
    run = train(parse_run_config([*options, "--train.output_dir", str(tmp_path / "a")]))
    close(our_logits(load(run))[0], our_logits(load(tmp_path / "imported"))[0])
    file = tmp_path / "lora" / "adapter_config.json"  # alpha / sqrt(r), which a run of ours does not have
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_rslora": True}))
    assert convert(tmp_path / "lora", "--to", "checkpoint", "--out", tmp_path / "imported", "--overwrite", *base) == 0
    with pytest.raises(CheckpointError, match="another adapter: use_rslora True there, None here"):
        train(parse_run_config([*options, "--train.output_dir", str(tmp_path / "c")]))
    options = [*common, *frozen, "--projector_weights", str(tmp_path / "imported")]
    run = train(parse_run_config([*options, "--train.output_dir", str(tmp_path / "b")]))
    state = load(run).model.projector.state_dict()
    assert all(torch.equal(state[name], value) for name, value in projector_state().items())


def test_a_lora_on_a_full_llava_takes_its_language_model_and_tower(tmp_path: Path) -> None:
    tower = make_clip(tmp_path / "clip")
    make_llava(tmp_path / "llava", tower=tower)
    make_language_model(tmp_path / "vicuna")
    make_llava_lora(tmp_path / "lora", tmp_path / "vicuna")
    options = ("--model-base", tmp_path / "llava", "--vision-tower", tmp_path / "clip")
    assert convert(tmp_path / "lora", "--to", "checkpoint", "--out", tmp_path / "run", *options) == 0
    expected = reference_logits(tmp_path / "vicuna", tower, projector_state(), tmp_path / "lora")
    close(our_logits(load(tmp_path / "run"))[0], expected)


def test_an_equal_tower_that_is_usable_in_place_is_not_copied(tmp_path: Path) -> None:
    tower = make_clip(tmp_path / "clip")
    make_llava(tmp_path / "llava", tower=tower)
    assert convert(tmp_path / "clip", "--to", "open-clip", "--out", tmp_path / "tower") == 0
    options = ("--to", "checkpoint", "--vision-tower", tmp_path / "tower", "--out", tmp_path / "run")
    assert convert(tmp_path / "llava", *options) == 0
    assert not (tmp_path / "run" / "vision_tower").exists()
    paths = read_manifest(tmp_path / "run" / "checkpoint-0")["paths"]
    assert paths["vision_tower_weights"] == str(tmp_path / "tower" / "model.safetensors")
    assert paths["language_model"] == "../language_model"
    # A tower that was trained differs; then the checkpoint's own is taken.
    file = tmp_path / "llava" / "model.safetensors"
    state = load_file(file)
    name = next(n for n in state if n.endswith("vision_model.encoder.layers.0.mlp.fc1.bias"))
    save_file({**state, name: state[name] + 1}, file, metadata={"format": "pt"})
    assert convert(tmp_path / "llava", *options[:-1], tmp_path / "other") == 0
    assert (tmp_path / "other" / "vision_tower").exists()
    assert (our_logits(load(tmp_path / "other"))[0] - our_logits(load(tmp_path / "run"))[0]).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["hub", "name"])
def test_open_clip_towers_of_the_hub(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_vision_tower(tmp_path / "tower")
    make_language_model(tmp_path / "vicuna")
    torch.save({f"model.mm_projector.{k}": v for k, v in projector_state().items()}, tmp_path / "p.bin")
    hub = tmp_path / "hub"
    hub.mkdir()
    shutil.copy(tmp_path / "tower" / "model.safetensors", hub / "open_clip_model.safetensors")
    command = (tmp_path / "p.bin", "--to", "checkpoint", "--out", tmp_path / "run", "--model-base", tmp_path / "vicuna")
    if layout == "hub":
        content = json.loads((tmp_path / "tower" / "config.json").read_text())
        (hub / "open_clip_config.json").write_text(json.dumps({"model_cfg": content, "preprocess_cfg": {}}))
        assert convert(*command, "--vision-tower", hub) == 0
    else:
        assert convert(*command, "--vision-tower", hub / "open_clip_model.safetensors") == 2
        assert "name the open_clip model with --vision-tower-name" in capsys.readouterr().err
        name = tmp_path / "tower" / "config.json"
        weights = hub / "open_clip_model.safetensors"
        assert convert(*command, "--vision-tower", weights, "--vision-tower-name", name) == 0
    loaded = load(tmp_path / "run")
    used = load_config(loaded.path / "config.yaml").model
    locate_parts(used, read_manifest(loaded.path), loaded.path, None)
    assert used.vision_tower.weights == str(hub / "open_clip_model.safetensors")


def test_options_replace_what_a_checkpoint_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_clip(tmp_path / "clip")
    make_language_model(tmp_path / "vicuna")
    torch.save({f"model.mm_projector.{k}": v for k, v in projector_state().items()}, tmp_path / "p.bin")
    command = (tmp_path / "p.bin", "--to", "checkpoint", "--out", tmp_path / "run", "--model-base", tmp_path / "vicuna")
    more = ("--template", "llava_v1", "--image-aspect-ratio", "square", "--select-layer", "-1")
    assert convert(*command, "--vision-tower", tmp_path / "clip", *more) == 0
    assert "template" not in capsys.readouterr().out
    loaded = load(tmp_path / "run")
    assert (loaded.template, loaded.image_processor.aspect_ratio) == ("llava_v1", "square")
    assert loaded.model.vision_tower.block == 2
    assert cli.main(["inspect", str(tmp_path / "run")]) == 0

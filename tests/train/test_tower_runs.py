"""Runs with a SigLIP tower and a pixel shuffle: train, answer, show the routing, move, export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from worlds.eval_models import make_checkpoint
from worlds.foreign_models import VOCABULARY
from worlds.interop_tools import close, convert, refused
from worlds.tiny_models import make_world
from worlds.towers import SIZE, dinov2, siglip

from llava_mole.analysis.check.cli import image_tokens
from llava_mole.analysis.plan.architecture import build_meta_model
from llava_mole.common.errors import CheckpointError, ConfigError, WeightsError
from llava_mole.config import parse_run_config
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.token_routing import route_answer
from llava_mole.interop.kinds import find_kind
from llava_mole.model.builder import load_pretrained_model
from llava_mole.model.flops import model_shape
from llava_mole.serve.overlay.files import as_data
from llava_mole.train.preflight import missing_inputs
from llava_mole.train.train import train

SHUFFLE = "pixel_shuffle+mlp2x_gelu"


def options(tower: Path, projector: str, activation: str = "gelu_pytorch_tanh") -> list[str]:
    return [
        "--model.vision_tower.name", str(tower), "--model.vision_tower.weights", str(tower / "model.safetensors"),
        "--model.vision_tower.activation", activation, "--model.projector", projector,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("siglip")
    siglip(directory / "siglip")
    make_world(directory, text_only_every=5)
    return directory


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """Two steps of MoLE; the grid is 3 x 3, so a shuffled image has 2 x 2 tokens."""
    more = ["--train.max_steps", "2", "--train.save_every", "2"]
    return train(parse_run_config([str(world / "config.yaml"), *options(world / "siglip", SHUFFLE), *more]))


def test_training_counts_the_tokens_behind_the_projector(world: Path, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 for line in lines if "loss" in line)
    state = load_file(run / "checkpoint-2" / "mm_projector.safetensors")
    assert state["mm_projector.1.weight"].shape == (32, 4 * 16)
    config = parse_run_config([str(world / "config.yaml"), *options(world / "siglip", SHUFFLE)])
    assert image_tokens(config) == 4
    shape = model_shape(build_meta_model(config.model, config.adapter, train_projector=True).model)
    assert (shape.image_tokens, shape.tower_width, shape.image_size) == (4, 64, SIZE)
    assert load_pretrained_model(run, device="cpu").model.num_image_tokens == 4


def test_a_tower_of_hugging_face_stays_frozen(world: Path) -> None:
    more = ["--model.train.tower", "all", "--train.output_dir", str(world / "unfrozen")]
    config = parse_run_config([str(world / "config.yaml"), *options(world / "siglip", SHUFFLE), *more])
    with pytest.raises(ConfigError, match=r"model\.train\.tower is 'all', but a tower in a directory of Hugging Face"):
        train(config)
    assert not list((world / "unfrozen").glob("checkpoint-*"))


def test_inference_and_overlay_use_the_grid_of_the_tower(run: Path) -> None:
    predictor = Predictor.from_pretrained(run, device="cpu")
    image = Image.new("RGB", (40, 30), (200, 30, 90))
    assert predictor.loaded.image_processor(image).shape == (3, SIZE, SIZE)
    routing = route_answer(predictor, [image], "What?", "red")
    (view,) = routing.views()
    assert (view.rows, view.columns) == predictor.loaded.model.image_grid == (2, 2)
    places = [(token["row"], token["column"]) for token in as_data(routing)["tokens"] if token["role"] == "image"]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_tower_that_has_moved_is_named_by_its_directory(run: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "siglip", tmp_path / "elsewhere")
    loaded = load_pretrained_model(run, vision_tower=str(tmp_path / "elsewhere"), device="cpu")
    assert loaded.model.vision_tower.spec.name == str(tmp_path / "elsewhere" / "config.json")
    assert loaded.image_processor.mean == (0.5, 0.5, 0.5)
    file = tmp_path / "elsewhere" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.4, 0.5, 0.5]}))
    with pytest.raises(CheckpointError, match=r"mean \[0.5, 0.5, 0.5\] there, \[0.4, 0.5, 0.5\] now"):
        load_pretrained_model(run, vision_tower=str(tmp_path / "elsewhere"), device="cpu")


def test_what_a_layout_cannot_hold_is_refused_by_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    refused(capsys, "the projector shuffles pixels", run, "--to", "projector", "--out", tmp_path / "p.bin")
    one = ("--expert", "0")
    refused(capsys, f"model.projector is '{SHUFFLE}'", run, "--to", "llava-hf", *one, "--out", out)
    refused(capsys, "the projector shuffles pixels", run, "--to", "llava", *one, "--out", out)
    refused(capsys, "'siglip_vision_model' cannot become a CLIPVisionModel", run, "--to", "hf-clip", "--out", out)
    refused(capsys, "cannot be converted; use it as it is", run, "--to", "open-clip", "--out", out)
    assert convert(run, "--to", "peft", "--out", out) == 0
    assert "mm_projector.1.weight" in load_file(out / "mm_projector.safetensors")


def test_siglip_in_the_layout_of_llava_hf_has_the_same_logits(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    ours = make_checkpoint(tmp_path / "own", "lora", std=0.1, overrides=options(world / "siglip", "mlp2x_gelu"))
    assert convert(ours, "--to", "llava-hf", "--out", tmp_path / "hf") == 0
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=generator)
    ids[:, 3:12] = IMAGE_TOKEN_INDEX
    images = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    vocabulary = model.config.image_token_id
    shown = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, vocabulary)
    with torch.no_grad():
        theirs = model.eval()(input_ids=shown, pixel_values=images).logits
        expected = load_pretrained_model(ours, device="cpu").model(ids, torch.ones_like(ids, dtype=torch.bool), images)
    close(theirs[..., :vocabulary], expected)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    told = processor(text="<image>\nWhat?", images=Image.new("RGB", (40, 30)), return_tensors="pt")
    assert int((told["input_ids"] == vocabulary).sum()) == 9
    assert told["pixel_values"].shape == (1, 3, SIZE, SIZE)
    refused(capsys, "LLaVA's layout has CLIP towers only", ours, "--to", "llava", "--out", tmp_path / "x")


def test_dinov2_has_no_place_in_llava_hf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dinov2(tmp_path / "dino")
    assert find_kind(tmp_path / "dino").kind == "vision-tower"
    ours = make_checkpoint(tmp_path / "own", "lora", overrides=options(tmp_path / "dino", "mlp2x_gelu", "gelu"))
    refused(capsys, "'dinov2'; the layout of llava-hf has clip", ours, "--to", "llava-hf", "--out", tmp_path / "x")


def test_missing_files_are_listed(world: Path) -> None:
    config = parse_run_config([str(world / "config.yaml"), "--model.vision_tower.name", "playground/models/none"])
    assert "model.vision_tower.name = playground/models/none" in missing_inputs(config.model, config.data, None, None)


def test_a_shuffled_projector_is_not_taken_for_another(world: Path, run: Path) -> None:
    more = ["--projector_weights", str(run), "--train.output_dir", str(world / "second")]
    plain = parse_run_config([str(world / "config.yaml"), *options(world / "siglip", "mlp2x_gelu"), *more])
    with pytest.raises(WeightsError, match="does not fit the projector"):
        train(plain)

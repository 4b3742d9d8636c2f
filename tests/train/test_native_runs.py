"""Runs on images in their own shape: lengths known before training, packed rows, ranks, answers, routing, the plan."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from worlds.image_shapes import data_url, make_shapes, noise
from worlds.interop_tools import convert, refused
from worlds.optimizer_state import assert_same_state, optimizer_state
from worlds.processes import fork_python
from worlds.tiny_models import make_world
from worlds.towers import PATCH, siglip2

from llava_mole import cli
from llava_mole.common.errors import ConfigError
from llava_mole.config import parse_run_config
from llava_mole.data.collator import collate
from llava_mole.data.dataset import SupervisedDataset
from llava_mole.data.tokenization import HFTextTokenizer
from llava_mole.inference.engine import EngineLimits
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.row_batch import RowBatch
from llava_mole.inference.token_routing import route_answer
from llava_mole.model.builder import build_parts, load_pretrained_model
from llava_mole.serve.api.images import ImagePolicy
from llava_mole.serve.api.protocol import parse_chat
from llava_mole.serve.api.service import Defaults, RequestLimits, Service
from llava_mole.serve.overlay.files import shown_images
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import load_data, train

SIZES = ((40, 24), (16, 16), (90, 31), (1, 400), (200, 150), (33, 32))
SIDE = 6
"""Patches in a row of the square, twice as many as the tower's own: an image has up to 36."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of 12 records with images of all shapes: some text only, two with a second image."""
    directory = tmp_path_factory.mktemp("native")
    siglip2(directory / "siglip2")
    config = make_shapes(directory, lambda _, n: SIZES[n % len(SIZES)])
    config["data"]["image_aspect_ratio"] = "native"
    config["model"]["vision_tower"] = {
        "name": str(directory / "siglip2"), "weights": str(directory / "siglip2" / "model.safetensors"),
        "activation": "gelu_pytorch_tanh", "select_layer": -2, "image_size": SIDE * PATCH,
    }  # fmt: skip
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    options = ["--train.output_dir", str(world / "run"), "--train.max_steps", "4", "--train.save_every", "2"]
    assert cli.main(["train", str(world / "config.yaml"), *options]) == 0
    return world / "run"


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(load_pretrained_model(run, device="cpu"))


@pytest.fixture(scope="module")
def built(world: Path) -> tuple[Any, SupervisedDataset]:
    config = parse_run_config([str(world / "config.yaml")])
    model, tokenizer, _ = build_parts(config.model)
    return model.eval(), load_data(config, model, HFTextTokenizer(tokenizer), False)


def test_lengths_known_before_are_those_of_the_samples(built: tuple[Any, SupervisedDataset]) -> None:
    model, dataset = built
    for position in range(len(dataset)):
        sample = dataset[position]
        assert sample.replaced_image is None
        assert len(sample.input_ids) == dataset.lengths([position])[0]
        batch = collate([sample], pad_token_id=0)
        with torch.no_grad():  # raises unless positions and features are equal in number
            embedded = model.embed(
                batch["input_ids"],
                batch["images"],
                feature_index=batch["feature_index"],
                image_grids=batch["image_grids"],
            )
        assert torch.isfinite(embedded).all()
    assert len({dataset.lengths([n])[0] for n in range(len(dataset))}) > 6


def test_packed_equals_padded(world: Path, run: Path) -> None:
    options = ["--train.output_dir", str(world / "padded"), "--train.max_steps", "4", "--train.batching", "padded"]
    train(parse_run_config([str(world / "config.yaml"), *options]))
    both = [read_metrics(folder / "metrics.jsonl") for folder in (run, world / "padded")]
    for own, other in zip(*both, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert own["tokens"] == other["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_ranks_equal_one_process(world: Path, run: Path, strategy: str) -> None:
    ranks = world / strategy
    given = [world / "config.yaml", "--train.output_dir", ranks, "--train.distributed", strategy,
             "--train.max_steps", "4", "--train.save_every", "2"]  # fmt: skip
    done = fork_python(Path(__file__).with_name("ranks_worker.py"), *given, ranks=2, timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for own, other in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (ranks, run)), strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert own["tokens"] == other["tokens"]
    assert_same_state(optimizer_state(ranks, 4), optimizer_state(run, 4))


def test_answers_do_not_depend_on_the_batch(predictor: Predictor) -> None:
    images: list[Any] = [noise(size, n) for n, size in enumerate(SIZES[:4])]
    asked = [images[0], None, [images[1], images[2]], images[3], images[0]]
    prompts = ["Is it blue?", "one two", "What is <image> and <image>?", "What color is this?", "red?"]
    together = predictor.generate(asked, prompts, max_new_tokens=6, batch_size=5)
    assert together == [predictor.generate([i], [p], max_new_tokens=6)[0] for i, p in zip(asked, prompts, strict=True)]


def test_the_engine_tells_grids_of_the_same_patches_apart(predictor: Predictor) -> None:
    """One colour in two shapes gives equal squares of pixels; features and answers must still be their own."""
    processor = predictor.loaded.image_processor
    flat, tall = (processor.tiles(Image.new("RGB", size, (90, 30, 200))) for size in ((90, 40), (40, 90)))
    assert torch.equal(flat.pixels, tall.pixels)
    assert flat.grids is not None
    assert tall.grids is not None
    assert flat.grids.flip(1).tolist() == tall.grids.tolist()
    rows = RowBatch(predictor)
    first, again, other = rows._encode(flat), rows._encode(flat), rows._encode(tall)
    assert torch.equal(first, again)
    shown = int(flat.grids.prod())
    assert not torch.allclose(first[0, :shown], other[0, :shown])


def test_requests_to_the_server_give_the_same_answers(predictor: Predictor) -> None:
    service = Service(
        {"native": predictor}, engine_limits=EngineLimits(), limits=RequestLimits(16, 400, 4),
        defaults=Defaults(5, 0.0, None), images=ImagePolicy(10**6, 10**6),
    )  # fmt: skip
    asked = [[noise(size, n)] for n, size in enumerate(SIZES[:3])] + [[noise((20, 50), 7), noise((40, 24), 8)]]
    jobs = []
    for images in asked:
        urls = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        content = [*urls, {"type": "text", "text": "Is it blue?"}]
        jobs += service.chat_jobs(parse_chat({"model": "native", "messages": [{"role": "user", "content": content}]}))
    rows = RowBatch(predictor)
    rows.join(jobs)
    while rows.jobs:
        rows.step()
    assert all(job.error is None for job in jobs)
    expected = [predictor.generate([images], ["Is it blue?"], max_new_tokens=5)[0] for images in asked]
    assert [job.answer.final(job.new_ids) for job in jobs] == expected


def test_routing_lies_on_the_image_in_its_shape(predictor: Predictor) -> None:
    images = [noise((90, 31), 1), noise((20, 50), 2)]
    routing = route_answer(predictor, images, "What is <image> and <image>?", "red")
    views = routing.views()
    grid = predictor.loaded.image_processor.grid
    assert grid is not None
    layouts = [grid.layout(image.size) for image in images]
    assert [(view.image, view.part, len(view.patches)) for view in views] == [
        (n, "whole", layout.tokens) for n, layout in enumerate(layouts)
    ]
    pictures = [picture for image in images for picture in shown_images(predictor.loaded.image_processor, image)]
    for view, picture in zip(views, pictures, strict=True):
        assert picture.width * view.rows == pytest.approx(picture.height * view.columns, rel=0.02)  # square cells


def test_conflicts_check_data_and_plan_follow(world: Path, run: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["conflict", str(run), "--batches", "1", "--batch-size", "2", "--out", str(tmp_path / "c")]) == 0
    options = ["--workers", "1", "--out", str(tmp_path), "--check.max_bad_images", "1"]
    assert cli.main(["check-data", str(world / "config.yaml"), *options]) == 0
    report = json.loads((tmp_path / "check_data.json").read_text())
    longest = max(source["tokens"]["max"] for source in report["sources"])
    assert longest > 2 * 30
    assert cli.main(["plan", str(world / "config.yaml"), "--gpu", "a100-80g", "--gpus", "1"]) == 0


def test_layouts_of_others_refuse_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layout in ("llava-hf", "llava-next-hf", "llava", "vllm"):
        expert = ("--expert", "0") if layout != "vllm" else ()
        refused(capsys, "images in their own shape", run, "--to", layout, *expert, "--out", tmp_path / layout)
    assert convert(run, "--to", "peft", "--out", tmp_path / "peft") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.projector", "pixel_shuffle+mlp2x_gelu"], "each patch is a token and nothing stands beside them"),
        (["--model.projector", "mlp2x_gelu+ends"], "set it to 'mlp2x_gelu' or another kind without '+'"),
        (["--data.image_draft", "true"], "on whose size the tokens of data.image_aspect_ratio 'native' depend"),
        (["--data.image_grid_pinpoints", "[[16, 32]]"], "is for data.image_aspect_ratio 'anyres'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(world: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_run_config([str(world / "config.yaml"), *options])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_clip_tower_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_world(tmp_path)
    more = ["--data.image_aspect_ratio", "native", "--train.output_dir", str(tmp_path / "none")]
    assert cli.main(["train", str(config), *more]) == 2
    assert "'native' needs a tower that takes images of any shape" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

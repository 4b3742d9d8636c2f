"""Runs on images in tiles: lengths known before training, packed rows, answers, meters, checks and the plan follow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from worlds.image_shapes import data_url, make_shapes, noise
from worlds.optimizer_state import assert_same_state, optimizer_state
from worlds.processes import fork_python

from llava_mole import cli
from llava_mole.common.errors import ConfigError, PromptError
from llava_mole.config import parse_run_config
from llava_mole.data.collator import collate
from llava_mole.data.dataset import SupervisedDataset
from llava_mole.data.lengths import ImagePlace, count_tiled
from llava_mole.data.records import RecordSubset, parse_record
from llava_mole.data.sources import ImageReader
from llava_mole.data.store import PreparedRecords, PreparedRow, StoreWriter, read_records
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.engine import EngineLimits
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.row_batch import RowBatch
from llava_mole.inference.token_routing import route_answer
from llava_mole.model.builder import build_parts, configured_image_processor, load_pretrained_model
from llava_mole.serve.api.errors import ApiError
from llava_mole.serve.api.images import ImagePolicy
from llava_mole.serve.api.protocol import parse_chat
from llava_mole.serve.api.service import Defaults, RequestLimits, Service
from llava_mole.serve.overlay.files import as_data, shown_images
from llava_mole.serve.session import Session
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import load_data, train

SIZES = ((40, 24), (16, 16), (90, 31), (16, 61), (200, 150), (33, 32))
NARROW = (1, 400)
TILES = ("--data.image_aspect_ratio", "anyres", "--model.projector", "mlp2x_gelu+newline")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of 12 records with images of all sizes: some text only, two with a second image, one narrow."""
    directory = tmp_path_factory.mktemp("tiles")
    narrow = ("blue", 3)
    config = make_shapes(directory, lambda name, n: NARROW if (name, n) == narrow else SIZES[n % len(SIZES)])
    config["data"] |= {"image_aspect_ratio": "anyres", "max_bad_image_share": 1.0}
    config["model"]["projector"] = "mlp2x_gelu+newline"
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


@pytest.fixture(scope="module")
def built(world: Path) -> tuple[Any, SupervisedDataset]:
    """The model of the run and its data, with lengths."""
    from llava_mole.data.tokenization import HFTextTokenizer

    config = parse_run_config(
        [str(world / "config.yaml"), "--data.validation_samples", "2", "--train.validate_every", "1"]
    )
    torch.manual_seed(0)
    model, tokenizer, _ = build_parts(config.model)
    return model.eval(), load_data(config, model, HFTextTokenizer(tokenizer), False)


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """The command of docs/any_resolution.md on this world, in one process, with packed rows."""
    options = ["--train.output_dir", str(world / "run"), "--train.max_steps", "4", "--train.save_every", "2"]
    assert cli.main(["train", str(world / "config.yaml"), *options]) == 0
    return world / "run"


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(load_pretrained_model(run, device="cpu"))


def test_lengths_known_before_are_those_of_the_samples(built: tuple[Any, SupervisedDataset]) -> None:
    model, dataset = built
    replaced = 0
    for position in range(len(dataset)):
        sample = dataset[position]
        replaced += sample.replaced_image is not None
        if sample.replaced_image is None:
            assert len(sample.input_ids) == dataset.lengths([position])[0]
        else:
            assert "1 x 400 pixels, too narrow for data.image_aspect_ratio 'anyres'" in sample.replaced_image
        batch = collate([sample], pad_token_id=0)
        with torch.no_grad():  # raises unless positions and features are equal in number
            model.embed(batch["input_ids"], batch["images"], feature_index=batch["feature_index"])
    assert replaced <= 1
    assert len({dataset.lengths([n])[0] for n in range(len(dataset))}) > 6
    narrow = [dataset.validation] if replaced == 0 else []
    assert all(any(d[n].replaced_image for n in range(len(d))) for d in narrow if d is not None)


def test_packed_equals_padded_and_the_newline_trains(world: Path, run: Path) -> None:
    options = ["--train.output_dir", str(world / "padded"), "--train.max_steps", "4", "--train.batching", "padded"]
    train(parse_run_config([str(world / "config.yaml"), *options]))
    for own, other in zip(
        read_metrics(run / "metrics.jsonl"), read_metrics(world / "padded/metrics.jsonl"), strict=True
    ):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert own["tokens"] == other["tokens"]
    first, last = (load_file(run / f"checkpoint-{n}" / "mm_projector.safetensors") for n in (2, 4))
    assert (first["mm_projector.newline.vector"] - last["mm_projector.newline.vector"]).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_two_ranks_equal_one_process(world: Path, run: Path, strategy: str) -> None:
    """Ranks have different numbers of tiles; under `fsdp2` the language model trains too."""
    options, single = ["--train.max_steps", "4", "--train.save_every", "2"], run
    if strategy == "fsdp2":
        options += ["--model.train.language_model", "full", "--train.learning_rate", "1e-3"]
        single = world / "full"
        train(parse_run_config([str(world / "config.yaml"), "--train.output_dir", str(single), *options]))
    ranks = world / strategy
    given = [world / "config.yaml", "--train.output_dir", ranks, "--train.distributed", strategy, *options]
    done = fork_python(Path(__file__).with_name("ranks_worker.py"), *given, ranks=2, timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    entries = [read_metrics(folder / "metrics.jsonl") for folder in (ranks, single)]
    for own, other in zip(*entries, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert own["tokens"] == other["tokens"]
    assert_same_state(optimizer_state(ranks, 4), optimizer_state(single, 4))


def test_stage_2_starts_from_a_projector_without_the_vector(
    world: Path, built: tuple[Any, SupervisedDataset], caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    from llava_mole.model.builder import load_projector

    state = {f"mm_projector.{name}": value for name, value in built[0].projector.state_dict().items()}
    newline = state.pop("mm_projector.newline.vector")
    save_file(state, world / "stage1.safetensors")
    with caplog.at_level("INFO"):
        load_projector(built[0].projector, world / "stage1.safetensors", start=True)
    assert "no newline vector; it starts from random values" in caplog.text
    assert torch.equal(built[0].projector.newline.vector, newline)


@pytest.mark.parametrize("modes", ["llava", "rescale"])
def test_prepared_sets_give_the_same_tokens(world: Path, built: tuple[Any, SupervisedDataset], modes: Any) -> None:
    grid, folder = built[1].image_processor.grid, world / "red"
    assert grid is not None
    if not (world / "red-set").exists():
        with StoreWriter(world / "red-set", name="red", shard_rows=5) as writer:
            for line, value in enumerate(json.loads((folder / "red.json").read_text()), 1):
                record, _ = parse_record(value, "", f"red.json:{line}")
                sizes = tuple(Image.open(folder / image).size for image in record.images)
                known = sizes if line % 2 else ()  # `prepare --check-images none` stores none
                writer.add(PreparedRow(record.id, "red", record.images, record.turns, known, None, record.where))
            writer.finish({})
    place = ImagePlace(ImageReader(str(folder)), modes)
    expected = count_tiled(read_records(folder / "red.json", "red"), grid, place, "red")
    own = PreparedRecords(world / "red-set", "red")
    assert np.array_equal(count_tiled(own, grid, place, "red"), expected)
    some = np.array([7, 2, 4])
    assert np.array_equal(count_tiled(RecordSubset(own, some), grid, place, "red"), expected[some])
    assert expected[0].tolist() == [0, 0]
    assert expected[4, 1] > expected[3, 1]


def test_answers_do_not_depend_on_the_batch(predictor: Predictor) -> None:
    images: list[Any] = [noise(size, n) for n, size in enumerate(SIZES[:4])]
    asked = [images[0], None, [images[1], images[2]], images[3], images[0]]
    prompts = ["Is it blue?", "one two", "What is <image> and <image>?", "What color is this?", "red?"]
    together = predictor.generate(asked, prompts, max_new_tokens=6, batch_size=5)
    assert together == [predictor.generate([i], [p], max_new_tokens=6)[0] for i, p in zip(asked, prompts, strict=True)]
    scores = predictor.score(asked, prompts, ["It is red."] * 5, batch_size=5)
    for image, prompt, score in zip(asked, prompts, scores, strict=True):
        (single,) = predictor.score([image], [prompt], ["It is red."])
        assert score.logprob == pytest.approx(single.logprob, abs=1e-3)


def test_requests_to_the_server_give_the_same_answers(predictor: Predictor) -> None:
    service = Service(
        {"tiles": predictor}, engine_limits=EngineLimits(), limits=RequestLimits(16, 400, 4),
        defaults=Defaults(5, 0.0, None), images=ImagePolicy(10**6, 10**6),
    )  # fmt: skip
    jobs, asked = (
        [],
        [[noise(size, n)] for n, size in enumerate(SIZES[:3])] + [[noise((20, 50), 7), noise((40, 24), 8)]],
    )
    for images in asked:
        urls = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        content = [*urls, {"type": "text", "text": "Is it blue?"}]
        jobs += service.chat_jobs(parse_chat({"model": "tiles", "messages": [{"role": "user", "content": content}]}))
    rows = RowBatch(predictor)
    rows.join(jobs)
    while rows.jobs:
        rows.step()
    assert all(job.error is None for job in jobs)
    expected = [predictor.generate([images], ["Is it blue?"], max_new_tokens=5)[0] for images in asked]
    assert [job.answer.final(job.new_ids) for job in jobs] == expected
    wide = {"type": "image_url", "image_url": {"url": data_url(noise(NARROW, 0))}}
    body = {"model": "tiles", "messages": [{"role": "user", "content": [wide, {"type": "text", "text": "Is it?"}]}]}
    with pytest.raises(ApiError, match="too narrow"):
        service.chat_jobs(parse_chat(body))


def test_the_chat_counts_the_tokens_of_its_images(predictor: Predictor, tmp_path: Path) -> None:
    noise((90, 31), 1).save(tmp_path / "a.png")
    session = Session(predictor, [str(tmp_path / "a.png")], Decoding(4))
    assert session.make_room("Is it blue?") == 0
    answer = "".join(session.ask("Is it blue?"))
    assert answer == predictor.generate([str(tmp_path / "a.png")], ["Is it blue?"], max_new_tokens=4)[0]


def test_conflicts_are_measured_on_tiles(run: Path, tmp_path: Path) -> None:
    assert cli.main(["conflict", str(run), "--batches", "1", "--batch-size", "2", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "conflict.json").read_text())["runs"]
    assert found["batches"] == 1


def test_routing_lies_on_the_whole_image_and_on_its_tiles(predictor: Predictor) -> None:
    images = [noise((90, 31), 1), noise((20, 50), 2)]
    routing = route_answer(predictor, images, "What is <image> and <image>?", "red")
    views = routing.views()
    assert [(view.image, view.part) for view in views] == [(0, "whole"), (0, "tiles"), (1, "whole"), (1, "tiles")]
    layouts = [predictor.loaded.image_processor.grid.layout(image.size) for image in images]  # type: ignore[union-attr]
    pictures = [picture for image in images for picture in shown_images(predictor.loaded.image_processor, image)]
    for view, picture in zip(views, pictures, strict=True):
        assert len(view.patches) == view.rows * view.columns
        assert picture.width * view.rows == pytest.approx(picture.height * view.columns)  # cells are square
    assert [views[1].grid, views[3].grid] == [(each.shown_rows, each.shown_columns) for each in layouts]
    assert sum(role == "image" for role in routing.roles) == sum(each.tokens for each in layouts)
    tokens = as_data(routing)["tokens"]
    assert [token["part"] for token in tokens if token.get("image") == 0].count("newline") == layouts[0].shown_rows
    assert tokens[views[1].patches[-1]] == {
        "role": "image", "image": 0, "part": "tiles", "row": views[1].rows - 1, "column": views[1].columns - 1,
    }  # fmt: skip


def test_prompts_about_images_that_cannot_be_shown_are_refused(predictor: Predictor) -> None:
    with pytest.raises(PromptError, match=r"prompt 1.*1 x 400 pixels, too narrow"):
        predictor.generate([noise((40, 24), 0), noise(NARROW, 0)], ["Is it?", "Is it?"], max_new_tokens=2)
    images = [[noise((200, 150), n) for n in range(30)]]
    with pytest.raises(PromptError, match="leave no room for an answer"):
        predictor.check(images, ["Is it?"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.image_aspect_ratio", "anyres"], "set model.projector to 'mlp2x_gelu+newline'"),
        (["--model.projector", "mlp2x_gelu+newline"], "'+newline' is for 'anyres'"),
        ([*TILES, "--data.image_grid_pinpoints", "[[16]]"], "give pairs of height and width"),
        (["--data.image_grid_pinpoints", "[[16, 32]]"], "is for data.image_aspect_ratio 'anyres'"),
        ([*TILES, "--data.image_draft", "true"], "data.image_draft reduces images, on whose size the tokens of"),
        (["--data.image_aspect_ratio", "original"], "anyres"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    minimal = ["--stage", "finetune", "--train.output_dir", str(tmp_path), "--data.sources.a.annotations", "a.json"]
    with pytest.raises(ConfigError) as error:
        parse_run_config([*minimal, *options])
    assert message in str(error.value)
    assert "\n" not in str(error.value).strip()


def test_a_grid_or_length_that_does_not_fit_is_refused_before_training(
    world: Path, built: tuple[Any, SupervisedDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_run_config([str(world / "config.yaml"), "--data.image_grid_pinpoints", "[[16, 40]]"])
    with pytest.raises(ConfigError, match=r"multiples of 16, such as \[16, 32\]"):
        configured_image_processor(built[0], config.data)
    config = parse_run_config([str(world / "config.yaml"), "--data.max_length", "20"])
    with pytest.raises(ConfigError, match="leaves no room for text beside the 24 tokens of the largest image"):
        load_data(config, built[0], built[1].limits.tokenizer, False)  # type: ignore[arg-type]
    wrong = ["--data.image_grid_pinpoints", "[[16, 40]]", "--dry-run", "--train.output_dir", str(world / "none")]
    assert cli.main(["train", str(world / "config.yaml"), *wrong]) == 2
    assert "multiples of 16" in capsys.readouterr().err


def test_check_data_and_plan_count_tiles(world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--workers", "1", "--out", str(tmp_path), "--check.max_bad_images", "1"]
    assert cli.main(["check-data", str(world / "config.yaml"), *options]) == 0
    report = json.loads((tmp_path / "check_data.json").read_text())
    assert sum(source["findings"].get("narrow-image", 0) for source in report["sources"]) == 1
    longest = max(source["tokens"]["max"] for source in report["sources"])
    assert cli.main(["plan", str(world / "config.yaml"), "--gpu", "a100-80g", "--gpus", "1"]) == 0
    text = capsys.readouterr().out
    assert "images of 1 of them not readable here, counted as 1024 x 768" in text
    assert longest > 60

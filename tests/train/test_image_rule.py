"""A run, its validation, its checkpoint and every later answer share one `data.image_modes`."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worlds.tiny_models import make_world

from llava_mole.config import config_to_dict, load_config, parse_run_config, save_config
from llava_mole.data.images import open_image
from llava_mole.inference.predictor import Predictor
from llava_mole.train.train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose red images are transparent drawings and 16-bit scans."""
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=12)
    for number, path in enumerate(sorted((directory / "red" / "images").glob("*.png"))):
        if number % 2:
            Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 60).save(path)
        else:
            Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(path)
    return directory


def run(world: Path, name: str, *more: str) -> Path:
    given = [str(world / "config.yaml"), "--train.output_dir", str(world / name), "--train.max_steps", "4", *more]
    given += ["--data.validation_samples", "2", "--train.validate_every", "4", "--train.validation_answers", "1"]
    return train(parse_run_config(given))


def test_the_rule_of_the_run_is_that_of_its_checkpoint(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "llava_mole"):
        rescaled = run(world, "rescale", "--data.image_modes", "rescale")
        assert not [record for record in caplog.records if "image_modes" in record.message]
        plain = run(world, "default")
    (warning,) = [record.message for record in caplog.records if "image_modes" in record.message]
    assert warning.startswith("data: red: image ")
    losses = [json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for path in (rescaled, plain)]
    assert losses[0] != losses[1]
    path = next((world / "red" / "images").glob("*.png"))
    for directory, modes in ((rescaled, "rescale"), (plain, "llava")):
        processor = Predictor.from_pretrained(str(directory), device="cpu").loaded.image_processor
        assert processor.modes == modes
        shown = processor.pixels(processor.load(path))
        assert torch.equal(shown, processor.pixels(open_image(path, modes=modes)))  # type: ignore[arg-type]


def test_a_configuration_of_an_older_version_means_llava(world: Path) -> None:
    values = config_to_dict(parse_run_config([str(world / "config.yaml"), "--train.output_dir", "x"]))
    del values["data"]["image_modes"]
    save_config(values, world / "old.yaml")
    assert load_config(world / "old.yaml").data.image_modes == "llava"

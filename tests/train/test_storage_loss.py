"""A run whose data vanish saves what is done, ends with one line, and continues to the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from worlds.tiny_models import make_world

from llava_mole.common.errors import EXIT_USER_ERROR, StorageError
from llava_mole.data.sources import ImageReader
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import main


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    steps = ["--train.max_steps", "4", "--train.save_every", "100", "--train.num_workers", "0"]
    return [str(world / "config.yaml"), "--train.output_dir", str(out), *steps, *more]


def test_a_run_without_data_saves_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_world(tmp_path / "world", samples=16)
    world = tmp_path / "world"
    assert main(arguments(world, tmp_path / "whole")) == 0
    original, run = ImageReader.load, tmp_path / "run"

    def load(reader: ImageReader, path: str, **options: Any) -> Any:
        if (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) == 3:
            raise StorageError("s3://bucket/x.tar: is no longer there")
        return original(reader, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "load", load)
        assert main(arguments(world, run)) == EXIT_USER_ERROR
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "error" in line] == [
        "llava-mole: error: stopped after step 3 of 4, saved: s3://bucket/x.tar: is no longer there"
    ]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]
    assert main(arguments(world, run, "--train.resume", "auto")) == 0
    for name in ("adapter/adapter_model.safetensors", "mm_projector.safetensors", "trainer/optimizer.safetensors"):
        one, other = (load_file(folder / "checkpoint-4" / name) for folder in (tmp_path / "whole", run))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name

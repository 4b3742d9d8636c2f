"""A run whose data vanish saves what is done, ends with one line, and continues to the same weights.

If only the held-out samples cannot be read, the run goes on and says so.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from worlds.processes import fork_python
from worlds.tiny_models import make_world

from llava_mole.common.errors import EXIT_USER_ERROR, StorageError
from llava_mole.data.sources import ImageReader
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import main
from llava_mole.train.validation import AnswerCheck, Validator


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


VALIDATION = ["--data.validation_samples", "4", "--train.validate_every", "2"]


@pytest.mark.parametrize("answers", ["0", "2"], ids=["losses", "answers"])
def test_a_validation_that_cannot_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answers: str
) -> None:
    make_world(tmp_path / "world", samples=16)
    world, run, options = tmp_path / "world", tmp_path / "run", [*VALIDATION, "--train.validation_answers", answers]
    assert main(arguments(world, tmp_path / "whole", *options)) == 0
    method = "scores" if int(answers) else "losses"
    checked = AnswerCheck if int(answers) else Validator
    measure, load = getattr(checked, method), ImageReader.load
    calls = []

    def fail_once(self: Any, *given: Any) -> Any:
        calls.append(given)
        if len(calls) > 1:
            return measure(self, *given)
        with monkeypatch.context() as patch:
            patch.setattr(ImageReader, "load", gone)
            return measure(self, *given)

    def gone(reader: ImageReader, path: str, **more: Any) -> Any:
        raise StorageError("s3://bucket/x.tar: is no longer there")

    monkeypatch.setattr(checked, method, fail_once)
    capsys.readouterr()
    assert main(arguments(world, run, *options)) == 0
    assert ImageReader.load is load
    said = capsys.readouterr().err
    assert said.count("no validation after step 2: s3://bucket/x.tar: is no longer there") == 1
    entries = {entry["step"]: entry for entry in read_metrics(run / "metrics.jsonl")}
    assert "validation_loss" not in entries[2]
    assert "validation_exact" not in entries[2]
    expected = {entry["step"]: entry for entry in read_metrics(tmp_path / "whole" / "metrics.jsonl")}
    assert entries[4]["validation_loss"] == expected[4]["validation_loss"]
    for key in ("adapter/adapter_model.safetensors", "trainer/optimizer.safetensors"):
        one, other = (load_file(folder / "checkpoint-4" / key) for folder in (tmp_path / "whole", run))
        assert all(torch.equal(one[name], other[name]) for name in one), key


ONE_RANK_FAILS = """
import os, sys
from llava_mole.common.errors import StorageError
from llava_mole.data.sources import ImageReader
from llava_mole.train.train import main
from llava_mole.train.validation import Validator

losses, calls = Validator.losses, []

def gone(*arguments, **options):
    raise StorageError("s3://bucket/x.tar: is no longer there")

def fail_once(self, *arguments):
    calls.append(arguments)
    load = ImageReader.load
    if os.environ["RANK"] == "1" and len(calls) == 1:
        ImageReader.load = gone
    try:
        return losses(self, *arguments)
    finally:
        ImageReader.load = load

Validator.losses = fail_once
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_no_rank_waits_for_one_that_cannot_read(tmp_path: Path, strategy: str) -> None:
    make_world(tmp_path / "world", samples=16)
    (tmp_path / "worker.py").write_text(ONE_RANK_FAILS)
    given = arguments(tmp_path / "world", tmp_path / "run", *VALIDATION, "--train.distributed", strategy)
    done = fork_python(tmp_path / "worker.py", *given, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("no validation after step 2: s3://bucket/x.tar: is no longer there") == 1
    entries = {entry["step"]: entry for entry in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert ["validation_loss" in entries[step] for step in (2, 4)] == [False, True]

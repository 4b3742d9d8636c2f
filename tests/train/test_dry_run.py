"""`--dry-run` prints what a run would do and writes nothing; Ctrl-C says what is lost; TensorBoard gets the entries."""

import json
import logging
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from worlds.tiny_models import make_world

from llava_mole.common.errors import EXIT_INTERRUPTED
from llava_mole.config import TrackerConfig, load_config, parse_run_config
from llava_mole.data.prepare.cli import main as prepare
from llava_mole.train.dry_run import dry_run
from llava_mole.train.tracker import Tracker, read_metrics
from llava_mole.train.train import main, train
from llava_mole.train.trainer import Trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and two sources, one of them a prepared set without stored lengths."""
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, text_only_every=5)
    raw = directory / "blue"
    assert prepare(["llava-json", "--raw", str(raw / "blue.json"), "--image-root", str(raw), "--out",
                    str(directory / "prepared"), "--workers", "1"]) == 0  # fmt: skip
    return directory


def arguments(world: Path, name: str, *more: str) -> list[str]:
    blue = {
        "annotations": f"{world}/prepared/train",
        "image_folder": f"{world}/prepared/images",
        "follow_links": "true",
    }
    prepared = [f"--data.sources.blue.{key}={value}" for key, value in blue.items()]
    return [str(world / "config.yaml"), "--train.output_dir", str(world / name), *prepared, *more]


def contents(world: Path) -> set[Path]:
    return {path for path in world.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flag", ["--dry-run", "--dry-run-load"])
def test_a_dry_run_prints_the_run_and_writes_nothing(
    world: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(world)
    assert main(arguments(world, "dry", flag)) == 0
    printed = capsys.readouterr().out
    assert contents(world) == before
    assert not (world / "dry").exists()
    assert "dry run of finetune (mole) on 1 rank: nothing was written" in printed
    assert re.search(r"^red +24 +24 +5 +0 +0 +0 +\d+$", printed, flags=re.M)
    assert "12 optimizer steps of 4 samples; 0 samples left over" in printed
    assert "not here" not in printed
    assert ("weights      not read" in printed) is (flag == "--dry-run")


def two_steps(world: Path) -> list[str]:
    return arguments(world, "real", "--train.max_steps", "2", "--train.save_every", "2")


@pytest.fixture(scope="module")
def real(world: Path) -> Path:
    """A finished run of `two_steps`."""
    return train(parse_run_config(two_steps(world)))


def test_the_dry_run_tells_what_the_run_then_does(world: Path, real: Path) -> None:
    told = dry_run(parse_run_config([*two_steps(world), "--train.output_dir", str(world / "other")]), None)
    (size,) = re.findall(r"checkpoint   ([\d.]+) (kB|MB)", told)
    trained = ("adapter/adapter_model.safetensors", "mm_projector.safetensors", "trainer/optimizer.safetensors")
    tensors = [tensor for name in trained for tensor in load_file(real / "checkpoint-2" / name).values()]
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert float(size[0]) * {"kB": 1e3, "MB": 1e6}[size[1]] == pytest.approx(written, rel=0.02)
    again = dry_run(parse_run_config([*two_steps(world), "--train.resume", "auto"]), None)
    assert f"is complete: {real / 'checkpoint-2'}" in again
    assert json.loads((real / "summary.json").read_text())["step"] == 2


def test_a_dry_run_tells_what_this_machine_cannot_do(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = dry_run(parse_run_config(arguments(world, "dry", "--train.precision", "bf16")), None)
    assert "not here     train.precision 'bf16' needs a GPU" in told


def test_a_dry_run_finds_what_would_end_the_run(world: Path, real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(world, "dry", "--dry-run", "--train.global_batch_size", "4000")) == 2
    assert "larger than the" in capsys.readouterr().err
    assert main(arguments(world, "dry", "--dry-run", "--data.sources.red.annotations", "none.json")) == 2
    assert "data.sources.red.annotations = none.json" in capsys.readouterr().err
    assert main(arguments(world, real.name, "--dry-run")) == 2
    assert "--train.resume auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("save_every", "message"),
    [
        ("2", "interrupted after step 3 of 5: 1 step is lost, checkpoint-2 stays in "),
        ("3", "interrupted after step 3 of 5: nothing is lost, checkpoint-3 stays in "),
        ("9", "interrupted after step 3 of 5: 3 steps are lost, there is no checkpoint yet in "),
    ],
)
def test_ctrl_c_says_what_is_lost_and_how_to_go_on(
    world: Path, save_every: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"interrupted-{save_every}"
    given = arguments(world, name, "--train.max_steps", "5", "--train.save_every", save_every)
    step = Trainer._step

    def interrupted(trainer: Trainer, number: int, *given: object) -> object:
        if number == 3:
            raise KeyboardInterrupt
        return step(trainer, number, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupted)
        assert main(given) == EXIT_INTERRUPTED
    printed = capsys.readouterr().err
    assert f"{message}{world / name}" in printed
    assert "--train.resume auto" in printed
    assert "Traceback" not in printed
    if save_every == "2":
        assert main([*given, "--train.resume", "auto"]) == 0
        assert [entry["step"] for entry in read_metrics(world / name / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_tensorboard_gets_the_entries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    entries = [
        {
            "step": step,
            "loss": 1 / step,
            "source_loss": {"red": float(step)},
            "expert_load_by_layer": [[0.25, 0.75]] * 2,
        }
        for step in (1, 2, 3)
    ]
    entries[1]["grad_norm"] = float("nan")
    tracker = Tracker(TrackerConfig(tensorboard=True), tmp_path, 0, run={}, enabled=True)
    for entry in entries:
        tracker.log(entry)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("source_loss/red")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert "grad_norm" not in events.Tags()["scalars"]
    assert [e.step for e in events.Histograms("over_layers/expert_load/1")] == [1, 2, 3]
    # Goes on from step 1: the later entries of the first process are hidden.
    tracker = Tracker(TrackerConfig(tensorboard=True), tmp_path, 1, run={}, enabled=True)
    tracker.log({**entries[1], "loss": 7.0})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 7.0)]


def test_a_missing_tensorboard_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(logging.getLogger("llava_mole"), "propagate", True)
    tracker = Tracker(TrackerConfig(tensorboard=True), tmp_path, 0, run={}, enabled=True)
    tracker.log({"step": 1, "loss": 1.0})
    tracker.close()
    assert "tensorboard is not available" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_saved_configuration_has_no_dry_run(real: Path) -> None:
    assert "dry_run" not in (real / "config.yaml").read_text(encoding="utf-8")
    assert load_config(real / "config.yaml").tracker.tensorboard is False

"""Faults that one process is enough for: unreadable images, damaged metrics, trackers, signals, refusals, init_from."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds.tiny_models import make_data, make_language_model, make_world

from llava_mole.common.errors import CheckpointError, ConfigError
from llava_mole.common.log import setup_logging
from llava_mole.config import config_to_dict, deepspeed_config, parse_run_config
from llava_mole.train import faults
from llava_mole.train.faults import TrainingError, check_ranks_agree, parameter_hash
from llava_mole.train.tracker import Tracker, read_metrics
from llava_mole.train.train import main, train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=20)
    return directory


def arguments(world: Path, name: str, *more: str) -> list[str]:
    return [str(world / "config.yaml"), "--train.output_dir", str(world / name), "--train.max_steps", "6", *more]


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    return train(parse_run_config(arguments(world, "finished", "--train.save_every", "3")))


# Images


def break_images(folder: Path, count: int) -> None:
    for path in sorted((folder / "images").glob("*.png"))[:count]:
        path.write_bytes(path.read_bytes()[:30])


def test_unreadable_images_are_replaced_counted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_world(tmp_path, samples=20)
    break_images(tmp_path / "red", 3)
    setup_logging()
    run = train(parse_run_config(arguments(tmp_path, "run", "--train.max_steps", "10")))
    assert read_metrics(run / "metrics.jsonl")[-1]["replaced_images"] == {"red": 3}
    state = json.loads((run / "checkpoint-10" / "trainer" / "state.json").read_text())
    assert state["replaced_images"] == {"red": 3}
    assert state["consumed_by_source"] == {"red": 20, "blue": 20}
    printed = capsys.readouterr().err
    assert printed.count("another sample of its source is used instead") == 3
    assert "red.json:1: image" in printed


def test_too_many_unreadable_images_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_world(tmp_path, samples=20)
    break_images(tmp_path / "red", 12)
    assert main(arguments(tmp_path, "run", "--train.max_steps", "10")) == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("llava-mole: error:"))
    assert "11 of " in error
    assert "samples of source 'red' had an image that cannot be read" in error
    assert "data.max_bad_image_share 0.001" in error
    allowed = arguments(tmp_path, "allowed", "--train.max_steps", "10", "--data.max_bad_image_share", "0.7")
    train(parse_run_config(allowed))
    strict = arguments(tmp_path, "strict", "--train.max_steps", "10", "--data.max_bad_image_share", "0")
    with pytest.raises(TrainingError, match="1 of "):
        train(parse_run_config(strict))


def test_a_run_goes_on_after_an_image_has_vanished_but_none_starts(tmp_path: Path) -> None:
    make_world(tmp_path, samples=20)
    options = ("--train.save_every", "3", "--train.resume", "auto")
    train(parse_run_config(arguments(tmp_path, "run", *options, "--train.max_steps", "3")))
    (tmp_path / "red" / "images" / "red-0.png").unlink()
    longer = ("--train.max_steps", "10", "--train.accept_changed", "[train.max_steps]")
    train(parse_run_config(arguments(tmp_path, "run", *options, *longer)))
    with pytest.raises(faults.UserError, match="red-0.png' is not a file"):
        train(parse_run_config(arguments(tmp_path, "new", *options)))


# Metrics and trackers


def tracker(world: Path, run_dir: Path, first_step: int, *more: str) -> Tracker:
    run_dir.mkdir(exist_ok=True)
    config = parse_run_config(arguments(world, "x", *more))
    return Tracker(config.tracker, run_dir, first_step, run=config_to_dict(config), enabled=True)


def test_metrics_stay_consistent_over_kill_and_resume(world: Path, tmp_path: Path) -> None:
    first = tracker(world, tmp_path, 0)
    for step in range(1, 6):
        first.log({"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:  # killed here, after the checkpoint of step 3
        file.write('{"step": 4, "loss": 9.0}\nnot json\n{"step": 6, "lo')
    second = tracker(world, tmp_path, 3)
    for step in range(4, 6):
        second.log({"step": step, "loss": math.nan if step == 4 else 50.0, "more": {"a": [math.inf, 1]}})
    second.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [1, 2, 3, 4, 5]
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(entries[3]["loss"])
    assert entries[4]["loss"] == 50.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class BrokenWandb:
    """A service that is there at first."""

    def __init__(self, fails: str):
        self.fails, self.calls = fails, 0

    def init(self, **_):
        return self

    def log(self, *_, **__):
        self.calls += 1
        if self.fails == "log":
            raise ConnectionError("gone")

    def finish(self):
        if self.fails == "finish":
            raise ConnectionError("gone")


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_breaks_is_warned_about_once(
    world: Path, tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = BrokenWandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", service)
    setup_logging()
    tracked = tracker(world, tmp_path, 0, "--tracker.wandb_project", "p")
    for step in range(1, 4):
        tracked.log({"step": step, "loss": 1.0})
    tracked.close()
    assert service.calls == (1 if fails == "log" else 3)
    assert capsys.readouterr().err.count("WARNING wandb") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_full_disk_does_not_stop_the_metrics(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tracker(world, tmp_path, 0)
    full._log._file = Path("/dev/full").open("w")
    setup_logging()
    for step in (1, 2):
        full.log({"step": step})
    assert capsys.readouterr().err.count("No space left on device") == 1


# Signals


def test_a_signal_is_noted_and_its_echo_is_no_second_one() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with faults.StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes on what the whole group has got already
        assert stop.requested
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_signal_kills_at_once() -> None:
    code = (
        "import os, signal; from llava_mole.train import faults; faults.SAME_REQUEST_S = -1.0\n"
        "with faults.StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print(stop.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "True\n")


def test_the_launcher_asks_by_a_file_and_finds_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not faults.record_exit_code(75)
    monkeypatch.setenv(faults.CONTROL_DIR, str(tmp_path))
    with faults.StopSignal() as stop:
        assert not stop.requested
        (tmp_path / "stop").touch()
        assert stop.requested
    assert faults.record_exit_code(75)
    assert (tmp_path / "exit_code").read_text() == "75\n"


def test_a_stopped_run_has_its_own_exit_code_and_goes_on(
    world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--train.save_every", "100", "--train.num_workers", "2")
    monkeypatch.setattr(faults.StopSignal, "requested", True)
    assert main(arguments(world, "stopped", *options)) == 75
    assert [path.name for path in (world / "stopped").glob("checkpoint-*")] == ["checkpoint-1"]
    assert "asked to stop; stopped after step 1 of 6" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(arguments(world, "stopped", *options, "--train.resume", "auto")) == 0
    ends = [load_file(d / "checkpoint-6/trainer/optimizer.safetensors") for d in (world / "stopped", finished)]
    assert all(torch.equal(ends[0][key], value) for key, value in ends[1].items())


# Ranks


def test_parameter_hash_sees_every_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.randn(7, 11).to(dtype)
        other = value.clone()
        assert parameter_hash(value) == parameter_hash(other)
        other[3, 4] = -other[3, 4]
        swapped = value[torch.tensor([1, 0, 2, 3, 4, 5, 6])]
        assert len({parameter_hash(v) for v in (value, other, swapped)}) == 3


def test_ranks_in_the_minority_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"a": torch.ones(2), "b": torch.ones(3)}
    usual = [parameter_hash(p) for p in parameters.values()]
    monkeypatch.setattr(faults, "all_gather_objects", lambda own: [own, own, [own[0], own[1] + 1], own])
    assert len(usual) == 2
    with pytest.raises(
        TrainingError, match=r"after step 9 .* of rank 2 differ from those of rank 0, 1, 3 \(first: b\)"
    ):
        check_ranks_agree(parameters, 9)


# Refusals


UNSUPPORTED = {
    "answers": (["--data.validation_samples", "2", "--train.validate_every", "1", "--train.validation_answers", "1"],
                "train.validation_answers is 1 and train.distributed is '{}', which spreads"),
    "compile": (["--train.compile", "true"], "train.compile is true and .* set --train.compile false, or use 'zero2'"),
    "conflict": (["--train.conflict_every", "2"], "train.conflict_every is 2 and train.distributed is '{}'"),
    "quantised": (["--model.quantization", "4bit"], "model.quantization is '4bit': quantised weights cannot be spread"),
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_spread_weights_do_not_support_is_refused(world: Path, strategy: str, name: str) -> None:
    options, message = UNSUPPORTED[name]
    with pytest.raises(ConfigError, match=message.format(strategy)) as refused:
        parse_run_config(arguments(world, "x", "--train.distributed", strategy, *options))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3}, "stage is 3; train.distributed 'zero2' takes 1 and 2 .*'zero3' 3"),
        ({"stage": 2, "offload_param": {"device": "nvme"}}, "offload_param is set; leave it out"),
        ({"stage": 2, "zero_quantized_weights": True}, "zero_quantized_weights is True; leave it out"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer is set; leave it out"),
    ],
)
def test_deepspeed_settings_are_refused_with_the_reason(world: Path, tmp_path: Path, zero: dict, message: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    config = parse_run_config(arguments(world, "x", "--train.deepspeed_config", str(path)))
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config.train, 2)


def test_a_strategy_of_accelerate_launch_is_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(arguments(world, "x")) == 2
    assert "ACCELERATE_USE_FSDP is set in the environment; unset it" in capsys.readouterr().err


def test_resuming_an_earlier_checkpoint_over_later_ones_is_refused(world: Path, finished: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-3 is not the newest .* \(checkpoint-6 is later\)"):
        train(parse_run_config(arguments(world, "finished", "--train.resume", str(finished / "checkpoint-3"))))
    branch = arguments(world, "branch", "--train.resume", str(finished / "checkpoint-3"))
    train(parse_run_config(branch))
    ends = [load_file(d / "checkpoint-6/trainer/optimizer.safetensors") for d in (world / "branch", finished)]
    assert all(torch.equal(ends[0][key], value) for key, value in ends[1].items())


def test_a_restarted_process_resumes_without_being_told(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--train.save_every", "3")
    train(parse_run_config(arguments(world, "again", *options, "--train.max_steps", "3")))
    with pytest.raises(CheckpointError, match="already has 1 checkpoint"):
        train(parse_run_config(arguments(world, "again", *options)))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(parse_run_config(arguments(world, "again", *options, "--train.accept_changed", "[train.max_steps]")))
    assert [entry["step"] for entry in read_metrics(world / "again" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


# New data from old weights


def test_init_from_takes_weights_but_neither_optimizer_nor_progress(world: Path, finished: Path) -> None:
    folder = world / "task"
    sources = {"task": {"annotations": str(make_data(folder, "task", 16, seed=7)), "image_folder": str(folder)}}
    still = ("--train.learning_rate", "0", "--train.min_learning_rate", "0")
    new = ("--data.sources", json.dumps(sources), "--data.mixture", "{task: 1}", "--train.max_steps", "1")
    run = train(parse_run_config(arguments(world, "task-run", "--init-from", str(finished), *new, *still)))
    before = load_file(finished / "checkpoint-6/trainer/optimizer.safetensors")
    after = load_file(run / "checkpoint-1/trainer/optimizer.safetensors")
    masters = [key for key in before if key.startswith("master/")]
    assert masters
    assert all(torch.equal(after[key], before[key]) for key in masters)
    moments = [key for key in before if key.startswith("exp_avg/")]
    assert any(not torch.equal(after[key], before[key]) for key in moments)
    state = json.loads((run / "checkpoint-1/trainer/state.json").read_text())
    assert (state["step"], state["consumed_by_source"]) == (1, {"task": 4})


INIT_MISTAKES = {
    "rank": (["--adapter.rank", "4"], "has another adapter: r 2 there, 4 here"),
    "experts": (["--adapter.num_experts", "1"], "num_experts 2 there, 1 here"),
    "scale": (["--adapter.options.expert_scale", "prob"], "expert_scale 'straight_through' there, 'prob' here"),
    "method": (["--adapter", "{method: lora, rank: 2}"], "has adapter.method 'mole', this run has 'lora'"),
    "projector": (["--projector_weights", "x"], "init_from brings its own projector"),
    "base": (["--model.language_model", "OTHER"], "was trained on another language model"),
    "nowhere": (["--init_from", "nowhere"], "init_from = nowhere"),
}


@pytest.mark.parametrize("name", INIT_MISTAKES)
def test_init_from_what_does_not_fit_is_refused(
    world: Path, finished: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = world / "other-lm"
    if not other.exists():
        make_language_model(other, seed=9)
    overrides, message = INIT_MISTAKES[name]
    overrides = [value.replace("OTHER", str(other)) for value in overrides]
    assert main(arguments(world, f"bad-{name}", "--init_from", str(finished), *overrides)) == 2
    assert message in capsys.readouterr().err
    assert not (world / f"bad-{name}").exists()

"""`train.conflict_every` records conflicts and leaves the run as it is without, bit for bit; it resumes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worlds.processes import fork_python
from worlds.tiny_models import make_world

from llava_mole.analysis.probe import Probe, first_positions
from llava_mole.common.errors import ConfigError, StorageError
from llava_mole.config import parse_run_config
from llava_mole.data.mixture import TrainingPlan
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train

STEPS = 4
TIMES = {"step_s", "tokens_per_s", "data_wait_s", "flops_per_s", "validation_s", "max_memory_bytes"}
ADAPTERS = {
    # Noise, counters, biases and every random generator that a step has.
    "noisy": ["--adapter.dropout", "0.1", "--adapter.options.jitter", "0.1", "--adapter.options.bias_update_rate",
              "0.01", "--train.activation_checkpointing", "all"],
    "random router": ["--adapter.preset", "paper", "--adapter.options.router", "random"],
    "sequence": ["--adapter.preset", "paper", "--adapter.options.granularity", "sequence",
                 "--adapter.options.balance_group", "micro_batch", "--adapter.options.expert_scale", "prob"],
    "lora, padded": ["--adapter.method", "lora", "--adapter.preset", "paper", "--adapter.dropout", "0.1",
                     "--train.batching", "padded"],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=15, text_only_every=3)
    return directory


def arguments(world: Path, name: str, *overrides: str) -> list[str]:
    out = ["--train.output_dir", str(world / name), "--train.max_steps", str(STEPS), "--train.save_every", "2"]
    return [str(world / "config.yaml"), *out, *overrides]


def run(world: Path, name: str, *overrides: str) -> Path:
    return train(parse_run_config(arguments(world, name, *overrides)))


def assert_same(one: Path, other: Path) -> None:
    """Everything a run leaves behind, but for times."""
    files = "trainer/optimizer.safetensors", "adapter/adapter_model.safetensors", "mm_projector.safetensors"
    for step in (2, STEPS):
        for file in files:
            a, b = (load_file(path / f"checkpoint-{step}" / file) for path in (one, other))
            assert a.keys() == b.keys()
            assert [name for name in a if not torch.equal(a[name], b[name])] == []
        states = [json.loads((path / f"checkpoint-{step}/trainer/state.json").read_text()) for path in (one, other)]
        assert states[0] == states[1]
    entries = [
        [
            {key: value for key, value in entry.items() if key not in TIMES}
            for entry in read_metrics(path / "metrics.jsonl")
        ]
        for path in (one, other)
    ]
    assert entries[0] == entries[1]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_run_is_the_same_bit_for_bit(world: Path, adapter: str) -> None:
    name = adapter.replace(" ", "-").replace(",", "")
    without = run(world, name, *ADAPTERS[adapter])
    measured = run(world, f"{name}-measured", *ADAPTERS[adapter], "--train.conflict_every", "1")
    assert_same(measured, without)
    assert not (without / "conflict.jsonl").exists()
    entries = read_metrics(measured / "conflict.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    for entry in entries:
        assert entry["sources"] == ["blue", "red"]
        assert -1 <= entry["all"]["cosine"][0][1] <= 1
        assert {"projector", "attention B"} <= set(entry["parts"])
        assert math.isfinite(entry["all"]["interval"][0][1])
        assert entry["seconds"] > 0


def test_it_resumes_and_may_be_changed(world: Path) -> None:
    whole = run(world, "whole", "--train.conflict_every", "1")
    cut = world / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / f"checkpoint-{STEPS}")
    run(world, "cut", "--train.conflict_every", "1", "--train.resume", "auto")
    a, b = (
        [{k: v for k, v in e.items() if k != "seconds"} for e in read_metrics(path / "conflict.jsonl")]
        for path in (whole, cut)
    )
    assert json.dumps(a) == json.dumps(b)
    shutil.rmtree(cut / f"checkpoint-{STEPS}")
    run(world, "cut", "--train.conflict_every", "3", "--train.resume", "auto")
    assert [entry["step"] for entry in read_metrics(cut / "conflict.jsonl")] == [1, 2, 3, 4]
    assert_same(cut, whole)


def test_a_measurement_costs_a_step_for_every_source(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source has as many samples as a step (4), each with one forward and one backward pass."""
    from llava_mole.analysis.conflict import gradients

    passed: list[str] = []
    forward = gradients.forward_losses

    def counting(model: torch.nn.Module, batch: dict) -> tuple:
        passed.extend(batch["sources"])
        return forward(model, batch)

    monkeypatch.setattr(gradients, "forward_losses", counting)
    run(world, "counted", "--train.conflict_every", "4")
    assert sorted(passed) == ["blue"] * 4 + ["red"] * 4
    run(world, "off")
    assert len(passed) == 8


def test_held_out_samples_are_used_where_there_are_some(world: Path) -> None:
    held = ["--data.validation_samples", "3", "--train.validate_every", "2", "--train.conflict_every", "2"]
    entry = read_metrics(run(world, "held", *held) / "conflict.jsonl")[0]
    assert entry["held_out"] is True
    assert (entry["batches"], entry["batch_size"]) == (3, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.mixture.blue", "0"], "the mixture has one source"),
        (["--data.validation_samples", "1", "--train.validate_every", "2"], "needs two samples of every source"),
    ],
)
def test_what_cannot_be_measured_is_refused(world: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(world, "refused", *overrides, "--train.conflict_every", "2")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "ddp"])
def test_two_ranks_are_undisturbed_too(world: Path, strategy: str) -> None:
    program = str(Path(__file__).with_name("ranks_worker.py"))
    common = ["--train.distributed", strategy, "--adapter.dropout", "0.1"]
    for name, every in ((f"{strategy}-off", "0"), (f"{strategy}-on", "1")):
        done = fork_python(
            program, *arguments(world, name, *common, "--train.conflict_every", every), ranks=2, timeout_s=600
        )
        assert done.returncode == 0, done.stderr[-4000:]
    assert_same(world / f"{strategy}-on", world / f"{strategy}-off")
    assert len(read_metrics(world / f"{strategy}-on" / "conflict.jsonl")) == STEPS
    # Without noise two ranks train as one process does, and their sums are its measurement.
    still = [*common, "--adapter.dropout", "0", "--train.conflict_every", "1"]
    done = fork_python(program, *arguments(world, f"{strategy}-still", *still), ranks=2, timeout_s=600)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = run(world, f"{strategy}-alone", *still)
    both, one = (read_metrics(world / name / "conflict.jsonl") for name in (f"{strategy}-still", alone.name))
    for ours, theirs in zip(both, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        for key in ("cosine", "norm"):
            assert np.array(ours["all"][key], float) == pytest.approx(np.array(theirs["all"][key], float), rel=1e-3)


def test_a_measurement_that_cannot_be_read_is_left_out(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on, as without the meter; the next measurement reads again."""
    whole, load, calls = run(world, "readable", "--train.conflict_every", "2"), Probe.load, []

    def fail_once(self: Probe, *given: int) -> None:
        calls.append(given)
        if len(calls) == 1:
            raise StorageError("s3://bucket/x.tar: is no longer there")
        load(self, *given)

    monkeypatch.setattr(Probe, "load", fail_once)
    lost = run(world, "unreadable", "--train.conflict_every", "2")
    assert caplog.text.count("no conflict after step 2: s3://bucket/x.tar: is no longer there") == 1
    assert_same(lost, whole)
    first, second = read_metrics(whole / "conflict.jsonl")
    (found,) = read_metrics(lost / "conflict.jsonl")
    assert (first["step"], second["step"], found["step"]) == (2, 4, 4)
    assert found["all"] == second["all"]


def test_a_sample_is_measured_once(world: Path) -> None:
    """A lambda above 1 repeats samples; the meter compares different ones."""
    more = ["--data.mixture.blue", "3", "--train.epochs", "2", "--train.global_batch_size", "28",
            "--train.conflict_every", "1", "--train.max_steps", "1"]  # fmt: skip
    (entry,) = read_metrics(run(world, "repeated", *more) / "conflict.jsonl")
    assert entry["batches"] * entry["batch_size"] <= 15


@pytest.mark.parametrize(("count", "enough"), [(20, True), (21, False)])
def test_the_first_positions_are_different_samples(count: int, enough: bool) -> None:
    plan = TrainingPlan({"a": 20, "b": 90}, {"a": 4.0, "b": 0.5}, 0, epochs=2)
    dataset: Any = type("Dataset", (), {"plan": plan, "source_names": plan.names, "__len__": lambda _: len(plan)})()
    if not enough:
        with pytest.raises(ConfigError, match="source 'a' has 20 samples to measure on, and 21 of each"):
            first_positions(dataset, count)
        return
    for name, own in zip(plan.names, first_positions(dataset, count), strict=True):
        assert own == sorted(own)
        assert [plan[position][0] for position in own] == [name] * count
        assert len({plan[position][1] for position in own}) == count

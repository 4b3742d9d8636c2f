"""Two ranks on which something goes wrong: they skip, stop, give up and resume together, and never wait for ever."""

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds import processes
from worlds.tiny_models import make_world

from llava_mole.train.tracker import read_metrics

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import faults
from faults_rank import Sabotage
from faults_ranks import Farm, Ranks

pytestmark = pytest.mark.slow

LIMIT_S = 120.0
ZERO3 = str(Path(__file__).parents[2] / "scripts" / "zero3.json")
SPREAD = {
    "zero3": ("--model.train.language_model", "full", "--train.deepspeed_config", ZERO3),
    "fsdp2": ("--model.train.language_model", "full"),
}
"""Further options of strategies that spread weights."""


@pytest.fixture(scope="module")
def farm() -> Farm:
    return processes.farm()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, text_only_every=5)
    return directory


def start(farm: Farm, world: Path, name: str, *more: str, sabotage: Sabotage | None = None) -> Ranks:
    options = ("--train.distributed", "ddp", "--train.micro_batch_size", "1", "--train.max_steps", "8")
    arguments = [str(world / "config.yaml"), "--train.output_dir", str(world / name), *options, *more]
    return farm.start(arguments, world / name, sabotage)


def log(world: Path, name: str) -> str:
    """What all ranks of the run have printed."""
    return "".join((world / f"{name}.{rank}").read_text(encoding="utf-8", errors="replace") for rank in range(2))


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoint-{step}" / "trainer" / "optimizer.safetensors")


def counts(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / f"checkpoint-{step}" / "trainer" / "state.json").read_text(encoding="utf-8"))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_short_campaign(farm: Farm, tmp_path: Path, strategy: str) -> None:
    """With `fsdp2` everything trains, and both ranks write."""
    campaign = faults.Campaign(farm, tmp_path, strategy, random.Random(1))
    campaign.prepare()
    expected = campaign.reference()
    assert expected["progress"]["skipped_steps"] > 0
    assert expected["progress"]["replaced_images"]["red"] > 0
    assert expected["leftovers"] == []
    for name in ("one", "two", "three"):  # kills are timed by the reference run: a faster run may outrun them
        campaign.disturb_until_done(name, expected, kills=4 if strategy == "ddp" else 2)
        if campaign.kills >= 2:
            break
    assert campaign.kills >= 2
    assert not campaign.lost
    assert not campaign.wrong
    assert not campaign.touched


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(farm: Farm, world: Path, strategy: str) -> None:
    name = f"nan-{strategy}"
    options = ("--train.distributed", strategy, "--train.save_every", "1", "--train.keep_checkpoints", "9",
               "--adapter.preset", "coupled", *SPREAD.get(strategy, ()))  # fmt: skip
    assert start(farm, world, name, *options, sabotage=Sabotage(nan_ids=("red-3",))).wait(LIMIT_S) == [0, 0]
    run_dir = world / name
    entries = {entry["step"]: entry for entry in read_metrics(run_dir / "metrics.jsonl")}
    (step,) = [s for s, entry in entries.items() if entry["loss"] != entry["loss"]]
    assert 1 < step < 8
    assert_equal(tensors(run_dir, step), tensors(run_dir, step - 1))
    # The expert counts of the dropped step, which the balance loss of the next one uses, are dropped too.
    adapters = [load_file(run_dir / f"checkpoint-{s}/adapter/adapter_model.safetensors") for s in (step - 1, step)]
    assert_equal(adapters[1], adapters[0])
    after = tensors(run_dir, step + 1)
    assert any(not torch.equal(after[key], value) for key, value in tensors(run_dir, step).items())
    assert all(value.isfinite().all() for value in tensors(run_dir, 8).values())
    assert counts(run_dir, 8)["skipped_steps"] == entries[8]["skipped_steps"] == 1
    assert counts(run_dir, 8)["samples_consumed"] == 32
    (line,) = [line for line in log(world, name).splitlines() if "is skipped on all ranks" in line]
    assert f"step {step} is skipped on all ranks: its loss is not finite; samples of rank" in line
    assert "red-3" in line
    # Adam counts updates, not steps: a resume from right after the skipped step must, too.
    shutil.copytree(run_dir, world / f"{name}-again")
    for later in range(step + 1, 9):
        shutil.rmtree(world / f"{name}-again" / f"checkpoint-{later}")
    again = start(farm, world, f"{name}-again", *options, "--train.resume", "auto")
    assert again.wait(LIMIT_S) == [0, 0]
    assert_equal(tensors(world / f"{name}-again", 8), tensors(run_dir, 8))


def test_too_many_bad_steps_in_a_row_end_the_run_with_one_message(farm: Farm, world: Path) -> None:
    ids = tuple(f"{source}-{number}" for source in ("red", "blue") for number in range(24))
    assert start(farm, world, "all-nan", sabotage=Sabotage(nan_ids=ids)).wait(LIMIT_S) == [2, 2]
    errors = [line for line in log(world, "all-nan").splitlines() if line.startswith("llava-mole: error:")]
    assert len(errors) == 1
    assert "3 steps in a row up to step 3 had a loss or gradient that is not finite" in errors[0]
    assert len(read_metrics(world / "all-nan" / "metrics.jsonl")) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_and_stops_all_after_the_same_step(farm: Farm, world: Path, rank: int) -> None:
    name, options = f"stopped-{rank}", ("--train.max_steps", "24", "--train.epochs", "2")
    ranks = start(farm, world, name, *options)
    metrics = world / name / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert all(process.is_alive() for process in ranks.processes)
        time.sleep(0.01)
    ranks.signal(signal.SIGTERM if rank else signal.SIGUSR1, rank)
    assert ranks.wait(LIMIT_S) == [75, 75]
    (checkpoint,) = (world / name).glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 2 <= step < 24
    assert [entry["step"] for entry in read_metrics(metrics)] == list(range(1, step + 1))
    assert "continue with --train.resume auto (exit code 75)" in log(world, name)
    assert start(farm, world, name, *options, "--train.resume", "auto").wait(LIMIT_S) == [0, 0]
    if not (world / "calm").exists():
        assert start(farm, world, "calm", *options).wait(LIMIT_S) == [0, 0]
    assert_equal(tensors(world / name, 24), tensors(world / "calm", 24))


def test_ranks_that_drift_apart_are_found_and_nothing_is_saved_of_them(farm: Farm, world: Path) -> None:
    drift = Sabotage(diverge_at=3)
    options = ("--train.check_ranks_every", "2", "--train.save_every", "4")
    assert start(farm, world, "drift", *options, sabotage=drift).wait(LIMIT_S) == [2, 2]
    text = log(world, "drift")
    assert text.count("llava-mole: error:") == 1
    assert "after step 4 the trainable parameters of rank 1 differ from those of rank 0 (first: projector." in text
    assert not list((world / "drift").glob("checkpoint-*"))


@pytest.mark.parametrize("kind", ["no_space", "file_limit"])
def test_a_failed_save_keeps_the_run_and_its_last_good_checkpoint(farm: Farm, world: Path, kind: str) -> None:
    options = ("--train.save_every", "2", "--train.keep_checkpoints", "2", "--train.max_steps", "6")
    failing = Sabotage(failing_saves={1: kind})
    assert start(farm, world, kind, *options, sabotage=failing).wait(LIMIT_S) == [0, 0]
    assert sorted(p.name for p in (world / kind).glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert "the checkpoint of step 4 could not be written" in log(world, kind)
    assert "training continues" in log(world, kind)


def test_the_last_save_is_tried_again_and_its_failure_is_an_error(farm: Farm, world: Path) -> None:
    options = ("--train.save_every", "4")
    once = Sabotage(failing_saves={1: "file_limit"})
    assert start(farm, world, "last-once", *options, sabotage=once).wait(LIMIT_S) == [0, 0]
    assert (world / "last-once" / "checkpoint-8").is_dir()
    ever = Sabotage(failing_saves={number: "no_space" for number in range(1, 9)})
    assert start(farm, world, "last-ever", *options, sabotage=ever).wait(LIMIT_S) == [2, 2]
    text = log(world, "last-ever")
    assert text.count("llava-mole: error:") == 1
    assert "the last checkpoint, of step 8, could not be written: OSError: [Errno 28]" in text
    assert [p.name for p in (world / "last-ever").glob("*checkpoint-*")] == ["checkpoint-4"]

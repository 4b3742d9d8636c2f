"""Two CPU ranks under DeepSpeed ZeRO-2 and DDP do what one process does, and a run moves between numbers of ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worlds.optimizer_state import assert_same_state, optimizer_state
from worlds.processes import fork_python, launch_environment
from worlds.tiny_models import make_world

from llava_mole.config import parse_run_config
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train

pytestmark = pytest.mark.slow

STEPS = 6
OVERRIDES = ["--train.max_steps", str(STEPS), "--train.save_every", "3", "--train.batching", "padded",
             "--train.micro_batch_size", "1", "--data.validation_samples", "3", "--train.validate_every", "3",
             "--adapter.preset", "paper", "--adapter.options.expert_scale", "straight_through"]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    # Of every three samples one has no image: some micro-batches of a rank are text only while the other's are not.
    make_world(directory, samples=15, text_only_every=3)
    return directory


def arguments(world: Path, name: str, *more: str) -> list[str]:
    return [str(world / "config.yaml"), "--train.output_dir", str(world / name), *OVERRIDES, *more]


def run_ranks(world: Path, name: str, *more: str, launcher: bool = False) -> list[dict]:
    """Train on two ranks, which are forked or started by torchrun; returns what each of them reported."""
    program = [str(Path(__file__).with_name("ranks_worker.py")), *arguments(world, name, *more)]
    if launcher:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program]
        environment = launch_environment()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    else:
        done = fork_python(*program, ranks=2, timeout_s=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((world / name / f"rank-{rank}.json").read_text()) for rank in range(2)]


def losses(world: Path, name: str) -> list[float]:
    return [e["loss"] + e["auxiliary_loss"] for e in read_metrics(world / name / "metrics.jsonl")]


def masters(world: Path, name: str) -> dict[str, torch.Tensor]:
    return optimizer_state(world / name, STEPS)


def assert_same_report(world: Path, name: str, other: str) -> None:
    """What is summed over ranks or read from sharded gradients is what one process sees."""
    entries = [read_metrics(world / run / "metrics.jsonl") for run in (name, other)]
    for entry, expected in zip(*entries, strict=True):
        assert entry["grad_norm_by_part"] == pytest.approx(expected["grad_norm_by_part"], rel=2e-3, abs=1e-5)
        assert entry["flops_per_s"] * entry["step_s"] == pytest.approx(expected["flops_per_s"] * expected["step_s"])
    assert [e["validation_loss"] for e in entries[0][-1:]] == [
        pytest.approx(e["validation_loss"], abs=1e-4) for e in entries[1][-1:]
    ]


def assert_same_run(world: Path, name: str, other: str) -> None:
    assert_same_report(world, name, other)
    assert losses(world, name) == pytest.approx(losses(world, other), abs=2e-5)
    assert_same_state(masters(world, name), masters(world, other))


@pytest.fixture(scope="module")
def single(world: Path) -> str:
    train(parse_run_config(arguments(world, "single")))
    return "single"


@pytest.fixture(scope="module")
def zero2(world: Path) -> list[dict]:
    return run_ranks(world, "zero2", launcher=True)


def test_zero2_is_really_deepspeed_on_two_ranks_with_disjoint_shards(zero2: list[dict]) -> None:
    for report in zero2:
        assert report["engine"] == "DeepSpeedEngine"
        assert report["zero_stage"] == 2
        assert report["world_size"] == report["accelerate_world_size"] == 2
        # Each rank keeps about half of the optimizer's state (a few elements more, for alignment).
        assert report["partition_elements"] < 0.6 * report["trainable_elements"]
    for step in range(STEPS):
        shards = [[i for s, *ids in report["ids"] if s == step for i in ids] for report in zero2]
        assert [len(shard) for shard in shards] == [2, 2]
        assert not set(shards[0]) & set(shards[1])


def test_zero2_equals_one_process(world: Path, single: str, zero2: list[dict]) -> None:
    assert_same_run(world, "zero2", single)


def test_ddp_equals_one_process(world: Path, single: str) -> None:
    reports = run_ranks(world, "ddp", "--train.distributed", "ddp")
    assert {report["engine"] for report in reports} == {"DistributedDataParallel"}
    assert_same_run(world, "ddp", single)


@pytest.mark.parametrize("strategy", ["zero2", "ddp"])
def test_packed_rows_balanced_over_ranks_equal_one_padded_process(world: Path, single: str, strategy: str) -> None:
    name = f"packed-{strategy}"
    reports = run_ranks(world, name, "--train.distributed", strategy, "--train.batching", "packed")
    for step in range(STEPS):
        shards = [[i for s, *ids in report["ids"] if s == step for i in ids] for report in reports]
        assert sum(map(len, shards)) == 4
        assert not set(shards[0]) & set(shards[1])
    assert_same_run(world, name, single)


@pytest.mark.parametrize("strategy", ["zero2", "ddp"])
def test_a_trained_head_and_norm_on_two_ranks_equal_one_process(world: Path, strategy: str) -> None:
    saved = ["--adapter.options.modules_to_save", "[lm_head, norm]"]
    train(parse_run_config(arguments(world, f"head-single-{strategy}", *saved)))
    run_ranks(world, f"head-{strategy}", "--train.distributed", strategy, *saved)
    assert any("lm_head" in key for key in masters(world, f"head-{strategy}"))
    assert_same_run(world, f"head-{strategy}", f"head-single-{strategy}")


def test_a_run_goes_on_with_another_number_of_ranks(world: Path, single: str, zero2: list[dict]) -> None:
    for source, name in (("zero2", "two-to-one"), (single, "one-to-two")):
        shutil.copytree(world / source, world / name)
        shutil.rmtree(world / name / f"checkpoint-{STEPS}")
    train(parse_run_config(arguments(world, "two-to-one", "--train.resume", "auto")))
    run_ranks(world, "one-to-two", "--train.resume", "auto")
    for name in ("two-to-one", "one-to-two"):
        assert_same_run(world, name, single)


def test_two_ranks_then_one_then_two_again(world: Path, single: str) -> None:
    options = ["--train.save_every", "2", "--train.keep_checkpoints", "3", "--train.batching", "packed"]
    run = world / "chain"
    run_ranks(world, "chain", "--train.distributed", "ddp", *options)
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    train(parse_run_config(arguments(world, "chain", *options, "--train.resume", "auto")))
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    run_ranks(world, "chain", "--train.distributed", "ddp", *options, "--train.resume", "auto")
    assert_same_run(world, "chain", single)

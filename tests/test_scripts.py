"""The shell scripts parse, print what they would run, and refuse what cannot run before loading anything."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in ("NNODES", "GPUS_PER_NODE", "LAUNCHER", "DRY_RUN")}
    return subprocess.run(
        command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script: Path) -> None:
    assert run("bash", "-n", str(script)).returncode == 0


@pytest.mark.parametrize("name", ["pretrain", "finetune_mole", "finetune_lora"])
def test_training_scripts_are_short_and_hold_no_hyper_parameter(name: str) -> None:
    lines = (ROOT / f"scripts/{name}.sh").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 15
    assert not [line for line in lines if "learning_rate" in line or "batch_size" in line]


DRY_RUNS = {
    "one process": (
        {"GPUS_PER_NODE": "1"},
        "python -m llava_mole.train.train configs/finetune_mole.yaml --train.max_steps 3",
    ),
    "one machine": (
        {"GPUS_PER_NODE": "8"},
        "torchrun --nproc_per_node 8 --nnodes 1 --standalone -m llava_mole.train.train",
    ),
    "eight machines": (
        {"GPUS_PER_NODE": "8", "NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "node0"},
        "torchrun --nproc_per_node 8 --nnodes 8 --node_rank 3 --master_addr node0 --master_port 29500 -m",
    ),
    "hostfile": (
        {"GPUS_PER_NODE": "8", "NNODES": "2", "LAUNCHER": "deepspeed", "HOSTFILE": "hosts"},
        "deepspeed --num_gpus 8 --num_nodes 2 --master_port 29500 --hostfile hosts --module llava_mole.train.train",
    ),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_prints_the_command(name: str) -> None:
    environment, expected = DRY_RUNS[name]
    done = run("bash", "scripts/finetune_mole.sh", "--train.max_steps", "3", DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected)


def test_launcher_mistakes_are_named() -> None:
    done = run("bash", "scripts/pretrain.sh", DRY_RUN="1", LAUNCHER="mpi")
    assert done.returncode == 2
    assert "allowed are torchrun, deepspeed and python" in done.stderr
    done = run("bash", "scripts/pretrain.sh", DRY_RUN="1", NNODES="2", GPUS_PER_NODE="8")
    assert done.returncode != 0
    assert "NODE_RANK is needed" in done.stderr


@pytest.mark.parametrize("name", ["pretrain", "finetune_mole", "finetune_lora"])
def test_paper_configurations_name_what_is_missing(name: str) -> None:
    done = run("bash", f"scripts/{name}.sh")
    assert done.returncode == 2
    assert "model.language_model = playground/models/vicuna-7b-v1.5" in done.stderr
    assert "annotations = playground/data/" in done.stderr
    assert "configs/tiny/finetune_mole.yaml" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (ROOT / "runs" / name).exists()


def test_batches_that_do_not_divide_are_refused_before_ranks_start() -> None:
    done = run(
        "bash", "scripts/finetune_mole.sh", "configs/tiny/finetune_mole.yaml", "--train.global_batch_size", "7",
        "--train.micro_batch_size", "2", GPUS_PER_NODE="2",
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        "train.global_batch_size 7 is not a multiple" in done.stderr
        or "inputs of this run are not there" in done.stderr
    )

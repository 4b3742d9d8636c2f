"""The shell scripts parse, print what they would run, and refuse what cannot run before loading anything."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    *sorted((ROOT / "scripts").rglob("*.sh")),
    *sorted((ROOT / "scripts").rglob("*.sbatch")),
    ROOT / ".ci" / "run",
]
TOPOLOGY = ("NNODES", "NODE_RANK", "GPUS_PER_NODE", "LAUNCHER", "DRY_RUN", "MAX_RESTARTS", "MASTER_ADDR", "MASTER_PORT")
TRAINING = ["pretrain", "finetune_mole", "finetune_lora", "finetune_task", "finetune"]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in TOPOLOGY}
    return subprocess.run(
        command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script: Path) -> None:
    assert run("bash", "-n", str(script)).returncode == 0


@pytest.mark.parametrize("name", TRAINING)
def test_training_scripts_are_short_and_hold_no_hyper_parameter(name: str) -> None:
    lines = (ROOT / f"scripts/{name}.sh").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 15
    assert not [line for line in lines if "learning_rate" in line or "batch_size" in line]


TORCHRUN = "python -m llava_mole.train.torchrun"
DRY_RUNS = {
    "one process": (
        {"GPUS_PER_NODE": "1"},
        "python -m llava_mole.train.train configs/finetune_mole.yaml --train.max_steps 3",
    ),
    "one machine": (
        {"GPUS_PER_NODE": "8"},
        f"{TORCHRUN} --nproc_per_node 8 --nnodes 1 --standalone -m llava_mole.train.train",
    ),
    "eight machines": (
        {"GPUS_PER_NODE": "8", "NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "node0"},
        f"{TORCHRUN} --nproc_per_node 8 --nnodes 8 --rdzv_backend c10d --rdzv_endpoint node0:29500 "
        "--rdzv_id llava_mole --rdzv_conf is_host=false -m llava_mole.train.train",
    ),
    "first of eight machines": (
        {"GPUS_PER_NODE": "8", "NNODES": "8", "NODE_RANK": "0", "MASTER_ADDR": "n", "RUN_ID": "7", "MAX_RESTARTS": "3"},
        f"{TORCHRUN} --nproc_per_node 8 --nnodes 8 --max-restarts 3 --rdzv_backend c10d --rdzv_endpoint n:29500 "
        "--rdzv_id 7 --rdzv_conf is_host=true -m llava_mole.train.train",
    ),
    "restarts": (
        {"GPUS_PER_NODE": "8", "MAX_RESTARTS": "2"},
        f"{TORCHRUN} --nproc_per_node 8 --nnodes 1 --max-restarts 2 --standalone -m llava_mole.train.train",
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


@pytest.mark.parametrize("name", ["pretrain", "finetune_mole"])
def test_slurm_jobs_print_what_they_run(name: str) -> None:
    job = ROOT / "scripts" / "slurm" / f"{name}.sbatch"
    done = run("bash", str(job), "--train.max_steps", "3", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    step, command = done.stdout.splitlines()
    asked = f"bash scripts/{name}.sh --train.max_steps 3 --train.resume auto"
    assert step.strip() == f"srun --nodes 8 --ntasks-per-node 1 --wait 120 {asked}"
    assert command.startswith(
        f"{TORCHRUN} --nproc_per_node 8 --nnodes 8 --max-restarts 3 --rdzv_backend c10d "
        f"--rdzv_endpoint first-host:20000 --rdzv_id 0.0 --rdzv_conf is_host=true "
        f"-m llava_mole.train.train configs/{name}.yaml"
    )
    header = [line for line in job.read_text(encoding="utf-8").splitlines() if line.startswith("#SBATCH")]
    for option in ("--nodes=8", "--ntasks-per-node=1", "--gpus-per-node=8", "--signal=USR1@300", "--requeue"):
        assert f"#SBATCH {option}" in header


FAKE_SLURM = """#!/usr/bin/env bash
case "$(basename "$0") $1" in
  "scontrol show") echo nodeA; echo nodeB ;;
  "scontrol requeue") echo "requeued $2" ;;
  srun*) echo "srun $NNODES $MASTER_ADDR $MASTER_PORT $RUN_ID: $*"; exit "${SRUN_EXIT:-0}" ;;
esac
"""


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True)])
def test_a_slurm_job_that_was_stopped_goes_back_into_the_queue(tmp_path: Path, code: int, requeued: bool) -> None:
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(FAKE_SLURM)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[A-B]", "SLURM_JOB_ID": "4711", "SRUN_EXIT": str(code),
             "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    done = run("bash", "scripts/slurm/finetune_mole.sbatch", **slurm)
    assert done.returncode == code
    assert "srun 2 nodeA 24711 4711.0: --nodes 2" in done.stdout
    assert ("requeued 4711" in done.stdout) == requeued


def test_launcher_mistakes_are_named() -> None:
    done = run("bash", "scripts/pretrain.sh", DRY_RUN="1", LAUNCHER="mpi")
    assert done.returncode == 2
    assert "allowed are torchrun, deepspeed and python" in done.stderr
    done = run("bash", "scripts/pretrain.sh", DRY_RUN="1", NNODES="2", GPUS_PER_NODE="8")
    assert done.returncode != 0
    assert "NODE_RANK is needed" in done.stderr


@pytest.mark.parametrize("name", ["pretrain", "finetune_mole", "finetune_lora", "finetune"])
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
        "--train.batching", "padded", "--train.micro_batch_size", "2", GPUS_PER_NODE="2",
    )  # fmt: skip
    assert done.returncode == 2
    assert "train.global_batch_size 7 is not a multiple" in done.stderr

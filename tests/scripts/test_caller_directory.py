"""Scripts that are called from elsewhere read the caller's configuration, and paths in it start where the caller is."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOPOLOGY = ("NNODES", "NODE_RANK", "LAUNCHER", "MAX_RESTARTS", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID",
            "SLURM_SUBMIT_DIR", "PYTHONPATH")  # fmt: skip
PYTHON = """#!/usr/bin/env bash
echo "in $PWD: $*"
"""
SLURM = f"""#!/usr/bin/env bash
case "$(basename "$0") $1 $2" in
  "scontrol show job") echo "   Command={ROOT}/scripts/slurm/pretrain.sbatch" ;;
  "scontrol show hostnames") echo nodeA ;;
  srun*) shift 6; echo "srun in $PWD: $*" ;;
esac
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a configuration, and in `bin` programs that print how they are called."""
    (tmp_path / "bin").mkdir()
    for name, text in {"python": PYTHON, "torchrun": PYTHON, "srun": SLURM, "scontrol": SLURM}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "my.yaml").write_text("stage: finetune\n")
    return tmp_path


def call(elsewhere: Path, script: str, *arguments: str, **environment: str) -> list[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in TOPOLOGY}
    inherited |= {"PATH": f"{elsewhere / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "x", "GPUS_PER_NODE": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments], cwd=elsewhere, env={**inherited, **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["pretrain", "finetune_lora", "finetune_mole", "finetune_task", "finetune", "_launch"])
def test_a_configuration_of_the_caller_is_his(elsewhere: Path, name: str) -> None:
    preflight, training = call(elsewhere, f"{name}.sh", "my.yaml", "--train.epochs", "2")
    assert preflight == f"in {elsewhere}: -m llava_mole.train.preflight 1 my.yaml --train.epochs 2"
    assert training == f"in {elsewhere}: -m llava_mole.train.train my.yaml --train.epochs 2"


@pytest.mark.parametrize("given", [[], ["configs/tiny/pretrain.yaml"], ["--train.epochs", "2"]])
def test_a_configuration_of_the_repository_starts_there(elsewhere: Path, given: list[str]) -> None:
    _, training = call(elsewhere, "pretrain.sh", *given)
    config = [] if given[:1] == ["configs/tiny/pretrain.yaml"] else ["configs/pretrain.yaml"]
    assert training == f"in {ROOT}: -m llava_mole.train.train {' '.join([*config, *given])}"


def test_a_slurm_job_starts_where_it_was_submitted(elsewhere: Path) -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(elsewhere), "SLURM_JOB_NODELIST": "node[A]"}
    copy = elsewhere / "slurm_script"  # SLURM runs a copy of the file in a folder of its own
    copy.write_text((ROOT / "scripts/slurm/pretrain.sbatch").read_text(encoding="utf-8"))
    (line,) = call(elsewhere, str(copy), "my.yaml", **slurm)
    script = os.path.relpath(ROOT / "scripts", elsewhere)
    assert line == f"srun in {elsewhere}: bash {script}/pretrain.sh my.yaml --train.resume auto"


def test_deepspeed_settings_are_found_from_elsewhere(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_mole.config import TrainConfig, deepspeed_config

    monkeypatch.chdir(elsewhere)
    settings = deepspeed_config(TrainConfig(output_dir="x"), 2)
    assert settings["zero_optimization"]["stage"] == 2

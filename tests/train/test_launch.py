"""Real launches: two torchrun agents as on two machines, a signal to one of them, and ranks that start again."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from worlds.processes import free_port, launch_environment
from worlds.tiny_models import make_world

from llava_mole.config import parse_run_config
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=80)
    return directory


def arguments(world: Path, name: str, *more: str) -> list[str]:
    return [str(world / "config.yaml"), "--train.output_dir", str(world / name), "--train.distributed", "ddp",
            "--train.max_steps", str(STEPS), "--train.save_every", "4", "--train.resume", "auto", *more]  # fmt: skip


def launch(world: Path, name: str, *more: str, **environment: str) -> subprocess.Popen:
    with (world / f"{name}.{environment.get('NODE_RANK', 0)}.log").open("w") as log:
        return subprocess.Popen(
            ["bash", "scripts/_launch.sh", *arguments(world, name, *more)],
            cwd=ROOT, env=launch_environment(**environment), stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def log(world: Path, name: str) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(world.glob(f"{name}.*.log")))


@pytest.fixture(scope="module")
def single(world: Path) -> dict:
    train(parse_run_config(arguments(world, "single")))
    return load_file(world / "single" / f"checkpoint-{STEPS}" / "trainer" / "optimizer.safetensors")


def assert_same_result(world: Path, name: str, expected: dict) -> None:
    entries = read_metrics(world / name / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    other = [entry["loss"] for entry in read_metrics(world / "single" / "metrics.jsonl")]
    assert [entry["loss"] for entry in entries] == pytest.approx(other, abs=1e-3)
    found = load_file(world / name / f"checkpoint-{STEPS}" / "trainer" / "optimizer.safetensors")
    assert found.keys() == expected.keys()


def test_two_agents_train_together_stop_on_a_signal_to_one_and_go_on(world: Path, single: dict) -> None:
    nodes = {"NNODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    agents = [launch(world, "nodes", NODE_RANK=str(node), **nodes) for node in range(2)]
    metrics = world / "nodes" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert all(agent.poll() is None for agent in agents), log(world, "nodes")[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(agents[1].pid, signal.SIGTERM)
    assert [agent.wait(120) for agent in agents] == [75, 75], log(world, "nodes")[-4000:]
    stopped = len(read_metrics(metrics))
    assert 3 <= stopped < STEPS
    assert (world / "nodes" / f"checkpoint-{stopped}" / "manifest.json").is_file()
    assert '"world_size": 2' in (world / "nodes" / "environment.json").read_text()
    train(parse_run_config(arguments(world, "nodes")))
    assert_same_result(world, "nodes", single)


DIE_ONCE = """
import os, signal, threading, time
def watch():
    while not os.path.isdir(os.environ["DIE_AFTER"]):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    threading.Thread(target=watch, daemon=True).start()
"""


def test_torchrun_starts_all_ranks_again_when_one_is_killed(world: Path, single: dict, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DIE_ONCE)
    run = launch(
        world, "restarted", GPUS_PER_NODE="2", MAX_RESTARTS="2", PYTHONPATH=str(tmp_path),
        DIE_AFTER=str(world / "restarted" / "checkpoint-4"),
    )  # fmt: skip
    assert run.wait(150) == 0, log(world, "restarted")[-4000:]
    text = log(world, "restarted")
    assert "resuming from" in text
    assert_same_result(world, "restarted", single)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--adapter.options.top_k", "9"], "top_k"),
        (["--data.max_length", "20"], "behind max_length 20"),
    ],
)
def test_a_mistake_that_the_ranks_find_is_one_line(world: Path, option: list[str], message: str) -> None:
    run = launch(world, "mistake", *option, GPUS_PER_NODE="2")
    assert run.wait(120) == 2
    text = log(world, "mistake")
    (line,) = [line for line in text.splitlines() if "error: " in line]
    assert re.search(message, line)
    assert "Traceback" not in text
    assert "FAILED" not in text
    assert not (world / "mistake").exists()


def test_a_rank_that_crashes_is_reported_by_torchrun(world: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DIE_ONCE)
    run = launch(
        world, "crashed", GPUS_PER_NODE="2", PYTHONPATH=str(tmp_path), DIE_AFTER=str(world / "crashed" / "checkpoint-4")
    )
    assert run.wait(150) == 1
    assert "ChildFailedError" in log(world, "crashed")

"""Full fine-tuning on two CPU ranks does what one process does, under every strategy, also from 2 to 1 to 2 ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds.processes import fork_python
from worlds.tiny_models import make_world

from llava_mole.config import parse_run_config
from llava_mole.train.consolidate import consolidate
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train
from llava_mole.train.trainer_state import TrainerState

pytestmark = pytest.mark.slow

STEPS = 6
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
OPTIONS = ["--train.max_steps", str(STEPS), "--train.save_every", "2", "--train.keep_checkpoints", "3",
           "--data.validation_samples", "3", "--train.validate_every", "3", "--train.learning_rate", "1e-3",
           "--model.train.language_model", "full", "--adapter.preset", "paper"]  # fmt: skip
"""The language model trains with experts, in packed rows; some rows of a rank have no image."""
TOWER = ["--model.train.tower", "last_n", "--model.train.tower_blocks", "1", "--train.tower_layer_decay", "0.5"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=15, text_only_every=3)
    settings = json.loads((Path(__file__).parents[2] / "scripts" / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 500  # or all weights would stay whole
    (directory / "zero3.json").write_text(json.dumps(settings))
    return directory


def arguments(world: Path, name: str, *more: str) -> list[str]:
    return [str(world / "config.yaml"), "--train.output_dir", str(world / name), *OPTIONS, *more]


def run_ranks(world: Path, name: str, strategy: str, *more: str) -> list[dict]:
    """Train on two forked ranks; returns what each of them reported."""
    worker = str(Path(__file__).with_name("ranks_worker.py"))
    file = ["--train.deepspeed_config", str(world / "zero3.json")] if strategy == "zero3" else []
    options = arguments(world, name, "--train.distributed", strategy, *file, *more)
    done = fork_python(worker, *options, ranks=2, timeout_s=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((world / name / f"rank-{rank}.json").read_text()) for rank in range(2)]


def differences(world: Path, name: str, other: str) -> dict[str, float]:
    """Largest absolute difference of two runs' losses, validation losses, masters and moments at the end."""
    ours, theirs = (read_metrics(world / run / "metrics.jsonl") for run in (name, other))
    assert len(ours) == len(theirs) == STEPS
    pairs = list(zip(ours, theirs, strict=True))
    found = {"loss": max(abs(a["loss"] - b["loss"]) for a, b in pairs)}
    found["grad_norm"] = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs)
    found["validation"] = max(
        abs(a["validation_loss"][k] - v)
        for a, b in pairs if "validation_loss" in b for k, v in b["validation_loss"].items()
    )  # fmt: skip
    mine, expected = (TrainerState(world / run / f"checkpoint-{STEPS}") for run in (name, other))
    assert mine.shapes == expected.shapes
    for key in expected:
        kind = key.partition("/")[0]
        found[kind] = max(found.get(kind, 0.0), float((mine[key] - expected[key]).abs().max()))
    return found


LIMITS = {"loss": 2e-5, "grad_norm": 2e-4, "validation": 1e-4, "master": 5e-5, "exp_avg": 1e-4, "exp_avg_sq": 1e-4}


def assert_same(world: Path, name: str, other: str) -> None:
    found = differences(world, name, other)
    assert all(found[key] <= limit for key, limit in LIMITS.items()), found


@pytest.fixture(scope="module")
def single(world: Path) -> str:
    train(parse_run_config(arguments(world, "single", *TOWER)))
    return "single"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_equal_one_process(world: Path, single: str, strategy: str) -> None:
    """The ranks recompute activations. With `fsdp2` both write their own pieces, which are made whole afterwards."""
    files = ["--train.checkpoint_files", "sharded"] if strategy == "fsdp2" else []
    reports = run_ranks(world, strategy, strategy, *TOWER, *files, "--train.activation_checkpointing", "all")
    engines = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlavaMole"}
    for report in reports:
        assert report["engine"] == engines.get(strategy, "DeepSpeedEngine")
        assert report["zero_stage"] == {"zero2": 2, "zero3": 3}.get(strategy)
    assert_same(world, strategy, single)
    whole = world / strategy / f"checkpoint-{STEPS}"
    if files:
        assert len(list((whole / "trainer").glob("optimizer-*-of-00002.safetensors"))) == 2
        consolidate(whole, world / "whole", inference=True)
        whole = world / "whole"
    for file in ("language_model/model.safetensors", "vision_tower/model.safetensors", "mm_projector.safetensors",
                 "adapter/adapter_model.safetensors"):  # fmt: skip
        found, expected = load_file(whole / file), load_file(world / single / f"checkpoint-{STEPS}" / file)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(value, expected[key], atol=5e-5) for key, value in found.items()), file


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_two_ranks_then_one_then_two_again(world: Path, single: str, strategy: str) -> None:
    run = world / f"chain-{strategy}"
    shutil.copytree(world / strategy, run)
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    train(parse_run_config(arguments(world, run.name, *TOWER, "--train.resume", "auto")))
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    run_ranks(world, run.name, strategy, *TOWER, "--train.resume", "auto")
    assert_same(world, run.name, single)


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_a_frozen_language_model_with_experts_can_be_spread_too(world: Path, strategy: str) -> None:
    frozen = ["--model.train.language_model", "adapters"]
    if not (world / "experts").exists():
        train(parse_run_config(arguments(world, "experts", *frozen)))
    run_ranks(world, f"experts-{strategy}", strategy, *frozen)
    assert_same(world, f"experts-{strategy}", "experts")
    states = [load_file(world / run / f"checkpoint-{STEPS}" / "adapter" / "adapter_model.safetensors")
              for run in ("experts", f"experts-{strategy}")]  # fmt: skip
    assert states[0].keys() == states[1].keys()
    assert all(torch.allclose(value, states[1][key], atol=5e-5) for key, value in states[0].items())


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_bfloat16_on_a_gpu_is_near_ddp(world: Path, strategy: str) -> None:
    """One rank: the casts of each engine, not its communication. The CPU form of it is in float32, above."""
    options = ["--device", "cuda", "--train.precision", "bf16", "--model.train.language_model", "full"]
    worker = str(Path(__file__).with_name("ranks_worker.py"))
    for name in ("ddp", strategy):
        if not (world / f"bf16-{name}").exists():
            file = ["--train.deepspeed_config", "scripts/zero3.json"] if name == "zero3" else []
            given = arguments(world, f"bf16-{name}", *options, "--train.distributed", name, *file)
            done = fork_python(worker, *given, ranks=1, timeout_s=600, CUDA_VISIBLE_DEVICES="0", DS_ACCELERATOR="cuda")
            assert done.returncode == 0, done.stderr[-6000:]
    found, expected = ([e["loss"] for e in read_metrics(world / f"bf16-{name}" / "metrics.jsonl")]
                       for name in (strategy, "ddp"))  # fmt: skip
    assert found == pytest.approx(expected, rel=0.03)

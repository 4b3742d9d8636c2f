"""Full fine-tuning, tiles, sharded weights, the network, slow GPUs: by hand, and by the command."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from worlds.tiny_models import make_world

from llava_mole import cli
from llava_mole.analysis.plan.architecture import Trained, build_meta_model
from llava_mole.analysis.plan.memory import Strategy
from llava_mole.analysis.plan.network import EFFICIENCY, LINK_LATENCY, NETWORK_LATENCY, Network, network_of, traffic_of
from llava_mole.analysis.plan.simulation import Samples, draw_slowness, step_time
from llava_mole.common.errors import ConfigError
from llava_mole.config import parse_run_config
from llava_mole.model.flops import ModelShape, find_gpu, model_shape, training_flops
from scripts.docs import published_runs

ROOT = Path(__file__).parents[3]
UNIT = ModelShape(1, 1, 1, 1, 0, 0, 1, 1, 0, 0.0, 1, False, 0, False, 1, 1, 0.0)
FAST = Network(link=100e9, node=50e9, gpus_per_node=4, overlap=0.5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=24, text_only_every=4)
    return directory


def test_a_ring_by_hand() -> None:
    assert FAST.seconds(1e9, 1, 3) == 0
    assert FAST.seconds(8e9, 4, 2) == pytest.approx(8e9 * 3 / 4 / (EFFICIENCY * 100e9) + 2 * 3 * LINK_LATENCY)
    # Three nodes: three of the ring's eleven steps cross the network, whose cards are slower than the links.
    latency = 8 * LINK_LATENCY + 3 * NETWORK_LATENCY
    assert FAST.seconds(8e9, 12, 2) == pytest.approx(8e9 * 11 / 12 / (EFFICIENCY * 50e9) + 2 * latency)
    assert network_of(find_gpu("h100")).link == 450e9
    assert network_of(find_gpu("rtx-4090"), overlap=0.0) == Network(32e9, overlap=0.0)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("single", 0),
        ("ddp", 8 * 100),  # float32 gradients, reduced and gathered once
        ("zero2", 3 * 2 * 100 + 2 * 100),  # gradients of three micro-batches, weights once
        ("zero3", 3 * (2 * (1000 + 200) + 200)),  # all weights twice a micro-batch, gradients once
        ("fsdp2", 3 * (2 * (1000 + 200) + 400)),  # gradients in float32
    ],
)
def test_bytes_of_a_step(kind: str, sent: float) -> None:
    traffic = traffic_of(Strategy(kind, 4), UNIT, frozen=1000, trainable=100, compute_bytes=2, overlap_comm=False)
    assert traffic.bytes_sent(4, 3) == pytest.approx(sent * 3 / 4)


def test_compute_hides_communication_up_to_a_point() -> None:
    traffic = traffic_of(Strategy("zero3", 4), UNIT, frozen=8e9, trainable=0, compute_bytes=2, overlap_comm=True)
    whole = traffic.pass_seconds(FAST, 4)
    assert traffic.exposed(FAST, 4, 0.0, last=True) == pytest.approx(whole)
    assert traffic.exposed(FAST, 4, whole, last=False) == pytest.approx(whole / 2)  # half of the compute hides it
    assert traffic.exposed(FAST, 4, 2 * whole, last=True) == 0
    # ZeRO-2 without overlap_comm hides nothing, and gathers the new weights after the step.
    zero2 = traffic_of(Strategy("zero2", 4), UNIT, frozen=0, trainable=1e9, compute_bytes=2, overlap_comm=False)
    once = FAST.seconds(2e9, 4, 2)
    assert zero2.exposed(FAST, 4, 99.0, last=False) == pytest.approx(once)
    assert zero2.exposed(FAST, 4, 99.0, last=True) == pytest.approx(2 * once)


def test_slow_gpus_are_told_from_long_samples() -> None:
    tokens = np.array([10, 2, 10, 2], dtype=np.int64)
    samples = Samples(tokens, np.zeros_like(tokens), np.zeros_like(tokens))
    ranks = [[[0], [1]], [[2], [3]]]
    slowness = np.array([[1.0, 1.0, 9.0], [1.5, 1.0, 9.0]])
    step = step_time(
        UNIT, samples, ranks, padded=True, recomputed_layers=0, flops_per_s=4.0, lock_step=True,
        exposed=lambda compute, last: 0.25 if last else 0.0, slowness_RP=slowness,
    )  # fmt: skip
    assert (step.useful, step.stragglers, step.slow, step.communication) == (12, 0, 5, 0.25)
    assert step.seconds == 17.25
    assert step.straggler_efficiency == pytest.approx(12 / 17.25)


def test_slowness_is_seeded_and_has_the_given_spread() -> None:
    def draw(seed: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=seed))
        return draw_slowness(1000, 20, jitter=0.05, slow_share=0.1, slow_factor=1.5, generator=generator)

    assert np.array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    means = draw(1).mean(axis=1)
    assert np.mean(means > 1.25) == pytest.approx(0.1, abs=0.03)
    assert draw(1).min() >= 1
    assert draw(1)[means < 1.25].mean() == pytest.approx(1 + 0.05 * math.sqrt(2 / math.pi), abs=0.002)


def test_what_trains_costs_six_flops() -> None:
    path = str(ROOT / "configs" / "finetune_lora.yaml")
    config = parse_run_config([path, "--adapter.method", "none"])
    shapes = {}
    for name, trained in {"frozen": Trained(), "full": Trained("full"), "tower": Trained("full", "last_12")}.items():
        meta = build_meta_model(config.model, config.adapter, train_projector=True, trained=trained)
        shapes[name] = model_shape(meta.model)
        assert meta.tower_blocks_trained == (12 if name == "tower" else 0)
    frozen, full, tower = shapes.values()
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert (frozen.trained_linear_parameters, full.trained_linear_parameters) == (0, linears)
    more = training_flops(full, 1000.0, 0.0, 100.0, 1.0) - training_flops(frozen, 1000.0, 0.0, 100.0, 1.0)
    assert more == pytest.approx(2 * linears * 1000 + 2 * 4096 * 32000 * 100)
    more = training_flops(tower, 1000.0, 0.0, 100.0, 1.0) - training_flops(full, 1000.0, 0.0, 100.0, 1.0)
    assert more == pytest.approx(2 * 12 / 23 * full.tower_flops, rel=0.02)
    for mistake in ({"language_model": "half"}, {"tower": "last"}, {"tower": "last_0"}):
        with pytest.raises(ConfigError, match="allowed are"):
            Trained(**mistake)
    with pytest.raises(ConfigError, match="only 23 blocks of the tower run"):
        build_meta_model(config.model, config.adapter, train_projector=True, trained=Trained("full", "last_24"))


def test_the_command_scales_draws_and_writes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan", str(world / "config.yaml"), "--gpus", "2", "--steps", "2", "--out", str(tmp_path), "--scale",
        "--strategy", "fsdp2", "--train-language-model", "full", "--adapter.method", "none", "--tiles", "2",
        "--jitter", "0.05", "--slow", "0.01,1.2", "--json", str(tmp_path / "plan.json"),
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "fsdp2 on 2 to 1,024 GPUs, samples a GPU and step: 2" in printed
    assert "communication binds" in printed
    rows = json.loads((tmp_path / "plan.json").read_text())["scale"]
    assert [row["gpus"] for row in rows] == [2, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert all(row["global_batch_size"] == 2 * row["gpus"] for row in rows)
    for row in rows:
        assert row["total_step_s"] == pytest.approx(sum(row["step_s"].values()))
    assert rows[-1]["step_s"]["communication"] > rows[1]["step_s"]["communication"]  # the ring grows
    assert rows[-1]["memory_bytes"] < rows[0]["memory_bytes"]  # the weights are spread
    with Image.open(tmp_path / "scale.png") as image:
        assert image.width > 2 * image.height
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parameters"]["language model"]["trainable"] == plan["parameters"]["language model"]["all"]


MISTAKES = {
    "part": (["--train-language-model", "half"], "--train-language-model is 'half'; allowed are full"),
    "tower": (["--train-tower", "last"], "--train-tower is 'last'; allowed are none, all and last_<n>"),
    "tiles": (["--tiles", "0.5"], "--tiles is 0.5; it must be at least 1"),
    "many tiles": (["--tiles", "1000"], "an image takes 4,000 tokens, data.max_length is"),
    "nodes": (["--gpus-per-node", "0"], "--gpus-per-node is 0"),
    "rate": (["--node-gbs", "-1"], "--node-gbs is -1; it must be a positive number"),
    "overlap": (["--overlap", "2"], "--overlap is 2.0; it is a share"),
    "jitter": (["--jitter", "1"], "--jitter is 1.0"),
    "slow": (["--slow", "0.1"], "it must be SHARE,FACTOR"),
    "fast": (["--slow", "0.1,0.9"], "the factor at least 1"),
    "quantised": (["--train-language-model", "full", "--model.quantization", "4bit"], "needs 'none'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = MISTAKES[name]
    assert cli.main(["plan", str(world / "config.yaml"), "--gpus", "2", "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_published_runs_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    shown = page.split(published_runs.BEGIN)[1].split(published_runs.END)[0]
    names = re.findall(r"^\| (LLaVA[^|]*) \|", shown, re.M)
    assert names == [run.name for run in published_runs.RUNS]
    # One row is computed anew; the script writes all of them.
    run = published_runs.RUNS[1]
    assert published_runs.table((run,)).splitlines()[-1] in shown
    ratios = [float(ratio) for ratio in re.findall(r"\*\*([\d.]+)\*\*", shown)]
    assert len(ratios) == len(published_runs.RUNS)
    assert all(0.5 < ratio < 2 for ratio in ratios)


def test_a_published_run_that_fitted_fits() -> None:
    run = published_runs.RUNS[3]  # 7B, all weights, on eight GPUs of 40 GB
    run = dataclasses.replace(run, sources=run.sources[:1])
    (plan,) = published_runs.plans_of(run, steps=1)
    assert plan.configured.memory_bytes / 2**30 == pytest.approx(40, rel=0.1)
    assert math.isfinite(plan.configured.hours)

"""The way of batching changes the work, never the result: packed equals padded, whatever adapter and micro-batch."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds.optimizer_state import assert_same_state, optimizer_state
from worlds.tiny_models import make_world

from llava_mole.common.errors import UserError
from llava_mole.config import parse_run_config
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=12, text_only_every=3)
    return directory


def _train(world: Path, name: str, *more: str) -> Path:
    run = world / name
    train(
        parse_run_config(
            [str(world / "config.yaml"), "--train.output_dir", str(run), "--train.max_steps", str(STEPS), *more]
        )
    )
    return run


def _entries(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def _assert_same(run: Path, other: Path) -> None:
    for own, expected in zip(_entries(run), _entries(other), strict=True):
        for key in ("loss", "auxiliary_loss", "grad_norm"):
            assert own.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), abs=1e-5, rel=1e-4), key
        assert own["source_loss"] == pytest.approx(expected["source_loss"], abs=1e-5)
        assert own["tokens"] == expected["tokens"]
        assert own["supervised_tokens"] == expected["supervised_tokens"]
        assert own.get("expert_load", []) == pytest.approx(expected.get("expert_load", []))
    assert_same_state(optimizer_state(run, STEPS), optimizer_state(other, STEPS))


VARIANTS: dict[str, list[str]] = {
    "lora": ["--adapter.method", "lora"],
    "paper": ["--adapter.preset", "paper"],
    "best": ["--adapter.preset", "best"],
    "coupled": ["--adapter.preset", "coupled"],
    "token mean": ["--train.loss_reduction", "token_mean"],
    "stratified": ["--adapter.options", "{balance_tokens: stratified, balance_group: sample, z_loss_coef: 0.01}"],
    "sequence": ["--adapter.options", "{granularity: sequence, balance_group: global_batch}"],
    "image": [
        "--adapter.options",
        "{granularity: sequence, sequence_tokens: image, expert_scale: prob_times_k, balance_group: global_batch}",
    ],
    "source": ["--adapter.options", "{source_coef: 0.1}"],
    "task": ["--adapter.options", "{granularity: task, num_tasks: 2, balance_group: global_batch}"],
    "oracle": ["--adapter.options", "{router: oracle, expert_scale: none, balance_coef: 0.0}"],
    "given": ["--adapter.options", "{granularity: given, expert_scale: none, balance_coef: 0.0}"],
    "checkpointing": ["--train.activation_checkpointing", "all"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_padded(world: Path, variant: str) -> None:
    options = VARIANTS[variant]
    name = variant.replace(" ", "-")
    padded = _train(world, f"padded-{name}", "--train.batching", "padded", *options)
    packed = _train(world, f"packed-{name}", "--train.batching", "packed", *options)
    _assert_same(packed, padded)


@pytest.mark.parametrize(
    "more",
    [
        ["--train.batching", "padded", "--train.micro_batch_size", "1"],
        ["--train.batching", "padded", "--train.micro_batch_size", "4"],
        ["--train.batching", "packed", "--data.max_length", "100"],
        ["--train.batching", "packed", "--train.pack_length", "1000"],
    ],
    ids=lambda more: "-".join(more[1::2]),
)
def test_micro_batches_and_row_length_change_nothing(world: Path, more: list[str]) -> None:
    reference = world / "reference"
    if not reference.exists():
        _train(world, "reference", "--train.batching", "padded")
    _assert_same(_train(world, "-".join(["cut", *more[1::2]]), *more), reference)


def test_packed_rows_hold_several_samples_and_no_padding(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_mole.train.trainer import Trainer

    rows: list[tuple[int, int]] = []
    original = Trainer._loss

    def loss(self: Trainer, batch: dict, global_tokens: float, stats: Any) -> torch.Tensor:
        assert bool(batch["attention_mask"].all())
        rows.append((len(batch["ids"]), batch["input_ids"].shape[1]))
        return original(self, batch, global_tokens, stats)

    monkeypatch.setattr(Trainer, "_loss", loss)
    _train(world, "rows", "--train.batching", "packed", "--train.pack_length", "600")
    assert sum(samples for samples, _ in rows) == 4 * STEPS
    assert max(samples for samples, _ in rows) >= 3
    assert max(length for _, length in rows) <= 600


def test_grouped_steps_are_of_one_modality(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_mole.train.trainer import Trainer

    with_image: dict[int, list[bool]] = {}
    original = Trainer._loss

    def loss(self: Trainer, batch: dict, global_tokens: float, stats: Any) -> torch.Tensor:
        with_image.setdefault(self.progress.step, []).extend(batch["has_image"].tolist())
        return original(self, batch, global_tokens, stats)

    monkeypatch.setattr(Trainer, "_loss", loss)
    _train(world, "grouped", "--train.batching", "grouped")
    # 16 samples with an image and 8 without: three whole steps and one; the rest of both would be mixed after them.
    assert sorted(map(tuple, with_image.values())) == [(False,) * 4, *[(True,) * 4] * 3]


def test_resume_may_change_the_way_of_batching(world: Path) -> None:
    whole = _train(world, "whole", "--train.batching", "padded")
    options = ["--train.save_every", "2", "--train.resume", "auto"]
    half = world / "half"
    _train(world, "half", "--train.batching", "padded", "--train.save_every", "2")
    shutil.rmtree(half / f"checkpoint-{STEPS}")
    _train(world, "half", "--train.batching", "packed", *options)
    assert_same_state(optimizer_state(half, STEPS), optimizer_state(whole, STEPS))


def test_rows_shorter_than_a_sample_are_refused(world: Path) -> None:
    with pytest.raises(UserError, match=r"train\.pack_length 100 is below data\.max_length 256"):
        _train(world, "short", "--train.pack_length", "100")


def test_a_kernel_that_would_leak_is_refused_before_training(world: Path) -> None:
    with pytest.raises(UserError, match="attn_implementation 'eager' cannot keep packed samples apart"):
        _train(world, "eager", "--train.batching", "packed", "--model.attn_implementation", "eager")
    assert not (world / "eager").exists()

"""TRL's trainers train the router: SFTTrainer and DPOTrainer equal a loop written by hand, to 1e-6."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from mole.preset_cases import OWN
from packaging.version import Version
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from worlds.mole_training import (
    BALANCING,
    KNOWN,
    adapted,
    assert_equal_adapters,
    batches,
    by_hand,
    chunks,
    is_balanced,
    known_from_the_step_before,
    per_token,
    routers,
    shares,
    skew,
    token_losses,
    tokenizer,
    toy_rows,
    trainable,
)

from llava_mole.mole import PRESETS, MoleConfig, mole_after_step, mole_auxiliary_loss

Make = Callable[[], LlamaForCausalLM]
LOSS_FROM_LOG_PROBABILITIES = Version(trl.__version__) >= Version("1.16")
"""Whether SFTTrainer computes its loss itself. Up to 1.14 it takes the model's, whose weights are exact."""


def completions(number: int) -> Dataset:
    """`toy_rows` as tokenized prompts and completions."""
    return Dataset.from_list(
        [
            {
                "input_ids": row["ids"].tolist(),
                "completion_mask": [int(i >= int(row["prompt"])) for i in range(len(row["ids"]))],
            }
            for row in toy_rows(number)
        ]
    )


def sft(model: nn.Module, data: Dataset, out: Path, **options: Any) -> SFTTrainer:
    known = {"max_length": 64, "completion_only_loss": True, "gradient_checkpointing": False}
    config = SFTConfig(str(out), **{**KNOWN, **known, **options})
    return SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer())


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}], ids=["padded", "padding_free"])
def test_sft_equals_a_loop_by_hand(tiny_llama: Make, tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    coupled = PRESETS["coupled"]
    model, reference = adapted(tiny_llama(), **coupled), adapted(tiny_llama(), add_balance_loss=False, **coupled)
    before = routers(model)
    sft(model, completions(20), tmp_path, gradient_accumulation_steps=steps, **options).train()
    weights = known_from_the_step_before(steps) if LOSS_FROM_LOG_PROBABILITIES else shares
    by_hand(reference, batches(20), steps, per_token, weights)
    assert_equal_adapters(model, reference)
    assert all((value - before[name]).abs().max() > 1e-4 for name, value in routers(model).items())


def test_packed_samples_are_balanced_one_by_one(tiny_llama: Make, tmp_path: Path) -> None:
    model, reference = adapted(tiny_llama()), adapted(tiny_llama(), add_balance_loss=False)
    trainer = sft(model, completions(20), tmp_path, packing=True, per_device_train_batch_size=1)
    padded = []
    for row in trainer.get_train_dataloader():  # its samples, each in a row of its own
        starts = (row["position_ids"][0] == 0).nonzero().flatten().tolist()
        spans = list(pairwise([*starts, row["input_ids"].shape[1]]))
        ids = torch.zeros(len(spans), max(end - start for start, end in spans), dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (start, end) in enumerate(spans):
            ids[i, : end - start] = row["input_ids"][0, start:end]
            labels[i, : end - start] = row["labels"][0, start:end]
            mask[i, : end - start] = 1
        padded.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert max(len(batch["input_ids"]) for batch in padded) > 2
    trainer.train()
    by_hand(reference, padded, 1, per_token, known_from_the_step_before(1))
    assert_equal_adapters(model, reference)


def test_positions_alone_tell_packed_samples_apart(tiny_llama: Make) -> None:
    model, padded = adapted(tiny_llama(), z_loss_coef=0.1), batches(2)[0]
    lengths = padded["attention_mask"].sum(dim=1).tolist()
    kept = padded["attention_mask"].bool()
    row = {"input_ids": padded["input_ids"][kept][None], "labels": padded["labels"][kept][None]}
    row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    torch.testing.assert_close(model(**row, use_cache=False).loss, model(**padded).loss)


@pytest.mark.parametrize("preset", OWN)
def test_sft_moves_every_router_and_balances_the_load(tiny_llama: Make, tmp_path: Path, preset: str) -> None:
    """The base model and the configuration are handed over, as users of TRL do."""
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(str(tmp_path), **{**KNOWN, **BALANCING}),
        train_dataset=Dataset.from_list([{"input_ids": row["ids"].tolist()} for row in toy_rows(64)]),
        processing_class=tokenizer(),
        peft_config=MoleConfig.from_preset(preset, r=4, task_type="CAUSAL_LM"),
    )
    model = skew(trainer.model)
    before = routers(model)
    assert not is_balanced(model, preset)
    trainer.train()
    assert len(before) == (4 if preset == "released" else 2)
    assert all((value - before[name]).norm() > 0.02 for name, value in routers(model).items())
    assert is_balanced(model, preset)


def preferences() -> Dataset:
    words = [[f"w{min(62, int(i))}" for i in row["ids"]] for row in toy_rows(24)]
    return Dataset.from_list(
        [
            {"prompt": " ".join(first[:3]), "chosen": " " + " ".join(first[3:]), "rejected": " " + " ".join(second)}
            for first, second in chunks(words, 2)
        ]
    )


def dpo(model: nn.Module, out: Path, peft_config: MoleConfig | None = None, **options: Any) -> DPOTrainer:
    """Preference training whose reference is the model with its adapters disabled."""
    known = {"gradient_checkpointing": False, "beta": 0.5, "learning_rate": 0.1}
    config = DPOConfig(str(out), **{**KNOWN, **known, **options})
    return DPOTrainer(
        model=model,
        ref_model=None,
        args=config,
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def log_probability(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Of each completion, `[B]`."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return -token_losses(logits, labels).sum(dim=1)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_equals_a_loop_by_hand(tiny_llama: Make, tmp_path: Path, precompute: bool, steps: int) -> None:
    """The reference pass has its adapters disabled and no gradients; it counts nothing and adds nothing."""
    options = {"r": 4, "balance_coef": 0.5, "task_type": "CAUSAL_LM", **PRESETS["coupled"]}
    torch.manual_seed(1)
    trainer = dpo(
        tiny_llama(),
        tmp_path,
        MoleConfig(**options),
        gradient_accumulation_steps=steps,
        precompute_ref_log_probs=precompute,
    )
    given = [dict(batch) for batch in trainer.get_train_dataloader()]
    model, before = trainer.model, routers(trainer.model)
    reference = get_peft_model(tiny_llama(), MoleConfig(**options, add_balance_loss=False))
    reference.load_state_dict(model.state_dict())
    trainer.train()

    optimizer = torch.optim.SGD(trainable(reference).values(), lr=0.1)
    weigh = known_from_the_step_before(steps)
    for group in chunks(given, steps):
        for batch, weight in zip(group, weigh([1] * len(group)), strict=True):
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            with torch.no_grad(), reference.disable_adapter():
                before_training = log_probability(reference(**inputs).logits, batch)
            gain = log_probability(reference(**inputs).logits, batch) - before_training
            chosen, rejected = gain.chunk(2)
            loss = -nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean() / len(group)
            auxiliary = mole_auxiliary_loss(reference, token_mask=batch["attention_mask"].bool())
            (loss + weight * auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
        mole_after_step(reference)
    assert_equal_adapters(model, reference)
    assert all((value - before[name]).abs().max() > 1e-4 for name, value in routers(model).items())

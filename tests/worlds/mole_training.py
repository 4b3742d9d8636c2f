"""Toy trainings of a MoLE model: with transformers' Trainer, and by hand with the auxiliary loss written out."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from llava_mole.mole import MoleConfig, collect_routing, mole_after_step, mole_auxiliary_loss, routing_load

Batch = dict[str, Tensor]
Row = dict[str, Tensor]


def tiny_llama() -> LlamaForCausalLM:
    """A random two-layer Llama, the same one each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def toy_rows(number: int) -> list[Row]:
    """Samples of 6 to 19 tokens whose first tokens are a prompt without labels, so that targets are uneven."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(6, 20, (number,), generator=generator).tolist()
    return [
        {"ids": torch.randint(1, 64, (length,), generator=generator), "prompt": torch.tensor(1 + length // 3)}
        for length in lengths
    ]


def collate(rows: list[Row]) -> Batch:
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        length, prompt = len(row["ids"]), int(row["prompt"])
        ids[i, :length], mask[i, :length], labels[i, prompt:length] = row["ids"], 1, row["ids"][prompt:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def batches(number: int) -> list[Batch]:
    """`toy_rows` in pairs."""
    return [collate(pair) for pair in chunks(toy_rows(number), 2)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `w1` to `w62`, which are the ids 1 to 62."""
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, 63)}, "</s>": 63}
    backend = Tokenizer(WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, MoleConfig(**{"r": 4, "balance_coef": 0.5, "task_type": "CAUSAL_LM", **options}))


def routers(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "mole_router" in n}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


KNOWN = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.0,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
"""Arguments of a Trainer that trains as `by_hand` does."""
BALANCING = {"optim": "adamw_torch", "learning_rate": 3e-3, "per_device_train_batch_size": 8, "num_train_epochs": 10}
"""Arguments of a training that balances `skew`ed routers on 64 `toy_rows`."""


def train(model: nn.Module, rows: list[Row], out: Path, compute_loss_func: Any = None, **options: Any) -> None:
    """Train with transformers' Trainer, as `KNOWN` says unless `options` say otherwise."""
    arguments = TrainingArguments(str(out), remove_unused_columns=False, **{**KNOWN, **options})
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, compute_loss_func=compute_loss_func
    )
    trainer.train()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies `[B, S - 1]` of the next tokens, 0 without a label."""
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def by_hand(
    model: PeftModel,
    given: list[Batch],
    steps: int,
    loss_of: Callable[[Tensor, Tensor, int], Tensor],
    weights_of: Callable[[list[int]], list[float]],
) -> None:
    """The same training without Trainer and without the automatic balance loss.

    Args:
        model: made with `add_balance_loss=False`.
        given: its batches.
        steps: batches of an optimizer step; the last may have fewer.
        loss_of: (logits, labels, targets of the optimizer step) -> the LM loss of a batch.
        weights_of: the targets of each batch of a step -> the weights of their auxiliary losses.
    """
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
    for group in chunks(given, steps):
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in group]
        for batch, weight in zip(group, weights_of(counts), strict=True):
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
            auxiliary = mole_auxiliary_loss(
                model,
                token_mask=batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool(),
                supervised_mask=nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1)),
                image_mask=torch.zeros_like(batch["input_ids"], dtype=torch.bool),
            )
            (loss_of(logits, batch["labels"], sum(counts)) + weight * auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
        mole_after_step(model)


def per_token(logits: Tensor, labels: Tensor, targets_of_step: int) -> Tensor:
    return token_losses(logits, labels).sum() / targets_of_step


def per_batch(logits: Tensor, labels: Tensor, targets_of_step: int) -> Tensor:
    return token_losses(logits, labels).sum() / (labels[:, 1:] != -100).sum()


def shares(counts: list[int]) -> list[float]:
    return [count / sum(counts) for count in counts]


def equal(counts: list[int]) -> list[float]:
    return [1 / len(counts)] * len(counts)


def known_from_the_step_before(length: int) -> Callable[[list[int]], list[float]]:
    """1 / n each, and what is left for the last pass: all of it in the first step."""
    steps_done: list[int] = []

    def weights(counts: list[int]) -> list[float]:
        early = (1 / length if steps_done else 0.0,) * (len(counts) - 1)
        steps_done.append(len(counts))
        return [*early, 1 - sum(early)]

    return weights


def assert_equal_adapters(model: nn.Module, reference: nn.Module) -> None:
    """Equal to 1e-6 in all trained parameters and counters; and the training moved them further than that."""
    expected, found = reference.state_dict(), model.state_dict()
    names = [name for name in expected if "mole_" in name]
    assert names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def skew(model: nn.Module) -> nn.Module:
    """Give all tokens a direction in common that the first expert's row of every router prefers."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(5))
    direction /= direction.norm()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += direction * embedding.norm(dim=-1).mean()
        for name, parameter in model.named_parameters():
            if "mole_router" in name and name.endswith("weight"):
                parameter[0] += 0.3 * direction
    return model


def is_balanced(model: nn.Module, preset: str) -> bool:
    """Whether every expert has 0.5 / K to 2 / K of the tokens of 64 `toy_rows`, in every layer.

    `released` pools the layers in its balance loss, so the bounds hold for all layers together.
    """
    batch, training = collate(toy_rows(64)), model.training
    model.eval()
    with torch.no_grad():
        model(**batch)
    load = routing_load(collect_routing(model), batch["attention_mask"].bool())
    model.train(training)
    if preset == "released":
        load = load.mean(dim=0)
    return 0.5 / 3 <= load.min().item() and load.max().item() <= 2 / 3

"""The small language model: a Llama, pre-trained on generated text.

The text (`text_grids`, `text_scenes`) teaches reading skills: look up, copy, compare, count, describe, and answer in
the `vicuna_v1` format. None of it comes from an image.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from llava_mole.common.log import get_logger
from llava_mole.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.conversation import Rendered, Turn, get_template, render
from llava_mole.data.prepare.sources.tiny.world import progress
from llava_mole.data.tokenization import HFTextTokenizer, encode
from scripts.tiny_world.text_grids import grid_item
from scripts.tiny_world.text_items import Item
from scripts.tiny_world.text_scenes import scene_item

LOG = get_logger(__name__)
CONTEXT_LENGTH = 512
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT_LENGTH,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONTEXT_WEIGHT = 0.1
"""Weight in the loss of a token of the context; a token of a description has weight 1."""
QUESTION_WEIGHT = 4.0
"""Weight of a token of an answer: answers are short, and look-ups are slow to learn."""


@dataclass(frozen=True)
class Recipe:
    """Size of the training run."""

    items: int = 24000
    steps: int = 800
    batch_size: int = 48
    learning_rate: float = 3e-3
    """Of embeddings and norms (AdamW)."""
    matrix_learning_rate: float = 8e-3
    """Of the blocks' matrices (Muon)."""
    weight_decay: float = 0.05
    warmup_steps: int = 60
    noise: float = 0.1
    """Standard deviation of the noise on input embeddings, relative to that of the embeddings (as in NEFTune)."""


QUICK = Recipe(items=64, steps=4, batch_size=16, warmup_steps=2)


def pretraining_item(rng: Random) -> Item:
    """Generate one piece of pre-training text."""
    return grid_item(rng) if rng.random() < 0.75 else scene_item(rng)


def to_tokens(item: Item, tokenizer: HFTextTokenizer) -> tuple[list[int], list[int]]:
    """Return ids and labels of an item in the layout of training with an image.

    The reading takes the place of the image's tokens, with one token for each word in the vocabulary.
    """
    marker = DEFAULT_IMAGE_TOKEN if item.reading else ""
    if item.kind == "drill":
        text, spans = marker, []
        for question, answer in item.turns:
            text += question
            spans.append((len(text), len(text) + 1 + len(answer)))
            text += f" {answer} "
        rendered = Rendered(text.rstrip(), tuple(spans))
    else:
        turns = []
        for number, (question, answer) in enumerate(item.turns):
            first = marker + "\n" if number == 0 and marker else ""
            turns += [Turn("user", first + question), Turn("assistant", answer)]
        rendered = render(get_template("plain" if item.kind == "description" else "vicuna_v1"), turns)
    encoded = encode(rendered, tokenizer, num_image_tokens=1, max_length=None)
    ids, labels = encoded.input_ids, encoded.labels
    if item.reading:
        reading, _ = tokenizer.encode_with_offsets(" ".join(item.reading))
        # Without the space piece before a digit, one cell of a grid is one token.
        space = tokenizer.hf.convert_tokens_to_ids("\u2581")
        reading = [token for token in reading if token != space]
        where = ids.index(IMAGE_TOKEN_INDEX)
        ids[where : where + 1] = reading
        labels[where : where + 1] = [IGNORE_INDEX] * len(reading)
    return ids, labels


def batches(
    encoded: list[tuple[list[int], list[int], str]], batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """Yield endless batches of items of similar length: ids and labels int64 `[B, L]` (ids 0 where padded), skills."""
    order = Random(f"{seed}-batches")
    while True:
        keyed = sorted(range(len(encoded)), key=lambda index: (len(encoded[index][0]) + order.uniform(-4, 4), index))
        groups = [keyed[start : start + batch_size] for start in range(0, len(keyed) - batch_size + 1, batch_size)]
        order.shuffle(groups)
        for group in groups:
            longest = max(len(encoded[index][0]) for index in group)
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            labels = torch.full((len(group), longest), IGNORE_INDEX)
            for row, index in enumerate(group):
                ids[row, : len(encoded[index][0])] = torch.tensor(encoded[index][0])
                labels[row, : len(encoded[index][1])] = torch.tensor(encoded[index][1])
            yield ids, labels, [encoded[index][2] for index in group]


def make_optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices, and AdamW for embeddings and norms.

    With Muon's orthogonal updates the model learns look-ups in far fewer steps than with AdamW.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "embed" not in name else others).append(parameter)
    muon = torch.optim.Muon(
        [{"params": matrices, "initial_lr": recipe.matrix_learning_rate}],
        lr=recipe.matrix_learning_rate,
        weight_decay=recipe.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [{"params": others, "initial_lr": recipe.learning_rate}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [muon, adamw]


def train(tokenizer: HFTextTokenizer, recipe: Recipe, seed: int) -> tuple[Any, dict[str, float]]:
    """Pre-train. Returns the `LlamaForCausalLM` and measurements (loss, token accuracy per skill, seconds)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    started = time.perf_counter()
    rng = Random(f"{seed}-language")
    encoded = []
    for _ in progress(range(recipe.items), "text", "item"):
        item = pretraining_item(rng)
        encoded.append((*to_tokens(item, tokenizer), item.skill))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer.hf), **ARCHITECTURE))
    optimizers = make_optimizers(model, recipe)
    source = batches(encoded, recipe.batch_size, seed)
    bar = progress(range(recipe.steps), "language model", "step")
    average = 0.0
    right: dict[str, list[float]] = defaultdict(list)
    accuracy: dict[str, float] = {}
    reports = {math.ceil(recipe.steps * part / 10) for part in range(1, 11)}
    model.train()
    for step in bar:
        scale = min(1.0, (step + 1) / recipe.warmup_steps) * (
            0.02 + 0.49 * (1 + math.cos(math.pi * step / recipe.steps))
        )
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * scale
        ids, labels, skills = next(source)
        embeddings = model.get_input_embeddings()(ids)
        embeddings = embeddings + torch.randn_like(embeddings) * embeddings.detach().std() * recipe.noise
        # No attention mask is needed: padding is on the right, where a causal model does not see it.
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, :-1]
        inside = ids[:, 1:] != 0  # generated text has no <unk>, whose id is 0
        target, answered = ids[:, 1:], labels[:, 1:] != IGNORE_INDEX
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        is_dialogue = torch.tensor([[not skill.endswith("description")] for skill in skills])
        weight = torch.where(answered, torch.where(is_dialogue, QUESTION_WEIGHT, 1.0), CONTEXT_WEIGHT * inside)
        loss = (losses * weight).sum() / weight.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        answer_loss = losses.detach()[answered].mean().item()
        average = answer_loss if step == 0 else 0.95 * average + 0.05 * answer_loss
        hit = ((logits.argmax(-1) == target) & answered).sum(1) / answered.sum(1)
        for skill, share in zip(skills, hit.tolist(), strict=True):
            right[skill].append(share)
        if step + 1 in reports:
            accuracy = {skill: sum(shares) / len(shares) for skill, shares in sorted(right.items())}
            shown = ", ".join(f"{skill} {value:.2f}" for skill, value in accuracy.items())
            LOG.info("step %d, loss %.3f, share of answer tokens right: %s", step + 1, average, shown)
            right.clear()
        bar.set_postfix_str(f"loss {average:.3f}", refresh=False)
    measured = {"answer_loss": average, "seconds": time.perf_counter() - started}
    measured |= {f"token_accuracy/{skill}": value for skill, value in accuracy.items()}
    model.eval()
    return model, measured


def save(model: Any, folder: Path) -> None:
    """Write the model in float16 safetensors, as `LlamaForCausalLM.from_pretrained` reads it."""
    import copy

    copy.deepcopy(model).half().save_pretrained(folder)

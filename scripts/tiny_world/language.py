"""The small language model: a Llama, pre-trained on generated text.

Drills over random words (`text_drills`) come first: they teach looking up and copying. The text that joins them
(`text_grids`, `text_scenes`) teaches to compare, count, describe, and answer in the `vicuna_v1` format. None of it
comes from an image.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from scripts.tiny_world import heads
from scripts.tiny_world.checkpoint import Checkpoint
from scripts.tiny_world.text_drills import MOST_TOKENS, Vocabulary, make_drill
from scripts.tiny_world.text_grids import grid_item
from scripts.tiny_world.text_items import Item
from scripts.tiny_world.text_scenes import scene_item

LOG = get_logger("llava_mole.tiny_world")
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

    items: int = 100000
    steps: int = 8000
    batch_tokens: int = 2048
    """About this many tokens a step, padding included."""
    learning_rate: float = 1e-3
    """Of embeddings and norms (AdamW)."""
    matrix_learning_rate: float = 1.5e-3
    """Of the blocks' matrices (Muon)."""
    weight_decay: float = 0.05
    warmup_steps: int = 100
    noise: float = 0.1
    """Standard deviation of the noise on input embeddings, relative to that of the embeddings (as in NEFTune)."""
    drills_alone: float = 0.1
    """Share of the steps before the first piece of pre-training text."""
    drills_later: float = 0.1
    """Share of drills among the steps after that."""
    mastered: float = 0.85
    """Share of right tokens in drills above which they become harder."""
    harder: float = 0.01
    """How much harder in such a step, on a scale from 0 to 1."""
    decay: float = 0.8
    """Share of the steps, the last ones, over which the rates fall linearly."""
    test_items: int = 1200
    report_every: int = 250


QUICK = Recipe(items=64, steps=4, batch_tokens=512, warmup_steps=2, test_items=40, report_every=2)


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


Row = tuple[list[int], list[int], str]
"""Ids, labels and skill of one sequence."""


def collate(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows on the right: ids and labels, int64 `[B, L]`, ids 0 where padded."""
    longest = max(len(ids) for ids, _, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE_INDEX)
    for number, (row_ids, row_labels, _) in enumerate(rows):
        ids[number, : len(row_ids)] = torch.tensor(row_ids)
        labels[number, : len(row_labels)] = torch.tensor(row_labels)
    return ids, labels


class Source:
    """Batches of drills and of pre-training text; a batch depends on seed, step and level alone."""

    def __init__(self, tokenizer: HFTextTokenizer, recipe: Recipe, seed: int) -> None:
        """Generate and encode the text; drills are made when they are needed."""
        self.recipe, self.seed = recipe, seed
        self.vocabulary = Vocabulary(tokenizer.hf)
        rng = Random(f"{seed}-language")
        rows = []
        for _ in progress(range(recipe.items), "text", "item"):
            item = pretraining_item(rng)
            rows.append((*to_tokens(item, tokenizer), f"text/{item.skill}"))
        self.rows: list[Row] = sorted(rows, key=lambda row: len(row[0]))

    def batch(self, step: int, level: float) -> list[list[Row]]:
        """Return the groups of rows of a step: drills of a level alone at first, then drills or text.

        Text comes in three groups of rows of similar length, one from each third of the order of lengths. Padding stays
        small, and each step sees short texts and long ones: descriptions, drills and dialogues.
        """
        recipe, rng = self.recipe, Random(f"{self.seed}-step-{step}")
        if step < recipe.drills_alone * recipe.steps or rng.random() < recipe.drills_later:
            drills = [
                make_drill(self.vocabulary, rng, level) for _ in range(max(1, recipe.batch_tokens // MOST_TOKENS))
            ]
            return [[(drill.ids, drill.labels, f"drill/{drill.skill}") for drill in drills]]
        groups, third = [], len(self.rows) // 3
        for first in (0, third, 2 * third):
            start = first + rng.randrange(third)
            count = min(third, max(1, recipe.batch_tokens // 3 // len(self.rows[start][0])))
            low = max(0, min(start - 4 * count, len(self.rows) - 8 * count))
            groups.append(
                [self.rows[index] for index in rng.sample(range(low, min(len(self.rows), low + 8 * count)), count)]
            )
        return groups


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


def answer_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and end of every run of supervised tokens."""
    spans, start = [], None
    for index, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = index
        elif label == IGNORE_INDEX and start is not None:
            spans.append((start, index))
            start = None
    return spans


def measure(model: Any, rows: Sequence[Row], batch_size: int = 64) -> dict[str, float]:
    """Measure the share of answers of which every token is the most likely one, for each skill.

    Of a description, whose wording is free, the share of tokens is measured.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    ordered = sorted(rows, key=lambda row: len(row[0]))
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            group = ordered[start : start + batch_size]
            ids, labels = collate(group)
            predicted = model(ids, use_cache=False).logits.argmax(-1)
            hits = predicted[:, :-1] == labels[:, 1:]
            for row, (_, row_labels, skill) in enumerate(group):
                spans = [hits[row, low - 1 : high - 1] for low, high in answer_spans(row_labels)]
                if skill.endswith("description"):
                    right[skill] += torch.cat(spans).tolist()
                else:
                    right[skill] += [bool(span.all()) for span in spans]
    return {skill: sum(found) / len(found) for skill, found in sorted(right.items())}


def held_out(tokenizer: HFTextTokenizer, count: int, seed: int) -> list[Row]:
    """Generate `count` drills and `count` pieces of text that no training run sees."""
    vocabulary = Vocabulary(tokenizer.hf)
    rng = Random(f"{seed}-held-out")
    drills = [make_drill(vocabulary, rng) for _ in range(count)]
    rows = [(drill.ids, drill.labels, f"drill/{drill.skill}") for drill in drills]
    for _ in range(count):
        item = pretraining_item(rng)
        rows.append((*to_tokens(item, tokenizer), f"text/{item.skill}"))
    return rows


def train(
    tokenizer: HFTextTokenizer,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None = None,
    start: Path | None = None,
) -> tuple[Any, dict[str, float]]:
    """Pre-train, from `checkpoint` on if that file is there.

    With `start`, the folder of an earlier model of this tokenizer, training goes on from that model, without the steps
    of drills alone.

    Returns:
        The `LlamaForCausalLM` and measurements (loss, share of right answers to held-out questions per skill, seconds).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    started = time.perf_counter()
    source = Source(tokenizer, recipe, seed)
    tests = held_out(tokenizer, recipe.test_items, seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer.hf), **ARCHITECTURE))
    if start is None:
        heads.initialise(model, torch.Generator().manual_seed(seed))
    else:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict())
        recipe = replace(recipe, drills_alone=0.0)
        source.recipe = recipe
    optimizers = make_optimizers(model, recipe)
    curriculum = Curriculum(recipe)
    kept = Checkpoint(checkpoint, [model, curriculum], optimizers)
    named = f"{recipe} seed {seed} from {start}"
    first = kept.load(named)
    bar = progress(range(first, recipe.steps), "language model", "step")
    average = 0.0
    for step in bar:
        scale = min(1.0, (step + 1) / recipe.warmup_steps, (1 - step / recipe.steps) / recipe.decay + 0.005)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * scale
        groups = source.batch(step, curriculum.level.item())
        model.zero_grad()
        answer_loss = 0.0
        for number, rows in enumerate(groups):
            loss, of_answers, right = losses(model, rows, recipe, (seed * 1_000_003 + step) * 3 + number)
            (loss / len(groups)).backward()
            answer_loss += of_answers / len(groups)
            if rows[0][2].startswith("drill/"):
                curriculum.record(right)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average = answer_loss if step == first else 0.95 * average + 0.05 * answer_loss
        bar.set_postfix_str(f"loss {average:.3f} level {curriculum.level.item():.2f}", refresh=False)
        if (step + 1) % recipe.report_every == 0 and step + 1 < recipe.steps:
            kept.save(named, step + 1)
            shown = ", ".join(f"{skill} {value:.2f}" for skill, value in measure(model, tests[::5]).items())
            LOG.info("step %d, loss %.3f, answers right: %s", step + 1, average, shown)
    model.eval()
    measured = {"answer_loss": average}
    measured |= {f"answers_right/{skill}": value for skill, value in measure(model, tests).items()}
    measured["seconds"] = time.perf_counter() - started
    return model, measured


class Curriculum(torch.nn.Module):
    """The drills' level, 0 to 1, which rises while most of their answers are right."""

    level: torch.Tensor
    right: torch.Tensor

    def __init__(self, recipe: Recipe) -> None:
        """Start at level 0."""
        super().__init__()
        self.recipe = recipe
        self.register_buffer("level", torch.zeros((), dtype=torch.float64))
        self.register_buffer("right", torch.zeros((), dtype=torch.float64))

    def record(self, right: float) -> None:
        """Take the share of right tokens in a batch of drills."""
        self.right.mul_(0.9).add_(0.1 * right)
        if self.right > self.recipe.mastered:
            self.level.add_(self.recipe.harder).clamp_(max=1.0)


def losses(model: Any, rows: Sequence[Row], recipe: Recipe, noise_seed: int) -> tuple[torch.Tensor, float, float]:
    """Compute the loss of a batch, and mean loss and share right of its answers' tokens; embeddings are noisy."""
    ids, labels = collate(rows)
    skills = [skill for _, _, skill in rows]
    embeddings = model.get_input_embeddings()(ids)
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(noise_seed))
    embeddings = embeddings + noise * embeddings.detach().std() * recipe.noise
    # No attention mask is needed: padding is on the right, where a causal model does not see it.
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
    target, answered = ids[:, 1:], labels[:, 1:] != IGNORE_INDEX
    is_text = torch.tensor([[skill.startswith("text/")] for skill in skills])
    described = torch.tensor([[skill.endswith("description")] for skill in skills])
    # Random words cannot be predicted: only the text has a loss on its context. Generated text has no <unk> (id 0).
    weight = torch.where(
        answered, torch.where(described, 1.0, QUESTION_WEIGHT), CONTEXT_WEIGHT * (is_text & (target != 0))
    )
    counted = weight > 0
    logits = model.lm_head(hidden[counted])
    token_losses = F.cross_entropy(logits, target[counted], reduction="none")
    loss = (token_losses * weight[counted]).sum() / weight.sum()
    of_answers = answered[counted]
    right = (logits.detach().argmax(-1) == target[counted])[of_answers].double().mean().item()
    return loss, token_losses.detach()[of_answers].mean().item(), right


def save(model: Any, folder: Path) -> None:
    """Write the model in float16 safetensors, as `LlamaForCausalLM.from_pretrained` reads it."""
    import copy

    copy.deepcopy(model).half().save_pretrained(folder)

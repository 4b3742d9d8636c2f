"""The loss on held-out samples, and the model's answers to their questions, by source."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from llava_mole.common.distributed import all_gather_objects, all_reduce_sum, get_rank, get_world_size, raise_together
from llava_mole.common.errors import ConfigError, PromptError, StorageError, value_errors_as, without_worker
from llava_mole.common.files import write_text
from llava_mole.common.log import get_logger
from llava_mole.common.text import plain
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.data.collator import collate
from llava_mole.data.dataset import SupervisedDataset
from llava_mole.data.records import Record
from llava_mole.inference.batching import encode_prompt, image_tokens
from llava_mole.inference.predictor import Predictor
from llava_mole.model.batch_loss import forward_losses, routing_inputs, to_device
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole import set_routing_inputs

if TYPE_CHECKING:
    from PIL.Image import Image

logger = get_logger(__name__)

NEW_TOKENS = 64
"""Longest answer; enough for short answers and captions to show whether a model learns."""
ANSWERS_FILE = "validation_answers.jsonl"
"""Of a run directory: every question that a validation asked, with the model's answer and the reference."""
BATCH_SIZE = 8
"""Questions answered at a time."""


class Validator:
    """Computes the validation loss; every rank takes its share of the samples.

    Args:
        dataset: The held-out samples.
        row_tokens: Most tokens of a forward pass, padding included.
        pad_token_id: Of the tokenizer.
        num_workers: Data loader processes.
        routes: Whether the model has routers that read a sample's source.
    """

    def __init__(
        self, dataset: SupervisedDataset, *, row_tokens: int, pad_token_id: int, num_workers: int, routes: bool
    ) -> None:
        self._dataset = dataset
        self._row_tokens = row_tokens
        self._pad_token_id = pad_token_id
        self._num_workers = num_workers
        self._routes = routes

    @torch.no_grad()
    def losses(self, model: LlavaMole, engine: torch.nn.Module | None = None) -> dict[str, float]:
        """Mean loss of each source's samples, all with the same weight; a collective.

        Where weights are spread over the ranks, `engine` computes, and all ranks make the same number of passes.

        Nothing that training depends on changes: the model's mode is restored, there are no gradients or counts, and
        every step seeds its own generators.

        Raises:
            StorageError: some rank could not read a sample. Raised on every rank.
        """
        names = self._dataset.source_names
        sums = torch.zeros(2, len(names), dtype=torch.float64, device=model.device)  # losses, samples
        was_training = model.training
        model.eval()
        loader, own = self._batches(together=engine is not None)
        batches, failure = iter(loader), None
        try:
            for number in range(len(loader)):
                try:
                    batch = next(batches)
                except StorageError as error:
                    failure = without_worker(error)
                if engine is not None:  # the other ranks would wait for this one in their next pass
                    raise_together(failure)
                if failure is not None:
                    break
                source_B = batch["source_index"].to(model.device)
                losses_B = self._sample_losses(model, batch, engine or model)
                if number >= own:  # only for the other ranks, which have more
                    continue
                sums[0].index_add_(0, source_B, losses_B.double())
                sums[1].index_add_(0, source_B, torch.ones_like(losses_B, dtype=torch.float64))
        finally:
            model.train(was_training)
        raise_together(failure)
        totals, counts = all_reduce_sum(sums).tolist()
        return _means(names, totals, counts)

    def _batches(self, together: bool) -> tuple[DataLoader, int]:
        """This rank's batches and their number; `together` adds others, up to the largest number of any rank."""
        mine = list(range(get_rank(), len(self._dataset), get_world_size()))
        batches = padded_batches(mine, self._dataset.lengths(mine), self._row_tokens)
        own = len(batches)
        if together:
            batches += [[0]] * (max(all_gather_objects(own)) - own)
        loader: DataLoader = DataLoader(
            self._dataset,  # type: ignore[arg-type]  # map-style, without torch's base class
            batch_sampler=batches,
            collate_fn=partial(collate, pad_token_id=self._pad_token_id),
            num_workers=self._num_workers,
        )
        return loader, own

    def _sample_losses(self, model: LlavaMole, batch: dict, engine: torch.nn.Module) -> torch.Tensor:
        """Token mean of the loss of every sample, float32 [B]."""
        batch = to_device(batch, model.device)
        if self._routes:
            with value_errors_as(ConfigError):
                set_routing_inputs(model.language_model, **routing_inputs(batch))
        sums_B, counts_B, _ = forward_losses(engine, batch)
        return sums_B / counts_B.clamp(min=1.0)


def padded_batches(positions: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Batches of positions of similar length, with at most `row_tokens` tokens after padding, or one sample."""
    batches: list[list[int]] = []
    longest = 0
    for length, position in sorted(zip(lengths, positions, strict=True), reverse=True):
        # The first sample of a batch is its longest.
        if not batches or (len(batches[-1]) + 1) * longest > row_tokens:
            batches.append([])
            longest = length
        batches[-1].append(position)
    return batches


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the shares of shared words, 0..1; words are separated by blanks, after `plain`.

    Two empty texts give 1; an empty and a non-empty text give 0.
    """
    said, wanted = Counter(plain(prediction).split()), Counter(plain(reference).split())
    shared = sum((said & wanted).values())
    if not said and not wanted:
        return 1.0
    return 2 * shared / (sum(said.values()) + sum(wanted.values()))


class AnswerCheck:
    """Answers the first question of held-out samples greedily; every rank takes its share of them.

    Args:
        dataset: The held-out samples.
        predictor: Of the model in training.
        count: Samples of each source, or all if fewer are held out.
        routes: Whether the model has routers that read inputs of the batch; those of the last training batch are reset.
    """

    def __init__(self, dataset: SupervisedDataset, predictor: Predictor, *, count: int, routes: bool) -> None:
        self._dataset = dataset
        self._predictor = predictor
        self._routes = routes
        self.answers: list[dict[str, Any]] = []
        """What the last `scores` asked and got, over all ranks: `source`, `id`, `where`, `question`, `answer`,
        `reference`, `exact` and `f1`."""
        self._positions = [
            position for position in first_of_each_source(dataset, count) if self._fits(*dataset.sample(position))
        ]

    def scores(self) -> dict[str, dict[str, float]]:
        """`exact` and `f1`, each a mean in 0..1 by source; a collective.

        `exact` is equality after `plain`, `f1` is `token_f1`. The model's mode is restored, and nothing that training
        depends on changes.

        Raises:
            StorageError: some rank could not read a sample. Raised on every rank.
        """
        model = self._predictor.loaded.model
        names = self._dataset.source_names
        sums = torch.zeros(3, len(names), dtype=torch.float64, device=model.device)  # exact, f1, samples
        mine, asked = self._positions[get_rank() :: get_world_size()], []
        was_training, failure = model.training, None
        model.eval()
        if self._routes:
            set_routing_inputs(model.language_model)
        try:
            # A compiled layer would be recompiled for every length of the cache.
            with torch.compiler.set_stance("force_eager"):
                for start in range(0, len(mine), BATCH_SIZE):
                    for row in self._score(mine[start : start + BATCH_SIZE]):
                        score = torch.tensor([row["exact"], row["f1"], 1.0], dtype=torch.float64)
                        sums[:, names.index(row["source"])] += score.to(sums)
                        asked.append(row)
        except StorageError as error:
            failure = error
        finally:
            model.train(was_training)
        raise_together(failure)
        self.answers = [row for rows in all_gather_objects(asked) for row in rows]
        exact, f1, counts = all_reduce_sum(sums).tolist()
        return {"exact": _means(names, exact, counts), "f1": _means(names, f1, counts)}

    def _fits(self, source: str, record: Record, pictures: "Sequence[Image]") -> bool:
        """Whether the first question leaves room for an answer; with shortened histories it may not."""
        first = record.turns[0].text.count(DEFAULT_IMAGE_TOKEN)
        try:
            shown = image_tokens(self._predictor.loaded, pictures[:first], 0)
            encode_prompt(self._predictor.loaded, self._predictor.template, record.turns[:1], shown, 0)
        except PromptError as error:
            logger.warning("validation: %s (%s) is not answered: %s", record.where, source, error.problem)
            return False
        return True

    def _score(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of `answers`."""
        if not positions:
            return []
        samples = [self._dataset.sample(position) for position in positions]
        prompts = [record.turns[:1] for _, record, _ in samples]
        # A record may show more images later in its conversation.
        images = [
            pictures[: record.turns[0].text.count(DEFAULT_IMAGE_TOKEN)] or None for _, record, pictures in samples
        ]
        try:
            answers = self._predictor.generate(images, prompts, max_new_tokens=NEW_TOKENS, batch_size=BATCH_SIZE)
        except PromptError as error:  # a model in training may overflow for one prompt, which must not end the run
            source, record, _ = samples[error.position]
            logger.warning("validation: %s (%s) is not answered: %s", record.where, source, error.problem)
            return self._score([p for n, p in enumerate(positions) if n != error.position])
        scored = []
        for (source, record, _), answer in zip(samples, answers, strict=True):
            wanted = record.turns[1].text
            row: dict[str, Any] = {"source": source, "id": record.id, "where": record.where}
            row |= {"question": record.turns[0].text, "answer": answer, "reference": wanted}
            scored.append(row | {"exact": float(plain(answer) == plain(wanted)), "f1": token_f1(answer, wanted)})
        return scored


class AnswerLog:
    """Writes what `AnswerCheck.answers` holds to the run directory; rank 0 only.

    A run that resumes drops what an earlier process wrote at the same or later steps. A file that cannot be written is
    reported, and training continues.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ANSWERS_FILE
        self._is_mine = False

    def add(self, step: int, answers: Sequence[dict[str, Any]]) -> None:
        """Append the answers after optimizer step `step`, one JSON object a line, each with its `step`."""
        if get_rank():
            return
        lines = "".join(json.dumps({"step": step, **row}) + "\n" for row in answers)
        try:
            if not self._is_mine and self._path.exists():
                kept = [line for line in self._path.read_text("utf-8").splitlines() if _step_of(line) < step]
                write_text(self._path, "".join(f"{line}\n" for line in kept))
            self._is_mine = True
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            logger.error("%s cannot be written (%s); training continues", self._path, error)
            return
        right = sum(row["exact"] for row in answers)
        logger.info("step %d answers %d of %d held-out questions like the reference; all of them are in %s",
                    step, right, len(answers), self._path)  # fmt: skip


def _step_of(line: str) -> float:
    """The step of a line; infinity for a damaged one, as after a crash."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


def first_of_each_source(dataset: SupervisedDataset, count: int) -> list[int]:
    """Positions of the first `count` samples of each source in the plan's order."""
    taken: Counter[str] = Counter()
    positions = []
    for position in range(len(dataset)):
        source, _ = dataset.plan[position]
        taken[source] += 1
        if taken[source] <= count:
            positions.append(position)
    return positions


def _means(names: Sequence[str], totals: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """The mean of every source that has samples."""
    return {name: total / n for name, total, n in zip(names, totals, counts, strict=True) if n}

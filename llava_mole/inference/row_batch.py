"""A batch of one model whose rows join and leave between the steps of decoding.

A row's tokens are those of `Predictor.generate` for its prompt alone: rows share products, never values. Each sampled
row has its own random generator. A row whose computation fails leaves with an error, and the others go on.

Shapes: R rows, n rows that join, L longest prompt, V vocabulary, K experts.
"""

import hashlib
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from llava_mole.common.errors import ConfigError, value_errors_as
from llava_mole.common.log import get_logger
from llava_mole.data.anyres import Tiles, join_tiles
from llava_mole.inference.batching import encode_tiles
from llava_mole.inference.decoding import AnswerDecoder, Decoding, draw_tokens
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.row_cache import RowCache, check_cache
from llava_mole.mole import active_config, collect_routing, missing_input, prompt_decisions, set_prompt_decisions

Reason = Literal["stop", "length", "cancelled", "error"]
KEPT_IMAGES = 32
"""Images whose features stay in memory: those of the turns before are asked about again."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token with log probabilities (natural logarithm) before temperature and top_p."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens with theirs, best first."""


@dataclass(eq=False)
class Job:
    """A prompt to be answered, and its answer so far."""

    model: str
    ids: list[int]
    """The prompt, IMAGE_TOKEN_INDEX at image positions."""
    images: tuple[Tiles, ...]
    """The pixels of each image."""
    decoding: Decoding
    answer: AnswerDecoder
    limit: int
    """Most new tokens, with the context's end taken into account."""
    seed: int = 0
    top_logprobs: int | None = None
    """Log probabilities of the token and this many others; None computes none."""
    live: bool = False
    """Whether every token is delivered at once, and not only the whole answer."""
    tag: Any = None
    """The caller's own."""
    cancelled: bool = False
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: Reason | None = None
    """Why the answer has ended; None while it goes on."""
    error: str | None = None


@dataclass
class _Row:
    number: int
    """Rows are numbered in the order in which they came."""
    job: Job
    generator: random.Random
    decisions: tuple[Tensor, ...]
    """For granularity `sequence`: each router's logits `[K]` for the prompt."""


class RowBatch:
    """The rows of one model.

    Raises:
        ConfigError: the model cannot be decoded with rows that join and leave, or its router needs an input that
            prompts do not have.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._model = predictor.loaded.model
        self._rows: list[_Row] = []
        self._joined = 0
        self._cache = RowCache()
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        language_model = self._model.language_model
        config = active_config(language_model) if predictor.loaded.adapter == "mole" else None
        if config is not None and (name := missing_input(language_model)):
            raise ConfigError(
                f"{predictor.loaded.path} routes by the routing input {name!r}, which prompts do not have; it cannot "
                "be served"
            )
        self._by_sequence = config is not None and config.granularity == "sequence"
        self._check()

    @property
    def jobs(self) -> list[Job]:
        """The jobs that are being answered."""
        return [row.job for row in self._rows]

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value cache."""
        return self._cache.nbytes

    @torch.inference_mode()
    def join(self, jobs: Sequence[Job]) -> list[Job]:
        """Compute the prompts and the first token of each job; the jobs become rows. Returns those jobs."""
        try:
            self._join(jobs)
        except Exception as error:
            if len(jobs) > 1:
                return [job for one in jobs for job in self.join([one])]
            _fail(jobs[0], error)
        return list(jobs)

    @torch.inference_mode()
    def step(self) -> list[Job]:
        """Add a token to every row. Returns the jobs of all rows; those that have ended are no longer rows."""
        touched = self.jobs
        while self._rows:
            try:
                ids = [row.job.new_ids[-1] for row in self._rows]
                decisions = [torch.stack(logits) for logits in zip(*(row.decisions for row in self._rows), strict=True)]
                logits_RV = self._forward(
                    ids, self._cache, self._cache.lengths, self._cache.mask(self._device), decisions
                )
                choices = self._choose(logits_RV, [(row.job, row.generator) for row in self._rows])
            except Exception as error:
                self._drop_culprits(error)
                continue
            self._cache.advance()
            for row, choice in zip(self._rows, choices, strict=True):
                _accept(row.job, choice)
            break
        self.drop_ended()
        return touched

    @torch.inference_mode()
    def drop_ended(self) -> None:
        """Free the places of jobs that have ended or were cancelled."""
        for n in reversed(range(len(self._rows))):
            job = self._rows[n].job
            if job.cancelled and job.reason is None:
                job.reason = "cancelled"
            if job.reason is not None:
                self._cache.remove(n)
                self._rows[n] = self._rows[-1]
                self._rows.pop()

    @property
    def _device(self) -> torch.device:
        return self._model.device

    def _join(self, jobs: Sequence[Job]) -> None:
        lengths = [len(job.ids) for job in jobs]
        longest, pad_id = max(lengths), self.predictor.loaded.tokenizer.pad_token_id
        ids_nL = torch.tensor([[pad_id] * (longest - len(job.ids)) + job.ids for job in jobs], device=self._device)
        shown = [image for job in jobs for image in job.images]
        features = torch.cat([self._encode(image) for image in shown]) if shown else None
        index = join_tiles(shown).shows if shown else None
        arguments: dict[str, Any] = {}
        if min(lengths) < longest:
            first_n1 = torch.tensor([[longest - length] for length in lengths], device=self._device)
            columns_L = torch.arange(longest, device=self._device)
            arguments = {
                "attention_mask": columns_L >= first_n1,
                "position_ids": (columns_L - first_n1).clamp(min=0),
            }
        cache = DynamicCache()
        logits_nV = self._model.causal_lm(
            inputs_embeds=self._model.embed(ids_nL, features=features, feature_index=index),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **arguments,
        ).logits[:, -1]
        check_cache(cache)
        self._check_routers()
        generators = [random.Random(job.seed) for job in jobs]
        choices = self._choose(logits_nV, list(zip(jobs, generators, strict=True)))
        decided = prompt_decisions(self._model.language_model) if self._by_sequence else []
        self._cache.add(cache, lengths)
        for n, (job, generator, choice) in enumerate(zip(jobs, generators, choices, strict=True)):
            self._rows.append(_Row(self._joined, job, generator, tuple(logits[n].clone() for logits in decided)))
            self._joined += 1
            _accept(job, choice)
        self.drop_ended()

    def _forward(
        self,
        ids: Sequence[int],
        cache: Cache,
        lengths: Sequence[int],
        mask: Tensor | None,
        decisions: Sequence[Tensor],
    ) -> Tensor:
        """Logits `[R, V]` of the tokens after `ids`, whose keys and values go to `cache`."""
        if decisions:
            set_prompt_decisions(self._model.language_model, decisions)
        return self._model.causal_lm(
            input_ids=torch.tensor(ids, device=self._device)[:, None],
            attention_mask=mask,
            position_ids=torch.tensor(lengths, device=self._device)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]

    def _choose(self, logits_RV: Tensor, jobs: Sequence[tuple[Job, random.Random]]) -> list[TokenLogprob | int | None]:
        """The next token of every row, with log probabilities where they are wanted; None if logits are not finite."""
        logits_RV = logits_RV.float()
        chosen_R = logits_RV.argmax(dim=-1)
        groups: dict[Decoding, list[int]] = {}
        for n, (job, _) in enumerate(jobs):
            if job.decoding.samples:
                groups.setdefault(job.decoding, []).append(n)
        for decoding, members in groups.items():
            scores = logits_RV[members]
            for warper in decoding.warpers():
                scores = warper(None, scores)
            chosen_R[members] = draw_tokens(scores, [jobs[n][1] for n in members])
        finite_R = logits_RV.isfinite().all(dim=-1)
        chosen: list[int]
        chosen, finite = torch.stack([chosen_R, finite_R.long()]).tolist()
        found: list[TokenLogprob | int | None] = [
            token if good else None for token, good in zip(chosen, finite, strict=True)
        ]
        for n, (job, _) in enumerate(jobs):
            if job.top_logprobs is not None and finite[n]:
                logprobs_V = logits_RV[n].log_softmax(dim=-1)
                best = logprobs_V.topk(job.top_logprobs)
                top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
                found[n] = TokenLogprob(chosen[n], float(logprobs_V[chosen[n]]), top)
        return found

    def _encode(self, tiles: Tiles) -> Tensor:
        """Features [t, P, D] of an image's tiles, computed alone so that they do not depend on other images."""
        content = hashlib.blake2b(tiles.pixels.numpy().tobytes(), digest_size=16)
        if tiles.grids is not None:  # the same patches may stand in another grid
            content.update(tiles.grids.numpy().tobytes())
        key = content.digest()
        if key not in self._features:
            self._features[key] = encode_tiles(self._model, tiles)
            if len(self._features) > KEPT_IMAGES:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]

    def _drop_culprits(self, error: Exception) -> None:
        """End the rows that fail alone, too; if none does, the batch was too large: end the one that came last."""
        culprits = [n for n in range(len(self._rows)) if len(self._rows) > 1 and not self._works_alone(n)]
        youngest = max(range(len(self._rows)), key=lambda n: self._rows[n].number)
        for n in culprits or [youngest]:
            _fail(self._rows[n].job, error)
        self.drop_ended()

    def _works_alone(self, n: int) -> bool:
        row = self._rows[n]
        try:
            decisions = [logits[None] for logits in row.decisions]
            self._forward([row.job.new_ids[-1]], self._cache.row(n), [self._cache.lengths[n]], None, decisions)
        except Exception:
            return False
        return True

    def _check_routers(self) -> None:
        """On a GPU the routers do not look at their logits, and experts chosen by NaN compute finite values."""
        if self._device.type != "cpu" and self.predictor.loaded.adapter == "mole":
            for logits in collect_routing(self._model.language_model).logits:
                if not bool(logits.isfinite().all()):
                    raise FloatingPointError("the router's logits are not finite")

    @torch.inference_mode()
    def _check(self) -> None:
        """Decode two tokens of a two-token prompt. Raises ConfigError if the model cannot be batched."""
        with value_errors_as(ConfigError):
            token = self.predictor.loaded.tokenizer.pad_token_id
            job = Job("", [token, token], (), Decoding(2), AnswerDecoder(self.predictor.loaded.tokenizer, (), ()), 2)
            self._join([job])
            self.step()
        if job.error is not None:
            raise ConfigError(f"{self.predictor.loaded.path} cannot be served: {job.error}")


def _accept(job: Job, choice: TokenLogprob | int | None) -> None:
    """Add a token to a job's answer, and end the answer if it is complete."""
    if choice is None:
        job.reason, job.error = "error", _NOT_FINITE
        return
    token = choice if isinstance(choice, int) else choice.token
    job.new_ids.append(token)
    if isinstance(choice, TokenLogprob):
        job.logprobs.append(choice)
    if token in job.answer.eos_ids or job.answer.is_done(job.new_ids):
        job.reason = "stop"
    elif len(job.new_ids) >= job.limit:
        job.reason = "length"


_NOT_FINITE = (
    "the model computes NaN or infinity for this prompt; with bfloat16 try float32, otherwise use another checkpoint"
)


def _fail(job: Job, error: Exception) -> None:
    """End a job with an error. What is not the prompt's fault is logged."""
    job.reason = "error"
    if isinstance(error, FloatingPointError):
        job.error = _NOT_FINITE
        return
    logger.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    job.error = "the device's memory is full; ask again later, or ask for less" if memory else "internal error"

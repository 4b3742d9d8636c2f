"""Decoding: its options, when an answer ends, and how token ids become text, at once or piece by piece."""

import math
import numbers
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_mole.common.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    from llava_mole.data.tokenization import TextTokenizer

LOWEST_TEMPERATURE = 1e-4
"""Below it, logits divided by the temperature overflow float32; use greedy decoding instead."""
TOP_K = 50
"""Sampling chooses among this many most likely tokens, as in LLaVA."""
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16")
INCOMPLETE_CHARACTER = "\ufffd"
"""The text that tokenizers decode an unfinished character's bytes to."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; greedy by default. Options of LLaVA keep LLaVA's meaning."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy; above 0, tokens are sampled among the TOP_K most likely."""
    top_p: float | None = None
    """Sample only within this probability mass."""
    num_beams: int = 1

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        for name, value in (("temperature", self.temperature), ("top_p", 1 if self.top_p is None else self.top_p)):
            if not isinstance(value, numbers.Real):
                raise ConfigError(f"{name} is {value!r}; it must be a number")
        if self.temperature and not LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or at least {LOWEST_TEMPERATURE}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        check_count("num_beams", self.num_beams)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0

    def generation_config(self, *, eos_ids: Sequence[int], pad_id: int) -> "GenerationConfig":
        """These options for transformers, unaffected by the language model's own generation config.

        Vicuna's holds sampling values; others hold a repetition penalty or suppressed tokens.
        """
        from transformers import GenerationConfig

        class Complete(GenerationConfig):
            """Unset values take transformers' defaults, not the model's."""

            def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> Any:
                if allow_custom_entries:  # this is how transformers passes the model's values
                    return kwargs
                return super().update(defaults_only=defaults_only, **kwargs)

        beam_sampling = self.samples and self.num_beams > 1
        return Complete(
            max_new_tokens=self.max_new_tokens,
            do_sample=beam_sampling,
            num_beams=self.num_beams,
            temperature=self.temperature if beam_sampling else 1.0,
            top_p=self.top_p if beam_sampling and self.top_p is not None else 1.0,
            top_k=TOP_K,
            eos_token_id=list(eos_ids) or None,
            pad_token_id=pad_id,
        )

    def processors(self, seeds: Sequence[int]) -> "LogitsProcessorList":
        """The logits processors that sample a batch, one seed per row; none for greedy decoding or beam search."""
        from transformers import LogitsProcessorList

        if not self.samples or self.num_beams > 1:
            return LogitsProcessorList()
        return LogitsProcessorList([*self.warpers(), RowSampler(seeds)])

    def warpers(self) -> list[Any]:
        """The logits processors after which the softmax of the scores is what is sampled from."""
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        nucleus = [TopPLogitsWarper(self.top_p)] if self.top_p is not None else []
        return [TemperatureLogitsWarper(self.temperature), TopKLogitsWarper(TOP_K), *nucleus]


def check_count(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 1")


def as_seeds(seeds: Any, count: int) -> list[int]:
    """One seed per prompt. Raises ConfigError unless there are `count` whole numbers."""
    try:
        found = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise ConfigError(f"seeds is {seeds!r}; give a list with one whole number for every prompt") from None
    if len(found) != count:
        raise ConfigError(f"{len(found)} seeds for {count} prompts; give one whole number for every prompt")
    return found


def as_stops(stop: Any) -> list[str]:
    """The texts that end an answer; a single text is one of them. Raises ConfigError if they are not texts."""
    found = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(found, Sequence) or not all(isinstance(text, str) for text in found):
        raise ConfigError(f"stop is {stop!r}; give a text or a list of texts")
    return list(found)


class AnswerDecoder:
    """Turns the ids that a model generated into the answer's text.

    The answer ends before the first end-of-sequence id or stop text; blanks around it are removed.
    """

    def __init__(self, tokenizer: "TextTokenizer", eos_ids: Sequence[int], stops: Sequence[str]):
        self._tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self._stops = tuple(stop for stop in stops if stop)

    def final(self, ids: Sequence[int]) -> str:
        """The answer, from all ids."""
        text = self._decode(ids)
        return text[: self._stop_position(text)].strip()

    def stable(self, ids: Sequence[int]) -> str:
        """The text that can be shown already: a prefix of `final` for every continuation that is valid text.

        Unfinished characters, trailing blanks and a possible beginning of a stop text are held back. More ids may
        give a shorter text: tokenizers decode a run of single bytes, such as two characters outside the vocabulary,
        as a whole or not at all.
        """
        text = self._decode(ids)
        stop = self._stop_position(text)
        if stop is not None:
            return text[:stop].strip()
        text = text.rstrip(INCOMPLETE_CHARACTER)
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        return text[: len(text) - held].strip()

    def is_done(self, ids: Sequence[int]) -> bool:
        """Whether a stop text occurred near the end. Call it after every id."""
        # Every id adds at least one byte or is special, so a stop text that was just completed lies in this tail.
        tail = ids[-max((len(stop.encode()) for stop in self._stops), default=0) - 8 :]
        return bool(self._stops) and self._stop_position(self._decode(tail)) is not None

    def _decode(self, ids: Sequence[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return self._tokenizer.decode(list(ids[:end]))

    def _stop_position(self, text: str) -> int | None:
        return min((position for stop in self._stops if (position := text.find(stop)) >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class RowSampler:
    """A logits processor for transformers that samples each row with its own random generator.

    An answer therefore does not depend on the other rows. It must be the last processor: greedy decoding then takes
    the token it drew.
    """

    def __init__(self, seeds: Sequence[int]):
        self._generators = [random.Random(seed) for seed in seeds]

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Scores [rows, V] with all but the drawn token at minus infinity."""
        import torch

        return torch.full_like(scores, -math.inf).scatter(1, draw_tokens(scores, self._generators).unsqueeze(-1), 0.0)


def draw_tokens(scores_RV: "torch.Tensor", generators: Sequence[random.Random]) -> "torch.Tensor":
    """A token of each row, int64 [R], from the softmax of its scores and its own generator."""
    import torch

    upto_RV = scores_RV.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    drawn_R = upto_RV.new_tensor([generator.random() for generator in generators]) * upto_RV[:, -1]
    found_R1 = torch.searchsorted(upto_RV, drawn_R.unsqueeze(-1), right=True)
    return found_R1.squeeze(-1).clamp(max=scores_RV.shape[-1] - 1)


class RowStop:
    """A stopping criterion for transformers: each row ends at a stop text or at its own length limit.

    Set `cancelled` to end all rows.
    """

    def __init__(self, answer: AnswerDecoder, limits: Sequence[int]):
        """`limits[i]` is the most new tokens of sample i. The beams of a sample are consecutive rows."""
        self._answer = answer
        self._limits = list(limits)
        self.cancelled = False
        self.new_ids_RN: torch.Tensor | None = None
        """int64 [R, N], the latest ids that it was called with."""

    def __call__(self, input_ids: "torch.Tensor", scores: object, **kwargs: object) -> "torch.Tensor":
        """Flags bool [rows] of finished rows, from the new ids int64 [rows, new]; prompts come as embeddings."""
        import torch

        self.new_ids_RN = input_ids
        beams = input_ids.shape[0] // len(self._limits)
        done = [
            self.cancelled or len(ids) >= self._limits[row // beams] or self._answer.is_done(ids)
            for row, ids in enumerate(input_ids.tolist())
        ]
        return input_ids.new_tensor(done, dtype=torch.bool)

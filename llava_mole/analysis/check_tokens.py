"""Records as tokens, as training makes them, and what `data.max_length_policy` does to those that are too long."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from llava_mole.data.encoding import LengthPolicy
from llava_mole.data.records import Record
from llava_mole.errors import DataError

TOO_LONG = ("truncated", "shortened", "dropped")
"""Kinds of findings about records that are longer than `data.max_length`, and that the policy lets pass."""


@dataclass(frozen=True)
class TextLimits:
    """How records become tokens, in plain values that travel to other processes."""

    language_model: str
    template: str
    image_tokens: int
    max_length: int
    policy: LengthPolicy = "truncate"


class TokenCount(NamedTuple):
    """One record as tokens."""

    tokens: int
    """Before any cut; 0 where the template cannot hold the record."""
    found: tuple[tuple[str, str], ...] = ()
    """(kind, detail) of what there is to say about it."""


@lru_cache(maxsize=1)
def _tools(language_model: str, template: str) -> tuple[Any, Any]:
    from llava_mole.data.chat_template import resolve_template
    from llava_mole.data.tokenization import HFTextTokenizer
    from llava_mole.model.language_model import load_tokenizer

    tokenizer = HFTextTokenizer(load_tokenizer(language_model))
    return tokenizer, resolve_template(template, tokenizer)


def count_chunk(records: Sequence[Record], limits: TextLimits) -> list[TokenCount]:
    """Tokens of some records. Runs in a worker process.

    Raises:
        WeightsError, ConfigError: no tokenizer, or no such template.
    """
    tokenizer, template = _tools(limits.language_model, limits.template)
    return [_count(record, limits, tokenizer, template) for record in records]


def _count(record: Record, limits: TextLimits, tokenizer: Any, template: Any) -> TokenCount:
    # The same calls as in `fitting.fit_source`, so that both say the same about a record.
    from llava_mole.data.encoding import encode_shortened
    from llava_mole.data.lengths import NEVER, count_record

    try:
        text, needed = count_record(record, template, tokenizer)
    except DataError as error:
        return TokenCount(0, (("bad-record", str(error).removeprefix(f"{record.where}: ")),))
    image_tokens = len(record.images) * limits.image_tokens
    tokens, most = text + image_tokens, limits.max_length
    length = f"{tokens} tokens"
    unanswered = ("masked", f"no token of an answer in {length}")
    if tokens <= most:
        return TokenCount(tokens, (unanswered,) if needed >= NEVER else ())
    if limits.policy == "error":
        return TokenCount(tokens, (("too-long", length),))
    if limits.policy == "drop":
        return TokenCount(tokens, (("dropped", length),))
    if needed >= NEVER:
        return TokenCount(tokens, (unanswered,))
    if limits.policy == "truncate_history":
        shorter = encode_shortened(record, template, tokenizer, limits.image_tokens, most)
        if shorter is None:
            return TokenCount(tokens, (("dropped", length),))
        return TokenCount(tokens, (("shortened", f"{length}, {len(shorter.input_ids)} without its oldest rounds"),))
    cut = ("truncated", length)
    if needed + image_tokens <= most:
        return TokenCount(tokens, (cut,))
    return TokenCount(tokens, (_lost_by_cut(record, limits, tokenizer, template), cut))


def _lost_by_cut(record: Record, limits: TextLimits, tokenizer: Any, template: Any) -> tuple[str, str]:
    """Kind and detail of what the cut at the end takes away that training cannot do without."""
    from llava_mole.data.encoding import render_record
    from llava_mole.data.tokenization import encode

    rendered, most = render_record(record, template), limits.max_length
    try:
        encode(rendered, tokenizer, num_image_tokens=limits.image_tokens, max_length=most)
    except DataError:
        return "image-cut", f"an image is behind data.max_length {most}"
    return "masked", f"no token of an answer before data.max_length {most}"

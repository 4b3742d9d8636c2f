"""From a rendered prompt to token ids and labels.

The text between image markers is tokenized piece by piece, each piece as if it began a text, as LLaVA's
`tokenizer_image_token` does. Labels follow from the answers' character spans and the tokens' character offsets.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from llava_mole.common.errors import DataError, WeightsError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.conversation import Rendered, Template, render
from llava_mole.data.records import Record

Offsets = list[tuple[int, int]]

VERSION = 1
"""Raised whenever `encode` makes other ids of the same text: stored token counts are then counted again."""


class TextTokenizer(Protocol):
    """What this package needs of a tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """Id that goes in front of every text; None where the tokenizer puts none."""

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends an answer."""

    @property
    def pad_token_id(self) -> int:
        """Id of padding positions. It may equal a real token's id: only lengths tell what is padding."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Ids of `text` without BOS, special tokens in it parsed, and each token's character range in `text`."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""


class HFTextTokenizer:
    """A Hugging Face fast tokenizer as a `TextTokenizer`; the original is `.hf`.

    Raises:
        WeightsError: the tokenizer reports no character offsets (a slow one), or has no token to pad with.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        if not getattr(hf_tokenizer, "is_fast", False):
            raise WeightsError(
                f"tokenizer {type(hf_tokenizer).__name__} gives no character offsets; load it with "
                "AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        self.hf = hf_tokenizer
        # Asked of the tokenizer, because `bos_token_id` is also set where none is put in front of texts.
        first = hf_tokenizer("a").input_ids[0]
        self.bos_token_id: int | None = first if first == hf_tokenizer.bos_token_id else None
        self.eos_token_id: int | None = hf_tokenizer.eos_token_id
        candidates = (hf_tokenizer.pad_token_id, hf_tokenizer.unk_token_id, hf_tokenizer.eos_token_id)
        pad_token_id = next((token for token in candidates if token is not None), None)
        if pad_token_id is None:
            raise WeightsError("the tokenizer has neither a padding, an unknown nor an end token; set its pad_token")
        self.pad_token_id: int = pad_token_id

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides which ids a text has."""
        content = f"{self.hf.backend_tokenizer.to_str()}\n{self.bos_token_id}"
        return hashlib.sha256(content.encode()).hexdigest()

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """See `TextTokenizer`."""
        # verbose=False: the length is this package's business, the tokenizer's own warning would mislead.
        encoding = self.hf(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoding.input_ids, encoding.offset_mapping

    def decode(self, ids: list[int]) -> str:
        """See `TextTokenizer`."""
        return self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class Encoded:
    """One tokenized sample; `input_ids` and `labels` have the same length."""

    input_ids: list[int]
    labels: list[int]
    """The id at supervised positions, IGNORE_INDEX elsewhere. Not shifted."""
    num_images: int
    truncated: int
    """Tokens cut off at `max_length`."""

    @property
    def num_supervised(self) -> int:
        """Positions that carry loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def encode(rendered: Rendered, tokenizer: TextTokenizer, *, num_image_tokens: int, max_length: int | None) -> Encoded:
    """Tokenize a rendered conversation.

    A token is supervised when it begins inside an answer span. So the piece that joins the space after the marker with
    the answer's first word is, and so is one that runs over the end of an answer whose end marker is ordinary text.

    Args:
        rendered: Text with `<image>` markers, and answer spans.
        tokenizer: Gives ids and offsets; its BOS, if it has one, goes in front.
        num_image_tokens: Copies of IMAGE_TOKEN_INDEX that stand for one image; 1 gives LLaVA's ids.
        max_length: Most tokens to keep, image tokens included; None keeps all.

    Raises:
        DataError: the cut at `max_length` would remove an image or a part of one.
    """
    bos = tokenizer.bos_token_id
    input_ids = [] if bos is None else [bos]
    labels = [IGNORE_INDEX] * len(input_ids)
    image_end = 0
    position = 0
    spans = list(rendered.answer_spans)
    chunks = rendered.text.split(DEFAULT_IMAGE_TOKEN)
    for index, chunk in enumerate(chunks):
        if index:
            input_ids += [IMAGE_TOKEN_INDEX] * num_image_tokens
            labels += [IGNORE_INDEX] * num_image_tokens
            image_end = len(input_ids)
            position += len(DEFAULT_IMAGE_TOKEN)
        if chunk:
            ids, offsets = tokenizer.encode_with_offsets(chunk)
            for token, (start, _) in zip(ids, offsets, strict=True):
                while spans and position + start >= spans[0][1]:
                    del spans[0]
                supervised = bool(spans) and position + start >= spans[0][0]
                labels.append(token if supervised else IGNORE_INDEX)
            input_ids += ids
            position += len(chunk)
    truncated = 0 if max_length is None else max(0, len(input_ids) - max_length)
    if truncated:
        if image_end > len(input_ids) - truncated:
            raise DataError(
                f"the image ends at token {image_end}, behind max_length {max_length}; raise data.max_length or "
                "shorten the text before the image"
            )
        del input_ids[-truncated:], labels[-truncated:]
    return Encoded(input_ids, labels, len(chunks) - 1, truncated)


LengthPolicy = Literal["truncate", "error", "drop", "truncate_history"]


def render_record(record: Record, template: Template) -> Rendered:
    """The prompt of a record. Raises DataError where the template cannot hold it; the message starts with `where`."""
    try:
        rendered = render(template, record.turns)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None
    shown = rendered.text.count(DEFAULT_IMAGE_TOKEN)
    if shown != len(record.images):
        raise DataError(
            f"{record.where}: template {template.name!r} shows {shown} of the record's {len(record.images)} images; "
            "take another template, or one image a record"
        )
    return rendered


def encode_record(
    record: Record, template: Template, tokenizer: TextTokenizer, num_image_tokens: int, max_length: int | None
) -> Encoded:
    """Render and tokenize one record; what is longer than `max_length` is cut at the end, as LLaVA does.

    Raises:
        DataError: the template cannot hold it, an image is cut off by `max_length`, or no supervised token is left;
            the message starts with `file:line`.
    """
    rendered = render_record(record, template)
    try:
        encoded = encode(rendered, tokenizer, num_image_tokens=num_image_tokens, max_length=max_length)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None
    if not encoded.num_supervised and not encoded.truncated:
        raise DataError(
            f"{record.where}: no answer of it has any text with template {template.name!r}; give it one, or remove the "
            "record"
        )
    if not encoded.num_supervised:
        raise DataError(
            f"{record.where}: no token of an answer is left after the cut at data.max_length {max_length} "
            f"({len(encoded.input_ids) + encoded.truncated} tokens); raise it, or shorten or remove the record"
        )
    return encoded


def encode_shortened(
    record: Record, template: Template, tokenizer: TextTokenizer, num_image_tokens: int, max_length: int
) -> Encoded | None:
    """Encode a record without as many of its oldest rounds as it takes to fit; None if it cannot be made to fit.

    Rounds that show an image stay, and so does the last answered one; a last question without an answer, which carries
    no loss, goes first. `Encoded.truncated` is 0.

    Raises:
        DataError: the template cannot hold the record; the message starts with `file:line`.
    """

    whole = encode_record(record, template, tokenizer, num_image_tokens, None)
    if len(whole.input_ids) <= max_length:
        return whole
    if template.caption:
        return None
    rounds = [record.turns[start : start + 2] for start in range(0, len(record.turns), 2)]
    if len(rounds[-1]) == 1 and DEFAULT_IMAGE_TOKEN not in rounds[-1][0].text:
        del rounds[-1]
    removable = [n for n, turns in enumerate(rounds[:-1]) if DEFAULT_IMAGE_TOKEN not in turns[0].text]
    # The fewest rounds, found by bisection: every round that goes makes the sample shorter.
    low, high, best = 0, len(removable), None
    while low <= high:
        middle = (low + high) // 2
        gone = set(removable[:middle])
        turns = tuple([turn for n, pair in enumerate(rounds) if n not in gone for turn in pair])
        rendered = render(template, turns)
        if not rendered.answer_spans:  # only questions are left, and fewer rounds would not bring an answer back
            high = middle - 1
            continue
        shorter = encode(rendered, tokenizer, num_image_tokens=num_image_tokens, max_length=None)
        if len(shorter.input_ids) <= max_length:
            best, high = shorter, middle - 1
        else:
            low = middle + 1
    return best if best is not None and best.num_supervised else None


def load_tokenizer(path: str):
    """The fast tokenizer in directory `path`. Raises WeightsError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, use_fast=True)
    except (OSError, ValueError, ImportError) as error:
        raise WeightsError(f"no tokenizer loads from {path!r}: {' '.join(str(error).split())}") from None
    if not tokenizer.is_fast:
        raise WeightsError(f"the tokenizer in {path!r} has no fast form, which label masking by text spans needs")
    return tokenizer

"""From a record or a rendered prompt to token ids and labels, and the tokenizers that do it.

The pieces of text between image markers are tokenized separately, as in LLaVA's `tokenizer_image_token`. The labels
follow from the character spans of the answers and the character offsets of the tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from llava_mole.common.errors import DataError, WeightsError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.conversation import Rendered, Template, render
from llava_mole.data.records import Record

Offsets = list[tuple[int, int]]

VERSION = 1
"""Increase it whenever `encode` returns other ids for the same text: stored token counts then become invalid."""
SAVED = ("padding_side", "truncation_side", "legacy")
"""Attributes of a tokenizer that transformers loses on saving: those set later, and Llama's `legacy`, which decides
about the blank after a special token."""
LengthPolicy = Literal["truncate", "error", "drop", "truncate_history"]
SpecialTokens = Literal["escape", "keep", "refuse"]


class TextTokenizer(Protocol):
    """The part of a tokenizer that this package uses."""

    @property
    def bos_token_id(self) -> int | None:
        """Id in front of every text; None if the tokenizer adds none."""

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends an answer."""

    @property
    def pad_token_id(self) -> int:
        """Id of padding positions. It may equal the id of a real token: only lengths identify padding."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Ids of `text` without BOS, with special tokens parsed, and the character range of each token in `text`."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""


class HFTextTokenizer:
    """A fast tokenizer of transformers as a `TextTokenizer`; `hf` is the original.

    `special_tokens` is `data.special_tokens`, which `resolve_template` builds into the template.

    Raises:
        WeightsError: the tokenizer is slow and reports no character offsets, or has no token for padding.
    """

    def __init__(self, hf_tokenizer: Any, special_tokens: SpecialTokens = "keep") -> None:
        if not getattr(hf_tokenizer, "is_fast", False):
            raise WeightsError(
                f"tokenizer {type(hf_tokenizer).__name__} gives no character offsets; load it with "
                "AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        self.hf = hf_tokenizer
        self.special_tokens = special_tokens
        # Some tokenizers have a `bos_token_id` but do not put it in front of texts.
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
        """SHA-256 (hex) of everything that determines the ids of a text."""
        content = f"{self.hf.backend_tokenizer.to_str()}\n{self.bos_token_id}"
        return hashlib.sha256(content.encode()).hexdigest()

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """See `TextTokenizer`."""
        # verbose=False suppresses a warning about the length, which this package checks itself.
        encoding = self.hf(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoding.input_ids, encoding.offset_mapping

    def decode(self, ids: list[int]) -> str:
        """See `TextTokenizer`."""
        return self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_tokenizer(path: str) -> Any:
    """Load the fast tokenizer in directory `path`. Raises WeightsError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, use_fast=True)
    except (OSError, ValueError, ImportError) as error:
        raise WeightsError(f"no tokenizer loads from {path!r}: {' '.join(str(error).split())}") from None
    if not tokenizer.is_fast:
        raise WeightsError(f"the tokenizer in {path!r} has no fast form, which labels by character spans require")
    # save_pretrained writes only the attributes named here, with their values at that time.
    tokenizer.init_kwargs.update({name: getattr(tokenizer, name) for name in SAVED if hasattr(tokenizer, name)})
    return tokenizer


def end_ids(tokenizer: TextTokenizer, configured: int | list[int] | None, stop: str) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's, the language model's, and the template's end marker if it is one id.

    Special tokens such as `<|im_end|>` never appear in decoded text, so they must be recognised by id.

    Args:
        configured: `eos_token_id` of the language model's generation configuration.
        stop: the template's end marker.
    """
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    marker, _ = tokenizer.encode_with_offsets(stop)
    if len(marker) == 1:
        ids += marker
    return tuple(dict.fromkeys(token for token in ids if token is not None))


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


def encode(
    rendered: Rendered, tokenizer: TextTokenizer, *, num_image_tokens: int | Sequence[int], max_length: int | None
) -> Encoded:
    """Tokenize a rendered conversation.

    A token is supervised if it begins inside an answer span. This includes the token that joins the space after the
    marker with the first word of the answer, and one that crosses the end of an answer whose end marker is plain text.

    Args:
        rendered: Text with `<image>` markers, and answer spans.
        tokenizer: Its BOS, if it adds one, comes first.
        num_image_tokens: Copies of IMAGE_TOKEN_INDEX for every image, or for each of them; 1 gives LLaVA's ids.
        max_length: Most tokens to keep, including those of images; None keeps all.

    Raises:
        DataError: truncation at `max_length` would remove an image or a part of one.
    """
    bos = tokenizer.bos_token_id
    input_ids = [] if bos is None else [bos]
    labels = [IGNORE_INDEX] * len(input_ids)
    image_end = 0
    position = 0
    spans = list(rendered.answer_spans)
    chunks = rendered.text.split(DEFAULT_IMAGE_TOKEN)
    each = [num_image_tokens] * (len(chunks) - 1) if isinstance(num_image_tokens, int) else num_image_tokens
    if len(each) < len(chunks) - 1:
        raise DataError(f"the prompt shows {len(chunks) - 1} images, but there are {len(each)}")
    for index, chunk in enumerate(chunks):
        if index:
            input_ids += [IMAGE_TOKEN_INDEX] * each[index - 1]
            labels += [IGNORE_INDEX] * each[index - 1]
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


def render_record(record: Record, template: Template) -> Rendered:
    """The prompt of a record. Raises DataError, starting with `where`, if the template cannot represent the record."""
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
    record: Record,
    template: Template,
    tokenizer: TextTokenizer,
    num_image_tokens: int | Sequence[int],
    max_length: int | None,
) -> Encoded:
    """Render and tokenize a record, and truncate it at `max_length` as LLaVA does.

    Raises:
        DataError: the template cannot represent the record, truncation would remove an image, or no supervised token
            is left; the message starts with `file:line`.
    """
    rendered = render_record(record, template)
    try:
        encoded = encode(rendered, tokenizer, num_image_tokens=num_image_tokens, max_length=max_length)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None
    if not encoded.num_supervised and not encoded.truncated:
        raise DataError(
            f"{record.where}: none of its answers has text with template {template.name!r}; add one, or remove the "
            "record"
        )
    if not encoded.num_supervised:
        raise DataError(
            f"{record.where}: no token of an answer is left after truncation at data.max_length {max_length} "
            f"({len(encoded.input_ids) + encoded.truncated} tokens); raise it, or shorten or remove the record"
        )
    return encoded


def encode_shortened(
    record: Record,
    template: Template,
    tokenizer: TextTokenizer,
    num_image_tokens: int | Sequence[int],
    max_length: int,
) -> Encoded | None:
    """Encode a record without its oldest rounds, removing as few as possible; None if it cannot be made to fit.

    Rounds with an image and the last answered round stay. A final question without an answer, which carries no loss,
    is removed first. `Encoded.truncated` is 0.

    Raises:
        DataError: the template cannot represent the record; the message starts with `file:line`.
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
    # Bisection finds the fewest rounds: every removed round makes the sample shorter.
    low, high, best = 0, len(removable), None
    while low <= high:
        middle = (low + high) // 2
        gone = set(removable[:middle])
        turns = tuple([turn for n, pair in enumerate(rounds) if n not in gone for turn in pair])
        rendered = render(template, turns)
        if not rendered.answer_spans:  # only questions are left; removing more rounds brings no answer back
            high = middle - 1
            continue
        shorter = encode(rendered, tokenizer, num_image_tokens=num_image_tokens, max_length=None)
        if len(shorter.input_ids) <= max_length:
            best, high = shorter, middle - 1
        else:
            low = middle + 1
    return best if best is not None and best.num_supervised else None

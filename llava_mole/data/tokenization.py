"""From a rendered prompt to token ids and labels.

The text between image markers is tokenized piece by piece, each piece as if it began a text, as LLaVA's
`tokenizer_image_token` does. Labels follow from the answers' character spans and the tokens' character offsets.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

from llava_mole.common.errors import DataError, WeightsError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.conversation import Rendered

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

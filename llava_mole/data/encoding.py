"""One record to token ids within `data.max_length`, and what is done with one that is longer."""

from typing import Literal

from llava_mole.common.errors import DataError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Rendered, Template, render
from llava_mole.data.records import Record
from llava_mole.data.tokenization import Encoded, TextTokenizer, encode

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

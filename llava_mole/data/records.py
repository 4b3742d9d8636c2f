"""Records in LLaVA's format: what a valid sample is, and the parser that checks a raw one.

A raw record is `{"id": ..., "image": "relative/path.jpg", "conversations": [{"from": "human", "value":
"<image>\\n..."}, {"from": "gpt", "value": "..."}, ...]}`. Without `image` it is text only; with a list of paths it has
several images and as many markers. Other keys are ignored. An image without a marker or a second marker for one image,
which LLaVA repairs or ignores silently, is an error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from llava_mole.common.errors import DataError
from llava_mole.common.text import UNPAIRED_SURROGATE, count_of, is_text
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Role, Turn, consecutive_turns, drop_leading_answer, place_image_first

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|data:")


@dataclass(frozen=True, slots=True)
class Record:
    """One valid sample."""

    id: str
    images: tuple[str, ...]
    """Paths relative to the source's image folder, in the order of their markers."""
    turns: tuple[Turn, ...]
    """User first, alternating. The user turns contain one `<image>` per image: a single marker precedes the text of its
    turn (LLaVA's rule), several stay where the data put them."""
    source: str
    where: str
    """`file:line` of the record's start, for messages."""


class RecordSubset(Sequence[Record]):
    """The records at `indices` (int64) of `records`, in that order, without a copy."""

    def __init__(self, records: Sequence[Record], indices: npt.NDArray[np.int64]) -> None:
        self.records = records
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return RecordSubset(self.records, self.indices[index])
        return self.records[int(self.indices[index])]


def parse_record(value: Any, source: str, where: str) -> tuple[Record, bool]:
    """Check a raw record and convert it.

    Args:
        value: Parsed JSON.
        source: See `Record.source`.
        where: `file:line` of the record.

    Returns:
        The record, and whether an answer that no question precedes was removed from it.

    Raises:
        DataError: the record is invalid; the message starts with `where`.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where}: a record must be an object, got {_kind(value)}")
    images = _image_paths(value["image"], where) if "image" in value else ()
    conversations = value.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        state = "no" if "conversations" not in value else "an empty" if conversations == [] else "a malformed"
        raise DataError(f"{where}: the record has {state} 'conversations' list; it needs human and gpt turns")
    all_turns = tuple([_to_turn(turn, where, index) for index, turn in enumerate(conversations, 1)])
    if (pair := consecutive_turns(all_turns)) is not None:
        speaker = conversations[pair[0]]["from"]
        raise DataError(
            f"{where}: two consecutive turns from {speaker!r} (turns {pair[0]} and {pair[1]}); human and gpt must "
            "alternate, merge them"
        )
    turns = drop_leading_answer(all_turns)
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        raise DataError(f"{where}: no gpt turn with text answers a human turn; there is nothing to train on")
    _check_markers(turns, images, where)
    if len(images) == 1:
        turns = place_image_first(turns)
    identifier = str(value.get("id", where.rpartition(":")[2]))
    _check_text(identifier, f"{where}: 'id'")
    return Record(identifier, images, turns, source, where), len(turns) < len(all_turns)


def _image_paths(value: Any, where: str) -> tuple[str, ...]:
    paths = value if isinstance(value, list) else [value]
    if not paths:
        raise DataError(f"{where}: 'image' is an empty list; leave the key out of text-only records")
    for path in paths:
        if not isinstance(path, str) or not path:
            raise DataError(
                f"{where}: 'image' must be one relative path or a list of them, got {_kind(path)}; leave the key out "
                "of text-only records"
            )
        if _URL.match(path):
            raise DataError(
                f"{where}: image {path[:80]!r} is a URL; images are read from the image folder and never fetched, so "
                "store it as a file"
            )
        _check_text(path, f"{where}: 'image'")
    return tuple(paths)


def _to_turn(value: Any, where: str, index: int) -> Turn:
    if not isinstance(value, dict):
        raise DataError(f"{where}: turn {index} must be an object with 'from' and 'value', got {_kind(value)}")
    missing = [key for key in ("from", "value") if key not in value]
    if missing:
        raise DataError(f"{where}: turn {index} has no {missing[0]!r}; a turn is an object with 'from' and 'value'")
    role, text = value["from"], value["value"]
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{where}: turn {index} is from {role!r}; allowed are 'human' and 'gpt'")
    if not isinstance(text, str):
        raise DataError(f"{where}: turn {index}: 'value' must be a string, got {_kind(text)}")
    if not text.isascii():
        _check_text(text, f"{where}: turn {index}: 'value'")
    return Turn(_ROLES[role], text)


def _check_text(text: str, where: str) -> None:
    if not is_text(text):
        raise DataError(f"{where} holds an {UNPAIRED_SURROGATE}")


def _check_markers(turns: tuple[Turn, ...], images: tuple[str, ...], where: str) -> None:
    markers = [turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns]
    total = sum(markers)
    if not images and total:
        raise DataError(
            f"{where}: {DEFAULT_IMAGE_TOKEN} stands in a record without 'image'; add the image or remove the marker"
        )
    if images and not total:
        raise DataError(
            f"{where}: image {images[0]!r} would never be seen: no human turn holds {DEFAULT_IMAGE_TOKEN}; put it in "
            "front of the first one, or remove 'image'"
        )
    if total != len(images):
        advice = "keep one marker" if len(images) == 1 else "every image needs one marker"
        count = count_of(len(images), "image")
        raise DataError(f"{where}: {total} times {DEFAULT_IMAGE_TOKEN} for {count}; {advice}")
    if any(markers[1::2]):
        raise DataError(f"{where}: {DEFAULT_IMAGE_TOKEN} stands in a gpt turn; move it to a human turn")


def _kind(value: Any) -> str:
    if value == "":
        return "an empty string"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

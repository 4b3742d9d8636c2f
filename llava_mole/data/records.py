"""LLaVA records: one JSON list a file, or JSONL with one record a line.

A record is `{"id": ..., "image": "relative/path.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."},
{"from": "gpt", "value": "..."}, ...]}`; without `image` it is text only. Other keys are ignored. What LLaVA silently
repairs or ignores (an image without a marker, two markers for one image) is an error here.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Turn, drop_leading_answer, place_image_first
from llava_mole.errors import DataError
from llava_mole.log import get_logger

logger = get_logger(__name__)

ROLES: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
_GAP = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Record:
    """One valid sample."""

    id: str
    image: str | None
    """Path relative to the source's image folder."""
    turns: tuple[Turn, ...]
    """User first, alternating; the image marker, if any, in front of its turn's text."""
    source: str
    where: str
    """`file:line` where the record starts, for messages."""


def read_records(path: str | os.PathLike[str], source: str) -> list[Record]:
    """Read and check every record of `path`: JSONL if its name ends in `.jsonl`, else a JSON list.

    Args:
        path: Annotation file, UTF-8.
        source: Name of the dataset, stored in each record.

    Raises:
        DataError: the file is missing or empty, or anything in it is not as it must be; the message starts with
            `file:line`.
    """
    path = Path(path)
    parsed = _parse_lines(path) if path.suffix == ".jsonl" else _parse_list(path)
    records = []
    dropped = 0
    try:
        for value, line in parsed:
            record, without_question = _to_record(value, source, f"{path}:{line}")
            dropped += without_question
            records.append(record)
    except FileNotFoundError:
        raise DataError(f"{path}: the annotation file does not exist; check data.sources.<name>.annotations") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read the annotation file: {error.strerror}") from None
    if not records:
        raise DataError(f"{path}:1: the file holds no record; give at least one or take the source out of data.sources")
    if dropped:
        logger.warning("%s: left out the first answer of %d records, which no question precedes", path, dropped)
    return records


def _decode(data: bytes, path: Path, line: int) -> str:
    """Text of `data`, which starts at `line` of the file."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8; convert the file") from None


def _parse_lines(path: Path) -> Iterator[tuple[Any, int]]:
    # A binary file breaks lines at "\n" only, not at the separators that JSON allows inside strings.
    with path.open("rb") as lines:
        for line, data in enumerate(lines, 1):
            text = _decode(data, path, line)
            if not text.strip():
                continue
            try:
                yield json.loads(text), line
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{line}: not valid JSON: {error.msg} (column {error.colno}); JSONL has one record a line"
                ) from None


def _parse_list(path: Path) -> Iterator[tuple[Any, int]]:
    """The elements of a JSON list with the line each starts on, decoded one by one."""
    text = _decode(path.read_bytes(), path, 1)
    decode = json.JSONDecoder().raw_decode
    position = _skip_gap(text, 0)
    line = 1 + text.count("\n", 0, position)
    if not text.startswith("[", position):
        raise DataError(
            f"{path}:{line}: not a JSON list; LLaVA's format is one list of records, and a file with one record a line "
            "must be named .jsonl"
        )
    counted = position
    position = _skip_gap(text, position + 1)
    expect_value = not text.startswith("]", position)
    while expect_value:
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
        yield value, line
        position = _skip_gap(text, end)
        expect_value = text.startswith(",", position)
        if expect_value:
            position = _skip_gap(text, position + 1)
    line += text.count("\n", counted, position)
    if not text.startswith("]", position):
        found = repr(text[position]) if position < len(text) else "the end of the file"
        raise DataError(f"{path}:{line}: not valid JSON: ',' or ']' expected, found {found}; is the file complete?")
    rest = _skip_gap(text, position + 1)
    if rest < len(text):
        line += text.count("\n", position, rest)
        raise DataError(f"{path}:{line}: not valid JSON: more text after the end of the list")


def _skip_gap(text: str, position: int) -> int:
    match = _GAP.match(text, position)
    return match.end() if match else position


def _to_record(value: Any, source: str, where: str) -> tuple[Record, bool]:
    """The record, and whether an answer without a question was left out of it."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: a record must be an object, got {_kind(value)}")
    image = value.get("image")
    if "image" in value and (not isinstance(image, str) or not image):
        raise DataError(
            f"{where}: 'image' must be one relative path, got {_kind(image)}; leave the key out of text-only records"
        )
    conversations = value.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        state = "no" if "conversations" not in value else "an empty" if conversations == [] else "a malformed"
        raise DataError(f"{where}: the record has {state} 'conversations' list; it needs human and gpt turns")
    all_turns = tuple(_to_turn(turn, f"{where}: turn {index}") for index, turn in enumerate(conversations, 1))
    turns = drop_leading_answer(all_turns)
    skipped = len(all_turns) - len(turns)
    for index, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[index % 2]:
            name = conversations[index + skipped]["from"]
            raise DataError(
                f"{where}: turn {index + skipped + 1} is again from {name!r}; human and gpt must alternate, merge them"
            )
    if not any(turn.role == "assistant" and turn.text for turn in turns):
        raise DataError(f"{where}: no gpt turn with text answers a human turn; there is nothing to train on")
    _check_markers(turns, image, where)
    if image is not None:
        turns = place_image_first(turns)
    identifier = str(value.get("id", where.rpartition(":")[2]))
    return Record(identifier, image, turns, source, where), bool(skipped)


def _to_turn(value: Any, where: str) -> Turn:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object with 'from' and 'value', got {_kind(value)}")
    missing = [key for key in ("from", "value") if key not in value]
    if missing:
        raise DataError(f"{where} has no {missing[0]!r}; a turn is an object with 'from' and 'value'")
    role, text = value["from"], value["value"]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where} is from {role!r}; allowed are 'human' and 'gpt'")
    if not isinstance(text, str):
        raise DataError(f"{where}: 'value' must be a string, got {_kind(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: 'value' holds half of a surrogate pair, which is no character; remove it") from None
    return Turn(ROLES[role], text)


def _check_markers(turns: tuple[Turn, ...], image: str | None, where: str) -> None:
    markers = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if image is None and markers:
        raise DataError(
            f"{where}: {DEFAULT_IMAGE_TOKEN} stands in a record without 'image'; add the image or remove the marker"
        )
    if image is not None and not markers:
        raise DataError(
            f"{where}: image {image!r} would never be seen, no human turn holds {DEFAULT_IMAGE_TOKEN}; put it in front "
            "of the first one, or remove 'image'"
        )
    if markers > 1:
        raise DataError(f"{where}: {markers} times {DEFAULT_IMAGE_TOKEN} for one image; keep one marker")
    if any(turn.role == "assistant" and DEFAULT_IMAGE_TOKEN in turn.text for turn in turns):
        raise DataError(f"{where}: {DEFAULT_IMAGE_TOKEN} stands in a gpt turn; move it to a human turn")


def _kind(value: Any) -> str:
    if value == "":
        return "an empty string"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

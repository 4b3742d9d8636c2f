"""Records in LLaVA's format: what a valid sample is, and the parser that checks a raw one.

A raw record is `{"id": ..., "image": "relative/path.jpg", "conversations": [{"from": "human", "value":
"<image>\\n..."}, {"from": "gpt", "value": "..."}, ...]}`. Without `image` it is text only; with a list of paths it has
several images and as many markers; `images` is another name of `image`. Other keys are ignored, unless one of a record
or turn without an image looks like an image: LLaVA would train on that record blindly. An image without a marker or a
second marker for one image, which LLaVA repairs or ignores silently, is an error.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from llava_mole.common.errors import DataError
from llava_mole.common.text import UNPAIRED_SURROGATE, count_of, is_text
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Role, Turn, consecutive_turns, drop_leading_answer, place_image_first

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}
_RECORD_KEYS = frozenset({"id", "image", "images", "conversations"})
_TURN_KEYS = frozenset({"from", "value", "role", "content"})
IMAGE_NAME = re.compile(
    r"(image|img|picture|photo|pic)s?_?(path|file|file_?name|name|url|uri|bytes|base64|data)?s?_?\d*", re.IGNORECASE
)
"""Keys that hold an image in other formats; `image_id` does not."""
_MEDIUM_NAME = re.compile(r"(video|audio|pixel)s?_?(path|file|url|value)?s?", re.IGNORECASE)
_MEDIUM = re.compile(
    r"data:(image|video|audio)/.*|\S[^\n]*\.(jpe?g|jpe|jfif|png|gif|webp|bmp|dib|tiff?|ppm|pgm|pbm|svg|heic|heif|avif|jp2"
    r"|dcm|mp4|avi|mov|mkv|webm|mpe?g)(\?\S*)?\s*",
    re.IGNORECASE | re.DOTALL,
)
"""A file name or address of an image or video, or a `data:` address."""
_LONGEST_NAME = 1024
_CONVERTED = ("messages", "question", "instruction", "prompt", "query")
"""Keys of records in the formats that `prepare messages` reads."""
_CONVERT = "`llava-mole prepare messages --raw FILE --out DIR` converts it"
_CHAT_ROLES = ("user", "assistant", "system")
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
    images = _images_of(value, where)
    conversations = value.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        state = "no" if "conversations" not in value else "an empty" if conversations == [] else "a malformed"
        other = next((f"; {key!r} is of another format, and {_CONVERT}" for key in _CONVERTED if key in value), "")
        raise DataError(f"{where}: the record has {state} 'conversations' list; it needs human and gpt turns{other}")
    all_turns = tuple([_to_turn(turn, where, index) for index, turn in enumerate(conversations, 1)])
    if not images and (unread := unread_image(value, conversations)) is not None:
        raise DataError(
            f"{where}: {unread}, but images are read from 'image' or 'images' only, and the record would be trained on "
            f"without it; rename the key ({_CONVERT} too), or remove it"
        )
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


def _images_of(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = {"image": _image_paths(record["image"], "image", where)} if "image" in record else {}
    if record.get("images"):
        found["images"] = _image_paths(record["images"], "images", where)
    if len(set(found.values())) > 1:
        raise DataError(f"{where}: 'image' and 'images' name different images; keep one of these keys")
    return next(iter(found.values()), ())


def unread_image(record: Mapping[Any, Any], turns: Sequence[Any], known: Collection[str] = _RECORD_KEYS) -> str | None:
    """Where a record has an image or another medium that is not read, and what it is; None if there is none.

    Such a record would be trained on as if the question came without the image.

    Args:
        record: Without an image that is read.
        turns: Its turns, of any type.
        known: Keys of the record that are read.
    """
    for key, value in record.items():
        if key not in known and _holds_medium(key, value):
            return f"{str(key)!a} is {str(value)[:80]!a}"
    for number, turn in enumerate(turns, 1):
        for key, value in turn.items() if isinstance(turn, dict) else ():
            if key not in _TURN_KEYS and _holds_medium(key, value):
                return f"{str(key)!a} of turn {number} is {str(value)[:80]!a}"
    return None


def _holds_medium(key: Any, value: Any) -> bool:
    """Whether the name of a key or its value says that it holds an image, video or sound."""
    if not isinstance(value, (str, list, dict, bytes)) or not value:
        return False
    name = str(key)
    return bool(IMAGE_NAME.fullmatch(name) or _MEDIUM_NAME.fullmatch(name)) or _is_medium(value)


def _is_medium(value: Any) -> bool:
    if isinstance(value, str):
        return (len(value) <= _LONGEST_NAME or value.startswith("data:")) and _MEDIUM.fullmatch(value) is not None
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(isinstance(item, str) and _is_medium(item) for item in inner)


def _image_paths(value: Any, key: str, where: str) -> tuple[str, ...]:
    paths = value if isinstance(value, list) else [value]
    if not paths:
        raise DataError(f"{where}: {key!r} is an empty list; leave the key out of text-only records")
    for path in paths:
        if not isinstance(path, str) or not path:
            raise DataError(
                f"{where}: {key!r} must be one relative path or a list of them, got {_kind(path)}; leave the key out "
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
        other = f". 'role' and 'content' are of another format, and {_CONVERT}" if "role" in value else ""
        raise DataError(
            f"{where}: turn {index} has no {missing[0]!r}; a turn is an object with 'from' and 'value'{other}"
        )
    role, text = value["from"], value["value"]
    if not isinstance(role, str) or role not in _ROLES:
        other = f". With other roles it is of another format, and {_CONVERT}" if role in _CHAT_ROLES else ""
        raise DataError(f"{where}: turn {index} is from {role!r}; allowed are 'human' and 'gpt'{other}")
    if not isinstance(text, str):
        other = f". Parts are of another format, and {_CONVERT}" if isinstance(text, list) else ""
        raise DataError(f"{where}: turn {index}: 'value' must be a string, got {_kind(text)}{other}")
    if not text.isascii():
        _check_text(text, f"{where}: turn {index}: 'value'")
    return Turn(_ROLES[role], text)


def _check_text(text: str, where: str) -> None:
    if not is_text(text):
        raise DataError(f"{where} holds an {UNPAIRED_SURROGATE}")


def marker_problem(text: str, num_images: int) -> str | None:
    """What is wrong with the `<image>` of a prompt with so many images; None if nothing is.

    There may be none, too: the images then come first.
    """
    markers = text.count(DEFAULT_IMAGE_TOKEN)
    if markers in (0, num_images):
        return None
    given = {0: "no image", 1: "one image"}.get(num_images, count_of(num_images, "image"))
    return f"{markers} {DEFAULT_IMAGE_TOKEN} in the text, but {given} given"


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

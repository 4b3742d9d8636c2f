"""Your own data in other formats: chat messages, ShareGPT with images, question and answer columns."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_mole.common.text import is_text
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Turn
from llava_mole.data.json_stream import JSON_SUFFIXES
from llava_mole.data.prepare.defects import Action, Defects, SkipRecord
from llava_mole.data.prepare.files import find_files, read_rows, read_values, show, split_of
from llava_mole.data.prepare.samples import (
    CHAT_ROLES,
    MULTI_IMAGE,
    TEXT_ONLY,
    WITH_IMAGES,
    Embedded,
    MultiImage,
    RawSample,
    Source,
    SourceOptions,
    Split,
    check_turns,
    choose_images,
    keep_first_marker,
    merge_turns,
    option,
    require_object,
    usable_samples,
    without_marker,
)
from llava_mole.data.records import IMAGE_NAME, unread_image

QUESTIONS = ("question", "instruction", "prompt", "query")
ANSWERS = ("answer", "output", "outputs", "response")
INPUTS = ("input", "inputs")
IMAGES = ("images", "image", "image_base64", "image_bytes")
_KNOWN = {*QUESTIONS, *ANSWERS, *INPUTS, *IMAGES, "messages", "conversations", "id", "source", "system"}
_METADATA = {"dataset_info.json", "state.json", "dataset_dict.json"}
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk")
_LONGEST_PATH = 1024
_REMOTE = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")


@dataclass(frozen=True)
class Options(SourceOptions):
    """Options of your own messages."""

    multi_image: MultiImage = field(default="keep", metadata=option(MULTI_IMAGE))
    system: Literal["drop", "prepend"] = field(
        default="drop", metadata=option("drop system prompts, or put them before the first question")
    )


def iterate(raw: Path, options: Options, defects: Defects) -> Iterator[RawSample]:
    """Yield the rows of every JSON, JSONL, parquet and Arrow file below `raw` but the metadata of `datasets`."""
    suffixes = (*JSON_SUFFIXES, ".parquet", ".arrow")
    for path in find_files(raw, suffixes, "file of messages", options.follow_links):
        if path.name in _METADATA or path.name.startswith("cache-"):
            continue
        split = _split(path, raw)
        if not options.wants(split):
            continue
        is_json = path.name.lower().endswith(JSON_SUFFIXES)
        rows = read_values(path, raw, defects) if is_json else read_rows(path, raw)
        stem = "" if path == raw else f"{show(path.with_suffix(''), raw)}-"
        make = functools.partial(to_sample, options=options, defects=defects, stem=stem)
        yield from usable_samples(rows, make, defects, split)


def _split(path: Path, raw: Path) -> Split:
    """Return the split in a file's name (`train-00000-of-00002.parquet`) or in its folder's (`test/data-...`)."""
    split = split_of(path.stem)
    if split == "train" and path != raw and path.parent != raw:
        split = split_of(path.parent.name)
    return split


def to_sample(value: Any, where: str, options: Options, defects: Defects, stem: str = "") -> RawSample:
    """Convert one record of any of the formats. Raises SkipRecord if it cannot be used."""
    value = {key: content for key, content in require_object(value).items() if content is not None}  # tables have nulls
    named = {key for key in value if IMAGE_NAME.fullmatch(str(key))}
    defects.add_ignored_keys(value.keys() - _KNOWN - named, where)
    images: list[str | Embedded | None] = []
    messages = value.get("messages", value.get("conversations"))
    system = value.get("system", "")
    if not isinstance(system, str):
        raise SkipRecord("bad-record", f"'system' is {system!r:.60}; it must be text")
    systems = [system]
    turns = _question(value) if messages is None else _messages(messages, images, systems, where, defects)
    system = "\n".join(text for text in systems if text)
    if system:
        action: Action = "repaired" if options.system == "prepend" else "kept"
        defects.add("system-turn", where, system[:60], action)
        if options.system == "prepend" and turns[0].role == "user":
            turns[0] = Turn("user", f"{system}\n{turns[0].text}")
    outside = _outside_images(value)
    found = _together(images, outside) if images else outside
    if not found and (unread := unread_image(value, messages or (), _KNOWN)) is not None:
        raise SkipRecord("image-key", unread)
    if outside and not any(DEFAULT_IMAGE_TOKEN in turn.text for turn in turns):
        turns = _with_markers(turns, len(outside))
    kept = choose_images(found, options.multi_image, where, defects)
    if len(kept) < len(found):
        turns = keep_first_marker(turns)
    checked = check_turns(turns, len(kept), where, defects)
    identifier = value.get("id")
    line = where.rpartition(":")[2]
    source = value.get("source")
    if not isinstance(source, str) or not source or not is_text(source):
        source = WITH_IMAGES if kept else TEXT_ONLY
    return RawSample(f"{stem}{line}" if identifier is None else str(identifier), source, tuple(kept), checked, where)


def _together(inside: list[str | Embedded | None], outside: list[str | Embedded]) -> list[str | Embedded]:
    """Return the images of the message parts in order; a part without one (TRL's format) takes the next `outside`."""
    unnamed = inside.count(None)
    if unnamed != len(outside):
        raise SkipRecord(
            "marker", f"{unnamed} image parts without an image, and {len(outside)} images beside the messages"
        )
    rest = iter(outside)
    return [next(rest) if image is None else image for image in inside]


def _question(value: Mapping[str, Any]) -> list[Turn]:
    question = next((value[key] for key in QUESTIONS if key in value), None)
    answer = next((value[key] for key in ANSWERS if key in value), None)
    more = next((value[key] for key in INPUTS if key in value), "")
    if not isinstance(question, str) or not isinstance(answer, str) or not isinstance(more, str):
        keys = ", ".join(map(str, value)) or "none"
        raise SkipRecord(
            "bad-record",
            f"neither 'messages', 'conversations' nor a question and an answer that are text; keys: {keys}",
        )
    return [Turn("user", "\n".join(text for text in (question, more) if text)), Turn("assistant", answer)]


def _messages(
    messages: Any, images: list[str | Embedded | None], systems: list[str], where: str, defects: Defects
) -> list[Turn]:
    """Return the turns of user and assistant; append system prompts to `systems` and images to `images`."""
    if not isinstance(messages, list) or not messages:
        raise SkipRecord("bad-record", "no list of messages")
    turns: list[Turn] = []
    for message in messages:
        if not isinstance(message, dict):
            raise SkipRecord("bad-record", "a message is not an object")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        text = _content(content, images)
        if role == "system":
            systems.append(text)
        elif isinstance(role, str) and role in CHAT_ROLES:
            turns.append(Turn(CHAT_ROLES[role], text))
        else:
            raise SkipRecord("unknown-role", f"from {role!r:.60}; known are system, {', '.join(CHAT_ROLES)}")
    if not turns:
        raise SkipRecord("bad-record", "only system messages")
    merged = merge_turns(turns)
    if len(merged) < len(turns):
        defects.add("merged-turns", where, f"{len(turns)} turns became {len(merged)}", "repaired")
    return merged


def _content(content: Any, images: list[str | Embedded | None]) -> str:
    """Return a message's text with a marker for each image part; append the image, or None, to `images`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise SkipRecord("bad-record", f"content is {type(content).__name__}; it must be text or a list of parts")
    pieces = []
    for part in content:
        if isinstance(part, str):
            pieces.append(without_marker(part))
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(without_marker(part["text"]))
        elif kind in ("image_url", "image", "input_image"):
            named = next((part[k] for k in ("image_url", "image", "url", "path") if part.get(k)), None)
            images.append(None if named is None else _image(named))
            pieces.append(DEFAULT_IMAGE_TOKEN)
        else:
            raise SkipRecord("bad-record", f"a part of type {kind!r:.40}; known are text, image and image_url")
    return "\n".join(pieces)


def _outside_images(value: Mapping[str, Any]) -> list[str | Embedded]:
    named = (key for key in value if key not in _KNOWN and IMAGE_NAME.fullmatch(str(key)))
    content = next((value[key] for key in (*IMAGES, *named) if value.get(key)), None)
    items = content if isinstance(content, list) else [] if content is None else [content]
    return [_image(item) for item in items if item is not None]


def _image(value: Any) -> str | Embedded:
    """Return an image as a path or as embedded bytes. Raises SkipRecord for a web address or another type."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("url") or value.get("path")
    if isinstance(value, bytes) and value:
        return Embedded(value)
    if not isinstance(value, str) or not value:
        raise SkipRecord("no-image", f"an image is {type(value).__name__}; it must be a path, base64 or bytes")
    if value.startswith("data:"):
        return Embedded(value)
    if _REMOTE.match(value):
        raise SkipRecord("remote-image", value[:200])
    if len(value) > _LONGEST_PATH or (value.startswith(_BASE64_STARTS) and "." not in value[-8:]):
        return Embedded(value)
    return value


def _with_markers(turns: list[Turn], images: int) -> list[Turn]:
    """Put all markers in front of the first question."""
    marker = f"{DEFAULT_IMAGE_TOKEN}\n" * images
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    return [Turn(t.role, marker + t.text) if i == first else t for i, t in enumerate(turns)]


SOURCES = (
    Source(
        "messages",
        "your own chat messages, or questions and answers: JSON, parquet, `datasets`",
        "RAW is one file, or a folder whose *.json, *.jsonl, *.parquet and *.arrow files are all read\n"
        "(JSON also compressed: .gz, .zst, .bz2, .lz4).\n"
        "Folders written by save_to_disk of `datasets` work too, without that package. The name of the file\n"
        "or folder gives the split.\n"
        "Records have `messages` (role, content: text, or parts of type text, image, image_url),\n"
        "`conversations` (from, value), or a question (question, instruction, prompt, query) and an answer\n"
        "(answer, output, response).\n"
        "Images: `image` or `images` (or `image_path`, `img` and the like), or parts of a message; a path\n"
        "below --image-root (default RAW), bytes, base64 or a data: address. Web addresses are counted and\n"
        "left out. A part of type image without an address takes the next of `images`.\n"
        "A system prompt (a turn, or the key `system`) is left out because the template has its own.",
        iterate,
        Options,
    ),
)

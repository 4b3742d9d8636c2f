"""M3IT: the raw JSON lines of its 40 sets, whose keys differ from set to set, or the single-image parquet copy."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.data.prepare.drafts import (
    Converter,
    Defects,
    Draft,
    Dropped,
    Embedded,
    Options,
    Split,
    check_turns,
    choose_images,
    question_and_answer,
    usable_drafts,
)
from llava_mole.data.prepare.files import find_files, read_rows, read_values, show, split_of

ALIASES: Mapping[str, str] = {
    "image_base64_str": "image",
    "img_str": "image",
    "image_str": "image",
    "image": "image",
    "instruction": "instruction",
    "input": "inputs",
    "inputs": "inputs",
    "output": "outputs",
    "outputs": "outputs",
}
"""Keys of the raw files -> what they mean. Another key stops the conversion: it may hold the text."""
INSTRUCTIONS = "instructions.json"
PARQUET_COLUMNS = ("instruction", "inputs", "outputs", "image")


def iterate(raw: Path, options: Options, defects: Defects) -> Iterator[Draft]:
    """Rows of every `<task>/<set>/*.jsonl` below `raw`, or of every parquet file if there are any."""
    parquet = raw.suffix == ".parquet" if raw.is_file() else next(raw.rglob("*.parquet"), None) is not None
    rows, suffix = (_parquet_rows, ".parquet") if parquet else (_json_rows, ".jsonl")
    for path in find_files(raw, (suffix,), "M3IT file (data/<task>/<set>/train.jsonl, or *.parquet)"):
        split = split_of(path.stem)
        if options.wants(split):
            yield from rows(path, raw, split, options, defects)


def read_instructions(path: Path) -> list[str]:
    """The instructions of a set: a list of texts, or of objects with `instruction`, or an object of lists.

    Raises:
        DataError: the file is something else.
    """
    if not path.is_file():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if isinstance(value, dict):
        value = [text for texts in value.values() for text in (texts if isinstance(texts, list) else [texts])]
    if isinstance(value, list):
        value = [item.get("instruction") if isinstance(item, dict) else item for item in value]
        if value and all(isinstance(text, str) and text for text in value):
            return value
    raise DataError(f"{path}: must hold a list of instructions")


def _fields(value: Any, where: str, options: Options) -> dict[str, Any]:
    """The values of a raw line by their meaning.

    Raises:
        DataError: a key that no alias names.
    """
    if type(value) is not dict:
        return {"not an object": type(value).__name__}
    fields: dict[str, Any] = {}
    for key, content in value.items():
        meaning = ALIASES.get(key)
        if meaning is None:
            if key in options.ignore_keys:
                continue
            raise DataError(
                f"{where}: unknown key {key!r}; known are {', '.join(ALIASES)}. If it holds nothing to train on, give "
                f"--ignore-keys {key}"
            )
        if fields.get(meaning) in (None, "", []):
            fields[meaning] = content
    return fields


def to_draft(fields: Mapping[str, Any], source: str, where: str, options: Options, defects: Defects) -> Draft:
    """One row. Raises Dropped where it cannot be used."""
    if "not an object" in fields:
        raise Dropped("bad-record", f"not an object but {fields['not an object']}")
    texts = {}
    for key in ("instruction", "inputs", "outputs"):
        text = fields.get(key)
        if text is not None and not isinstance(text, str):
            raise Dropped("bad-record", f"{key!r} is {text!r:.60}; it must be text")
        texts[key] = text or ""
    images = embedded_images(fields.get("image"), where, options, defects)
    if not texts["outputs"].strip():
        raise Dropped("empty-answer", "'outputs' is empty")
    if not texts["instruction"] and not texts["inputs"]:
        raise Dropped("no-instruction", f"no instruction, no input, and no {INSTRUCTIONS} beside the file")
    question = "\n".join(text for text in (texts["instruction"], texts["inputs"]) if text)
    turns = check_turns(question_and_answer(question, texts["outputs"], len(images)), len(images), where, defects)
    identifier = f"{source}-{where.rpartition(':')[2]}"
    return Draft(identifier, source, images, turns, where)


def embedded_images(value: Any, where: str, options: Options, defects: Defects) -> tuple[Embedded, ...]:
    """The images of a record: base64 texts, bytes, or `{"bytes"}`, one or a list of them, after `--multi-image`.

    Raises:
        Dropped: no image, several of them with `skip`, or something else.
    """
    items = value if isinstance(value, list) else [value]
    images: list[Embedded] = []
    for item in items:
        content = item.get("bytes") if isinstance(item, dict) else item
        if content is None or content in ("", b""):
            continue
        if not isinstance(content, (str, bytes)):
            raise Dropped("bad-record", f"an image is {type(content).__name__}; it must be base64 text or bytes")
        images.append(Embedded(content))
    if not images:
        raise Dropped("no-image", "no image in the record")
    if len(images) < len(items):
        if options.multi_image == "skip":
            raise Dropped("several-images", f"{len(items)} images")
        raise Dropped("no-image", f"{len(items) - len(images)} of {len(items)} images are empty")
    return tuple(choose_images(images, where, options, defects))


def _json_rows(path: Path, raw: Path, split: Split, options: Options, defects: Defects) -> Iterator[Draft]:
    name = path.parent.name
    instructions = read_instructions(path.parent / INSTRUCTIONS)
    # Drawn in the order of the lines, so that the same seed gives the same instructions.
    draw = random.Random(f"{options.seed}/{name}/{split}")

    def make(value: Any, where: str) -> Draft:
        fields = _fields(value, where, options)
        if not fields.get("instruction") and instructions:
            fields["instruction"] = draw.choice(instructions)
        return to_draft(fields, name, where, options, defects)

    return usable_drafts(read_values(path, raw, defects), make, defects, split)


def _parquet_rows(path: Path, raw: Path, split: Split, options: Options, defects: Defects) -> Iterator[Draft]:
    # A set's folder, or the data set's own `data` folder, which names no set.
    folder = path.parent.name if path != raw else ""
    name = folder if folder not in ("", "data", raw.name) else "m3it"

    def make(value: Any, where: str) -> Draft:
        draft = to_draft(value, name, where, options, defects)
        if path != raw:
            draft.id = f"{show(path, raw)}-{draft.id.rpartition('-')[2]}"
        return draft

    return usable_drafts(read_rows(path, raw, PARQUET_COLUMNS), make, defects, split)


CONVERTER = Converter(
    "m3it",
    "general instructions, 40 sets, 1.59M for training: data/<task>/<set>/train.jsonl, or the parquet copy",
    "Hub data set MMInstruction/M3IT (each set keeps its own licence); the loading script no longer runs, so:\n"
    "RAW/data/<task>/<set>/{train,val,test}.jsonl with instructions.json beside them, from which records without an\n"
    "instruction get one, drawn with --seed. Or the single-image copy HuggingFaceM4/M3IT: RAW/**/*.parquet, of which\n"
    "train-*.parquet is read for training.\n"
    "Images are base64 in the records: each is decoded and written once as OUT/images/<set>/<sha1>.<ext>.\n"
    "Known: nlvr, vist and the video sets have several images a row (--multi-image); some nlvr rows are broken. An\n"
    "unknown key stops the conversion (--ignore-keys NAME lets it pass).",
    iterate,
    embedded=True,
)

"""M3IT: the raw JSON lines of its 40 sets, whose keys differ between sets, or the single-image parquet copy."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.data.prepare.defects import Defects, SkipRecord
from llava_mole.data.prepare.files import find_files, read_rows, read_values, show, split_of
from llava_mole.data.prepare.samples import (
    MULTI_IMAGE,
    Embedded,
    MultiImage,
    RawSample,
    Source,
    SourceOptions,
    Split,
    check_turns,
    choose_images,
    option,
    question_and_answer,
    require_object,
    usable_samples,
)

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
"""Keys of the raw files -> their meaning. An unknown key stops the conversion because it may hold the text."""
INSTRUCTIONS = "instructions.json"
PARQUET_COLUMNS = ("instruction", "inputs", "outputs", "image")


@dataclass(frozen=True)
class Options(SourceOptions):
    """Options of M3IT."""

    multi_image: MultiImage = field(default="skip", metadata=option(MULTI_IMAGE))
    seed: int = field(default=0, metadata=option("seed for drawing the instructions of records without one"))
    ignore_keys: tuple[str, ...] = field(default=(), metadata=option("raw keys that hold nothing to train on"))


def iterate(raw: Path, options: Options, defects: Defects) -> Iterator[RawSample]:
    """Yield the rows of every `<task>/<set>/*.jsonl` below `raw`, or of every parquet file if there are any."""
    parquet = raw.suffix == ".parquet" if raw.is_file() else next(raw.rglob("*.parquet"), None) is not None
    rows, suffix = (_parquet_rows, ".parquet") if parquet else (_json_rows, ".jsonl")
    for path in find_files(
        raw, (suffix,), "M3IT file (data/<task>/<set>/train.jsonl, or *.parquet)", options.follow_links
    ):
        split = split_of(path.stem)
        if options.wants(split):
            yield from rows(path, raw, split, options, defects)


def read_instructions(path: Path) -> list[str]:
    """Read the instructions of a set: a list of texts, or of objects with `instruction`, or an object of lists.

    Returns [] if there is no such file. Raises DataError if it holds something else.
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
    """Return the values of a raw line by the meaning of their keys. Raises DataError for an unknown key."""
    fields: dict[str, Any] = {}
    for key, content in require_object(value).items():
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


def to_sample(fields: Mapping[str, Any], source: str, where: str, options: Options, defects: Defects) -> RawSample:
    """Convert one row of set `source`. Raises SkipRecord if it cannot be used."""
    texts = {}
    for key in ("instruction", "inputs", "outputs"):
        text = fields.get(key)
        if text is not None and not isinstance(text, str):
            raise SkipRecord("bad-record", f"{key!r} is {text!r:.60}; it must be text")
        texts[key] = text or ""
    images = embedded_images(fields.get("image"), where, options, defects)
    if not texts["outputs"].strip():
        raise SkipRecord("empty-answer", "'outputs' is empty")
    if not texts["instruction"] and not texts["inputs"]:
        raise SkipRecord("no-instruction", f"no instruction, no input, and no {INSTRUCTIONS} beside the file")
    question = "\n".join(text for text in (texts["instruction"], texts["inputs"]) if text)
    turns = check_turns(question_and_answer(question, texts["outputs"], len(images)), len(images), where, defects)
    identifier = f"{source}-{where.rpartition(':')[2]}"
    return RawSample(identifier, source, images, turns, where)


def embedded_images(value: Any, where: str, options: Options, defects: Defects) -> tuple[Embedded, ...]:
    """The images of a record that `--multi-image` keeps; `value` is base64 text, bytes, `{"bytes"}`, or a list of them.

    Raises:
        SkipRecord: no image, several images with `skip`, or a value of another type.
    """
    items = value if isinstance(value, list) else [value]
    images: list[Embedded] = []
    for item in items:
        content = item.get("bytes") if isinstance(item, dict) else item
        if content is None or content in ("", b""):
            continue
        if not isinstance(content, (str, bytes)):
            raise SkipRecord("bad-record", f"an image is {type(content).__name__}; it must be base64 text or bytes")
        images.append(Embedded(content))
    if not images:
        raise SkipRecord("no-image", "no image in the record")
    if len(images) < len(items):
        if options.multi_image == "skip":
            raise SkipRecord("several-images", f"{len(items)} images")
        raise SkipRecord("no-image", f"{len(items) - len(images)} of {len(items)} images are empty")
    return tuple(choose_images(images, options.multi_image, where, defects))


def _json_rows(path: Path, raw: Path, split: Split, options: Options, defects: Defects) -> Iterator[RawSample]:
    name = path.parent.name
    instructions = read_instructions(path.parent / INSTRUCTIONS)
    # Drawn in the order of the lines: the same seed gives the same instructions.
    draw = random.Random(f"{options.seed}/{name}/{split}")

    def make(value: Any, where: str) -> RawSample:
        fields = _fields(value, where, options)
        if not fields.get("instruction") and instructions:
            fields["instruction"] = draw.choice(instructions)
        return to_sample(fields, name, where, options, defects)

    return usable_samples(read_values(path, raw, defects), make, defects, split)


def _parquet_rows(path: Path, raw: Path, split: Split, options: Options, defects: Defects) -> Iterator[RawSample]:
    # The folder is that of a set, or the data set's own `data` folder, which does not name a set.
    folder = path.parent.name if path != raw else ""
    name = folder if folder not in ("", "data", raw.name) else "m3it"

    def make(value: Any, where: str) -> RawSample:
        sample = to_sample(value, name, where, options, defects)
        if path != raw:
            sample.id = f"{show(path, raw)}-{sample.id.rpartition('-')[2]}"
        return sample

    return usable_samples(read_rows(path, raw, PARQUET_COLUMNS), make, defects, split)


SOURCES = (
    Source(
        "m3it",
        "general instructions, 40 sets, 1.59M for training: data/<task>/<set>/*.jsonl",
        "Hub data set MMInstruction/M3IT (each set keeps its own licence). Its loading script no longer\n"
        "runs: RAW/data/<task>/<set>/{train,val,test}.jsonl and instructions.json beside them are read.\n"
        "A record without an instruction gets one from there, drawn with --seed.\n"
        "Or the single-image copy HuggingFaceM4/M3IT: RAW/**/*.parquet, of which train-*.parquet is read\n"
        "for training.\n"
        "Images are base64 in the records; each is decoded and written once as\n"
        "OUT/images/<set>/<sha1>.<ext>.\n"
        "Known: nlvr, vist and the video sets have several images a row (--multi-image). Some nlvr rows\n"
        "are broken. An unknown key stops the conversion (--ignore-keys NAME lets it pass).",
        iterate,
        Options,
        embedded=True,
        questions_by_sub_source=True,
    ),
)

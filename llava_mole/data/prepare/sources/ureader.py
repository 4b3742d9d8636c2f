"""UReader (and DocDownstream): document instructions with user and assistant roles, the image in a turn of its own."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.data.prepare.drafts import (
    CHAT_ROLES,
    Converter,
    Defects,
    Draft,
    Dropped,
    Options,
    Split,
    check_turns,
    choose_images,
    keep_first_marker,
    merge_turns,
    read_turns,
    usable_drafts,
)
from llava_mole.data.prepare.files import find_files, read_values

PRESETS = {
    "official": {
        "DocVQA": 3,
        "InfographicsVQA": 3,
        "WikiTableQuestions": 3,
        "DeepForm": 2,
        "KleisterCharity": 2,
    },
    "none": {},
}
"""`--upsample`: `official` is what the UReader paper does."""
_KNOWN = {"image", "prompt", "text", "system_instruction", "conversations", "task_type", "id"}
_DUE = "DUE_Benchmark/"


def iterate(raw: Path, options: Options, defects: Defects) -> Iterator[Draft]:
    """Rows of train.jsonl and val.jsonl, as often as `--upsample` says, then those of every test_<set>.jsonl."""
    seen: set[str] = set()
    for path, split in _files(raw):
        if not options.wants(split):
            continue
        make = functools.partial(to_draft, stem=path.stem, options=options, defects=defects)
        for draft in usable_drafts(read_values(path, raw, defects), make, defects, split):
            copies = 1
            if split in options.train_splits:
                seen.add(draft.source)
                copies = options.upsample.get(draft.source, 1)
            again = [replace(draft, id=f"{draft.id}#{copy}", again=True) for copy in range(2, copies + 1)]
            yield draft
            yield from again
    # A set of the official ones may have been left out; in factors of one's own a name is a mistake in writing.
    official = options.upsample == PRESETS["official"]
    unknown = [] if official else sorted(options.upsample.keys() - seen)
    if unknown and seen:
        raise ConfigError(f"--upsample: no rows of {', '.join(unknown)}; the sub-sources are {', '.join(sorted(seen))}")


def _files(raw: Path) -> list[tuple[Path, Split]]:
    files = find_files(raw, (".jsonl",), "UReader file (train.jsonl, val.jsonl, test_<set>.jsonl)")
    found: list[tuple[Path, Split]] = []
    for path in files:
        if path.stem in ("train", "val"):
            found.append((path, "train" if path.stem == "train" else "val"))
        elif path.stem.startswith("test") or path.parent.name == "test":
            found.append((path, "test"))
    if not found:
        raise DataError(f"{raw}: no train.jsonl, val.jsonl or test_<set>.jsonl below it; unpack ureader_json.zip there")
    order = ("train", "val", "test")
    return sorted(found, key=lambda item: (order.index(item[1]), item[0]))


def source_of(image: str) -> str:
    """Sub-source by the image's path: `ChartQA/...`, or `DUE_Benchmark/<set>/...`; DocDownstream puts `imgs/` first."""
    path = image.removeprefix("./").removeprefix("imgs/").removeprefix(_DUE)
    folder, slash, _ = path.partition("/")
    return folder if slash else "ureader"


def to_draft(value: Any, where: str, stem: str, options: Options, defects: Defects) -> Draft:
    """One record. Raises Dropped where it cannot be used."""
    if type(value) is not dict:
        raise Dropped("bad-record", f"not an object but {type(value).__name__}")
    unused = [key for key in ("prompt", "text", "system_instruction") if _text(value.get(key))]
    extra = sorted(map(str, value.keys() - _KNOWN)) + unused
    if extra:
        defects.ignored_keys.update(extra)
        defects.add("ignored-keys", where, ", ".join(extra), "kept")
    images = value.get("image")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise Dropped("bad-record", f"'image' is {images!r:.60}; it must be a list of paths")
    if not images:
        raise Dropped("no-image", "no image in the record")
    several = len(images)
    images = choose_images(images, where, options, defects)
    turns = merge_turns(read_turns(value.get("conversations"), CHAT_ROLES))
    if len(images) < several:
        turns = keep_first_marker(turns)
    checked = check_turns(turns, len(images), where, defects)
    if any(turn.role == "assistant" and turn.text.strip() == "None" for turn in checked):
        defects.add("none-answer", where, "", "kept")
    source = source_of(images[0])
    line = where.rpartition(":")[2]
    return Draft(f"{stem}-{line}", source, tuple(images), checked, where, category=source)


def _text(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(item not in (None, "") for item in values)


CONVERTER = Converter(
    "ureader",
    "document instructions, 654,840 before up-sampling: train.jsonl, val.jsonl, test_<set>.jsonl",
    "Hub data set Mizukiluke/ureader-instruction-1.0 (no licence stated; each set keeps its own): ureader_json.zip\n"
    "and the image archives. RAW/**/{train,val}.jsonl and test_<set>.jsonl; images stay in place, below --image-root\n"
    "(default: RAW/ureader_images if it is there, else RAW): ChartQA, DUE_Benchmark/<set>, TextCaps, TextVQA, ...\n"
    "train.jsonl and val.jsonl are both trained on, as the released configuration does (--train-splits train: not).\n"
    "--upsample DocVQA=3,... repeats sub-sources; `official` is the UReader paper's: DocVQA, InfographicsVQA and\n"
    "WikiTableQuestions three times, DeepForm and KleisterCharity twice; default none.\n"
    "Known: many answers of DeepForm and KleisterCharity are the word None, on purpose: kept and counted; some\n"
    "TabFact images are missing; images called x.tiff.<page>, from 0, of which only x.tiff is there: its first\n"
    "page is used in place, the others need --images unpack, else they are counted as tiff-page.\n"
    "DocDownstream-1.0 has the same form (its imgs/ is understood).",
    iterate,
    default_train_splits=("train", "val"),
)

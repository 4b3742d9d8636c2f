"""UReader (and DocDownstream): document instructions with user and assistant roles, the image in a turn of its own."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.data.prepare.defects import Defects, SkipRecord
from llava_mole.data.prepare.files import find_files, read_values
from llava_mole.data.prepare.samples import (
    CHAT_ROLES,
    MULTI_IMAGE,
    SPLITS,
    TRAIN_SPLITS,
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
    read_turns,
    require_object,
    usable_samples,
)

PRESETS = {
    "official": {"DocVQA": 3, "InfographicsVQA": 3, "WikiTableQuestions": 3, "DeepForm": 2, "KleisterCharity": 2},
    "none": {},
}
"""Names that `--upsample` takes; `official` has the factors of the UReader paper."""
_KNOWN = {"image", "prompt", "text", "system_instruction", "conversations", "task_type", "id"}
_DUE = "DUE_Benchmark/"


def parse_upsample(text: str) -> dict[str, int]:
    """Parse `DocVQA=3,WikiTableQuestions=3`, or the name of a preset. Raises ValueError for anything else."""
    if text in PRESETS:
        return dict(PRESETS[text])
    factors = {}
    for part in text.split(","):
        name, _, factor = part.partition("=")
        if not name or re.fullmatch("[0-9]{1,4}", factor) is None or int(factor) < 1:
            presets = ", ".join(PRESETS)
            raise ValueError(f"it must be NAME=FACTOR,... with whole factors from 1 to 9999 or one of {presets}")
        factors[name.strip()] = int(factor)
    return factors


@dataclass(frozen=True)
class Options(SourceOptions):
    """Options of UReader."""

    train_splits: tuple[Split, ...] = field(default=("train", "val"), metadata=option(TRAIN_SPLITS))
    multi_image: MultiImage = field(default="skip", metadata=option(MULTI_IMAGE))
    upsample: Mapping[str, int] = field(
        default_factory=dict,
        metadata=option(
            "repeat sub-sources; or `official`, or `none`", metavar="NAME=FACTOR,...", parse=parse_upsample
        ),
    )


def iterate(raw: Path, options: Options, defects: Defects) -> Iterator[RawSample]:
    """Yield the rows of train.jsonl and val.jsonl, repeated as `--upsample` says, then of every test_<set>.jsonl."""
    seen: set[str] = set()
    for path, split in _files(raw, options):
        if not options.wants(split):
            continue
        make = functools.partial(to_sample, stem=path.stem, options=options, defects=defects)
        for sample in usable_samples(read_values(path, raw, defects), make, defects, split):
            copies = 1
            if split in options.train_splits:
                seen.add(sample.source)
                copies = options.upsample.get(sample.source, 1)
            again = [replace(sample, id=f"{sample.id}#{copy}", again=True) for copy in range(2, copies + 1)]
            yield sample
            yield from again
    # The raw data may lack a set of the official factors. An unknown name in your own factors is a typing error.
    official = options.upsample == PRESETS["official"]
    unknown = [] if official else sorted(options.upsample.keys() - seen)
    if unknown and seen:
        raise ConfigError(f"--upsample: no rows of {', '.join(unknown)}; the sub-sources are {', '.join(sorted(seen))}")


def _files(raw: Path, options: Options) -> list[tuple[Path, Split]]:
    files = find_files(
        raw, (".jsonl",), "UReader file (train.jsonl, val.jsonl, test_<set>.jsonl)", options.follow_links
    )
    found: list[tuple[Path, Split]] = []
    for path in files:
        if path.stem in ("train", "val"):
            found.append((path, "train" if path.stem == "train" else "val"))
        elif path.stem.startswith("test") or path.parent.name == "test":
            found.append((path, "test"))
    if not found:
        raise DataError(f"{raw}: no train.jsonl, val.jsonl or test_<set>.jsonl below it; unpack ureader_json.zip there")
    return sorted(found, key=lambda item: (SPLITS.index(item[1]), item[0]))


def source_of(image: str) -> str:
    """Return the sub-source of an image: `ChartQA/...`, `DUE_Benchmark/<set>/...`; DocDownstream prefixes `imgs/`."""
    path = image.removeprefix("./").removeprefix("imgs/").removeprefix(_DUE)
    folder, slash, _ = path.partition("/")
    return folder if slash else "ureader"


def to_sample(value: Any, where: str, stem: str, options: Options, defects: Defects) -> RawSample:
    """Convert one record. Raises SkipRecord if it cannot be used."""
    value = require_object(value)
    unused = [key for key in ("prompt", "text", "system_instruction") if _has_text(value.get(key))]
    defects.add_ignored_keys([*(value.keys() - _KNOWN), *unused], where)
    images = value.get("image")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise SkipRecord("bad-record", f"'image' is {images!r:.60}; it must be a list of paths")
    if not images:
        raise SkipRecord("no-image", "no image in the record")
    several = len(images)
    images = choose_images(images, options.multi_image, where, defects)
    turns = merge_turns(read_turns(value.get("conversations"), CHAT_ROLES))
    if len(images) < several:
        turns = keep_first_marker(turns)
    checked = check_turns(turns, len(images), where, defects)
    if any(turn.role == "assistant" and turn.text.strip() == "None" for turn in checked):
        defects.add("none-answer", where, "", "kept")
    source = source_of(images[0])
    line = where.rpartition(":")[2]
    return RawSample(f"{stem}-{line}", source, tuple(images), checked, where, category=source)


def _has_text(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(item not in (None, "") for item in values)


SOURCES = (
    Source(
        "ureader",
        "document instructions, 654,840: train.jsonl, val.jsonl, test_<set>.jsonl",
        "Hub data set Mizukiluke/ureader-instruction-1.0 (no licence stated; each set keeps its own):\n"
        "ureader_json.zip and the image archives.\n"
        "RAW/**/{train,val}.jsonl and test_<set>.jsonl; images stay in place, below --image-root (default:\n"
        "RAW/ureader_images if it exists, else RAW): ChartQA, DUE_Benchmark/<set>, TextCaps, TextVQA, ...\n"
        "Training uses train.jsonl and val.jsonl, as the released configuration does (--train-splits train\n"
        "leaves val.jsonl out).\n"
        "--upsample DocVQA=3,... repeats sub-sources; `official` is the UReader paper's choice: DocVQA,\n"
        "InfographicsVQA and WikiTableQuestions three times, DeepForm and KleisterCharity twice.\n"
        "Known: many answers of DeepForm and KleisterCharity are the word None, which the source intends;\n"
        "they are kept and counted. Some TabFact images are missing. Some images are called x.tiff.<page>,\n"
        "counted from 0, but only x.tiff exists. The first page is used in place. The others need --images\n"
        "unpack; without it they are left out and counted as tiff-page.\n"
        "DocDownstream-1.0 has the same format (its imgs/ is accepted).",
        iterate,
        Options,
        image_folder="ureader_images",
        questions_by_sub_source=True,
    ),
)

"""PathVQA: the original pickles, the parquet copy on the hub, or LLaVA-Med's JSON."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.conversation import Turn
from llava_mole.data.json_stream import JSON_SUFFIXES
from llava_mole.data.prepare.defects import Defects, SkipRecord
from llava_mole.data.prepare.files import find_files, read_rows, read_values, show, split_of
from llava_mole.data.prepare.samples import (
    CHAT_ROLES,
    SPLITS,
    Embedded,
    RawSample,
    Source,
    SourceOptions,
    Split,
    check_turns,
    option,
    question_and_answer,
    read_turns,
    require_object,
    usable_samples,
)

LARGEST = 1 << 30
"""Most bytes of a pickle; PathVQA's have two million."""

# Errors that the unpickler raises for damage, depending on its place.
_REFUSALS = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, ValueError, TypeError,
             OverflowError, MemoryError, RecursionError)  # fmt: skip


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to another file")


def load_plain(path: Path) -> Any:
    """Load a pickle that holds only lists, dicts, tuples, texts, numbers, True, False and None.

    Raises:
        DataError: it holds anything else (which is not called), or it is damaged.
    """
    if path.stat().st_size > LARGEST:
        raise DataError(f"{path}: {path.stat().st_size} bytes; at most {LARGEST} are read")
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except _REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: refused as a pickle of plain lists and dicts: {reason}; use the file as published"
        ) from None


SOURCE = "pathvqa"
CLOSED_SUFFIX = " Please choose from the following two options: [yes, no]"
MISSPELT = "conversatons"
_LARGEST_ANSWER = 1e100
_TYPES = {"open": "OPEN", "other": "OPEN", "number": "OPEN", "closed": "CLOSED", "yes/no": "CLOSED"}


def answer_type(answer: str) -> str:
    """`CLOSED` for yes and no, else `OPEN`."""
    return "CLOSED" if answer.lower().strip() in ("yes", "no") else "OPEN"


@dataclass(frozen=True)
class Options(SourceOptions):
    """Options of PathVQA."""

    closed_suffix: bool = field(default=False, metadata=option("add LLaVA-Med's suffix to yes/no questions"))


def iterate(raw: Path, options: Options, defects: Defects) -> Iterator[RawSample]:
    """Yield the rows of the format that lies below `raw`, for the splits that the options name."""
    splits = [split for split in SPLITS if options.wants(split)]
    pickles = {split: path for split in splits if (path := _pickle(raw, split)) is not None}
    if pickles:
        for split, path in pickles.items():
            yield from _pickle_rows(path, raw, split, options, defects)
        return
    if raw.is_dir() and not next(raw.rglob("*.parquet"), None) and not next(raw.rglob("*.json*"), None):
        raise DataError(f"{raw}: no PathVQA below it: qas/<split>/<split>_qa.pkl, *.parquet or LLaVA-Med's *.json")
    for path in find_files(raw, (".parquet", *JSON_SUFFIXES), "PathVQA file", options.follow_links):
        split = split_of(path.stem)
        if path.name.startswith("dataset_info") or split not in splits:
            continue
        rows = _parquet_rows if path.suffix == ".parquet" else _json_rows
        yield from rows(path, raw, split, options, defects)


def _pickle(raw: Path, split: Split) -> Path | None:
    """Find the pickle of a split, `<split>_qa.pkl` or LXMERT's `<split>_vqa.pkl`, where the archives put it."""
    for name in (f"{split}_qa.pkl", f"{split}_vqa.pkl"):
        for folder in ("pvqa/qas", "qas", "."):
            for path in (raw / folder / split / name, raw / folder / name):
                if path.is_file():
                    return path
    return None


def _pickle_rows(path: Path, raw: Path, split: Split, options: Options, defects: Defects) -> Iterator[RawSample]:
    values = load_plain(path)
    if not isinstance(values, list):
        raise DataError(f"{path}: holds {type(values).__name__}, not a list of questions; use the file as published")
    images = next((f for f in ("pvqa/images", "images") if (raw / f).is_dir()), "images")
    name = show(path, raw)

    def make(value: Any, where: str) -> RawSample:
        value = require_object(value)
        image = value.get("image", value.get("img_id"))
        if not isinstance(image, str) or not image:
            raise SkipRecord("bad-record", f"'image' is {type(image).__name__}; it must be a name")
        question, answer = value.get("question", value.get("sent")), value.get("answer", value.get("label"))
        if isinstance(answer, dict):  # candidates with their weights
            if not all(isinstance(weight, (int, float)) for weight in answer.values()):
                raise SkipRecord("bad-record", "'label' has values that are not numbers")
            answer = max(answer.items(), key=lambda item: item[1], default=("", 0))[0]
        return _sample(question, answer, f"{images}/{split}/{image}.jpg", where, split, options, defects)

    numbered = ((value, f"{name}:{number}") for number, value in enumerate(values, 1))
    return usable_samples(numbered, make, defects, split)


def _parquet_rows(path: Path, raw: Path, split: Split, options: Options, defects: Defects) -> Iterator[RawSample]:
    def make(value: Any, where: str) -> RawSample:
        image = value["image"]
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, (bytes, str)) or not data:
            raise SkipRecord("no-image", "no bytes in column 'image'")
        return _sample(value["question"], value["answer"], Embedded(data), where, split, options, defects)

    return usable_samples(read_rows(path, raw, ("image", "question", "answer")), make, defects, split)


def _sample(
    question: Any, answer: Any, image: str | Embedded, where: str, split: Split, options: Options, defects: Defects
) -> RawSample:
    number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    if number and abs(answer) < _LARGEST_ANSWER:  # neither NaN nor an integer that Python refuses to print
        answer = str(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        # Types instead of values, which a hostile pickle may nest too deeply to be shown.
        types = f"question is {type(question).__name__}, answer is {type(answer).__name__}"
        raise SkipRecord("bad-record", f"{types}; both must be text")
    kind = answer_type(answer)
    if options.closed_suffix and kind == "CLOSED":
        question += CLOSED_SUFFIX
    turns = check_turns(question_and_answer(question, answer, 1), 1, where, defects)
    identifier = f"{SOURCE}-{split}-{where.rpartition(':')[2]}"
    return RawSample(identifier, SOURCE, (image,), turns, where, split, kind, kind)


def _with_suffix(turns: tuple[Turn, ...], first: str) -> tuple[Turn, ...]:
    """Add the suffix to every closed question that lacks it; `first` is the answer type of the first question."""
    result = list(turns)
    for i in range(0, len(turns) - 1, 2):
        closed = (answer_type(turns[i + 1].text) if i else first) == "CLOSED"
        if closed and not turns[i].text.endswith(CLOSED_SUFFIX.strip()):
            result[i] = Turn(turns[i].role, turns[i].text + CLOSED_SUFFIX)
    return tuple(result)


def _json_rows(path: Path, raw: Path, split: Split, options: Options, defects: Defects) -> Iterator[RawSample]:
    """Yield LLaVA-Med's records; its test file misspells `conversations`."""

    def make(value: Any, where: str) -> RawSample:
        value = require_object(value)
        conversations = value.get("conversations")
        if conversations is None and MISSPELT in value:
            conversations = value[MISSPELT]
            defects.add("misspelt-key", where, MISSPELT, "repaired")
        image = value.get("image")
        if not isinstance(image, str) or not image:
            raise SkipRecord("no-image", "no 'image' in the record")
        turns = check_turns(read_turns(conversations, CHAT_ROLES), 1, where, defects)
        given = value.get("answer_type")
        kind = _TYPES.get(given.lower()) if isinstance(given, str) else None
        kind = kind or answer_type(turns[1].text)
        if options.closed_suffix:
            turns = _with_suffix(turns, kind)
        identifier = str(value.get("id", value.get("question_id", f"{SOURCE}-{where.rpartition(':')[2]}")))
        return RawSample(identifier, SOURCE, (image,), turns, where, answer_type=kind, category=kind)

    return usable_samples(read_values(path, raw, defects), make, defects, split)


SOURCES = (
    Source(
        "pathvqa",
        "biomedicine, 19,755 train and 6,761 test: pickles, parquet, LLaVA-Med's JSON",
        "One of:\n"
        "RAW/pvqa/qas/<split>/<split>_qa.pkl and RAW/pvqa/images/<split>/*.jpg (UCSD-AI4H/PathVQA), with\n"
        "the paper's counts. Nothing in the pickles is executed.\n"
        "RAW/**/{train,validation,test}*.parquet (flaviagiammarino/path-vqa): 19,654 / 6,259 / 6,719,\n"
        "de-duplicated. Its test scores therefore have other denominators than the paper's 3,370 open and\n"
        "3,391 closed questions.\n"
        "RAW/**/*.json in LLaVA-Med's format (its misspelt key is accepted); the file name gives the split,\n"
        "and images are below --image-root.\n"
        "A question is CLOSED if its answer is yes or no. --closed-suffix adds LLaVA-Med's\n"
        "`Please choose ...` to those.\n"
        "MIT licence; the images belong to textbook publishers: do not pass them on. Some images are CMYK\n"
        "or grey.",
        iterate,
        Options,
    ),
)

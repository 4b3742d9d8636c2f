"""What a converter is given and what it yields: drafts of rows, whose images are looked at later."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava_mole.common.errors import ConfigError
from llava_mole.conversation import Turn

if TYPE_CHECKING:
    from llava_mole.data.converters.defects import Defects

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
TEXT_ONLY, WITH_IMAGES = "text", "images"
"""Sub-sources of records that name none: those without an image, and the others."""
MultiImage = Literal["skip", "first", "keep"]


@dataclass(frozen=True, slots=True)
class Embedded:
    """An image that comes inside a record; it is unpacked to `<source of the row>/<sha1>.<ext>`."""

    data: bytes | str
    """The file's bytes, or their base64, with or without a `data:` prefix."""


@dataclass(slots=True)
class Draft:
    """A row as a converter yields it."""

    id: str
    source: str
    """Sub-source, such as `coco` or `vqa-v2`."""
    images: tuple[str | Embedded, ...]
    """Paths relative to the image root, or bytes."""
    turns: tuple[Turn, ...]
    where: str
    """Raw `file:line` (or `file:row`)."""
    split: Split = "train"
    answer_type: str | None = None
    category: str | None = None
    """What a test question's accuracy is grouped by; None takes `source`."""
    again: bool = False
    """Whether it repeats an earlier row, to be trained on more often; it is never a question."""


@dataclass(frozen=True)
class Options:
    """What the command line gives a converter; every source documents those it reads."""

    train_splits: tuple[Split, ...] = ("train",)
    """Raw splits that go into the prepared training set."""
    test_splits: tuple[Split, ...] = ("test",)
    """Raw splits that become question files."""
    seed: int = 0
    """Draws the instructions of records without one."""
    multi_image: MultiImage = "skip"
    upsample: Mapping[str, int] = field(default_factory=dict)
    """How often the rows of a sub-source are repeated."""
    closed_suffix: bool = False
    system: Literal["drop", "prepend"] = "drop"
    ignore_keys: tuple[str, ...] = ()

    def wants(self, split: Split) -> bool:
        """Whether rows of a raw split are used at all."""
        return split in self.train_splits or split in self.test_splits


Iterate = Callable[[Path, Options, "Defects"], Iterator[Draft]]


@dataclass(frozen=True)
class Converter:
    """One source of `llava-mole prepare`."""

    name: str
    summary: str
    """One line for the list of sources."""
    expects: str
    """What lies under `--raw`, with the license and the known traps; the text of `prepare SOURCE --help`."""
    iterate: Iterate
    embedded: bool = False
    """Whether images come inside the records, so that they must be unpacked and are decoded by default."""
    default_train_splits: tuple[Split, ...] = ("train",)
    searches: bool = True
    """Whether it reads every file of a kind below `--raw`, so that the output must lie elsewhere."""


class Dropped(Exception):
    """The record at hand is left out; `usable_drafts` counts it and goes on."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


def usable_drafts(
    values: Iterable[tuple[Any, str]], make: Callable[[Any, str], Draft], defects: "Defects", split: Split = "train"
) -> Iterator[Draft]:
    """What `make` gives for each `(value, where)`, marked as of `split`; what it drops is counted."""
    for value, where in values:
        try:
            draft = make(value, where)
        except Dropped as dropped:
            defects.add(dropped.kind, where, dropped.detail)
            continue
        draft.split = split
        yield draft


def parse_upsample(text: str, known: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """`DocVQA=3,WikiTableQuestions=3`, or the name of one of the presets `known`.

    Raises:
        ConfigError: something else, or a factor that is not 1 to 9999.
    """
    if text in known:
        return dict(known[text])
    factors = {}
    for part in text.split(","):
        name, _, factor = part.partition("=")
        if not name or re.fullmatch("[0-9]{1,4}", factor) is None or int(factor) < 1:
            presets = f" or one of {', '.join(known)}" if known else ""
            raise ConfigError(
                f"--upsample {text!r}: it must be NAME=FACTOR,... with whole factors from 1 to 9999{presets}"
            )
        factors[name.strip()] = int(factor)
    return factors

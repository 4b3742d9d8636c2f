"""What a converter is given and what it yields: drafts of rows, whose images are looked at later."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_mole.common.errors import ConfigError
from llava_mole.common.text import is_text
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Turn, place_image_first

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


Action = Literal["dropped", "repaired", "kept"]

KINDS: dict[str, str] = {
    "missing-image": "the image file is not there",
    "outside-image": "absolute path, '..', or a link that leads out of the image folder",
    "remote-image": "the image is a web address; nothing is downloaded",
    "corrupt-image": "the image cannot be decoded",
    "too-large-image": "more pixels than Pillow decodes (a decompression bomb)",
    "animated-image": "several frames; training sees the first",
    "cmyk-image": "CMYK pixels; training sees them converted to RGB",
    "wrong-extension": "the content is of another format than the file's name says",
    "base64": "the base64 text is not valid",
    "base64-spaces": "white space inside the base64 text",
    "no-image": "a record without an image where each must have one",
    "several-images": "more than one image",
    "several-images-question": "a test row with more than one image; the evaluation reads one",
    "tiff-page": "a page of a TIFF file that is not its first; --images unpack takes it out",
    "id-again": "an id that an earlier record has; `where` tells them apart",
    "empty-answer": "no answer with text",
    "none-answer": "the answer is the word None, which the source uses for an absent field",
    "unknown-role": "a turn of a role that has no meaning here",
    "merged-turns": "neighbouring turns of one role, joined",
    "turn-order": "turns do not alternate, or none is the user's",
    "first-answer": "an answer that no question precedes",
    "marker": "the number of <image> markers and of images differ, or a marker stands in an answer",
    "marker-again": "several markers in one turn for one image",
    "misspelt-key": "a key that the source misspells",
    "many-sources": "more sub-sources than are told apart; counted as `images` or `text`",
    "ignored-keys": "keys that training does not read",
    "system-turn": "a system prompt of its own; the template brings one",
    "no-instruction": "no instruction, and none to draw one from",
    "bad-record": "a value of the wrong type",
    "bad-json": "a line that is no JSON",
    "bad-text": "characters that are no text",
}
"""Kind -> what it means."""


class Defects:
    """Counts defects and lists them in a file.

    Args:
        path: The list file; each line is `{"where", "kind", "action", "detail"}`. None lists nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.counts: Counter[tuple[str, Action]] = Counter()
        self.ignored_keys: Counter[str] = Counter()
        """How many records hold each key that training does not read."""
        self._file = None if path is None else path.open("w", encoding="utf-8", newline="\n")

    def add(self, kind: str, where: str, detail: str = "", action: Action = "dropped") -> None:
        """Count one defect; `kind` is one of `KINDS`."""
        if kind not in KINDS:
            raise KeyError(kind)
        self.counts[kind, action] += 1
        if self._file is not None:
            line = {"where": where, "kind": kind, "action": action, "detail": detail[:300]}
            self._file.write(json.dumps(line, ensure_ascii=True) + "\n")

    def close(self) -> None:
        """Close the list file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def rows(self) -> list[dict[str, Any]]:
        """`{kind, action, count, meaning}`, most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [
            {"kind": kind, "action": action, "count": count, "meaning": KINDS[kind]}
            for (kind, action), count in ordered
        ]


Role = Literal["user", "assistant"]

LLAVA_ROLES: Mapping[str, Role] = {"human": "user", "gpt": "assistant"}
_IN_FRONT = f"{DEFAULT_IMAGE_TOKEN}\n"
CHAT_ROLES: Mapping[str, Role] = {"user": "user", "assistant": "assistant", **LLAVA_ROLES}


def read_turns(conversations: Any, roles: Mapping[str, Role]) -> list[Turn]:
    """`[{"from", "value"}, ...]` as turns. Raises Dropped for another shape or role."""
    if not isinstance(conversations, list) or not conversations:
        raise Dropped("bad-record", "no list of turns")
    turns = []
    for turn in conversations:
        try:
            role, text = turn["from"], turn["value"]
        except (TypeError, KeyError, IndexError):
            raise Dropped("bad-record", "a turn is not an object with 'from' and 'value'") from None
        if type(text) is not str or type(role) is not str:
            raise Dropped("bad-record", f"a turn's 'from' or 'value' is no text: {role!r:.40}, {text!r:.40}")
        if role not in roles:
            raise Dropped("unknown-role", f"from {role!r:.60}; known are {', '.join(roles)}")
        turns.append(Turn(roles[role], text))
    return turns


def merge_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbours of the same role become one turn, joined by a newline; empty ones vanish into their neighbour."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            texts = (merged[-1].text, turn.text)
            merged[-1] = Turn(turn.role, "\n".join(text for text in texts if text))
        else:
            merged.append(turn)
    return merged


def check_turns(turns: Sequence[Turn], images: int, where: str, defects: Defects) -> tuple[Turn, ...]:
    """The turns as the record reader wants them: user first, alternating, one marker for each image.

    Args:
        turns: Of one conversation.
        images: Images of the record.
        where: `file:line`, for what is repaired and counted.
        defects: Takes the repairs.

    Raises:
        Dropped: the conversation cannot be used.
    """
    if turns and turns[0].role == "assistant":
        defects.add("first-answer", where, turns[0].text[:60], "repaired")
        turns = turns[1:]
    expected: Role = "user"
    answered = False
    unanswered = 0
    markers = 0
    for turn in turns:
        if turn.role != expected:
            raise Dropped("turn-order", f"two turns of the {turn.role} in a row")
        if not turn.text.isascii() and not is_text(turn.text):
            raise Dropped("bad-text", "half of a surrogate pair, which is no character")
        if expected == "user":
            markers += turn.text.count(DEFAULT_IMAGE_TOKEN)
            expected = "assistant"
        else:
            if turn.text and not turn.text.isspace():
                answered = True
            else:
                unanswered += 1
            if DEFAULT_IMAGE_TOKEN in turn.text:
                raise Dropped("marker", f"{DEFAULT_IMAGE_TOKEN} stands in an answer")
            expected = "user"
    if not answered:
        raise Dropped("empty-answer", "no answer with text" if turns else "no turn of the user")
    if unanswered:
        defects.add("empty-answer", where, f"{unanswered} of {len(turns) // 2} answers", "kept")
    if markers > images == 1 and sum(DEFAULT_IMAGE_TOKEN in turn.text for turn in turns) == 1:
        defects.add("marker-again", where, f"{markers} markers in one turn for one image", "repaired")
        return place_image_first(turns)
    if markers != images:
        raise Dropped("marker", f"{markers} markers of {DEFAULT_IMAGE_TOKEN} for {images} images")
    return tuple(turns) if images != 1 or _is_in_front(turns[0].text) else place_image_first(turns)


def _is_in_front(text: str) -> bool:
    """Whether `place_image_first` would leave a first question with the only marker as it is, which most are."""
    return (
        len(text) > len(_IN_FRONT)
        and text.startswith(_IN_FRONT)
        and not text[len(_IN_FRONT)].isspace()
        and not text[-1].isspace()
    )


def question_and_answer(question: str, answer: str, images: int) -> list[Turn]:
    """One round about `images` images, the markers in front."""
    marker = f"{DEFAULT_IMAGE_TOKEN}\n" * images
    return [Turn("user", marker + without_marker(question)), Turn("assistant", answer)]


def without_marker(text: str) -> str:
    """The text without the literal marker, which the text of a question must not bring."""
    return text.replace(DEFAULT_IMAGE_TOKEN, "") if DEFAULT_IMAGE_TOKEN in text else text


def choose_images(images: list[Any], where: str, options: Options, defects: Defects) -> list[Any]:
    """What `--multi-image` leaves of a record's images. Raises Dropped with `skip`."""
    if len(images) > 1:
        if options.multi_image == "skip":
            raise Dropped("several-images", f"{len(images)} images")
        action: Action = "repaired" if options.multi_image == "first" else "kept"
        defects.add("several-images", where, f"{len(images)} images", action)
    return images[:1] if options.multi_image == "first" else images


def keep_first_marker(turns: Sequence[Turn]) -> list[Turn]:
    """Only the first image marker of the conversation stays."""
    seen = False
    result = []
    for turn in turns:
        head, marker, tail = turn.text.partition(DEFAULT_IMAGE_TOKEN)
        text = turn.text if not marker else head + ("" if seen else marker) + without_marker(tail)
        seen = seen or bool(marker)
        result.append(Turn(turn.role, text))
    return result

"""The interface of a source of `llava-mole prepare`: its options, its raw samples and the rules for their turns."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_mole.common.text import UNPAIRED_SURROGATE, count_of, is_text
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Turn, place_image_first
from llava_mole.data.prepare.defects import Action, Defects, SkipRecord

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
TEXT_ONLY, WITH_IMAGES = "text", "images"
"""Sub-sources of records that name none: those without an image, and the others."""

Role = Literal["user", "assistant"]
LLAVA_ROLES: Mapping[str, Role] = {"human": "user", "gpt": "assistant"}
CHAT_ROLES: Mapping[str, Role] = {"user": "user", "assistant": "assistant", **LLAVA_ROLES}
_ORDER: tuple[Role, Role] = ("user", "assistant")
_IN_FRONT = f"{DEFAULT_IMAGE_TOKEN}\n"


@dataclass(frozen=True, slots=True)
class Embedded:
    """An image inside a record; it is unpacked to `<sub-source>/<sha1>.<ext>`."""

    data: bytes | str
    """The file's bytes, or their base64, with or without a `data:` prefix."""


@dataclass(slots=True)
class RawSample:
    """One sample of a source, with checked turns and unchecked images."""

    id: str
    source: str
    """Sub-source, such as `coco` or `vqa-v2`."""
    images: tuple[str | Embedded, ...]
    """Paths relative to the image root, or embedded images."""
    turns: tuple[Turn, ...]
    where: str
    """Raw `file:line` (or `file:row`)."""
    split: Split = "train"
    answer_type: str | None = None
    category: str | None = None
    """The group of a test question, over which accuracy is averaged; None takes `source`."""
    again: bool = False
    """Whether this repeats an earlier sample so that training sees it more often; a repetition is never a question."""


def usable_samples(
    values: Iterable[tuple[Any, str]], make: Callable[[Any, str], RawSample], defects: Defects, split: Split = "train"
) -> Iterator[RawSample]:
    """Yield `make(value, where)` for each `(value, where)`, marked as of `split`; skipped records are counted."""
    for value, where in values:
        try:
            sample = make(value, where)
        except SkipRecord as skipped:
            defects.add(skipped.kind, where, skipped.detail)
            continue
        sample.split = split
        yield sample


def require_object(value: Any) -> dict[Any, Any]:
    """Return a record that is a JSON object. Raises SkipRecord for anything else."""
    if type(value) is not dict:
        raise SkipRecord("bad-record", f"not an object but {type(value).__name__}")
    return value


def read_turns(conversations: Any, roles: Mapping[str, Role]) -> list[Turn]:
    """Parse `[{"from", "value"}, ...]` into turns. Raises SkipRecord for another shape or role."""
    if not isinstance(conversations, list) or not conversations:
        raise SkipRecord("bad-record", "no list of turns")
    turns = []
    for turn in conversations:
        try:
            role, text = turn["from"], turn["value"]
        except (TypeError, KeyError, IndexError):
            raise SkipRecord("bad-record", "a turn is not an object with 'from' and 'value'") from None
        if type(text) is not str or type(role) is not str:
            raise SkipRecord("bad-record", f"a turn's 'from' or 'value' is not text: {role!r:.40}, {text!r:.40}")
        if role not in roles:
            raise SkipRecord("unknown-role", f"from {role!r:.60}; known are {', '.join(roles)}")
        turns.append(Turn(roles[role], text))
    return turns


def merge_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Join consecutive turns of one role with a newline; turns without text add nothing."""
    groups = itertools.groupby(turns, key=lambda turn: turn.role)
    return [Turn(role, "\n".join(turn.text for turn in group if turn.text)) for role, group in groups]


def check_turns(turns: Sequence[Turn], images: int, where: str, defects: Defects) -> tuple[Turn, ...]:
    """Return the turns in the form that training reads: user first, alternating, one marker for each image.

    Args:
        turns: One conversation.
        images: Number of images of the record.
        where: `file:line`, for repairs.
        defects: Counts the repairs.

    Raises:
        SkipRecord: the conversation cannot be used.
    """
    if turns and turns[0].role == "assistant":
        defects.add("first-answer", where, turns[0].text[:60], "repaired")
        turns = turns[1:]
    for index, turn in enumerate(turns):
        if turn.role != _ORDER[index % 2]:
            raise SkipRecord("turn-order", f"two consecutive turns from the {turn.role}")
        if not is_text(turn.text):
            raise SkipRecord("bad-text", UNPAIRED_SURROGATE)
        if index % 2 and DEFAULT_IMAGE_TOKEN in turn.text:
            raise SkipRecord("marker", f"an answer holds {DEFAULT_IMAGE_TOKEN}")
    questions, answers = turns[::2], turns[1::2]
    unanswered = sum(not answer.text or answer.text.isspace() for answer in answers)
    if unanswered == len(answers):
        raise SkipRecord("empty-answer", "no answer with text" if turns else "no turn from the user")
    if unanswered:
        defects.add("empty-answer", where, f"{unanswered} of {len(answers)} answers", "kept")
    counts = [question.text.count(DEFAULT_IMAGE_TOKEN) for question in questions]
    markers = sum(counts)
    if markers > images == 1 and markers in counts:
        defects.add("marker-again", where, f"{markers} markers in one turn for one image", "repaired")
    elif markers != images:
        raise SkipRecord(
            "marker", f"{count_of(markers, f'{DEFAULT_IMAGE_TOKEN} marker')} for {count_of(images, 'image')}"
        )
    return tuple(turns) if images != 1 or _is_in_front(turns[0].text) else place_image_first(turns)


def _is_in_front(text: str) -> bool:
    """Whether a question already has its only marker where `place_image_first` puts it, which most have."""
    rest = text[len(_IN_FRONT) :]
    return text.startswith(_IN_FRONT) and rest == rest.strip() != "" and DEFAULT_IMAGE_TOKEN not in rest


def question_and_answer(question: str, answer: str, images: int) -> list[Turn]:
    """Return a question with `images` markers in front, and its answer."""
    return [Turn("user", _IN_FRONT * images + without_marker(question)), Turn("assistant", answer)]


def without_marker(text: str) -> str:
    """Remove the image markers from raw text, where they stand for no image."""
    return text.replace(DEFAULT_IMAGE_TOKEN, "") if DEFAULT_IMAGE_TOKEN in text else text


def choose_images(
    images: list[Any], multi_image: Literal["skip", "first", "keep"], where: str, defects: Defects
) -> list[Any]:
    """Return the images of a record that `--multi-image` keeps. Raises SkipRecord for several images with `skip`."""
    if len(images) > 1:
        if multi_image == "skip":
            raise SkipRecord("several-images", f"{len(images)} images")
        action: Action = "repaired" if multi_image == "first" else "kept"
        defects.add("several-images", where, f"{len(images)} images", action)
    return images[:1] if multi_image == "first" else images


def keep_first_marker(turns: Sequence[Turn]) -> list[Turn]:
    """Remove every image marker of the conversation but the first."""
    seen = False
    result = []
    for turn in turns:
        head, marker, tail = turn.text.partition(DEFAULT_IMAGE_TOKEN)
        result.append(Turn(turn.role, head + ("" if seen else marker) + without_marker(tail)))
        seen = seen or bool(marker)
    return result


def option(text: str, *, metavar: str | None = None, parse: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """Metadata of a dataclass field that is also an option of the command line, `--like-this` for `like_this`.

    The field's type decides how the option is read: bool (a flag), int, Literal (one of its values), tuple of str or
    of a Literal (comma-separated).

    Args:
        text: Help for the option; the default is added to it.
        metavar: Name of the value in the help.
        parse: Parses a value of any other type. Raises ValueError that says what is allowed.
    """
    return {"help": text, "metavar": metavar, "parse": parse}


TRAIN_SPLITS = "raw splits to train on"


@dataclass(frozen=True)
class SourceOptions:
    """Options of every source; a source with more of them derives its own class."""

    train_splits: tuple[Split, ...] = field(default=("train",), metadata=option(TRAIN_SPLITS))
    test_splits: tuple[Split, ...] = field(default=("test",), metadata=option("raw splits that become question files"))
    follow_links: bool = field(
        default=False, metadata=option("search linked folders of --raw, and read images that links lead to")
    )

    def wants(self, split: Split) -> bool:
        """Whether samples of a raw split are used at all."""
        return split in self.train_splits or split in self.test_splits


MultiImage = Literal["skip", "first", "keep"]
MULTI_IMAGE = "records with several images: leave out and count, use the first image, or keep all"


@dataclass(frozen=True)
class Source:
    """One source of `llava-mole prepare`."""

    name: str
    summary: str
    """One line for the list of sources; at most 77 columns."""
    expects: str
    """What lies below `--raw`, with the licence and known defects; the text of `prepare SOURCE --help`."""
    iterate: Callable[[Path, Any, Defects], Iterator[RawSample]]
    """Yields the usable samples below `--raw` and counts the others; the second argument is an `options` instance."""
    options: type[SourceOptions] = SourceOptions
    embedded: bool = False
    """Whether images are inside the records. They must then be unpacked, and are decoded by default."""
    searches: bool = True
    """Whether it reads every file of a kind below `--raw`. The output must then lie elsewhere."""
    image_folder: str = ""
    """Folder below `--raw` that image paths are relative to; if it does not exist, they are relative to `--raw`."""
    questions_by_sub_source: bool = False
    """Whether each sub-source gets a question file of its own."""

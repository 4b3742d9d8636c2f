"""Turns of raw conversations, brought into the one form that training takes, or dropped with the reason."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Turn, place_image_first
from llava_mole.data.converters.base import Dropped, Options
from llava_mole.data.converters.defects import Action, Defects
from llava_mole.data.records import is_text

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

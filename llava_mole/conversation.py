"""Conversations: from turns to the prompt text and the character spans that training supervises.

`render` is the only place that builds a prompt: training, evaluation and chat call it, with a template from
`templates.py`. The spans replace LLaVA's counting of tokens: whatever the tokenizer does, a token is supervised when it
begins inside an answer's span.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.errors import DataError
from llava_mole.templates import TEMPLATES, Template, get_template

__all__ = [
    "TEMPLATES",
    "Rendered",
    "Template",
    "Turn",
    "drop_leading_answer",
    "get_template",
    "place_image_first",
    "render",
]


@dataclass(frozen=True)
class Turn:
    """What one side says; `text` may hold the image marker `<image>`."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Rendered:
    """A prompt with the literal `<image>` markers and its supervised character ranges, ascending, end excluded."""

    text: str
    answer_spans: tuple[tuple[int, int], ...]


def place_image_first(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """LLaVA's multimodal step: in each turn with image markers, one marker and a newline go in front of the text."""
    return tuple(
        replace(turn, text=f"{DEFAULT_IMAGE_TOKEN}\n{_without_image(turn.text)}".strip())
        if DEFAULT_IMAGE_TOKEN in turn.text
        else turn
        for turn in turns
    )


def drop_leading_answer(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns from the first user turn on if only one answer precedes it, as LLaVA does."""
    return tuple(turns[1:] if turns and turns[0].role == "assistant" else turns)


def render(template: Template, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendered:
    """Build the prompt of a conversation.

    An answer without text renders as the bare marker, without `answer_end`, and is not supervised; that is what LLaVA
    trains on. A leading answer is dropped. The image markers stay where they are: see `place_image_first`.

    Args:
        template: One of `TEMPLATES`.
        turns: User and assistant in turn. The last one may be the user's.
        add_generation_prompt: End with the marker of an answer to come; the last turn must then be the user's.

    Returns:
        The text and the answers' character ranges, from behind the marker to the end of `answer_end`.

    Raises:
        DataError: no turns, turns that do not alternate, or a shape that the template cannot hold.
    """
    turns = drop_leading_answer(turns)
    if template.strip:
        turns = [replace(turn, text=turn.text.strip()) for turn in turns]
    _check_turns(template, turns, add_generation_prompt)
    if template.caption:
        return _render_caption(template, turns, add_generation_prompt)
    pieces = [template.system]
    length = len(template.system)
    spans: list[tuple[int, int]] = []
    for index, turn in enumerate(turns):
        if turn.role == "user":
            piece = _user_piece(template, turn.text, first=index == 0)
        elif turn.text:
            answer = template.answer_start + turn.text + template.answer_end
            start = length + len(template.answer_marker)
            spans.append((start, start + len(answer)))
            piece = template.answer_marker + answer
        else:
            piece = template.answer_marker
        pieces.append(piece)
        length += len(piece)
    if add_generation_prompt:
        pieces.append(template.answer_marker)
    return Rendered("".join(pieces), tuple(spans))


def _without_image(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def _user_piece(template: Template, text: str, *, first: bool) -> str:
    if first and text:
        return template.user_start + template.first_text_prefix + text + template.user_end
    piece = template.user_start + text + template.user_end if text else template.user_empty
    return piece if first or not piece else template.between_rounds + piece


def _check_turns(template: Template, turns: Sequence[Turn], add_generation_prompt: bool) -> None:
    if not turns:
        raise DataError("the conversation has no user turn; it must start with one")
    for index, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[index % 2]:
            raise DataError(
                f"turn {index + 1} of the conversation is again from the {turn.role}; user and assistant must alternate"
            )
    if add_generation_prompt and turns[-1].role != "user":
        raise DataError("the conversation ends with an answer; a prompt for generation must end with the user's turn")
    if template.first_text_prefix and not turns[0].text:
        raise DataError(f"the first user turn is empty; template {template.name!r} needs text there")


def _render_caption(template: Template, turns: Sequence[Turn], add_generation_prompt: bool) -> Rendered:
    """Training: marker and caption. Generation: the marker, then what the user says, if anything, as in LLaVA."""
    if add_generation_prompt:
        if len(turns) != 1:
            raise DataError(f"template {template.name!r} holds one turn, the prompt has {len(turns)}")
        words = _without_image(turns[0].text)
        marker = DEFAULT_IMAGE_TOKEN if DEFAULT_IMAGE_TOKEN in turns[0].text else ""
        said = f"{words}{template.user_end}" if words else ""
        return Rendered(f"{marker}\n{said}" if marker and said else marker + said, ())
    if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in turns[0].text:
        raise DataError(
            f"template {template.name!r} needs an image marker in the first turn and exactly one answer, got "
            f"{len(turns)} turns {'with' if DEFAULT_IMAGE_TOKEN in turns[0].text else 'without'} one"
        )
    text = DEFAULT_IMAGE_TOKEN + turns[1].text + template.answer_end
    return Rendered(text, ((len(DEFAULT_IMAGE_TOKEN), len(text)),))

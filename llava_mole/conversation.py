"""Conversations: turns, templates, and `render`, which turns them into prompt text and supervised character spans.

`render` is the only place that builds a prompt: training, evaluation and chat all call it. The spans replace LLaVA's
counting of tokens: whatever the tokenizer does, a token is supervised if it begins inside the span of an answer.

A template for another family of language models is one more entry in `TEMPLATES`.
"""

import functools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN

Role = Literal["user", "assistant"]
ROLES: tuple[Role, Role] = ("user", "assistant")
"""The roles in the order in which they take turns."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `text` may contain the image marker `<image>`."""

    role: Role
    text: str


def consecutive_turns(turns: Sequence[Turn]) -> tuple[int, int] | None:
    """Numbers, from 1, of the first two consecutive turns with the same role; None if the roles alternate."""
    for number in range(1, len(turns)):
        if turns[number].role == turns[number - 1].role:
            return number, number + 1
    return None


def drop_leading_answer(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns without an answer that no question precedes, as in LLaVA."""
    return tuple(turns[1:] if turns and turns[0].role == "assistant" else turns)


def place_image_first(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Put one image marker and a newline in front of each turn that contains markers (LLaVA's multimodal step)."""
    return tuple(
        replace(turn, text=f"{DEFAULT_IMAGE_TOKEN}\n{_without_image(turn.text)}".strip())
        if DEFAULT_IMAGE_TOKEN in turn.text
        else turn
        for turn in turns
    )


def _without_image(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


@dataclass(frozen=True)
class Template:
    """The fixed strings around the turns of a conversation.

    A prompt is `system`, then `user_start text user_end` for a question and `answer_marker answer_start text
    answer_end` for an answer. Everything after `answer_marker` is supervised.
    """

    name: str
    answer_end: str
    """Ends an answer and is supervised: the model must learn to write it in order to stop."""
    system: str = ""
    first_text_prefix: str = ""
    """Precedes the text of the first user turn (Llama-2's `<<SYS>>` block)."""
    between_rounds: str = ""
    """Precedes every user turn but the first, unless that turn renders to nothing."""
    user_start: str = ""
    user_end: str = ""
    user_empty: str = ""
    """Replaces a whole user turn without text."""
    answer_marker: str = ""
    """Announces an answer. A prompt for generation ends with it, and an answer without text consists of it alone."""
    answer_start: str = ""
    """Stands between marker and text. Its space belongs to the answer: tokenizers join it to the first word."""
    strip: bool = False
    """Whether white space around every text is removed, as the published template does."""
    caption: bool = False
    """Whether the training text is only the image marker and the answer, without the question (LLaVA's `plain`)."""
    # Not in the repr, whose digest identifies the template that a run was trained with.
    system_frame: tuple[str, str] | None = field(default=None, repr=False)
    """What stands before and after a system text; None if the template has no place for one."""
    system_in_question: bool = field(default=False, repr=False)
    """Whether the system text is a part of `first_text_prefix`, and not of `system`."""

    @property
    def stop(self) -> str:
        """The string at which generation may stop."""
        return self.answer_end.strip(" ")


@functools.cache
def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """A pattern that finds each of some texts, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


@dataclass(frozen=True)
class GuardedTemplate(Template):
    """A template that keeps control tokens in the text of a turn from acting as such."""

    controls: tuple[str, ...] = ()
    """The control tokens."""
    refuse: bool = False
    """Refuse a text that has one; otherwise a space after its first character makes it ordinary text."""

    def admit(self, text: str) -> str:
        """The text without control tokens. Raises DataError if they are refused."""
        found = any_of(self.controls)
        if self.refuse and (token := found.search(text)):
            raise DataError(
                f"the text has the control token {token.group()!r}, which data.special_tokens 'refuse' does not allow; "
                "remove it, or set data.special_tokens to escape (ordinary text) or keep (it acts as the token)"
            )
        return found.sub(lambda token: f"{token.group()[0]} {token.group()[1:]}", text)


def with_system(template: Template, text: str) -> Template:
    """The template with another system text; an empty one leaves it out.

    Raises:
        ConfigError: the template has no place for a system text.
        DataError: the text has a control token, and they are refused.
    """
    if template.system_frame is None:
        raise ConfigError(
            f"template {template.name!r} has no place for a system text; put it into the first question instead"
        )
    text = template.admit(text) if isinstance(template, GuardedTemplate) else text
    block = text.join(template.system_frame) if text else ""
    if template.system_in_question:
        return replace(template, first_text_prefix=block)
    return replace(template, system=block)


VICUNA_SYSTEM = (
    "A chat between a curious {user} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
)
LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)


def _vicuna(name: str, user: str) -> Template:
    return Template(
        name=name,
        system=VICUNA_SYSTEM.format(user=user) + " ",
        system_frame=("", " "),
        user_start="USER: ",
        user_end=" ",
        user_empty="USER:",
        answer_marker="ASSISTANT:",
        answer_start=" ",
        answer_end="</s>",
    )


def _chatml(name: str, system: str) -> Template:
    """ChatML as LLaVA writes it, without a line break between the messages."""
    return Template(
        name=name,
        system=f"<|im_start|>system\n{system}<|im_end|>",
        system_frame=("<|im_start|>system\n", "<|im_end|>"),
        user_start="<|im_start|>user\n",
        user_end="<|im_end|>",
        user_empty="<|im_start|>user\n",
        answer_marker="<|im_start|>assistant\n",
        answer_end="<|im_end|>",
    )


def _messages(
    name: str, start: str, end: str, assistant: str, *, system: str = "", strip: bool = False, has_system: bool = True
) -> Template:
    """Messages that each begin with `start`, which contains `{role}`, and end with `end`.

    Line breaks at the end of `end` separate the messages; they are not part of an answer. `has_system` says whether the
    family knows messages of the role `system`.
    """
    marker, gap = end.rstrip("\n"), end[len(end.rstrip("\n")) :]
    user = start.format(role="user")
    return Template(
        name=name,
        system=start.format(role="system") + system + end if system else "",
        system_frame=(start.format(role="system"), end) if has_system else None,
        between_rounds=gap,
        user_start=user,
        user_end=end,
        user_empty=user + end,
        answer_marker=start.format(role=assistant),
        answer_end=marker,
        strip=strip,
    )


def _instruct(
    name: str,
    *,
    before: str,
    after: str,
    answer_end: str,
    between_rounds: str = "",
    system: tuple[str, str] | None = None,
) -> Template:
    """`[INST]` of Llama-2 and Mistral. The variants differ in white space, and therefore in tokens."""
    return Template(
        name=name,
        between_rounds=between_rounds,
        user_start=before,
        user_end=after,
        user_empty=before + after,
        answer_start=" ",
        answer_end=answer_end,
        system_frame=system,
        system_in_question=True,
    )


_LLAMA_2_FRAME = ("<<SYS>>\n", "\n<</SYS>>\n\n")
_VICUNA_V1 = _vicuna("vicuna_v1", "user")

TEMPLATES: dict[str, Template] = {
    "plain": Template(name="plain", user_end="\n", answer_end="\n", caption=True),
    "vicuna_v1": _VICUNA_V1,
    "v1": _VICUNA_V1,
    "llava_v1": _vicuna("llava_v1", "human"),
    "llava_llama_2": Template(
        name="llava_llama_2",
        first_text_prefix=LLAVA_LLAMA_2_SYSTEM.join(_LLAMA_2_FRAME),
        system_frame=_LLAMA_2_FRAME,
        system_in_question=True,
        between_rounds="<s>",
        user_start="[INST] ",
        user_end=" [/INST]",
        answer_start=" ",
        answer_end=" </s>",
    ),
    "chatml_direct": _chatml("chatml_direct", "Answer the questions."),
    "mpt": _chatml("mpt", MPT_SYSTEM),
    "mistral_instruct": _instruct("mistral_instruct", before="[INST] ", after=" [/INST]", answer_end=" </s>"),
    "mistral_v1": _instruct("mistral_v1", before=" [INST] ", after=" [/INST]", answer_end="</s>"),
    "mistral_v3": _instruct("mistral_v3", before="[INST] ", after="[/INST]", answer_end="</s>"),
    "llama_2": _instruct(
        "llama_2", before="[INST] ", after=" [/INST]", answer_end=" </s>", between_rounds="<s>", system=_LLAMA_2_FRAME
    ),
    "llama_3": _messages(
        "llama_3", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "assistant", strip=True
    ),
    "chatml": _messages("chatml", "<|im_start|>{role}\n", "<|im_end|>\n", "assistant"),
    "qwen": _messages(
        "qwen", "<|im_start|>{role}\n", "<|im_end|>\n", "assistant", system="You are a helpful assistant."
    ),
    "gemma": _messages("gemma", "<start_of_turn>{role}\n", "<end_of_turn>\n", "model", strip=True, has_system=False),
}
"""Templates by name; `v1` is an alias of `vicuna_v1`. Names and texts up to `mistral_instruct` are those of LLaVA."""

TOKENIZER_TEMPLATE = "tokenizer"
"""Name that selects the chat template of the language model's tokenizer, see `data/chat_template.py`."""


def get_template(name: str) -> Template:
    """The template called `name`. Raises ConfigError, which lists the names, if there is none."""
    try:
        return TEMPLATES[name]
    except KeyError:
        names = ", ".join(sorted(TEMPLATES))
        raise ConfigError(
            f"template {name!r} does not exist; choose one of {names}, or {TOKENIZER_TEMPLATE!r} (the tokenizer's own)"
        ) from None


@dataclass(frozen=True)
class Rendered:
    """A prompt with literal `<image>` markers."""

    text: str
    answer_spans: tuple[tuple[int, int], ...]
    """Supervised ranges of characters, ascending, each `(start, end)` without the end."""


def render(template: Template, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendered:
    """The prompt of a conversation and the spans of its answers.

    An answer without text renders as the bare marker, without `answer_end`, and is not supervised, as in LLaVA. A
    leading answer is dropped. Image markers stay where they are; see `place_image_first`.

    Args:
        template: One of `TEMPLATES`, or the one of a tokenizer.
        turns: Alternating turns. The last one may be a question.
        add_generation_prompt: End with the marker of the answer to be generated; the last turn must be a question.

    Returns:
        The text, and for each answer its range from behind the marker to the end of `answer_end`.

    Raises:
        DataError: there are no turns, they do not alternate, or the template cannot represent them.
    """
    _check_order(turns)
    turns = drop_leading_answer(turns)
    if isinstance(template, GuardedTemplate):
        turns = [Turn(turn.role, template.admit(turn.text)) for turn in turns]
    if template.strip:
        turns = [replace(turn, text=turn.text.strip()) for turn in turns]
    _check_ends(template, turns, add_generation_prompt)
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


def _check_order(turns: Sequence[Turn]) -> None:
    if (pair := consecutive_turns(turns)) is not None:
        raise DataError(
            f"two consecutive turns from the {turns[pair[0]].role} (turns {pair[0]} and {pair[1]}); user and assistant "
            "must alternate"
        )


def _check_ends(template: Template, turns: Sequence[Turn], add_generation_prompt: bool) -> None:
    if not turns:
        raise DataError("the conversation has no user turn; it must start with one")
    if add_generation_prompt and turns[-1].role != "user":
        raise DataError("the conversation ends with an answer; a prompt for generation must end with a user turn")
    if template.first_text_prefix and not turns[0].text:
        raise DataError(f"the first user turn is empty; template {template.name!r} needs text there")


def _user_piece(template: Template, text: str, *, first: bool) -> str:
    if first and text:
        return template.user_start + template.first_text_prefix + text + template.user_end
    piece = template.user_start + text + template.user_end if text else template.user_empty
    return piece if first or not piece else template.between_rounds + piece


def _render_caption(template: Template, turns: Sequence[Turn], add_generation_prompt: bool) -> Rendered:
    """Training: marker and caption. Generation: the marker, then the user's text if there is any, as in LLaVA."""
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

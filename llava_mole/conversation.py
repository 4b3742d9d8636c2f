"""Conversations: from turns to the prompt text and the character spans that training supervises.

`render` is the only place that builds a prompt: training, evaluation and chat call it, with a template from
`templates.py`. The spans replace LLaVA's counting of tokens: whatever the tokenizer does, a token is supervised when it
begins inside an answer's span.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN

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


@dataclass(frozen=True)
class Template:
    """The fixed strings around the turns.

    A prompt is `system`, then per turn `user_start text user_end` or `answer_marker answer_start text answer_end`.
    The supervised span of an answer is everything after `answer_marker`.
    """

    name: str
    answer_end: str
    """Ends an answer and is supervised: what the model must learn to say in order to stop."""
    system: str = ""
    first_text_prefix: str = ""
    """Put in front of the first user text (Llama-2's `<<SYS>>` block)."""
    between_rounds: str = ""
    """Put in front of every user turn but the first, if that renders to anything."""
    user_start: str = ""
    user_end: str = ""
    user_empty: str = ""
    """Replaces a whole user turn without text."""
    answer_marker: str = ""
    """Announces an answer. A prompt for generation ends with it, and an answer without text is only this."""
    answer_start: str = ""
    """Between marker and text. The space is the answer's: tokenizers join it to the answer's first word."""
    strip: bool = False
    """Blanks around every text are removed, as the published template does."""
    caption: bool = False
    """Training text is the image marker and the answer; what the user says is left out (LLaVA's `plain`)."""

    @property
    def stop(self) -> str:
        """The string at which generation may stop."""
        return self.answer_end.strip(" ")


def _vicuna(name: str, user: str) -> Template:
    return Template(
        name=name,
        system=VICUNA_SYSTEM.format(user=user) + " ",
        user_start="USER: ",
        user_end=" ",
        user_empty="USER:",
        answer_marker="ASSISTANT:",
        answer_start=" ",
        answer_end="</s>",
    )


def _chatml(name: str, system: str) -> Template:
    """LLaVA's ChatML, which has no line break between the messages."""
    return Template(
        name=name,
        system=f"<|im_start|>system\n{system}<|im_end|>",
        user_start="<|im_start|>user\n",
        user_end="<|im_end|>",
        user_empty="<|im_start|>user\n",
        answer_marker="<|im_start|>assistant\n",
        answer_end="<|im_end|>",
    )


def _messages(name: str, start: str, end: str, assistant: str, *, system: str = "", strip: bool = False) -> Template:
    """A model's own format of messages, each from `start` (with the role) to `end` and a line break if it has one."""
    marker, gap = end.rstrip("\n"), end[len(end.rstrip("\n")) :]
    user = start.format(role="user")
    return Template(
        name=name,
        system=start.format(role="system") + system + end if system else "",
        between_rounds=gap,
        user_start=user,
        user_end=end,
        user_empty=user + end,
        answer_marker=start.format(role=assistant),
        answer_end=marker,
        strip=strip,
    )


def _instruct(name: str, *, before: str, after: str, answer_end: str, between_rounds: str = "") -> Template:
    """`[INST]` as Llama-2 and Mistral use it; they differ in blanks, and the blanks in tokens."""
    return Template(
        name=name,
        between_rounds=between_rounds,
        user_start=before,
        user_end=after,
        user_empty=before + after,
        answer_start=" ",
        answer_end=answer_end,
    )


_VICUNA_V1 = _vicuna("vicuna_v1", "user")

TEMPLATES: dict[str, Template] = {
    "plain": Template(name="plain", user_end="\n", answer_end="\n", caption=True),
    "vicuna_v1": _VICUNA_V1,
    "v1": _VICUNA_V1,
    "llava_v1": _vicuna("llava_v1", "human"),
    "llava_llama_2": Template(
        name="llava_llama_2",
        first_text_prefix=f"<<SYS>>\n{LLAVA_LLAMA_2_SYSTEM}\n<</SYS>>\n\n",
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
    "llama_2": _instruct("llama_2", before="[INST] ", after=" [/INST]", answer_end=" </s>", between_rounds="<s>"),
    "llama_3": _messages(
        "llama_3", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "assistant", strip=True
    ),
    "chatml": _messages("chatml", "<|im_start|>{role}\n", "<|im_end|>\n", "assistant"),
    "qwen": _messages(
        "qwen", "<|im_start|>{role}\n", "<|im_end|>\n", "assistant", system="You are a helpful assistant."
    ),
    "gemma": _messages("gemma", "<start_of_turn>{role}\n", "<end_of_turn>\n", "model", strip=True),
}
"""Templates by name; `v1` is another name of `vicuna_v1`. Up to `mistral_instruct` the names and texts are LLaVA's."""

TOKENIZER_TEMPLATE = "tokenizer"
"""Stands for the chat template that the language model's tokenizer brings along, see `data/chat_template.py`."""


def get_template(name: str) -> Template:
    """The template called `name`. Raises ConfigError that lists the names (LLaVA would silently take `vicuna_v1`)."""
    try:
        return TEMPLATES[name]
    except KeyError:
        names = ", ".join(sorted(TEMPLATES))
        raise ConfigError(
            f"template {name!r} does not exist; choose one of {names}, or {TOKENIZER_TEMPLATE!r} (the tokenizer's own)"
        ) from None


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
                f"two consecutive turns from the {turn.role} (turns {index} and {index + 1} of the conversation); user "
                "and assistant must alternate"
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

"""Conversation templates: the fixed strings around the turns of a conversation, by name.

A template is data; `conversation.render` builds the prompt. The first seven equal LLaVA-1.5's `conversation.py`, the
others the chat templates that the models publish; `data/chat_template.py` reads any other from a tokenizer.
"""

from dataclasses import dataclass

from llava_mole.errors import ConfigError

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

"""Converts the chat template of a tokenizer to a `Template`, whose answers have known spans.

A chat template is a program. Running it on marked texts yields its fixed strings, which are accepted only if they
reproduce the program's output for conversations of one to three rounds. Spans could also be found by rendering each
prefix of a conversation, but generation (stop string), the bound of the tokens and the key of stored token counts need
the fixed strings, which also keep Jinja out of the data loader.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llava_mole.common.errors import ConfigError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import TOKENIZER_TEMPLATE, GuardedTemplate, Template, Turn, get_template, render
from llava_mole.data.tokenization import HFTextTokenizer, TextTokenizer

Render = Callable[[Sequence[Turn], bool], str]
_MARKS = ("qqAskedFirstqq", "qqSaidFirstqq", "qqAskedLastqq", "qqSaidLastqq")
"""Words that occur in no chat template."""
_ALTERNATIVE = "name a template of conversation.TEMPLATES instead"


def check_template_name(name: str) -> None:
    """Raise ConfigError for a name that `resolve_template` does not know; needs no tokenizer."""
    if name != TOKENIZER_TEMPLATE:
        get_template(name)


def resolve_template(name: str, tokenizer: TextTokenizer | None) -> Template:
    """The template called `name`; the name `tokenizer` selects the chat template of `tokenizer`.

    It treats control tokens in texts as the tokenizer's `special_tokens` says.

    Raises:
        ConfigError: no template has this name, or as `read_chat_template`.
    """
    template = read_chat_template(getattr(tokenizer, "hf", None)) if name == TOKENIZER_TEMPLATE else get_template(name)
    if not isinstance(tokenizer, HFTextTokenizer) or tokenizer.special_tokens == "keep":
        return template
    controls = control_tokens(template, tokenizer)
    return GuardedTemplate(**vars(template), controls=controls, refuse=tokenizer.special_tokens == "refuse")


def markers(template: Template) -> set[str]:
    """The visible texts that a template writes around every turn."""
    around = (
        template.user_start,
        template.user_end,
        template.answer_marker,
        template.answer_end,
        template.between_rounds,
    )
    return {text.strip() for text in around} - {""}


def control_tokens(template: Template, tokenizer: HFTextTokenizer) -> tuple[str, ...]:
    """Texts that act on a model even inside a turn: special tokens of the tokenizer, and bracketed template markers.

    A marker of letters, such as `USER:`, is ordinary text, which an escape would damage.
    """
    added = tokenizer.hf.added_tokens_decoder.values()
    special = {*tokenizer.hf.all_special_tokens, *(token.content for token in added if token.special)}
    special |= {text for text in markers(template) if not text[0].isalnum()}
    return tuple(sorted(text for text in special - {DEFAULT_IMAGE_TOKEN} if len(text) > 1))


def read_chat_template(hf_tokenizer: Any) -> Template:
    """The fixed strings of a tokenizer's own chat template.

    The beginning-of-text token is part of the text unless the tokenizer adds it to every text: `tokenization.encode`
    then adds it. Supervision of an answer includes the last special token after it (`<|im_end|>`), but not the line
    break after that token.

    Raises:
        ConfigError: the tokenizer has no chat template, or fixed strings cannot describe it: it renders the last answer
            differently from earlier ones, depends on the date, or changes texts beyond stripping white space.
    """
    if hf_tokenizer is None or not getattr(hf_tokenizer, "chat_template", None):
        raise ConfigError(f"template 'tokenizer': the language model's tokenizer has no chat template; {_ALTERNATIVE}")
    if "strftime_now" in str(hf_tokenizer.chat_template):
        raise _unfit("depends on the date")
    published = _renderer(hf_tokenizer)
    template = _take_apart(published, set(hf_tokenizer.all_special_tokens) | set(hf_tokenizer.get_added_vocab()))
    blanks = [Turn("user", " padded "), Turn("assistant", " padded\n")]
    if (wanted := published(blanks, False)) != _whole(template, blanks, wanted):
        template = replace(template, strip=True)
    _check(template, published, blanks)
    return _with_system_frame(template, published)


def _renderer(hf_tokenizer: Any) -> Render:
    # `tokenization.encode` adds a BOS if the tokenizer does; otherwise that of the template stays.
    bos = "" if HFTextTokenizer(hf_tokenizer).bos_token_id is None else hf_tokenizer.bos_token

    def published(turns: Sequence[Turn], prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text = hf_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        # A template is a foreign program, which can raise errors of Jinja and any error of Python.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"template 'tokenizer': the tokenizer's chat template fails on a plain conversation: {reason}; "
                f"{_ALTERNATIVE}"
            ) from None
        return text.removeprefix(bos)

    return published


def _take_apart(published: Render, special_tokens: set[str]) -> Template:
    asked, said, asked_last, said_last = _MARKS
    rounds = [Turn("user", asked), Turn("assistant", said), Turn("user", asked_last), Turn("assistant", said_last)]
    pieces, rest = [], published(rounds, False)
    for mark in _MARKS:
        before, found, rest = rest.partition(mark)
        if not found:
            raise _unfit("leaves a turn out")
        pieces.append(before)
    head, to_answer, to_user, to_last_answer = pieces
    prompt = published(rounds[:1], True).partition(asked)[2]
    if to_answer != to_last_answer or not to_answer.startswith(prompt):
        raise _unfit("announces the last answer differently from the one before it, or from the prompt")
    answer_end, tail = _split_end(rest, special_tokens)
    if not to_user.startswith(answer_end):
        raise _unfit("ends the last answer differently from the one before it")
    to_user = to_user[len(answer_end) :]
    between, user_start = _split_start(to_user, tail, head)
    # Only the first question has a system text: before `user_start`, or between it and the question.
    if head.endswith(user_start):
        system, prefix = head[: len(head) - len(user_start)], ""
    else:
        system, _, prefix = head.partition(user_start)
    user_end, answer_marker = _split_marker(prompt, special_tokens)
    return Template(
        name=TOKENIZER_TEMPLATE,
        system=system,
        first_text_prefix=prefix,
        between_rounds=between,
        user_start=user_start,
        user_end=user_end,
        user_empty=user_start + user_end,
        answer_marker=answer_marker,
        answer_start=to_answer[len(prompt) :],
        answer_end=answer_end,
    )


def _with_system_frame(template: Template, published: Render) -> Template:
    """The template with the place of a system text, if the chat template has one that fixed strings describe."""
    said, asked = _MARKS[:2]
    system: Any = "system"
    try:
        text = published([Turn(system, said), Turn("user", asked)], True)
    except ConfigError:  # it knows no system messages
        return template
    before, found, rest = text.partition(said)
    tail = asked + template.user_end + template.answer_marker
    if not found or not rest.endswith(tail):
        return template
    after = rest.removesuffix(tail)
    if after.endswith(template.user_start):
        return replace(template, system_frame=(before, after[: len(after) - len(template.user_start)]))
    if before.startswith(template.user_start):
        frame = (before.removeprefix(template.user_start), after)
        return replace(template, system_frame=frame, system_in_question=True)
    return template


def _split_end(rest: str, special_tokens: set[str]) -> tuple[str, str]:
    """The end of the last answer, up to its last special token, and the unsupervised rest."""
    ends = [rest.rfind(token) + len(token) for token in special_tokens if token and token in rest]
    end = max(ends, default=len(rest))
    if not end:
        raise _unfit("writes nothing after an answer, so a model could not learn to stop")
    return rest[:end], rest[end:]


def _split_start(to_user: str, tail: str, head: str) -> tuple[str, str]:
    """The text that occurs only between rounds (the tail of an answer, a second BOS), and the start of a question."""
    for start in range(len(to_user) + 1):
        user_start = to_user[start:]
        if to_user[:start].startswith(tail) and user_start in head:
            return to_user[:start], user_start
    raise _unfit("begins the first question differently from later ones")


def _split_marker(prompt: str, special_tokens: set[str]) -> tuple[str, str]:
    """The end of a question and the marker of its answer, which together are `prompt`."""
    ends = [prompt.find(token) + len(token) for token in special_tokens if token and token in prompt]
    end = min(ends, default=len(prompt))
    # Line breaks after the token belong to the question; the marker of an answer begins with a visible character.
    end += len(prompt[end:]) - len(prompt[end:].lstrip("\n")) if prompt[end:].strip("\n") else 0
    return prompt[:end], prompt[end:]


def _check(template: Template, published: Render, blanks: list[Turn]) -> None:
    """Raise ConfigError if the template does not reproduce the published output."""
    texts = ["What?", "One.", "And then,\n\nwhat?", "Two: a & b", "Why <b>?", "So."]
    for count in (2, 4, 6):
        turns = [Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts[:count])]
        for conversation, prompt in ((turns, False), (turns[:-1], True), (blanks + turns, False)):
            wanted = published(conversation, prompt)
            given = _whole(template, conversation, wanted, prompt)
            if given != wanted:
                raise _unfit(f"makes {wanted!r} where its fixed strings make {given!r}")


def _whole(template: Template, turns: Sequence[Turn], wanted: str, prompt: bool = False) -> str:
    """The template's rendering with the white space that follows the last end marker in `wanted`."""
    text = render(template, turns, add_generation_prompt=prompt).text
    tail = wanted[len(text) :] if wanted.startswith(text) else ""
    return text + tail if not prompt and not tail.strip() else text


def _unfit(reason: str) -> ConfigError:
    return ConfigError(f"template 'tokenizer': the tokenizer's chat template {reason}; {_ALTERNATIVE}")

"""Templates: names, spans, generation prompts and refusals. The recorded texts of LLaVA are compared in tests/data."""

import pytest

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.conversation import (
    TEMPLATES,
    GuardedTemplate,
    Turn,
    drop_leading_answer,
    get_template,
    place_image_first,
    render,
    with_system,
)

USER = Turn("user", "Hi")
ASSISTANT = Turn("assistant", "Hello there")
CHAT = sorted({template.name for template in TEMPLATES.values()} - {"plain"})


def test_template_names() -> None:
    llava = {"plain", "vicuna_v1", "v1", "llava_v1", "llava_llama_2", "chatml_direct", "mpt", "mistral_instruct"}
    models = {"mistral_v1", "mistral_v3", "llama_2", "llama_3", "chatml", "qwen", "gemma"}
    assert set(TEMPLATES) == llava | models
    assert get_template("v1") is get_template("vicuna_v1")
    assert all(template.name == name for name, template in TEMPLATES.items() if name != "v1")


def test_unknown_template_is_refused_with_the_names() -> None:
    with pytest.raises(
        ConfigError, match=r"template 'vicuna' does not exist; choose one of chatml, .*vicuna_v1, or 'tokenizer'"
    ):
        get_template("vicuna")


@pytest.mark.parametrize("name", CHAT)
def test_spans_are_the_answers_with_their_end_marker(name: str) -> None:
    template = get_template(name)
    rendered = render(template, [USER, ASSISTANT, USER, Turn("assistant", "Bye")])
    spoken = [rendered.text[start:end] for start, end in rendered.answer_spans]
    assert spoken == [template.answer_start + text + template.answer_end for text in ("Hello there", "Bye")]
    assert all(rendered.text[:start].endswith(template.answer_marker) for start, _ in rendered.answer_spans)
    assert rendered.text.endswith(template.answer_end)


def test_span_is_found_even_where_an_answer_repeats_the_markers() -> None:
    template = get_template("vicuna_v1")
    answer = Turn("assistant", "It writes USER: x ASSISTANT: y</s> and waits.")
    ((start, end),) = render(template, [USER, answer]).answer_spans
    assert render(template, [USER, answer]).text[start:end] == f" {answer.text}</s>"


@pytest.mark.parametrize("name", CHAT)
def test_generation_prompt_begins_the_training_text(name: str) -> None:
    template = get_template(name)
    prompt = render(template, [USER, ASSISTANT, USER], add_generation_prompt=True)
    trained = render(template, [USER, ASSISTANT, USER, Turn("assistant", "Bye")])
    assert trained.text.startswith(prompt.text)
    assert len(prompt.text) == trained.answer_spans[1][0]
    assert prompt.answer_spans == trained.answer_spans[:1]
    assert not prompt.text.endswith(" ")


def test_vicuna_prompt_in_full() -> None:
    prompt = render(get_template("vicuna_v1"), [USER], add_generation_prompt=True)
    assert prompt.text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT:"
    )


def test_question_at_the_end_is_kept_without_a_marker() -> None:
    rendered = render(get_template("vicuna_v1"), [USER, ASSISTANT, Turn("user", "More?")])
    assert rendered.text.endswith("Hello there</s>USER: More? ")
    assert len(rendered.answer_spans) == 1


@pytest.mark.parametrize("name", CHAT)
def test_empty_answer_is_the_bare_marker_and_not_supervised(name: str) -> None:
    template = get_template(name)
    rendered = render(template, [USER, Turn("assistant", ""), USER, ASSISTANT])
    assert len(rendered.answer_spans) == 1
    assert rendered.text.count(template.answer_end) == (3 if template.answer_end in template.user_end else 1) + (
        template.system.count(template.answer_end)
    )


def test_stop_strings() -> None:
    stops = {name: template.stop for name, template in TEMPLATES.items()}
    assert stops["vicuna_v1"] == stops["llava_llama_2"] == "</s>"
    assert stops["chatml_direct"] == stops["mpt"] == "<|im_end|>"
    assert stops["plain"] == "\n"


def test_plain_is_marker_and_caption() -> None:
    turns = [Turn("user", "<image>\nDescribe it."), Turn("assistant", "a red mill")]
    rendered = render(get_template("plain"), turns)
    assert rendered.text == "<image>a red mill\n"
    assert rendered.answer_spans == ((7, 18),)


@pytest.mark.parametrize(
    ("said", "prompt"),
    [("<image>", "<image>"), ("<image>\nWhat?", "<image>\nWhat?\n"), ("What?", "What?\n"), ("", "")],
)
def test_plain_prompt_for_generation(said: str, prompt: str) -> None:
    assert render(get_template("plain"), [Turn("user", said)], add_generation_prompt=True).text == prompt


def test_image_marker_goes_to_the_front_of_its_turn() -> None:
    turns = [Turn("user", "Look <image> here <image>"), ASSISTANT, Turn("user", "<image>"), ASSISTANT]
    placed = place_image_first(turns)
    assert [turn.text for turn in placed] == ["<image>\nLook  here", "Hello there", "<image>", "Hello there"]
    assert place_image_first(placed) == placed


def test_leading_answer_is_dropped() -> None:
    assert drop_leading_answer([ASSISTANT, USER, ASSISTANT]) == (USER, ASSISTANT)
    assert drop_leading_answer([USER, ASSISTANT]) == (USER, ASSISTANT)
    template = get_template("mpt")
    assert render(template, [ASSISTANT, USER, ASSISTANT]) == render(template, [USER, ASSISTANT])


@pytest.mark.parametrize(
    ("name", "turns", "generate", "message"),
    [
        ("vicuna_v1", [], False, "no user turn"),
        ("vicuna_v1", [ASSISTANT], False, "no user turn"),
        ("vicuna_v1", [USER, USER], False, r"two consecutive turns from the user \(turns 1 and 2\)"),
        (
            "vicuna_v1",
            [USER, ASSISTANT, ASSISTANT],
            False,
            r"two consecutive turns from the assistant \(turns 2 and 3\)",
        ),
        ("vicuna_v1", [USER, ASSISTANT], True, "ends with an answer"),
        ("llava_llama_2", [Turn("user", ""), ASSISTANT], False, "first user turn is empty"),
        ("plain", [USER, ASSISTANT], False, "2 turns without one"),
        ("plain", [Turn("user", "<image>")], False, "1 turns with one"),
        ("plain", [Turn("user", "<image>"), ASSISTANT, USER, ASSISTANT], False, "4 turns with one"),
        ("plain", [Turn("user", "<image>"), ASSISTANT, USER], True, "holds one turn, the prompt has 3"),
    ],
)
def test_impossible_conversation_is_refused(name: str, turns: list[Turn], generate: bool, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(get_template(name), turns, add_generation_prompt=generate)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if get_template(name).system_frame])
def test_a_system_text_replaces_the_templates_own(name: str) -> None:
    template = get_template(name)
    own = render(template, [USER, ASSISTANT]).text
    before, after = template.system_frame or ("", "")
    assert not (template.system or template.first_text_prefix) or before in own
    changed = render(with_system(template, "Be kind."), [USER, ASSISTANT, USER], add_generation_prompt=True).text
    assert changed.count("Be kind.") == 1
    bare = render(with_system(template, ""), [USER, ASSISTANT, USER], add_generation_prompt=True).text
    assert changed.replace(f"{before}Be kind.{after}", "") == bare
    if template.system or template.first_text_prefix:
        words = (template.system or template.first_text_prefix).removeprefix(before).removesuffix(after)
        assert with_system(template, words) == template
    assert with_system(template, "Be kind.").stop == template.stop


def test_templates_without_a_place_refuse_a_system_text() -> None:
    for name in ("gemma", "plain", "mistral_v3"):
        with pytest.raises(ConfigError, match=f"template '{name}' has no place for a system text"):
            with_system(get_template(name), "Be kind.")


def test_control_tokens_in_a_system_text_are_escaped() -> None:
    guarded = GuardedTemplate(**vars(get_template("qwen")), controls=("<|im_end|>",))
    assert "<|im_start|>system\nBe < |im_end|> kind.<|im_end|>\n" in with_system(guarded, "Be <|im_end|> kind.").system


def test_the_digest_of_a_template_does_not_depend_on_its_frame() -> None:
    assert "frame" not in repr(get_template("vicuna_v1"))
    assert "in_question" not in repr(get_template("llama_2"))

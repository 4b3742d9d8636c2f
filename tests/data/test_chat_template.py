"""The tokenizer's own chat template, and the registered templates of models, against transformers' rendering."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llava_mole.common.errors import ConfigError
from llava_mole.constants import IGNORE_INDEX
from llava_mole.conversation import Turn, get_template, render, with_system
from llava_mole.data.chat_template import read_chat_template, resolve_template
from llava_mole.data.tokenization import HFTextTokenizer, encode

QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<end_of_turn>{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL_V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% else %}{% generation %} {{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{% generation %} {{ m['content'] }} {{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_2_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first %}<<SYS>>\nBe kind.\n<</SYS>>\n\n{% endif %}{{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
REGISTERED = {"qwen": QWEN, "llama_3": LLAMA_3, "gemma": GEMMA, "mistral_v3": MISTRAL_V3, "llama_2": LLAMA_2}
WITHOUT_BOS = {"qwen"}
"""Published templates that do not write the beginning-of-text token."""
SPECIAL = {
    "qwen": ["<|im_start|>", "<|im_end|>"],
    "llama_3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "mistral_v3": ["[INST]", "[/INST]"],
    "phi_3": ["<|user|>", "<|assistant|>", "<|end|>"],
}
ROUNDS = [
    Turn("user", "What is  this?"),
    Turn("assistant", "A chart.\nIt has bars."),
    Turn("user", "How many"),
    Turn("assistant", "7, I think"),
]


def tokenizer_with(
    chat_template: str | None, special: list[str], *, adds_bos: bool = False, **tokens: Any
) -> PreTrainedTokenizerFast:
    """Bytes as tokens, plus the special ones: ids and offsets are exact, whatever the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | tokens
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=special, **tokens)
    hf.chat_template = chat_template
    if adds_bos:
        hf.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{hf.bos_token} $A", special_tokens=[(hf.bos_token, hf.bos_token_id)]
        )
    return hf


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_template_is_the_published_one(name: str) -> None:
    hf = tokenizer_with(REGISTERED[name], SPECIAL.get(name, []))
    bos = hf.bos_token if name not in WITHOUT_BOS else ""
    for turns in (ROUNDS, [*ROUNDS[:2], Turn("user", ""), ROUNDS[3]]):
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        text = render(get_template(name), turns).text
        assert bos + text == hf.apply_chat_template(messages, tokenize=False).rstrip("\n")
    messages = [{"role": turn.role, "content": turn.text} for turn in ROUNDS]
    prompt = render(get_template(name), ROUNDS[:3], add_generation_prompt=True).text
    assert bos + prompt == hf.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", REGISTERED)
@pytest.mark.parametrize("own", [True, False], ids=["tokenizer", "registered"])
@pytest.mark.parametrize("adds_bos", [True, False], ids=["adds", "adds-none"])
def test_supervised_tokens_are_those_transformers_marks(name: str, own: bool, adds_bos: bool) -> None:
    """The chat templates of this test mark what the assistant generates; transformers turns that into a mask."""
    adds_bos = adds_bos and name not in WITHOUT_BOS  # no tokenizer adds what its chat template does not write
    hf = tokenizer_with(REGISTERED[name], SPECIAL.get(name, []), adds_bos=adds_bos)
    messages = [{"role": turn.role, "content": turn.text} for turn in ROUNDS]
    wanted = hf.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    template = resolve_template("tokenizer" if own else name, HFTextTokenizer(hf))
    encoded = encode(render(template, ROUNDS), HFTextTokenizer(hf), num_image_tokens=1, max_length=None)
    ids, mask = wanted["input_ids"], wanted["assistant_masks"]
    assert (ids[0] == hf.bos_token_id) == (name not in WITHOUT_BOS)
    if ids[0] == hf.bos_token_id and not own and not adds_bos:  # registered templates leave it to the tokenizer
        ids, mask = ids[1:], mask[1:]
    tail = len(ids) - len(encoded.input_ids)
    assert tail in (0, 1)
    assert not any(mask[len(ids) - tail :])
    assert encoded.input_ids == ids[: len(ids) - tail]
    assert [label != IGNORE_INDEX for label in encoded.labels] == [bool(m) for m in mask[: len(ids) - tail]]
    assert sum(mask) > 10


@pytest.mark.parametrize("name", REGISTERED)
def test_own_template_renders_as_the_registered_one(name: str) -> None:
    own = read_chat_template(tokenizer_with(REGISTERED[name], SPECIAL.get(name, []), adds_bos=True))
    registered = get_template(name)
    no_question = [*ROUNDS[:2], Turn("user", ""), ROUNDS[3]]
    for turns in (ROUNDS, ROUNDS[:2], no_question, [Turn("user", " a "), Turn("assistant", "b ")]):
        assert render(own, turns) == render(registered, turns)
    assert own.strip == registered.strip
    assert own.stop == registered.stop


def test_system_text_inside_the_first_question() -> None:
    own = read_chat_template(tokenizer_with(LLAMA_2_SYSTEM, [], adds_bos=True))
    assert own.first_text_prefix == "<<SYS>>\nBe kind.\n<</SYS>>\n\n"
    text = render(own, ROUNDS).text
    assert text.startswith("[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhat is  this? [/INST] A chart.")
    assert text.count("Be kind.") == 1


LLAMA_2_GIVEN_SYSTEM = (
    "{% set held = namespace(text='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set held.text = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}{% elif m['role'] == 'user' %}"
    "{{ bos_token }}[INST] {{ held.text + m['content'] }} [/INST]{% set held.text = '' %}"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("name", "published"), [("qwen", QWEN), ("llama_3", LLAMA_3), ("llama_2", LLAMA_2_GIVEN_SYSTEM)]
)
@pytest.mark.parametrize("own", [True, False], ids=["tokenizer", "registered"])
def test_a_system_text_stands_where_the_published_template_has_it(name: str, published: str, own: bool) -> None:
    hf = tokenizer_with(published, SPECIAL.get(name, []), adds_bos=True)
    template = read_chat_template(hf) if own else get_template(name)
    messages = [{"role": turn.role, "content": turn.text} for turn in ROUNDS[:3]]
    wanted = hf.apply_chat_template(
        [{"role": "system", "content": "Be kind."}, *messages], tokenize=False, add_generation_prompt=True
    )
    text = render(with_system(template, "Be kind."), ROUNDS[:3], add_generation_prompt=True).text
    assert text == wanted.removeprefix(hf.bos_token)


def test_a_chat_template_may_have_no_place_for_a_system_text() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + GEMMA
    own = read_chat_template(tokenizer_with(refusing, SPECIAL["gemma"]))
    with pytest.raises(ConfigError, match="template 'tokenizer' has no place for a system text"):
        with_system(own, "Be kind.")


def test_markers_made_of_ordinary_text() -> None:
    own = read_chat_template(
        tokenizer_with(
            "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}### assistant: {% endif %}",
            [],
        )
    )
    rendered = render(own, ROUNDS[:2])
    assert rendered.text == "### user: What is  this?\n### assistant: A chart.\nIt has bars.\n"
    ((start, end),) = rendered.answer_spans
    assert rendered.text[start:end] == "A chart.\nIt has bars.\n"


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "the language model's tokenizer has no chat template; name a template of"),
        ("{{ raise_exception('no such thing') }}", "fails on a plain conversation: no such thing"),
        ("{{ messages[0]['content'] }}{{ nothing.at.all }}", "fails on a plain conversation"),
        ("{{ strftime_now('%d %b %Y') }}\n" + QWEN, "chat template depends on the date; name a template of"),
        ("{{ messages[-1]['content'] }}</s>", "leaves a turn out"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}", "writes nothing after an answer"),
        (
            "{% for m in messages %}{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
            "{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}",
            "announces the last answer differently",
        ),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper if m['content'] == 'So.' else "
            "m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            "makes '.*' where its fixed strings make",
        ),
    ],
)
def test_unfit_chat_template_is_refused(chat_template: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_chat_template(tokenizer_with(chat_template, []))


def test_phi_3_adds_an_end_token_to_finished_conversations_only() -> None:
    """Its training text ends in the end-of-text token, which earlier answers do not have: no fixed strings."""
    with pytest.raises(ConfigError, match="ends the last answer differently from the one before it"):
        read_chat_template(tokenizer_with(PHI_3, SPECIAL["phi_3"]))


def test_unknown_name_lists_the_tokenizers_own() -> None:
    with pytest.raises(ConfigError, match="template 'nope' does not exist; .*'tokenizer' \\(the tokenizer's own\\)"):
        resolve_template("nope", HFTextTokenizer(tokenizer_with(None, [])))

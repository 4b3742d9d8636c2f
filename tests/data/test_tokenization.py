"""`encode` on its own: spans, image placeholders, the cut, and Hugging Face tokenizers beside SentencePiece's rules."""

import itertools
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from worlds import golden_cases
from worlds.llama_sentencepiece import LlamaSentencePiece

from llava_mole.common.errors import DataError, WeightsError
from llava_mole.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.conversation import Rendered, Turn, get_template, render
from llava_mole.data.tokenization import HFTextTokenizer, TextTokenizer, encode

TURNS = [
    Turn("user", "<image>\nWhat is on the table?"),
    Turn("assistant", "Two pears, 3 plums and a knife."),
    Turn("user", "Which is nearer?"),
    Turn("assistant", "The knife."),
]
CONVERSATIONS = {
    "image": TURNS,
    "text": [Turn("user", "Name a river."), Turn("assistant", "The Nile, 6,650 km long.")],
    "accents": [Turn("user", "<image>\nWas steht da?"), Turn("assistant", "„Bäckerei Müller“, seit 1894")],
    "other scripts": [Turn("user", "颜色"), Turn("assistant", "门是深绿色的 🏖️ 日本")],
    "newlines": [Turn("user", "Print it."), Turn("assistant", "def f(x):\n\treturn x\n")],
}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Vicuna-1.5 has it: a SentencePiece model and `legacy: false`."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(golden_cases.read_bytes("tokenizer.model"))
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | tokens))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> HFTextTokenizer:
    return HFTextTokenizer(AutoTokenizer.from_pretrained(llama_folder))


@pytest.fixture(scope="module")
def byte_level() -> HFTextTokenizer:
    """A GPT-2-like tokenizer: bytes as tokens, no BOS, end marker only as a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "he", "\u0120T", "\u0120The"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("h", "e"), ("\u0120", "T"), ("\u0120T", "he")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return HFTextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))


def full(turns: list[Turn], tokenizer: TextTokenizer, template: str = "vicuna_v1", **options: Any) -> Any:
    settings = {"num_image_tokens": 1, "max_length": None} | options
    return encode(render(get_template(template), turns), tokenizer, **settings)


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2"])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_hugging_face_llama_equals_sentencepiece(llama: HFTextTokenizer, turns: list[Turn], template: str) -> None:
    reference = full(turns, LlamaSentencePiece(legacy=False), template)
    result = full(turns, llama, template)
    assert result.input_ids == reference.input_ids
    assert result.labels == reference.labels


def test_plain_in_hugging_face_equals_sentencepiece(llama: HFTextTokenizer) -> None:
    assert full(TURNS[:2], llama, "plain") == full(TURNS[:2], LlamaSentencePiece(legacy=False), "plain")


def test_wrapper_attributes_of_llama(llama: HFTextTokenizer) -> None:
    assert (llama.bos_token_id, llama.eos_token_id) == (1, 2)
    assert llama.pad_token_id == 0  # <unk>: the tokenizer has no padding token
    assert llama.decode([1, *llama.encode_with_offsets("A mill.")[0], 2]) == "A mill."
    assert llama.encode_with_offsets("</s>") == ([2], [(0, 4)])


def test_tokenizer_survives_pickling(llama: HFTextTokenizer) -> None:
    assert full(TURNS, pickle.loads(pickle.dumps(llama))) == full(TURNS, llama)


def test_text_longer_than_the_tokenizers_own_limit_is_kept_without_a_warning(llama: HFTextTokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, _ = llama.encode_with_offsets("word " * 200)
    assert len(ids) >= 200


@pytest.mark.parametrize(
    ("name", "template"),
    [
        *itertools.product(["llama", "byte_level", "sentencepiece"], ["vicuna_v1", "llava_v1", "llava_llama_2"]),
        ("byte_level", "chatml_direct"),
    ],
)
def test_labels_spell_the_answers(name: str, template: str, request: pytest.FixtureRequest) -> None:
    """Whatever the tokenizer, the supervised ids decode to the answers and nothing else."""
    tokenizer = LlamaSentencePiece(legacy=True) if name == "sentencepiece" else request.getfixturevalue(name)
    encoded = full(TURNS, tokenizer, template)
    ids = [label for label in encoded.labels if label != IGNORE_INDEX]
    end = "<|im_end|>" if template == "chatml_direct" else ""
    expected = "".join(turn.text + end for turn in TURNS if turn.role == "assistant")
    assert tokenizer.decode(ids).replace(" ", "") == expected.replace(" ", "")
    if template != "chatml_direct":
        assert ids.count(tokenizer.eos_token_id) == 2


def test_byte_level_has_no_bos_and_pads_with_its_end_token(byte_level: HFTextTokenizer) -> None:
    assert byte_level.bos_token_id is None
    assert byte_level.pad_token_id == byte_level.eos_token_id
    assert full([Turn("user", "a"), Turn("assistant", "b")], byte_level).input_ids[0] != byte_level.eos_token_id


def test_space_joined_to_the_first_word_is_supervised(byte_level: HFTextTokenizer) -> None:
    encoded = full([Turn("user", "Who?"), Turn("assistant", "The cat")], byte_level)
    first = next(label for label in encoded.labels if label != IGNORE_INDEX)
    assert byte_level.hf.convert_ids_to_tokens(first) == "\u0120The"


def test_end_marker_of_ordinary_text_is_supervised_to_its_end(byte_level: HFTextTokenizer) -> None:
    encoded = full([Turn("user", "Who?"), Turn("assistant", "Me")], byte_level, "chatml_direct")
    assert byte_level.decode([label for label in encoded.labels if label != IGNORE_INDEX]) == "Me<|im_end|>"


def test_token_that_runs_over_the_end_of_an_answer_is_supervised() -> None:
    """Without it the end marker, here ordinary text, would never be learnt to its last character."""
    tokenizer = LlamaSentencePiece(legacy=False)
    encoded = full(TURNS, tokenizer, "chatml_direct")
    spoken = tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
    assert spoken == "Two pears, 3 plums and a knife.<|im_end|><The knife.<|im_end|>"


def test_image_becomes_as_many_placeholders_as_asked(llama: HFTextTokenizer) -> None:
    one, many = full(TURNS, llama), full(TURNS, llama, num_image_tokens=16)
    position = one.input_ids.index(IMAGE_TOKEN_INDEX)
    assert many.input_ids[position : position + 16] == [IMAGE_TOKEN_INDEX] * 16
    assert many.labels[position : position + 16] == [IGNORE_INDEX] * 16
    assert many.input_ids[:position] + many.input_ids[position + 15 :] == one.input_ids
    assert many.labels[:position] + many.labels[position + 15 :] == one.labels
    assert (one.num_images, many.num_images, full(CONVERSATIONS["text"], llama).num_images) == (1, 1, 0)


def test_image_stands_behind_the_text_before_it(llama: HFTextTokenizer) -> None:
    before = render(get_template("vicuna_v1"), TURNS).text.partition("<image>")[0]
    position = 1 + len(llama.encode_with_offsets(before)[0])
    assert full(TURNS, llama).input_ids.index(IMAGE_TOKEN_INDEX) == position


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llava_llama_2", "chatml_direct", "mpt", "plain"])
@pytest.mark.parametrize("legacy", [True, False])
def test_prompt_for_generation_begins_the_training_sample(template: str, legacy: bool) -> None:
    tokenizer = LlamaSentencePiece(legacy=legacy, added_tokens=("<|im_start|>", "<|im_end|>"))
    user = Turn("user", "<image>") if template == "plain" else TURNS[0]
    trained = full([user, TURNS[1]], tokenizer, template)
    prompt = render(get_template(template), [user], add_generation_prompt=True)
    asked = encode(prompt, tokenizer, num_image_tokens=1, max_length=None)
    assert asked.num_supervised == 0
    assert trained.input_ids[: len(asked.input_ids)] == asked.input_ids
    assert trained.labels[len(asked.input_ids) :] == trained.input_ids[len(asked.input_ids) :]


def test_cut_is_counted_and_keeps_the_beginning(llama: HFTextTokenizer) -> None:
    whole = full(TURNS, llama, num_image_tokens=4)
    length = len(whole.input_ids)
    for limit in (length, length + 5):
        assert full(TURNS, llama, num_image_tokens=4, max_length=limit) == whole
    cut = full(TURNS, llama, num_image_tokens=4, max_length=length - 7)
    assert (cut.truncated, whole.truncated) == (7, 0)
    assert cut.input_ids == whole.input_ids[:-7]
    assert cut.labels == whole.labels[:-7]


def test_cut_through_an_image_is_refused(llama: HFTextTokenizer) -> None:
    end = full(TURNS, llama).input_ids.index(IMAGE_TOKEN_INDEX) + 16
    assert full(TURNS, llama, num_image_tokens=16, max_length=end).num_images == 1
    for limit in (end - 1, end - 15, end - 16, 20):
        with pytest.raises(DataError, match=f"image ends at token {end}, behind max_length {limit}"):
            full(TURNS, llama, num_image_tokens=16, max_length=limit)


def test_real_unk_in_an_answer_stays_supervised(llama: HFTextTokenizer) -> None:
    encoded = full([Turn("user", "Unknown?"), Turn("assistant", "It is <unk> here.")], llama)
    assert llama.pad_token_id in encoded.labels


def test_spans_decide_and_not_the_words() -> None:
    """The same text with other spans gives other labels: nothing is looked for in the text."""
    tokenizer = LlamaSentencePiece(legacy=False)
    text = "one two three four"
    words = [
        encode(Rendered(text, ((start, end),)), tokenizer, num_image_tokens=1, max_length=None)
        for start, end in ((0, 3), (3, 7), (7, 18))
    ]
    spoken = [tokenizer.decode([label for label in e.labels if label != IGNORE_INDEX]) for e in words]
    assert spoken == ["one", "two", "three four"]


def test_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(WeightsError, match="Slow gives no character offsets"):
        HFTextTokenizer(Slow())


def test_tokenizer_without_any_padding_candidate_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(WeightsError, match="set its pad_token"):
        HFTextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))

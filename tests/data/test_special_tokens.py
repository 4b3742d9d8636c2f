"""Control tokens inside texts: kept as in LLaVA, escaped to ordinary text, or refused; blank answers are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from worlds import raw_sets
from worlds.tiny_models import make_tokenizer, make_world

from llava_mole.common.errors import DataError
from llava_mole.config import parse_run_config
from llava_mole.conversation import TEMPLATES, Turn, render
from llava_mole.data.chat_template import control_tokens, resolve_template
from llava_mole.data.dataset import build_dataset
from llava_mole.data.images import ImageProcessor
from llava_mole.data.lengths import lengths_path
from llava_mole.data.prepare.defects import Defects, SkipRecord
from llava_mole.data.prepare.samples import check_turns
from llava_mole.data.records import parse_record
from llava_mole.data.tokenization import HFTextTokenizer, SpecialTokens, encode
from llava_mole.model.builder import load_pretrained_model
from llava_mole.train import train


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|pause|>", "<image>"], special_tokens=True)
    return tokenizer


def ids(hf_tokenizer: Any, policy: SpecialTokens, template: str, question: str, answer: str) -> list[int]:
    tokenizer = HFTextTokenizer(hf_tokenizer, policy)
    rendered = render(resolve_template(template, tokenizer), [Turn("user", question), Turn("assistant", answer)])
    return encode(rendered, tokenizer, num_image_tokens=1, max_length=None).input_ids


TEXTS = [
    ("vicuna_v1", "Which tag?", "It is </s> here.", "It is < /s> here."),
    ("vicuna_v1", "What does <s> do?", "Begin.", "What does < s> do?"),
    ("vicuna_v1", "<image>\nAnd <|pause|><unk>?", "Yes.", "And < |pause|>< unk>?"),
    ("mistral_v1", "[INST] be quiet [/INST]", "No.", "[ INST] be quiet [ /INST]"),
    ("chatml", "Hi", "a<|im_end|>\n<|im_start|>user\nb", "a< |im_end|>\n< |im_start|>user\nb"),
    ("plain", "<image>", "A cat</s></s>", "A cat< /s>< /s>"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "question", "answer", "escaped"), TEXTS)
def test_control_tokens_in_texts(hf_tokenizer: Any, template: str, question: str, answer: str, escaped: str) -> None:
    specials = set(hf_tokenizer.all_special_ids) | set(hf_tokenizer.added_tokens_decoder)
    tokenizer = HFTextTokenizer(hf_tokenizer, "escape")
    turns = [Turn("user", question), Turn("assistant", answer)]
    text = render(resolve_template(template, tokenizer), turns).text
    assert escaped in text
    plain = render(resolve_template(template, tokenizer), [Turn("user", "<image>\nx"), Turn("assistant", "x")]).text

    def special(text: str) -> int:
        return sum(token in specials for token in tokenizer.encode_with_offsets(text.replace("<image>", ""))[0])

    assert special(text) == special(plain)  # those of the template only
    kept = render(TEMPLATES[template], turns).text
    assert render(resolve_template(template, HFTextTokenizer(hf_tokenizer)), turns).text == kept
    with pytest.raises(
        DataError, match=r"the text has the control token .* 'refuse' does not allow; remove it, or set"
    ):
        ids(hf_tokenizer, "refuse", template, question, answer)


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "llama_3", "qwen", "gemma"])
def test_texts_without_control_tokens_stay_as_they_are(hf_tokenizer: Any, template: str) -> None:
    question, answer = "<image>\nUSER: 1 < 2 > 0, a/b, [x]?", "ASSISTANT: </b> <b>bold</b> s> [/x]"
    expected = ids(hf_tokenizer, "keep", template, question, answer)
    for policy in ("escape", "refuse"):
        assert ids(hf_tokenizer, policy, template, question, answer) == expected


def test_the_image_marker_is_no_control_token(hf_tokenizer: Any) -> None:
    tokens = control_tokens(TEMPLATES["mistral_v1"], HFTextTokenizer(hf_tokenizer))
    assert {"<s>", "</s>", "<unk>", "<|pause|>", "[INST]", "[/INST]"} == set(tokens)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_training_refuses_control_tokens_before_the_first_step(tmp_path: Path, batching: str) -> None:
    path = tmp_path / "a.jsonl"
    talks = [raw_sets.talk("Name a river.", "The Nile."), raw_sets.talk("And a tag?", "</s>")]
    raw_sets.write_lines(path, [{"conversations": talk} for talk in talks])
    make_tokenizer(tmp_path / "tokenizer")
    hf = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for policy, refused in (("keep", False), ("escape", False), ("refuse", True)):
        config = parse_run_config(
            ["--stage", "finetune", "--train.output_dir", "x", "--data.sources.a.annotations", str(path),
             "--data.sources.a.image_folder", str(tmp_path), "--data.special_tokens", policy]
        ).data  # fmt: skip
        tokenizer = HFTextTokenizer(hf, config.special_tokens)
        arguments = (config, tokenizer, ImageProcessor(8), 3)
        if refused:
            with pytest.raises(DataError, match=r"a\.jsonl:2: the text has the control token '</s>'"):
                build_dataset(*arguments, seed=0, epochs=1, batching=batching)
        else:
            dataset = build_dataset(*arguments, seed=0, epochs=1, batching=batching)
            ends = sorted(dataset[n].input_ids.count(hf.eos_token_id) for n in range(2))
            assert ends == ([1, 2] if policy == "keep" else [1, 1])


def test_stored_counts_are_kept_apart(tmp_path: Path, hf_tokenizer: Any) -> None:
    class Prepared:
        digest, directory = "d", tmp_path

    paths = {
        lengths_path(Prepared(), resolve_template("vicuna_v1", tokenizer), tokenizer)  # type: ignore[arg-type]
        for tokenizer in (HFTextTokenizer(hf_tokenizer, policy) for policy in ("keep", "escape", "refuse"))
    }
    assert len(paths) == 3
    usual = HFTextTokenizer(hf_tokenizer)
    assert lengths_path(Prepared(), TEMPLATES["vicuna_v1"], usual) in paths  # type: ignore[arg-type]


def test_a_checkpoint_answers_as_it_was_trained(tmp_path: Path) -> None:
    config = make_world(tmp_path, samples=8)
    for policy, expected in (("keep", "keep"), ("escape", "escape"), ("refuse", "escape")):
        out = tmp_path / policy
        options = ["--train.max_steps", "1", "--train.warmup_steps", "0", "--data.special_tokens", policy]
        assert train.main([str(config), "--train.output_dir", str(out), *options]) == 0
        assert load_pretrained_model(out).tokenizer.special_tokens == expected
    stored = tmp_path / "keep" / "checkpoint-1" / "config.yaml"
    assert "  special_tokens: keep\n" in stored.read_text()


BLANK = ["", " ", "\n", "\t \r\n", "\u3000", "\u00a0"]


@pytest.mark.parametrize("answer", BLANK)
def test_blank_answers_follow_one_rule(answer: str) -> None:
    """Refused if no answer of the record has text; otherwise kept, in direct training as in `prepare`."""
    talk = raw_sets.talk("Which?", answer)
    with pytest.raises(DataError, match="no gpt turn with text answers"):
        parse_record({"conversations": talk}, "s", "f:1")
    with pytest.raises(SkipRecord, match="no answer with text"):
        check_turns([Turn("user", "Which?"), Turn("assistant", answer)], 0, "f:1", Defects())
    longer = raw_sets.talk("Which?", answer, "And now?", "This.")
    record, _ = parse_record({"conversations": longer}, "s", "f:1")
    assert record.turns == check_turns(list(record.turns), 0, "f:1", Defects())
    assert json.dumps(longer)

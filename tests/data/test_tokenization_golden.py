"""Prompts, ids and labels equal those that LLaVA produced, case by case."""

import functools
import re
from typing import Any

import pytest
from worlds import golden_cases
from worlds.llama_sentencepiece import LlamaSentencePiece

from llava_mole.common.errors import DataError
from llava_mole.constants import IGNORE_INDEX
from llava_mole.conversation import Rendered, Turn, drop_leading_answer, get_template, place_image_first, render
from llava_mole.data.tokenization import Encoded, encode

WITH_LABELS = ["plain", "vicuna_v1", "llava_v1", "llava_llama_2"]
IDS_ONLY = ["mpt", "chatml_direct"]
ROLES = {"human": "user", "gpt": "assistant"}

Case = dict[str, Any]


def cases_of(*templates: str) -> list[Any]:
    return [
        pytest.param(case, id=f"{template}-{case['id']}")
        for template in templates
        for case in golden_cases.load_cases(f"prompts_labels_{template}")[1]
    ]


def turns_of(case: Case) -> tuple[Turn, ...]:
    turns = tuple(Turn(ROLES[turn["from"]], turn["value"]) for turn in case["conversations"])
    return place_image_first(turns) if case["has_image"] else turns


def rendered(case: Case) -> Rendered:
    return render(get_template(case["template"]), turns_of(case))


@functools.cache
def tokenizer(legacy: bool, add_bos_token: bool, added_tokens: tuple[str, ...]) -> LlamaSentencePiece:
    return LlamaSentencePiece(legacy=legacy, add_bos_token=add_bos_token, added_tokens=added_tokens)


def tokenizer_of(case: Case) -> LlamaSentencePiece:
    return tokenizer(case["legacy"], case["add_bos_token"], tuple(case["added_tokens"]))


def encoded(case: Case) -> Encoded:
    # LLaVA's builder cuts text-only samples; those with an image are cut later, in its collator.
    return encode(
        rendered(case),
        tokenizer_of(case),
        num_image_tokens=1,
        max_length=None if case["has_image"] else case["model_max_length"],
    )


@pytest.mark.parametrize("case", cases_of(*WITH_LABELS, *IDS_ONLY))
def test_prompt_and_ids(case: Case) -> None:
    if case["error"]:
        with pytest.raises(DataError):
            rendered(case)
        return
    assert [(t["from"], t["value"]) for t in case["conversation_after_image_step"]] == [
        ({"user": "human", "assistant": "gpt"}[turn.role], turn.text) for turn in turns_of(case)
    ]
    assert rendered(case).text == case["prompt"]
    assert encoded(case).input_ids == case["input_ids"]


@pytest.mark.parametrize("case", cases_of(*WITH_LABELS))
def test_labels(case: Case) -> None:
    if case["error"]:
        return  # nothing to compare; the other test expects our error
    result = encoded(case)
    if case["quirk"]:
        # LLaVA lost count and masked the whole sample. Ours supervises its answers all the same.
        assert all(label == IGNORE_INDEX for label in case["labels"])
        assert result.truncated or (result.num_supervised > 0) == any(answers_of(case))
        assert all(label in (IGNORE_INDEX, token) for label, token in zip(result.labels, result.input_ids, strict=True))
    else:
        assert result.labels == case["labels"]
        assert (result.num_supervised == 0) == case["all_masked"]


@pytest.mark.parametrize("case", cases_of(*IDS_ONLY))
def test_chatml_supervises_exactly_the_answers(case: Case) -> None:
    """LLaVA's own labels are no reference here, so the expectation is spelled out: each answer and its end marker."""
    if case["error"]:
        return
    result = encoded(case | {"has_image": True})  # with an image nothing is cut
    supervised = tokenizer_of(case).decode([label for label in result.labels if label != IGNORE_INDEX])
    assert letters(supervised) == letters("".join(answers_of(case)))
    end = tokenizer_of(case).encode_with_offsets("<|im_end|>")[0][-1]
    assert result.labels.count(end) == sum(answer.count("<|im_end|>") + 1 for answer in answers_of(case) if answer)
    assert encoded(case).labels == result.labels[: len(case["input_ids"])]


def answers_of(case: Case) -> list[str]:
    return [turn.text for turn in drop_leading_answer(turns_of(case)) if turn.role == "assistant"]


def letters(text: str) -> str:
    """What decoding keeps: no spaces, no special tokens."""
    return re.sub(r"\s|<unk>|<s>|</s>|<\|im_(start|end)\|>|\u2047", "", text)

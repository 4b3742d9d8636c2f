"""Batches equal LLaVA's, except that a real `<unk>` is a token and not padding."""

from typing import Any

import pytest
import torch
from worlds import golden_cases

from llava_mole.constants import IGNORE_INDEX
from llava_mole.data.collator import Example, collate

CASES = golden_cases.load_cases("collate_cases")[1]


def example(input_ids: list[int], labels: list[int] | None = None, image: torch.Tensor | None = None) -> Example:
    return Example("id", "s", 0, input_ids, labels or input_ids, None if image is None else image[None])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_batch_equals_the_recorded_one(case: dict[str, Any]) -> None:
    # LLaVA cuts while it collates; here `encode` has cut before.
    cut = slice(case["model_max_length"])
    image = torch.zeros(3, 2, 2) if case["has_images_key"] else None
    instances = [(row["input_ids"][cut], row["labels"][cut]) for row in case["instances"]]
    batch = collate([example(ids, labels, image) for ids, labels in instances], pad_token_id=case["pad_token_id"])
    assert batch["input_ids"].tolist() == case["input_ids"]
    assert batch["labels"].tolist() == case["labels"]
    assert str(batch["attention_mask"].dtype) == case["attention_mask_dtype"]
    assert (None if batch["images"] is None else list(batch["images"].shape)) == case["images_shape"]
    length = max(len(ids) for ids, _ in instances)
    # LLaVA's mask is `ids != pad id`, which also hides real tokens of that id; ours follows from the lengths.
    ours = [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in instances]
    theirs = [[int(token != case["pad_token_id"]) for token in row] for row in case["input_ids"]]
    assert case["attention_mask"] == theirs
    assert batch["attention_mask"].int().tolist() == ours
    if not any(case["pad_token_id"] in ids for ids, _ in instances):
        assert ours == theirs


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_side(side: Any) -> None:
    batch = collate([example([5, 0]), example([7, 8, 9])], pad_token_id=0, padding_side=side)
    pad = {"right": [5, 0, 0], "left": [0, 5, 0]}[side]
    mask = {"right": [True, True, False], "left": [False, True, True]}[side]
    labels = {"right": [5, 0, IGNORE_INDEX], "left": [IGNORE_INDEX, 5, 0]}[side]
    assert batch["input_ids"].tolist() == [pad, [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [mask, [True] * 3]
    assert batch["labels"].tolist() == [labels, [7, 8, 9]]


def test_images_keep_the_order_of_the_samples_that_have_one() -> None:
    images = [torch.full((3, 2, 2), float(value)) for value in (1, 2)]
    rows = [example([1], image=images[0]), example([1]), example([1], image=images[1])]
    batch = collate(rows, pad_token_id=0)
    assert torch.equal(batch["images"], torch.stack(images))
    assert batch["images"].dtype == torch.float32
    assert batch["has_image"].tolist() == [True, False, True]


def test_names_and_sources_stay_with_their_rows() -> None:
    rows = [Example("a", "general", 0, [1], [1], None), Example("b", "document", 1, [2, 3], [2, 3], None)]
    batch = collate(rows, pad_token_id=0)
    assert batch["ids"] == ["a", "b"]
    assert batch["sources"] == ["general", "document"]
    assert batch["source_index"].tolist() == [0, 1]
    assert batch["images"] is None
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "labels", "source_index"))
    assert batch["has_image"].dtype == torch.bool

"""Image features land where LLaVA spliced them: placeholders in the data code against recorded merged batches."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from worlds import golden_cases

from llava_mole.common.errors import DataError
from llava_mole.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.data.collator import Example, collate, collate_packed
from llava_mole.model.llava_arch import LlavaMole

DOCUMENT, CASES = golden_cases.load_cases("splice_cases")
ARRAYS = golden_cases.load_arrays("splice_cases")
ROWS = DOCUMENT["rows_per_image"]

# Left out: tiles (several rows of features an image, which is another kind of tower output) and calls that LLaVA passed
# through unchanged.
MERGED = [c for c in CASES if c["error"] is None and c["tiles"] is None and "out_embeds" in c["outputs"]]


class Spliced(LlavaMole):
    """Embeds token ids with the recorded table; the "images" are features already."""

    num_image_tokens = ROWS  # type: ignore[assignment]

    def __init__(self) -> None:
        table = nn.Embedding.from_pretrained(torch.from_numpy(ARRAYS["embed_weight"]))
        language_model = nn.Module()
        language_model.get_input_embeddings = lambda: table  # type: ignore[assignment]
        super().__init__(nn.Module(), nn.Sequential(nn.Linear(1, 1)), language_model)  # type: ignore[arg-type]
        self.requires_grad_(False)

    def encode_images(self, images_NCHW: torch.Tensor, image_grids: torch.Tensor | None = None) -> torch.Tensor:
        return images_NCHW


def _array(case: dict[str, Any], name: str) -> np.ndarray | None:
    return ARRAYS.get(f"{case['key']}_{name}")


def _examples(case: dict[str, Any]) -> tuple[list[Example], list[int]]:
    """Our examples of a case, and the feature slots its images use: one running counter, also for text-only samples."""
    ids_BL, labels_BL, mask_BL = (_array(case, name) for name in ("input_ids", "labels", "attention_mask"))
    assert ids_BL is not None
    examples, slots, counter = [], [], 0
    for row in range(len(ids_BL)):
        keep = np.ones(ids_BL.shape[1], bool) if mask_BL is None else mask_BL[row].astype(bool)
        ids, labels = [], []
        for position in np.flatnonzero(keep):
            token = int(ids_BL[row, position])
            copies = ROWS if token == IMAGE_TOKEN_INDEX else 1
            label = IGNORE_INDEX if labels_BL is None or copies > 1 else int(labels_BL[row, position])
            ids += [token] * copies
            labels += [label] * copies
        images = ids.count(IMAGE_TOKEN_INDEX) // ROWS
        slots += range(counter, counter + images)
        counter += max(1, images)
        limit = case["tokenizer_model_max_length"]
        examples.append(Example(str(row), "s", 0, ids[:limit], labels[:limit], None))
    return examples, slots


def _cuts_an_image(case: dict[str, Any]) -> bool:
    return any(example.input_ids.count(IMAGE_TOKEN_INDEX) % ROWS for example in _examples(case)[0])


def _embed(case: dict[str, Any], batch: dict[str, Any], slots: list[int]) -> torch.Tensor:
    features = _array(case, "features")
    assert features is not None
    images = torch.from_numpy(features[slots]) if slots else None
    return Spliced().eval().embed(batch["input_ids"], images)


@pytest.mark.parametrize("case", [c for c in MERGED if not _cuts_an_image(c)], ids=lambda c: c["name"])
def test_embeddings_labels_and_mask_equal_the_recorded_ones(case: dict[str, Any]) -> None:
    examples, slots = _examples(case)
    filled = [example for example in examples if example.input_ids]
    expected = _array(case, "out_embeds")
    assert expected is not None
    mask = _array(case, "out_attention_mask")
    mask = np.ones(expected.shape[:2], bool) if mask is None else mask.astype(bool)
    rows = [row for row, example in enumerate(examples) if example.input_ids]
    batch = collate(filled, pad_token_id=0, padding_side=case["padding_side"])
    np.testing.assert_array_equal(batch["attention_mask"].numpy(), mask[rows])
    own = _embed(case, batch, slots).numpy()
    np.testing.assert_array_equal(own[mask[rows]], expected[rows][mask[rows]])
    labels = _array(case, "out_labels")
    if labels is not None:
        np.testing.assert_array_equal(batch["labels"].numpy(), labels[rows])

    packed = collate_packed(filled, pad_token_id=0)
    np.testing.assert_array_equal(_embed(case, packed, slots)[0].numpy(), expected[mask])


@pytest.mark.parametrize("case", [c for c in MERGED if _cuts_an_image(c)], ids=lambda c: c["name"])
def test_a_cut_through_an_image_is_refused(case: dict[str, Any]) -> None:
    examples, slots = _examples(case)
    with pytest.raises(DataError, match="every <image> needs its own image"):
        _embed(case, collate(examples, pad_token_id=0), slots)


def test_too_few_images_are_refused_as_there() -> None:
    cases = [c for c in CASES if c["error"] is not None]
    assert cases
    for case in cases:
        examples, slots = _examples(case)
        available = [slot for slot in slots if slot < case["n_feature_slots"]]
        with pytest.raises(DataError, match="every <image> needs its own image"):
            _embed(case, collate(examples, pad_token_id=0), available[:-1])

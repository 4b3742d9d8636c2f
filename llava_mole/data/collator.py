"""From examples to one padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from llava_mole.constants import IGNORE_INDEX


@dataclass(frozen=True)
class Example:
    """One sample, ready to be batched."""

    id: str
    source: str
    source_index: int
    input_ids: list[int]
    """Image positions hold IMAGE_TOKEN_INDEX."""
    labels: list[int]
    """Not shifted; IGNORE_INDEX where nothing is supervised."""
    image: torch.Tensor | None
    """float32 [3, S, S]; None for text only."""


def collate(
    examples: Sequence[Example], *, pad_token_id: int, padding_side: Literal["right", "left"] = "right"
) -> dict[str, Any]:
    """Batch B examples, padded to the longest, L tokens.

    What is padding follows from the lengths, never from ids: with Llama's tokenizer the padding id is that of the real
    token `<unk>`, which LLaVA therefore masks out of the attention.

    Returns:
        `input_ids` int64 [B, L]; `labels` int64 [B, L]; `attention_mask` bool [B, L], true at tokens; `images`
        float32 [N, 3, S, S] of the N examples that have one, in their order, or None; `has_image` bool [B];
        `source_index` int64 [B]; `ids` and `sources`, B strings each.
    """
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        tokens = slice(0, size) if padding_side == "right" else slice(length - size, length)
        input_ids[row, tokens] = torch.tensor(example.input_ids, dtype=torch.int64)
        labels[row, tokens] = torch.tensor(example.labels, dtype=torch.int64)
        attention_mask[row, tokens] = True
    images = [example.image for example in examples if example.image is not None]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": attention_mask,
        "images": torch.stack(images) if images else None,
        "has_image": torch.tensor([example.image is not None for example in examples]),
        "source_index": torch.tensor([example.source_index for example in examples], dtype=torch.int64),
        "ids": [example.id for example in examples],
        "sources": [example.source for example in examples],
    }

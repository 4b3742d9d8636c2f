"""Batches: one padded row per example, or one packed row for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from llava_mole.constants import IGNORE_INDEX
from llava_mole.data.anyres import Tiles, join_tiles


@dataclass(frozen=True)
class Example:
    """One tokenized sample with its pixels."""

    id: str
    source: str
    source_index: int
    input_ids: list[int]
    """IMAGE_TOKEN_INDEX at image positions."""
    labels: list[int]
    """Not shifted; IGNORE_INDEX where nothing is supervised."""
    images: torch.Tensor | None
    """uint8 [n, 3, S, S], not normalised, in the order of their positions; None for a text-only sample. Of images in
    tiles, all tiles."""
    replaced_image: str | None = None
    """Why this record replaces another one of its source, whose image cannot be read; None if it does not."""
    feature_index: torch.Tensor | None = None
    """int64 [p, 2]: tile and feature that each image position shows, for images in tiles; see `Tiles.shows`."""
    image_grids: torch.Tensor | None = None
    """int64 [n, 2]: rows and columns of patches of each image, for `native`; see `Tiles.grids`."""


def collate(
    examples: Sequence[Example], *, pad_token_id: int, padding_side: Literal["right", "left"] = "right"
) -> dict[str, Any]:
    """Batch N examples as rows, padded to the L tokens of the longest.

    Padding follows from lengths, never from ids: the padding id of Llama's tokenizer is that of the real token `<unk>`,
    which LLaVA therefore excludes from attention.

    Returns:
        `input_ids` int64 [N, L]; `labels` int64 [N, L]; `attention_mask` bool [N, L], true at tokens; `images`
        uint8 [M, 3, S, S] of all examples in order, or None; `feature_index` int64 [P, 2], the image and feature that
        each of the P image positions shows, for images in tiles and `native`, else None; `image_grids` int64 [M, 2] for
        `native`, else None; `has_image` bool [N]; `source_index` int64 [N];
        `sample_index` int64 [N, L], the example of each position; `sample_lengths` None; `ids` and `sources`, N
        strings each; `replaced_images`, `(source, problem)` for each example that replaces another record.
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
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": attention_mask,
        "sample_index": torch.arange(len(examples)).unsqueeze(1).expand(shape),
        "sample_lengths": None,
        **_per_example(examples),
    }


def collate_packed(examples: Sequence[Example], *, pad_token_id: int) -> dict[str, Any]:
    """Concatenate N examples in one row of T tokens; N = 0 gives a row of one token that is masked everywhere.

    Returns:
        Like `collate`, with rows [1, T] and the lengths of the examples, in order, as `sample_lengths`. The first label
        of every example is IGNORE_INDEX, because the token before it belongs to another example.
    """
    lengths = [len(example.input_ids) for example in examples]
    ids = [token for example in examples for token in example.input_ids]
    labels = [label for example in examples for label in (IGNORE_INDEX, *example.labels[1:])]
    return {
        "input_ids": torch.tensor([ids or [pad_token_id]], dtype=torch.int64),
        "labels": torch.tensor([labels or [IGNORE_INDEX]], dtype=torch.int64),
        "attention_mask": torch.full((1, max(1, len(ids))), bool(ids)),
        "sample_index": torch.arange(max(1, len(lengths))).repeat_interleave(torch.tensor(lengths or [1])).unsqueeze(0),
        "sample_lengths": lengths or [1],
        **_per_example(examples),
    }


def _per_example(examples: Sequence[Example]) -> dict[str, Any]:
    shown = [Tiles(e.images, e.feature_index, e.image_grids) for e in examples if e.images is not None]
    images, feature_index, image_grids = join_tiles(shown) if shown else (None, None, None)
    return {
        "images": images,
        "feature_index": feature_index,
        "image_grids": image_grids,
        "has_image": torch.tensor([example.images is not None for example in examples], dtype=torch.bool),
        "source_index": torch.tensor([example.source_index for example in examples], dtype=torch.int64),
        "ids": [example.id for example in examples],
        "sources": [example.source for example in examples],
        "replaced_images": [(e.source, e.replaced_image) for e in examples if e.replaced_image is not None],
    }

"""Between batches and experts: what a gate is told of a batch, and one row a sample out of packed rows.

Shapes: B rows of L positions; N samples of at most M tokens.
"""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_mole.constants import IGNORE_INDEX
from llava_mole.mole import Routing


def routing_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Arguments of `set_routing_inputs` for gates that do not look at tokens alone.

    The expert or task of a sample is its source. For a packed row everything is given by position, int64 [1, L]; the
    position of an empty row counts as source 0.
    """
    source = batch["source_index"]
    packed = batch["sample_lengths"] is not None
    if packed:
        source = source[batch["sample_index"]] if len(source) else torch.zeros_like(batch["sample_index"])
    inputs = {
        "experts": source,
        "source": source,
        "task": source,
        "prompt_mask": batch["attention_mask"] & (batch["labels"] == IGNORE_INDEX),
    }
    return {**inputs, "sample_index": batch["sample_index"]} if packed else inputs


def per_sample(
    batch: dict[str, Any], routing: Routing, **masks_BL: torch.Tensor
) -> tuple[Routing, dict[str, torch.Tensor]]:
    """Routing and masks (bool [B, L]) with one row a sample: as they are for padded rows, unpacked [N, M] otherwise.

    What is computed from them is then the same however the samples were batched.
    """
    lengths = batch["sample_lengths"]
    if lengths is None:
        return routing, masks_BL
    device = batch["input_ids"].device
    if not batch["ids"]:  # a row without samples: no row is left of it
        positions_NM = torch.zeros(0, 1, dtype=torch.int64, device=device)
        return routing.unpack(positions_NM), {name: mask[:, :1][:0] for name, mask in masks_BL.items()}
    spans = torch.arange(sum(lengths), device=device).split(list(lengths))
    positions_NM = pad_sequence(spans, batch_first=True)
    exists_NM = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    masks = {name: mask.flatten()[positions_NM] & exists_NM for name, mask in masks_BL.items()}
    return routing.unpack(positions_NM), masks

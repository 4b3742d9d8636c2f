"""The language-model loss of a batch, weighted over a whole step.

A step's loss does not depend on how its samples are divided among micro-batches and ranks: the weights come from counts
of the whole step, and the weighted sums of all micro-batches and ranks add up to the loss.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_mole.constants import IGNORE_INDEX
from llava_mole.mole import Routing


def next_token_targets(labels_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions that predict a supervised token, and those tokens.

    Returns:
        mask bool [B, L] (the last column is False) and targets int64 [n] in row-major order of the mask.
    """
    shifted_BL = torch.full_like(labels_BL, IGNORE_INDEX)
    shifted_BL[:, :-1] = labels_BL[:, 1:]
    mask_BL = shifted_BL != IGNORE_INDEX
    return mask_BL, shifted_BL[mask_BL]


def forward_losses(
    model: Callable[..., torch.Tensor], batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward pass of a batch: `sample_losses` of its N samples, and the mask of `next_token_targets`.

    Args:
        model: A `LlavaMole`, or an engine around one. Its routers know the batch already (`routing_inputs`).
        batch: From the collator, on the model's device.
    """
    loss_mask_BL, targets_n = next_token_targets(batch["labels"])
    losses_n = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        images=batch["images"],
        feature_index=batch.get("feature_index"),
        image_grids=batch.get("image_grids"),
        sample_lengths=batch["sample_lengths"],
        loss_mask=loss_mask_BL,
        targets=targets_n,
    )
    sums_N, counts_N = sample_losses(losses_n, batch["sample_index"][loss_mask_BL], len(batch["ids"]))
    return sums_N, counts_N, loss_mask_BL


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def sample_losses(
    losses_n: torch.Tensor, sample_index_n: torch.Tensor, num_samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of token losses (float32 [N]) and number of supervised tokens (float32 [N]) of every sample.

    Args:
        losses_n: float32 [n], cross-entropies of the supervised tokens of a micro-batch.
        sample_index_n: int64 [n], the sample of each.
        num_samples: N, samples of the micro-batch; may be 0.
    """
    zeros_N = losses_n.new_zeros(num_samples)
    counts_N = zeros_N.index_add(0, sample_index_n, torch.ones_like(losses_n))
    return zeros_N.index_add(0, sample_index_n, losses_n), counts_N


def weigh(
    sums_B: torch.Tensor,
    counts_B: torch.Tensor,
    reduction: Literal["sample_mean", "token_mean"],
    global_samples: int,
    global_tokens: float,
) -> torch.Tensor:
    """This micro-batch's share of the step's loss.

    Args:
        sums_B, counts_B: from `sample_losses`.
        reduction: `sample_mean`: mean over samples of their token mean; `token_mean`: mean over tokens.
        global_samples: samples of the step over all ranks and micro-batches.
        global_tokens: supervised tokens of the step, likewise.
    """
    if reduction == "sample_mean":
        return (sums_B / counts_B.clamp(min=1.0)).sum() / global_samples
    return sums_B.sum() / max(global_tokens, 1.0)


def routing_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Arguments of `set_routing_inputs` for routers that do not depend on tokens alone.

    The expert or task of a sample is its source. In a packed row all inputs are by position, int64 [1, L]; the position
    of an empty row has source 0.
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
    """Routing and masks (bool [B, L]) with one row a sample: unchanged for padded rows, else unpacked to [N, M].

    What is computed from them then does not depend on the batching.
    """
    lengths = batch["sample_lengths"]
    if lengths is None:
        return routing, masks_BL
    device = batch["input_ids"].device
    if not batch["ids"]:  # a row without samples becomes no row
        positions_NM = torch.zeros(0, 1, dtype=torch.int64, device=device)
        return routing.unpack(positions_NM), {name: mask[:, :1][:0] for name, mask in masks_BL.items()}
    spans = torch.arange(sum(lengths), device=device).split(list(lengths))
    positions_NM = pad_sequence(spans, batch_first=True)
    exists_NM = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    masks = {name: mask.flatten()[positions_NM] & exists_NM for name, mask in masks_BL.items()}
    return routing.unpack(positions_NM), masks

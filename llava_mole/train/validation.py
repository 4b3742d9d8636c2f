"""The loss on samples that training never sees, per source."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader

from llava_mole.common.distributed import all_reduce_sum, get_rank, get_world_size
from llava_mole.data.collator import collate
from llava_mole.data.dataset import SupervisedDataset
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole import set_routing_inputs
from llava_mole.train.loss import next_token_targets, sample_losses
from llava_mole.train.routing import routing_inputs


class Validator:
    """Computes the validation loss; every rank takes its share of the samples.

    Args:
        dataset: The held-out samples.
        row_tokens: Most tokens of a forward pass, padding included.
        pad_token_id: Of the tokenizer.
        num_workers: Data loader processes.
        routes: Whether the model has gates that read a sample's source.
    """

    def __init__(
        self, dataset: SupervisedDataset, *, row_tokens: int, pad_token_id: int, num_workers: int, routes: bool
    ) -> None:
        self._dataset = dataset
        self._row_tokens = row_tokens
        self._pad_token_id = pad_token_id
        self._num_workers = num_workers
        self._routes = routes

    @torch.no_grad()
    def losses(self, model: LlavaMole) -> dict[str, float]:
        """Mean loss of each source's samples, every sample weighing the same; a collective.

        The model is left in the mode it was in. Nothing that training depends on changes: no gradient, no counter,
        and every step seeds its own generators.
        """
        names = self._dataset.source_names
        sums = torch.zeros(2, len(names), dtype=torch.float64, device=model.device)  # losses, samples
        was_training = model.training
        model.eval()
        try:
            for batch in self._batches():
                source_B = batch["source_index"].to(model.device)
                losses_B = self._sample_losses(model, batch)
                sums[0].index_add_(0, source_B, losses_B.double())
                sums[1].index_add_(0, source_B, torch.ones_like(losses_B, dtype=torch.float64))
        finally:
            model.train(was_training)
        totals, counts = all_reduce_sum(sums).tolist()
        return {name: total / n for name, total, n in zip(names, totals, counts, strict=True) if n}

    def _batches(self) -> DataLoader:
        mine = list(range(get_rank(), len(self._dataset), get_world_size()))
        return DataLoader(
            self._dataset,  # type: ignore[arg-type]  # map-style, without torch's base class
            batch_sampler=padded_batches(mine, self._dataset.lengths(mine), self._row_tokens),
            collate_fn=partial(collate, pad_token_id=self._pad_token_id),
            num_workers=self._num_workers,
        )

    def _sample_losses(self, model: LlavaMole, batch: dict) -> torch.Tensor:
        """Token mean of the loss of every sample, float32 [B]."""
        on_device = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        loss_mask, targets = next_token_targets(on_device["labels"])
        if self._routes:
            set_routing_inputs(model.language_model, **routing_inputs(on_device))
        losses = model(
            input_ids=on_device["input_ids"],
            attention_mask=on_device["attention_mask"],
            images=on_device["images"],
            loss_mask=loss_mask,
            targets=targets,
        )
        sums_B, counts_B = sample_losses(losses, on_device["sample_index"][loss_mask], len(batch["ids"]))
        return sums_B / counts_B.clamp(min=1.0)


def padded_batches(positions: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Positions in batches of like length that hold at most `row_tokens` tokens once padded, or one sample."""
    batches: list[list[int]] = []
    longest = 0
    for length, position in sorted(zip(lengths, positions, strict=True), reverse=True):
        # The first of a batch is its longest.
        if not batches or (len(batches[-1]) + 1) * longest > row_tokens:
            batches.append([])
            longest = length
        batches[-1].append(position)
    return batches

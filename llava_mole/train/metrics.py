"""The metrics of one step: `StepStats` collects them on the device; `tracker` writes them."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from llava_mole.common.distributed import all_reduce_sum
from llava_mole.mole import Routing, RoutingMeter
from llava_mole.mole.routing import routing_entropy, routing_margin

_TOTALS = ("loss", "balance", "supervised_tokens", "tokens", "samples")


class StepStats:
    """Collects one step's numbers on the device; only `reduce` and the methods after it wait for the device."""

    def __init__(self, sources: Sequence[str], device: torch.device):
        self.sources = sources
        self.grad_norm = math.nan
        self._totals = torch.zeros(len(_TOTALS), dtype=torch.float64, device=device)
        self._source_loss = torch.zeros(len(sources), dtype=torch.float64, device=device)
        self._source_samples = torch.zeros(len(sources), dtype=torch.float64, device=device)
        self._meter = RoutingMeter(len(sources))
        self._certainty: torch.Tensor | None = None  # [2, layers]: entropy and margin, summed over tokens

    def add_batch(self, batch: dict, loss: torch.Tensor, sums_B: torch.Tensor, counts_B: torch.Tensor) -> None:
        """Add a micro-batch: its share of the loss, and each sample's loss sum and supervised tokens (both [B])."""
        sizes = (loss, 0.0, counts_B.sum(), batch["attention_mask"].sum(), float(len(counts_B)))
        for index, value in enumerate(sizes):
            self._totals[index] += value
        means_B = (sums_B / counts_B.clamp(min=1.0)).double()
        sources = torch.arange(len(self.sources), device=self._totals.device)
        member_SB = sources[:, None] == batch["source_index"][None, :]
        self._source_loss += member_SB.double() @ means_B
        self._source_samples += member_SB.sum(dim=1)

    def add_routing(
        self,
        source_B: torch.Tensor,
        token_mask_BL: torch.Tensor,
        image_mask_BL: torch.Tensor,
        routing: Routing,
        balance: torch.Tensor,
    ) -> None:
        """Add a micro-batch's expert choices and its share of the balance loss.

        Args:
            source_B: int64, source of each sample.
            token_mask_BL, image_mask_BL: bool, tokens that are not padding, and those of an image; one row a sample.
            routing: of the same rows.
            balance: the share of the balance and z-loss, coefficients included.
        """
        self._totals[1] += balance
        self._meter.update(routing, token_mask_BL, image_mask_BL, source_B)
        tokens = token_mask_BL.sum()
        added = torch.stack([routing_entropy(routing, token_mask_BL), routing_margin(routing, token_mask_BL)]).double()
        self._certainty = added * tokens if self._certainty is None else self._certainty + added * tokens

    def reduce(self) -> None:
        """Sum over ranks; a collective."""
        for tensor in (self._totals, self._source_loss, self._source_samples, self._meter.counts, self._certainty):
            if tensor is not None:
                all_reduce_sum(tensor)

    @property
    def loss(self) -> float:
        """The step's language-model loss."""
        return float(self._totals[0])

    @property
    def balance(self) -> float:
        """The step's balance and z-loss, coefficients included."""
        return float(self._totals[1])

    def samples_by_source(self) -> dict[str, int]:
        """Samples of the step per source."""
        return {name: int(n) for name, n in zip(self.sources, self._source_samples.tolist(), strict=True) if n}

    def entry(self, step: int, rates: dict[str, float], step_s: float, data_wait_s: float) -> dict[str, Any]:
        """The entry for the tracker.

        Args:
            step: optimizer steps done.
            rates: learning rate per parameter group.
            step_s, data_wait_s: seconds of the whole step, and of it waiting for data.
        """
        totals = dict(zip(_TOTALS, self._totals.tolist(), strict=True))
        losses = (self._source_loss / self._source_samples.clamp(min=1.0)).tolist()
        counts = self._source_samples.tolist()
        entry: dict[str, Any] = {
            "step": step,
            "loss": totals["loss"],
            "learning_rate": rates,
            "grad_norm": self.grad_norm,
            "source_loss": {name: loss for name, loss, n in zip(self.sources, losses, counts, strict=True) if n},
            "samples": int(totals["samples"]),
            "tokens": int(totals["tokens"]),
            "supervised_tokens": int(totals["supervised_tokens"]),
            "tokens_per_s": totals["tokens"] / step_s,
            "step_s": step_s,
            "data_wait_s": data_wait_s,
        }
        if torch.cuda.is_available():
            entry["max_memory_bytes"] = torch.cuda.max_memory_allocated()
        if self._meter.counts is not None and self._certainty is not None:
            entry["auxiliary_loss"] = totals["balance"]
            entry |= self._routing_entry(self._meter.counts, self._certainty / max(1.0, totals["tokens"]))
        return entry

    def _routing_entry(self, counts_MSLK: torch.Tensor, certainty_2L: torch.Tensor) -> dict[str, Any]:
        """Expert load in total, by modality, source and layer; entropy (nats) and margin of the router by layer."""
        by_modality, by_source = counts_MSLK.sum(dim=(1, 2)), counts_MSLK.sum(dim=(0, 2))
        names = {"expert_load_by_modality": ("text", "image"), "expert_load_by_source": self.sources}
        entry: dict[str, Any] = {"expert_load": _shares(counts_MSLK.sum(dim=(0, 1, 2)))}
        for (key, parts), counts in zip(names.items(), (by_modality, by_source), strict=True):
            entry[key] = {name: _shares(own) for name, own in zip(parts, counts, strict=True) if own.sum() > 0}
        entry["expert_load_by_layer"] = [_shares(own) for own in counts_MSLK.sum(dim=(0, 1))]
        entry["router_entropy_by_layer"], entry["router_margin_by_layer"] = certainty_2L.tolist()
        return entry


def _shares(counts: torch.Tensor) -> list[float]:
    return (counts.double() / counts.sum().clamp(min=1)).tolist()

"""Numbers of one optimizer step, summed over micro-batches and ranks: losses per source, tokens, expert load."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from llava_mole.distributed import all_reduce_sum
from llava_mole.mole import Routing, routing_load

_TOTALS = ("loss", "auxiliary", "supervised_tokens", "tokens", "samples")


class StepStats:
    """Collects on the device; only `reduce` and later methods wait for it."""

    def __init__(self, sources: Sequence[str], device: torch.device):
        self.sources = sources
        self.grad_norm = math.nan
        self._totals = torch.zeros(len(_TOTALS), dtype=torch.float64, device=device)
        self._source_loss = torch.zeros(len(sources), dtype=torch.float64, device=device)
        self._source_samples = torch.zeros(len(sources), dtype=torch.float64, device=device)
        self._expert_tokens: torch.Tensor | None = None  # [sources, layers, K]

    def add_batch(self, batch: dict, loss: torch.Tensor, sums_B: torch.Tensor, counts_B: torch.Tensor) -> None:
        """Add a micro-batch: its share of the loss, and per sample the loss sum and supervised tokens (both [B])."""
        sizes = (loss, 0.0, counts_B.sum(), batch["attention_mask"].sum(), float(len(counts_B)))
        for index, value in enumerate(sizes):
            self._totals[index] += value
        means_B = (sums_B / counts_B.clamp(min=1.0)).double()
        member_SB = self._membership(batch["source_index"])
        self._source_loss += member_SB.double() @ means_B
        self._source_samples += member_SB.sum(dim=1)

    def add_routing(
        self, source_B: torch.Tensor, token_mask_BL: torch.Tensor, routing: Routing, auxiliary: torch.Tensor
    ) -> None:
        """Add a micro-batch's expert choices and its share of the auxiliary loss.

        Args:
            source_B: int64, source of each sample.
            token_mask_BL: bool, tokens that are not padding; one row a sample.
            routing: of the same rows.
            auxiliary: the share.
        """
        self._totals[1] += auxiliary
        counts = []
        for member_B in self._membership(source_B):
            mask_BL = token_mask_BL & member_B[:, None]
            counts.append(routing_load(routing, mask_BL).double() * mask_BL.sum())
        added = torch.stack(counts)
        self._expert_tokens = added if self._expert_tokens is None else self._expert_tokens + added

    def reduce(self) -> None:
        """Sum over ranks; a collective."""
        for tensor in (self._totals, self._source_loss, self._source_samples, self._expert_tokens):
            if tensor is not None:
                all_reduce_sum(tensor)

    @property
    def loss(self) -> float:
        """The step's language-model loss."""
        return float(self._totals[0])

    @property
    def auxiliary(self) -> float:
        """The step's auxiliary (balance and z-) loss, coefficients included."""
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
        samples = self._source_samples.clamp(min=1.0)
        entry: dict[str, Any] = {
            "step": step,
            "loss": totals["loss"],
            "learning_rate": rates,
            "grad_norm": self.grad_norm,
            "source_loss": {
                name: value
                for name, value, n in zip(
                    self.sources, (self._source_loss / samples).tolist(), self._source_samples.tolist(), strict=True
                )
                if n
            },
            "samples": int(totals["samples"]),
            "tokens": int(totals["tokens"]),
            "supervised_tokens": int(totals["supervised_tokens"]),
            "tokens_per_s": totals["tokens"] / step_s,
            "step_s": step_s,
            "data_wait_s": data_wait_s,
        }
        if torch.cuda.is_available():
            entry["max_memory_bytes"] = torch.cuda.max_memory_allocated()
        if self._expert_tokens is not None:
            entry["auxiliary_loss"] = totals["auxiliary"]
            entry["expert_load"] = _shares(self._expert_tokens.sum(dim=(0, 1)))
            entry["expert_load_by_source"] = {
                name: _shares(counts)
                for name, counts in zip(self.sources, self._expert_tokens.sum(dim=1), strict=True)
                if counts.sum() > 0
            }
            entry["expert_load_by_layer"] = [_shares(counts) for counts in self._expert_tokens.sum(dim=0)]
        return entry

    def _membership(self, source_B: torch.Tensor) -> torch.Tensor:
        """Bool [sources, B]: which sample is of which source."""
        sources = torch.arange(len(self.sources), device=self._totals.device)
        return sources[:, None] == source_B[None, :]


def _shares(counts: torch.Tensor) -> list[float]:
    return (counts / counts.sum().clamp(min=1.0)).tolist()

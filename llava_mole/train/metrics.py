"""The metrics of a run: `StepStats` collects those of one step, `Tracker` writes them, `read_metrics` reads them.

They are written to `metrics.jsonl`, and to Weights & Biases if configured.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.distributed import all_reduce_sum
from llava_mole.common.files import atomic_path, finite, write_errors
from llava_mole.common.log import get_logger
from llava_mole.config import TrackerConfig
from llava_mole.mole import Routing, RoutingMeter
from llava_mole.mole.routing import routing_entropy, routing_margin

logger = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
CONFLICT_FILE = "conflict.jsonl"
"""What `train.conflict_every` records."""
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


class StepLog:
    """A file with one JSON line a step, which a run continues after a restart.

    Args:
        path: The file.
        first_step: Step (from 0) at which the run starts. Entries of later steps, written by a run after its last
            checkpoint, are dropped, and no step is in the file twice.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self._failed = False
        kept = [entry for entry in read_metrics(path) if entry["step"] <= first_step] if first_step else []
        # Written atomically, to keep the run's history if the process is killed here.
        with write_errors(path), atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(finite(entry)) + "\n" for entry in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """Add the entry of a step."""
        try:
            self._file.write(json.dumps(finite(entry)) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def sync(self) -> None:
        """Flush the entries to the disk, as every checkpoint needs."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Flush and close the file."""
        self.sync()
        self._file.close()

    def _give_up(self, error: OSError) -> None:
        """Report once that entries are lost, as on a full disk; training continues."""
        if not self._failed:
            name = self._path.name
            logger.error("%s cannot be written (%s); training continues, these entries are lost", name, error)
        self._failed = True


class Tracker:
    """Writes one entry a step. A tracker service that fails is reported once and not used again.

    Args:
        first_step: See `StepLog`, whose errors are raised.
        run: The complete configuration as plain values, for the tracker service.
        enabled: False on ranks other than 0, which write nothing.
    """

    def __init__(
        self, config: TrackerConfig, run_dir: Path, first_step: int, *, run: dict[str, Any], enabled: bool
    ) -> None:
        self._wandb: Any = None
        self._log = StepLog(run_dir / METRICS_FILE, first_step) if enabled else None
        if enabled and config.wandb_project:
            self._start_wandb(config, run_dir, run)

    def log(self, entry: dict[str, Any]) -> None:
        """Record one step; `entry["step"]` is the number of optimizer steps done (1 after the first)."""
        if self._log is None:
            return
        self._log.write(entry)
        if self._wandb is not None:
            try:
                import wandb

                histograms = {name: wandb.Histogram(values) for name, values in over_layers(entry).items()}
                self._wandb.log(_flatten(entry) | histograms, step=entry["step"])
            except Exception as error:  # whatever the service raises, training continues
                logger.warning("wandb failed (%s); the run continues with %s only", error, METRICS_FILE)
                self._wandb = None

    def sync(self) -> None:
        """Flush the entries to the disk, as every checkpoint needs."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Flush and close the file, and end the run of the tracker service."""
        if self._log is not None:
            self._log.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:  # as above
                logger.warning("wandb did not finish cleanly: %s", error)

    def _start_wandb(self, config: TrackerConfig, run_dir: Path, run: dict[str, Any]) -> None:
        try:
            import wandb

            project, mode = config.wandb_project, config.wandb_mode
            self._wandb = wandb.init(project=project, mode=mode, name=run_dir.name, dir=str(run_dir), config=run)
        except Exception as error:  # not installed, no network, no account: training continues without it
            logger.warning("wandb is not available (%s); metrics go to %s only", error, METRICS_FILE)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file, one a step, in order of steps; values that were not finite are NaN.

    Damaged lines, as after a crash, are left out. The later of two entries of one step counts.
    """
    if not path.is_file():
        return []
    entries: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            entry = json.loads(line, object_hook=_with_nan)
            entries[entry["step"]] = entry
        except (json.JSONDecodeError, TypeError, KeyError):
            if line.strip():
                logger.warning("%s: a damaged line is left out: %.60r", path, line)
    return [entries[step] for step in sorted(entries)]


def over_layers(entry: dict[str, Any]) -> dict[str, list[float]]:
    """Values of all layers for one histogram each: load of every expert, router entropy, router margin."""
    by_layer = entry.get("expert_load_by_layer", [])
    values = {f"over_layers/expert_load/{k}": list(loads) for k, loads in enumerate(zip(*by_layer, strict=True))}
    for key in ("router_entropy_by_layer", "router_margin_by_layer"):
        if key in entry:
            values[f"over_layers/{key.removesuffix('_by_layer')}"] = entry[key]
    return values


def _with_nan(value: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if item is None else item for key, item in value.items()}


def _flatten(entry: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in entry.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(_flatten(value, name + "/"))
        elif isinstance(value, list):
            flat.update(_flatten({str(i): v for i, v in enumerate(value)}, name + "/"))
        elif isinstance(value, int | float):
            flat[name] = value
    return flat

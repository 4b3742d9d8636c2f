"""The file of a run's metrics: `Tracker` writes it, `read_metrics` reads it. It needs no PyTorch.

Entries are written to `metrics.jsonl`, and to Weights & Biases and TensorBoard if configured.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from llava_mole.common.files import atomic_path, finite, write_errors
from llava_mole.common.log import get_logger
from llava_mole.config import TrackerConfig

logger = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
CONFLICT_FILE = "conflict.jsonl"
"""What `train.conflict_every` records."""
TENSORBOARD_DIR = "tensorboard"


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
        self._tensorboard: Any = None
        self._log = StepLog(run_dir / METRICS_FILE, first_step) if enabled else None
        if enabled and config.wandb_project:
            self._start_wandb(config, run_dir, run)
        if enabled and config.tensorboard:
            self._start_tensorboard(run_dir, first_step)

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
        if self._tensorboard is not None:
            try:
                self._write_tensorboard(entry)
            except Exception as error:  # as above
                logger.warning("tensorboard failed (%s); the run continues with %s only", error, METRICS_FILE)
                self._tensorboard = None

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
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _start_wandb(self, config: TrackerConfig, run_dir: Path, run: dict[str, Any]) -> None:
        try:
            import wandb

            project, mode = config.wandb_project, config.wandb_mode
            self._wandb = wandb.init(project=project, mode=mode, name=run_dir.name, dir=str(run_dir), config=run)
        except Exception as error:  # not installed, no network, no account: training continues without it
            logger.warning("wandb is not available (%s); metrics go to %s only", error, METRICS_FILE)

    def _start_tensorboard(self, run_dir: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier process wrote after its last checkpoint is hidden.
            self._tensorboard = SummaryWriter(run_dir / TENSORBOARD_DIR, purge_step=first_step + 1)
        except Exception as error:  # not installed, or its folder cannot be written: training continues without it
            logger.warning("tensorboard is not available (%s); metrics go to %s only", error, METRICS_FILE)

    def _write_tensorboard(self, entry: dict[str, Any]) -> None:
        for name, value in _flatten(entry).items():
            if name != "step" and math.isfinite(value):
                self._tensorboard.add_scalar(name, value, entry["step"])
        for name, values in over_layers(entry).items():
            self._tensorboard.add_histogram(name, np.array(values), entry["step"])
        self._tensorboard.flush()


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

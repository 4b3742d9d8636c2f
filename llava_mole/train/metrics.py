"""Where numbers go: `metrics.jsonl` always, Weights & Biases when configured."""

import json
import math
import os
from pathlib import Path
from typing import IO, Any

from llava_mole.common.log import get_logger
from llava_mole.config import RunConfig, config_to_dict

METRICS_FILE = "metrics.jsonl"

logger = get_logger(__name__)


class Tracker:
    """Writes one entry a step on rank 0. A tracker service that fails is reported once and left out from then on."""

    def __init__(self, config: RunConfig, run_dir: Path, first_step: int, enabled: bool):
        """
        Args:
            first_step: 0-based step the run starts with; entries of later steps, left by a run that was cut off after
                its last checkpoint, are dropped so that no step stands in the file twice.
            enabled: False on ranks other than 0.
        """
        self._wandb: Any = None
        self._file: IO[str] | None = None
        self._failed = False
        if not enabled:
            return
        path = run_dir / METRICS_FILE
        kept = [entry for entry in read_metrics(path) if entry["step"] <= first_step] if first_step else []
        # Rewritten beside and renamed: a process killed here must not take the run's history with it.
        temporary = path.with_name(f".{path.name}.tmp")
        self._file = temporary.open("w", encoding="utf-8")
        for entry in kept:
            self._write(entry)
        self.sync()
        os.replace(temporary, path)
        if config.tracker.wandb_project:
            self._start_wandb(config, run_dir)

    def log(self, entry: dict[str, Any]) -> None:
        """Record one step; `entry["step"]` is the number of optimizer steps done (1 after the first)."""
        if self._file is None:
            return
        self._write(entry)
        if self._wandb is not None:
            try:
                import wandb

                histograms = {name: wandb.Histogram(values) for name, values in over_layers(entry).items()}
                self._wandb.log(_flatten(entry) | histograms, step=entry["step"])
            except Exception as error:  # whatever the service raises, training goes on
                logger.warning("wandb failed (%s); the run goes on with %s only", error, METRICS_FILE)
                self._wandb = None

    def sync(self) -> None:
        """Have what was written on the disk itself: called before a checkpoint counts on it."""
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:  # as above
                logger.warning("wandb did not finish cleanly: %s", error)

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(_finite(entry)) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A full disk stops the file, not the run: the entries from here to the next start are lost."""
        if not self._failed:
            logger.error("%s cannot be written (%s); training goes on, these entries are lost", METRICS_FILE, error)
        self._failed = True

    def _start_wandb(self, config: RunConfig, run_dir: Path) -> None:
        try:
            import wandb

            self._wandb = wandb.init(
                project=config.tracker.wandb_project,
                mode=config.tracker.wandb_mode,
                name=run_dir.name,
                dir=str(run_dir),
                config=config_to_dict(config),
            )
        except Exception as error:  # not installed, no network, no account: none of them may stop training
            logger.warning("wandb is not available (%s); metrics go to %s only", error, METRICS_FILE)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file, one a step, in order of steps; numbers that were not finite are NaN.

    Lines that a crash has cut short or garbled are left out. Of two entries of one step the later one counts.
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
    """What the routers of all layers do, as values for one histogram each: load of every expert, entropy, margin."""
    by_layer = entry.get("expert_load_by_layer", [])
    values = {f"over_layers/expert_load/{k}": list(loads) for k, loads in enumerate(zip(*by_layer, strict=True))}
    for key in ("router_entropy_by_layer", "router_margin_by_layer"):
        if key in entry:
            values[f"over_layers/{key.removesuffix('_by_layer')}"] = entry[key]
    return values


def _with_nan(value: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if item is None else item for key, item in value.items()}


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON has not: NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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

"""Writes a run's directory: configuration, environment and complete checkpoints (docs/architecture.md, Checkpoint)."""

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llava_mole import __version__
from llava_mole.config import RunConfig, save_config
from llava_mole.errors import CheckpointError
from llava_mole.model.builder import ADAPTER_DIR, CONFIG_FILE, PROJECTOR_FILE, PROJECTOR_PREFIX, TOKENIZER_DIR
from llava_mole.model.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    newest_valid_checkpoint,
    read_manifest,
    resolve_checkpoint,
    write_checkpoint,
)
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.train.state import MASTER

OPTIMIZER_FILE = "trainer/optimizer.safetensors"
STATE_FILE = "trainer/state.json"
ENVIRONMENT_FILE = "environment.json"
SUMMARY_FILE = "summary.json"


@dataclass
class Progress:
    """How far a run is, in units that do not depend on ranks or micro-batches."""

    step: int = 0
    """Optimizer steps done."""
    samples_consumed: int = 0
    consumed_by_source: dict[str, int] = field(default_factory=dict)
    plan_digest: str = ""
    """Identity of the sample order."""


@dataclass
class CheckpointWriter:
    """Everything besides the weights that goes into the checkpoints of a run."""

    run_dir: Path
    config: RunConfig
    hf_tokenizer: Any
    fingerprints: dict[str, str]

    def write(self, model: LlavaMole, optimizer_state: Mapping[str, torch.Tensor], progress: Progress) -> Path:
        """Write `checkpoint-<step>`. Weights are taken from the float32 masters in `optimizer_state`.

        Raises:
            OSError: it could not be written; nothing is left behind and older checkpoints are untouched.
        """
        masters = {
            key.removeprefix(f"{MASTER}/"): value
            for key, value in optimizer_state.items()
            if key.startswith(f"{MASTER}/")
        }

        def write_files(directory: Path) -> None:
            save_config(self.config, directory / CONFIG_FILE)
            self.hf_tokenizer.save_pretrained(directory / TOKENIZER_DIR)
            projector = {
                PROJECTOR_PREFIX + key: masters.get(f"projector.{key}", value).detach().float().cpu().contiguous()
                for key, value in model.projector.state_dict().items()
            }
            save_file(projector, directory / PROJECTOR_FILE)
            if self.config.adapter.method != "none":
                self._write_adapter(model, masters, directory / ADAPTER_DIR)
            (directory / "trainer").mkdir()
            save_file(dict(optimizer_state), directory / OPTIMIZER_FILE)
            (directory / STATE_FILE).write_text(json.dumps(vars(progress), indent=1) + "\n", encoding="utf-8")

        path = checkpoint_path(self.run_dir, progress.step)
        write_checkpoint(path, write_files, self._manifest_fields(progress))
        return path

    def _write_adapter(self, model: LlavaMole, masters: Mapping[str, torch.Tensor], directory: Path) -> None:
        prefix = "language_model."
        state = model.language_model.state_dict()
        state.update({key.removeprefix(prefix): value for key, value in masters.items() if key.startswith(prefix)})
        model.language_model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)

    def _manifest_fields(self, progress: Progress) -> dict[str, Any]:
        parts = self.config.model
        tower = parts.vision_tower
        return {
            "version": __version__,
            "stage": self.config.stage,
            "step": progress.step,
            "adapter": self.config.adapter.method,
            "template": self.config.data.template,
            "fingerprints": self.fingerprints,
            "paths": {
                "language_model": str(Path(parts.language_model).resolve()),
                "vision_tower_weights": str(Path(tower.weights).resolve()),
                "vision_tower_config": str(Path(tower.name).resolve()) if tower.name.endswith(".json") else tower.name,
            },
        }


def find_resume(config: RunConfig) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        CheckpointError: the output directory already has checkpoints and `train.resume` is not set (a new run would
            overwrite them), or the one asked for does not verify.
    """
    run_dir, resume = Path(config.train.output_dir), config.train.resume
    if resume not in (None, "auto"):
        return resolve_checkpoint(resume)
    existing = list_checkpoints(run_dir)
    if not existing:
        return None
    if resume is None:
        raise CheckpointError(
            f"{run_dir} already has {len(existing)} checkpoint(s), newest {existing[0].name}; continue with "
            "--train.resume auto, or choose another --train.output_dir"
        )
    return newest_valid_checkpoint(run_dir)


def check_same_run(checkpoint: Path, config: RunConfig) -> None:
    """Raise CheckpointError unless the checkpoint is of the configured stage and kind of adapter."""
    manifest = read_manifest(checkpoint)
    for key, wanted in (("stage", config.stage), ("adapter", config.adapter.method)):
        if manifest[key] != wanted:
            raise CheckpointError(f"{checkpoint} has {key} {manifest[key]!r}, this run has {wanted!r}: another run")


def read_progress(checkpoint: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Progress and optimizer state of a checkpoint that has been verified."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return Progress(**state), load_file(checkpoint / OPTIMIZER_FILE)


def write_summary(run_dir: Path, progress: Progress, entry: dict[str, Any] | None, seconds: float) -> None:
    """Mark the run as finished: what it did, its last metrics and the seconds of its last (or only) part."""
    summary = {**vars(progress), "last_step": entry, "seconds": seconds}
    (run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def write_environment(run_dir: Path, world_size: int, device: str, engine: str) -> None:
    """Record what the run ran on; `engine` is the class that wraps the model."""
    packages = {}
    for name in ("torch", "transformers", "peft", "accelerate", "deepspeed", "open_clip_torch"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    environment = {
        "llava_mole": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "world_size": world_size,
        "device": device,
        "engine": engine,
        "arguments": sys.argv[1:],
    }
    (run_dir / ENVIRONMENT_FILE).write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")

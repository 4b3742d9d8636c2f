"""Writes a run's directory: configuration, environment and complete checkpoints (docs/architecture.md, Checkpoint)."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llava_mole import __version__
from llava_mole.common.distributed import all_gather_objects, get_rank
from llava_mole.common.errors import CheckpointError
from llava_mole.common.log import get_logger
from llava_mole.config import RunConfig, save_config
from llava_mole.model.builder import ADAPTER_DIR, CONFIG_FILE, PROJECTOR_FILE, PROJECTOR_PREFIX, TOKENIZER_DIR
from llava_mole.model.checkpoint import (
    checkpoint_path,
    clean_leftovers,
    list_checkpoints,
    newest_valid_checkpoint,
    read_manifest,
    resolve_checkpoint,
    rotate_checkpoints,
    write_checkpoint,
)
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.train.strategy import MASTER

logger = get_logger(__name__)

OPTIMIZER_FILE = "trainer/optimizer.safetensors"
STATE_FILE = "trainer/state.json"
ENVIRONMENT_FILE = "environment.json"
SUMMARY_FILE = "summary.json"
FINAL_SAVE_WAITS_S = (0.0, 10.0, 20.0, 30.0, 60.0, 60.0, 60.0, 60.0)
"""Seconds before each attempt at the last checkpoint; in all less than the usual timeout of a collective."""
TOKENIZER_BYTES = 16 << 20
"""Allowed for tokenizer and configuration files when the size of a checkpoint is estimated."""


@dataclass
class Progress:
    """How far a run is, in units that do not depend on ranks or micro-batches."""

    step: int = 0
    """Optimizer steps done."""
    samples_consumed: int = 0
    consumed_by_source: dict[str, int] = field(default_factory=dict)
    plan_digest: str = ""
    """Identity of the sample order."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite: their samples are consumed, nothing was learned from them."""
    bad_steps_in_a_row: int = 0
    replaced_images: dict[str, int] = field(default_factory=dict)
    """Samples per source whose image could not be read, so that another sample took their place."""

    @property
    def updates(self) -> int:
        """Times the optimizer has changed the parameters."""
        return self.step - self.skipped_steps


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
            Exception: it could not be written (OSError, or what safetensors and PEFT make of one); nothing is left
                behind and older checkpoints are untouched.
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
        # Masters and two moments of all that trains, the masters once more as weights, and the tokenizer's files.
        expected = sum(value.nbytes for value in optimizer_state.values()) * 4 // 3 + TOKENIZER_BYTES
        write_checkpoint(path, write_files, self._manifest_fields(progress), expected)
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
            "quantization": parts.quantization,
            "template": self.config.data.template,
            "fingerprints": self.fingerprints,
            "paths": {
                "language_model": str(Path(parts.language_model).resolve()),
                "vision_tower_weights": str(Path(tower.weights).resolve()),
                "vision_tower_config": str(Path(tower.name).resolve()) if tower.name.endswith(".json") else tower.name,
            },
        }


def save_together(
    writer: CheckpointWriter,
    model: LlavaMole,
    optimizer_state: Mapping[str, torch.Tensor],
    progress: Progress,
    keep: int,
    final: bool,
) -> None:
    """Write a checkpoint on rank 0 and delete all but the newest `keep`; a collective.

    One that cannot be written is reported, and training goes on with the earlier ones untouched. The last one is the
    result of the run, so it is tried again for some minutes in which somebody may make room.

    Raises:
        CheckpointError: the last checkpoint could not be written; on every rank.
    """
    problem = None
    for wait_s in FINAL_SAVE_WAITS_S if final else (0.0,):
        time.sleep(wait_s)
        if get_rank() == 0:
            problem = _try_to_write(writer, model, optimizer_state, progress, keep)
        problem = all_gather_objects(problem)[0]
        if problem is None:
            return
        if get_rank() == 0:
            logger.error(
                "the checkpoint of step %d could not be written: %s. Earlier ones are untouched; %s",
                progress.step,
                problem,
                "free disk space: it is tried again" if final else "training goes on",
            )
    if final:
        error = CheckpointError(
            f"the last checkpoint, of step {progress.step}, could not be written: {problem}. Free disk space and go on "
            f"from the one before with --train.resume auto (--train.output_dir {writer.run_dir})"
        )
        error.on_every_rank = True
        raise error


def _try_to_write(
    writer: CheckpointWriter,
    model: LlavaMole,
    optimizer_state: Mapping[str, torch.Tensor],
    progress: Progress,
    keep: int,
) -> str | None:
    """None, or what went wrong."""
    try:
        path = writer.write(model, optimizer_state, progress)
    except Exception as error:  # OSError, or what safetensors, PEFT and tokenizers make of it; never the run's end
        return " ".join(f"{type(error).__name__}: {error}".split())
    logger.info("saved %s", path)
    try:
        rotate_checkpoints(path, keep)
    except OSError as error:
        logger.warning("an old checkpoint could not be deleted: %s", error)
    return None


def find_resume(config: RunConfig) -> Path | None:
    """The checkpoint to go on from, or None for a new run. One rank calls it: whole checkpoints are read.

    A process that torchrun has restarted (`--max-restarts`) goes on from what its predecessor left, as with `auto`.

    Raises:
        CheckpointError: the output directory already has checkpoints and `train.resume` is not set (a new run would
            overwrite them), the one asked for does not verify, or it is not the newest of its own run.
    """
    run_dir, resume = Path(config.train.output_dir), config.train.resume
    clean_leftovers(run_dir)
    existing = list_checkpoints(run_dir)
    if resume == "auto" or (_restarted() and existing):
        newest = newest_valid_checkpoint(run_dir)
        if newest is None and existing:
            logger.error("none of the %d checkpoints of %s verifies: the run starts anew", len(existing), run_dir)
        return newest
    if resume is not None:
        checkpoint = resolve_checkpoint(resume)
        later = [path.name for path in existing if _step(path) > read_manifest(checkpoint)["step"]]
        if later and checkpoint.parent.resolve() == run_dir.resolve():
            raise CheckpointError(
                f"{checkpoint} is not the newest checkpoint of its run ({later[0]} is later) and going on from it "
                "would overwrite the later ones; choose another --train.output_dir, or remove them"
            )
        return checkpoint
    if existing:
        raise CheckpointError(
            f"{run_dir} already has {len(existing)} checkpoint(s), newest {existing[0].name}; continue with "
            "--train.resume auto, or choose another --train.output_dir"
        )
    return None


def was_started(config: RunConfig) -> bool:
    """Whether the run to be gone on with has begun before, be it that it has no checkpoint yet."""
    resumes = config.train.resume is not None or _restarted()
    return resumes and (Path(config.train.output_dir) / CONFIG_FILE).exists()


def _restarted() -> bool:
    """Whether torchrun has started this process in the place of one that failed (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def check_same_run(checkpoint: Path, config: RunConfig) -> None:
    """Raise CheckpointError unless the checkpoint is of the configured stage, kind of adapter and quantisation."""
    manifest = {"quantization": "none", **read_manifest(checkpoint)}
    quantization = config.model.quantization
    for key, wanted in (("stage", config.stage), ("adapter", config.adapter.method), ("quantization", quantization)):
        if manifest[key] != wanted:
            raise CheckpointError(f"{checkpoint} has {key} {manifest[key]!r}, this run has {wanted!r}: another run")


def read_progress(checkpoint: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Progress and optimizer state of a checkpoint that has been verified."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return Progress(**state), load_file(checkpoint / OPTIMIZER_FILE)


def write_summary(
    run_dir: Path, progress: Progress, entry: dict[str, Any] | None, seconds: float, data: dict[str, dict[str, int]]
) -> None:
    """Mark the run as finished: what it did, its last metrics, the seconds of its last (or only) part, and `data`, what
    became of the records of each source."""
    summary = {**vars(progress), "last_step": entry, "seconds": seconds, "data": data}
    (run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def write_environment(run_dir: Path, world_size: int, device: str, engine: str) -> None:
    """Record what the run ran on; `engine` is the class that wraps the model."""
    packages = {}
    for name in ("torch", "transformers", "peft", "accelerate", "deepspeed", "open_clip_torch", "bitsandbytes"):
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

"""What a run writes to its directory: checkpoints, environment, summary (docs/architecture.md, Checkpoint)."""

import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava_mole import __version__
from llava_mole.common.distributed import all_gather_objects, get_rank
from llava_mole.common.errors import CheckpointError
from llava_mole.common.files import finite, read_json, write_json
from llava_mole.common.log import get_logger
from llava_mole.config import save_config
from llava_mole.model.builder import ADAPTER_DIR, CONFIG_FILE, PROJECTOR_FILE, PROJECTOR_PREFIX, TOKENIZER_DIR
from llava_mole.model.checkpoint import (
    OPTIMIZER_FILE,
    STATE_FILE,
    TRAINER_DIR,
    checkpoint_path,
    rotate_checkpoints,
    write_checkpoint,
)
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.train.strategy import MASTER
from llava_mole.train.trained_parts import Origin, write_parts
from llava_mole.train.trainer_state import Pieces, write_together

logger = get_logger(__name__)

ENVIRONMENT_FILE = "environment.json"
SUMMARY_FILE = "summary.json"
FINAL_SAVE_WAITS_S = (0.0, 10.0, 20.0, 30.0, 60.0, 60.0, 60.0, 60.0)
"""Seconds to wait before each attempt at the last checkpoint; together less than the usual timeout of a collective."""
TOKENIZER_BYTES = 16 << 20
"""Bytes added for tokenizer and configuration files when the size of a checkpoint is estimated."""


@dataclass
class Progress:
    """How far a run has come, in units that do not depend on ranks or micro-batches."""

    step: int = 0
    """Optimizer steps done."""
    samples_consumed: int = 0
    consumed_by_source: dict[str, int] = field(default_factory=dict)
    plan_digest: str = ""
    """Identity of the sample order."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite: their samples are consumed, the parameters did not change."""
    bad_steps_in_a_row: int = 0
    replaced_images: dict[str, int] = field(default_factory=dict)
    """Samples per source that were replaced because their image could not be read."""

    @property
    def updates(self) -> int:
        """Times the optimizer has changed the parameters."""
        return self.step - self.skipped_steps


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of a run; holds everything in them besides weights and progress."""

    run_dir: Path
    config: dict[str, Any]
    """The complete configuration as plain values, see `config_to_dict`."""
    hf_tokenizer: Any
    fingerprints: dict[str, str]
    """Of the model's frozen parts."""
    contents: dict[str, str]
    """Digests of everything else the run reads, by configuration key."""
    run: str
    """Identifier of the run."""
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Weights of adapter and projector that do not train, by parameter name."""

    def write(
        self,
        model: LlavaMole,
        optimizer_state: Mapping[str, torch.Tensor],
        progress: Progress,
        pieces: Pieces | None = None,
        write_pieces: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write `checkpoint-<step>`. Weights are taken from the float32 masters in `optimizer_state`.

        With `pieces` that state has adapter and projector only, and `write_pieces` lets all ranks write theirs;
        language model and tower are then left to `llava-mole consolidate`.

        Raises:
            Exception: it could not be written (OSError, or what safetensors and PEFT make of one). Nothing is left
                behind and older checkpoints are untouched.
        """
        prefix = f"{MASTER}/"
        masters = {key[len(prefix) :]: value for key, value in optimizer_state.items() if key.startswith(prefix)}
        weights = {**self.frozen, **masters}
        tower = model.vision_tower
        fields = {
            **self._manifest_fields(progress),
            "pixels": tower.spec.pixels.described(tower.image_size),
            "tower_layout": tower.spec.layout,
        }

        def write_files(directory: Path) -> dict[str, Any]:
            save_config(self.config, directory / CONFIG_FILE)
            self.hf_tokenizer.save_pretrained(directory / TOKENIZER_DIR)
            projector = {
                PROJECTOR_PREFIX + key: weights.get(f"projector.{key}", value).detach().float().cpu().contiguous()
                for key, value in model.projector.state_dict().items()
            }
            save_file(projector, directory / PROJECTOR_FILE)
            if self.config["adapter"]["method"] != "none":
                self._write_adapter(model, weights, directory / ADAPTER_DIR)
            (directory / TRAINER_DIR).mkdir()
            if pieces is None or write_pieces is None:
                changed = write_parts(directory, optimizer_state, Origin.of(self.config, fields["paths"]), fields)
                save_file(dict(optimizer_state), directory / OPTIMIZER_FILE)
            else:
                write_pieces(directory)
                changed = {"in_pieces": pieces.parts}
            write_json(directory / STATE_FILE, vars(progress), indent=1)
            return changed

        path = checkpoint_path(self.run_dir, progress.step)
        # Masters and two moments of everything trainable, the masters again as weights, and the tokenizer's files.
        trained = sum(value.nbytes for value in optimizer_state.values()) if pieces is None else 12 * pieces.elements
        write_checkpoint(path, write_files, fields, trained * 4 // 3 + TOKENIZER_BYTES, self.run)
        return path

    def _write_adapter(self, model: LlavaMole, masters: Mapping[str, torch.Tensor], directory: Path) -> None:
        prefix = "language_model."
        state = model.language_model.state_dict()
        state.update({key.removeprefix(prefix): value for key, value in masters.items() if key.startswith(prefix)})
        model.language_model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)

    def _manifest_fields(self, progress: Progress) -> dict[str, Any]:
        model = self.config["model"]
        tower = model["vision_tower"]
        is_file = tower["name"].endswith(".json")
        return {
            "version": __version__,
            "stage": self.config["stage"],
            "step": progress.step,
            "adapter": self.config["adapter"]["method"],
            "quantization": model["quantization"],
            "template": self.config["data"]["template"],
            "fingerprints": self.fingerprints,
            "contents": self.contents,
            "paths": {
                "language_model": str(Path(model["language_model"]).resolve()),
                "vision_tower_weights": str(Path(tower["weights"]).resolve()),
                "vision_tower_config": str(Path(tower["name"]).resolve()) if is_file else tower["name"],
            },
        }


def save_together(
    writer: CheckpointWriter,
    model: LlavaMole,
    optimizer_state: Mapping[str, torch.Tensor],
    progress: Progress,
    keep: int,
    final: bool,
    pieces: Pieces | None = None,
) -> None:
    """Write a checkpoint on rank 0, or `pieces` of it on all ranks, and delete all but the newest `keep`; a collective.

    A failure is logged and training continues; earlier checkpoints are untouched. The last checkpoint is the result of
    the run, so it is tried again for some minutes, in which somebody may free disk space.

    Raises:
        CheckpointError: the last checkpoint could not be written; on every rank.
    """
    problem = None
    for wait_s in FINAL_SAVE_WAITS_S if final else (0.0,):
        time.sleep(wait_s)
        problem = write_together(
            pieces,
            lambda write_pieces: _try_to_write(
                writer, model, optimizer_state, progress, keep, *((pieces, write_pieces) if pieces is not None else ())
            ),
        )
        problem = all_gather_objects(problem)[0]
        if problem is None:
            return
        if get_rank() == 0:
            logger.error(
                "the checkpoint of step %d could not be written: %s. Earlier ones are untouched; %s",
                progress.step,
                problem,
                "free disk space: it is tried again" if final else "training continues",
            )
    if final:
        error = CheckpointError(
            f"the last checkpoint, of step {progress.step}, could not be written: {problem}. Free disk space and "
            f"resume from the one before with --train.resume auto (--train.output_dir {writer.run_dir})"
        )
        error.on_every_rank = True
        raise error


def _try_to_write(
    writer: CheckpointWriter,
    model: LlavaMole,
    optimizer_state: Mapping[str, torch.Tensor],
    progress: Progress,
    keep: int,
    *pieces: Any,
) -> str | None:
    """Write one checkpoint and delete old ones. Returns the error text, or None on success."""
    try:
        path = writer.write(model, optimizer_state, progress, *pieces)
    except Exception as error:  # OSError, or what safetensors, PEFT and tokenizers make of it; must not end the run
        return " ".join(f"{type(error).__name__}: {error}".split())
    logger.info("saved %s", path)
    try:
        rotate_checkpoints(path, keep, writer.run)
    except OSError as error:
        logger.warning("an old checkpoint could not be deleted: %s", error)
    return None


def read_progress(checkpoint: Path) -> Progress:
    """Progress of a verified checkpoint."""
    return Progress(**read_json(checkpoint / STATE_FILE))


def write_summary(
    run_dir: Path,
    progress: Progress,
    entry: dict[str, Any] | None,
    seconds: float,
    data: dict[str, dict[str, int]],
    trainable: dict[str, int],
) -> None:
    """Mark the run as finished.

    Args:
        entry: The last metrics; None if this process did no step.
        seconds: Duration of this process's part of the run.
        data: What became of the records, by source.
        trainable: Trainable parameters by part of the model.
    """
    summary = {
        **vars(progress),
        "last_step": entry,
        "seconds": seconds,
        "data": data,
        "trainable_parameters": trainable,
    }
    summary["peak_memory_bytes"] = _peak_memory()
    write_json(run_dir / SUMMARY_FILE, finite(summary), indent=1)


def _peak_memory() -> dict[str, int]:
    """Peak of this process so far, in bytes: `host` (resident), and `gpu` (allocated by PyTorch) where there is one."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts in KiB
    return peak | ({"gpu": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def write_environment(run_dir: Path, world_size: int, device: str, engine: str) -> None:
    """Record packages, machine and arguments of the run; `engine` is the class that wraps the model."""
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
    write_json(run_dir / ENVIRONMENT_FILE, environment, indent=1)

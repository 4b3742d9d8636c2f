"""Faults of a run and how all ranks react to them together.

If one rank alone skipped a step, saved or stopped, the others would wait for it in a collective. So each rank reports
its signals to stop, losses and gradients that are not finite and replaced images; one sum over the ranks tells all of
them, and all react alike.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from llava_mole.common.distributed import all_gather_objects, all_reduce_sum, get_rank
from llava_mole.common.errors import UserError
from llava_mole.common.files import write_text
from llava_mole.common.log import get_logger
from llava_mole.common.text import count_of, shorten
from llava_mole.model.checkpoint import list_checkpoints
from llava_mole.train.checkpointing import Progress

logger = get_logger(__name__)


CONTROL_DIR = "LLAVA_MOLE_CONTROL_DIR"
STOP_FILE = "stop"
EXIT_CODE_FILE = "exit_code"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_S = 5.0
"""A signal within this many seconds of the first is the same request, passed on again by a launcher."""


class StopRequested(Exception):
    """The run has saved because it was asked to stop. Raised on every rank after the same step."""


class StopSignal:
    """Context manager that records requests to stop; read `requested` at every step."""

    def __init__(self) -> None:
        self._received: float | None = None
        self._previous: dict[int, object] = {}
        control = control_dir()
        self._file = control / STOP_FILE if control is not None else None

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None or (self._file is not None and self._file.exists())

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = now
        elif now - self._received > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def tell_interruption(run_dir: Path, progress: Progress, total_steps: int) -> Iterator[None]:
    """Say what Ctrl-C (SIGINT) in the block loses and how the run continues; the interruption itself is passed on."""
    try:
        yield
    except KeyboardInterrupt:
        saved = [int(path.name.removeprefix("checkpoint-")) for path in list_checkpoints(run_dir)]
        newest, done = max(saved, default=0), progress.step
        lost = count_of(done - newest, "step") if done > newest else "nothing"
        kept = f"checkpoint-{newest} stays" if newest else "there is no checkpoint yet"
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the bar ends here
        logger.warning(
            "interrupted after step %d of %d: %s lost, %s in %s; continue with the same command and "
            "--train.resume auto (SIGTERM saves before it stops)",
            done,
            total_steps,
            f"{lost} {'is' if done - newest <= 1 else 'are'}",
            kept,
            run_dir,
        )
        raise


def control_dir() -> Path | None:
    """Directory through which `_launch.sh` and the processes it started on this machine communicate, or None."""
    value = os.environ.get(CONTROL_DIR)
    return Path(value) if value else None


def record_exit_code(code: int) -> bool:
    """Write the run's exit code where `_launch.sh` reads it. Returns False without a launcher that reads it."""
    directory = control_dir()
    if directory is None or not directory.is_dir():
        return False
    write_text(directory / EXIT_CODE_FILE, f"{code}\n")
    return True


def ignore_stop_signals(_: int = 0) -> None:
    """Ignore stop signals in a data loader worker, so that a signal to the whole process group does not end it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


FEW_BAD_IMAGES = 10
"""Always tolerate this many replacements; a share of a few samples is noise."""
_SHOWN = 8
_CHUNK = 1 << 22


class TrainingError(UserError):
    """Training cannot continue; the message names the step and the samples. Raised on every rank at the same step."""

    on_every_rank = True


class StepGuard:
    """Watches the steps of a run; its counts are kept in `progress`, so they survive a restart."""

    def __init__(
        self,
        progress: Progress,
        sources: Sequence[str],
        stop: StopSignal,
        device: torch.device,
        max_bad_steps: int,
        max_bad_image_share: float,
    ) -> None:
        self.stop_requested = False
        """Whether some rank was asked to stop; the same on every rank after `allows_update`."""
        self._max_bad_steps = max_bad_steps
        self._max_bad_image_share = max_bad_image_share
        self._device = device
        self._progress = progress
        self._sources = sources
        self._stop = stop
        self._seen: list[tuple[dict[str, Any], torch.Tensor]] = []

    def watch(self, batch: dict[str, Any], loss: torch.Tensor) -> None:
        """Note a micro-batch and its loss (a scalar on the device, not waited for)."""
        self._seen.append((batch, loss.detach()))

    def allows_update(self, step: int, squared_gradients: torch.Tensor) -> bool:
        """Whether the step may change the parameters; a collective, after the backward pass of all micro-batches.

        Args:
            step: optimizer steps done before this one.
            squared_gradients: this rank's share, from `Strategy.squared_gradients`.

        Returns:
            False on every rank if a loss or gradient of any of them is not finite; the step is then to be dropped.
        """
        seen, self._seen = self._seen, []
        replaced = [entry for batch, _ in seen for entry in batch["replaced_images"]]
        local = torch.zeros(3 + len(self._sources), dtype=torch.float64, device=self._device)
        local[0] = float(self._stop.requested)
        if seen:
            local[1] = (~torch.stack([loss.float() for _, loss in seen]).isfinite()).any().double()
        local[2] = squared_gradients
        for source, _ in replaced:
            local[3 + self._sources.index(source)] += 1
        stop, bad_losses, squares, *bad_images = all_reduce_sum(local).tolist()
        self.stop_requested = stop > 0
        if any(bad_images):
            self._count_images(bad_images, replaced)
        if bad_losses == 0 and squares < float("inf"):
            self._progress.bad_steps_in_a_row = 0
            return True
        self._progress.skipped_steps += 1
        self._progress.bad_steps_in_a_row += 1
        self._report_bad_step(step, seen, bad_losses > 0)
        return False

    def end_step(self) -> None:
        """End the run if continuing would be wrong.

        Raises:
            TrainingError: too many bad steps in a row, or too many images of a source that cannot be read.
        """
        progress = self._progress
        if progress.bad_steps_in_a_row >= self._max_bad_steps:
            raise TrainingError(
                f"{progress.bad_steps_in_a_row} steps in a row up to step {progress.step} had a loss or gradient that "
                "is not finite (train.max_bad_steps); the samples are named above. Lower train.learning_rate or "
                "remove what is wrong with these samples, then continue with --train.resume auto"
            )
        for source, count in progress.replaced_images.items():
            consumed = progress.consumed_by_source.get(source, 0)
            share = self._max_bad_image_share
            if count > (max(FEW_BAD_IMAGES, share * consumed) if share else 0):
                raise TrainingError(
                    f"{count} of {consumed} samples of source {source!r} had an image that cannot be read, more than "
                    f"data.max_bad_image_share {share} allows; check that data.sources.{source}.image_folder is "
                    "mounted and complete, then continue with --train.resume auto"
                )

    def entry(self) -> dict[str, Any]:
        """Counts of faults since the start of the run for the metrics; empty without faults."""
        progress = self._progress
        counts = {"skipped_steps": progress.skipped_steps, "replaced_images": dict(progress.replaced_images)}
        return {key: value for key, value in counts.items() if value}

    def _count_images(self, counts: Sequence[float], replaced: list[tuple[str, str]]) -> None:
        for source, count in zip(self._sources, counts, strict=True):
            if count:
                before = self._progress.replaced_images.get(source, 0)
                self._progress.replaced_images[source] = before + int(count)
        messages = [message for rank in all_gather_objects(replaced) for _, message in rank]
        for message in messages[:_SHOWN]:
            logger.warning("%s; another sample of its source is used instead", message)
        if len(messages) > _SHOWN:
            logger.warning("%d more images of this step cannot be read", len(messages) - _SHOWN)

    def _report_bad_step(self, step: int, seen: list[tuple[dict[str, Any], torch.Tensor]], in_loss: bool) -> None:
        ids = [
            sample for batch, loss in seen if not in_loss or not bool(loss.isfinite().all()) for sample in batch["ids"]
        ]
        ranks = [f"rank {rank}: {shorten(ids, _SHOWN)}" for rank, ids in enumerate(all_gather_objects(ids)) if ids]
        if get_rank():
            return  # every rank prints its errors, and this one concerns all of them
        logger.error(
            "step %d is skipped on all ranks: its %s not finite; samples of %s (%d in a row, %d in the run)",
            step + 1,
            "loss is" if in_loss else "gradients are",
            "; ".join(ranks[:_SHOWN]),
            self._progress.bad_steps_in_a_row,
            self._progress.skipped_steps,
        )


def check_ranks_agree(parameters: Mapping[str, torch.Tensor], step: int) -> None:
    """Compare a hash of every trainable parameter over the ranks; a collective.

    Raises:
        TrainingError: the ranks' parameters have drifted apart; the message names the ranks and a parameter.
    """
    hashes = all_gather_objects([parameter_hash(parameter) for parameter in parameters.values()])
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, values in enumerate(hashes):
        groups.setdefault(tuple(values), []).append(rank)
    if len(groups) == 1:
        return
    usual, *others = sorted(groups.items(), key=lambda item: -len(item[1]))
    name = next(n for n, a, b in zip(parameters, usual[0], others[0][0], strict=True) if a != b)
    apart = [str(rank) for rank in sorted(rank for _, ranks in others for rank in ranks)]
    raise TrainingError(
        f"after step {step} the trainable parameters of rank {shorten(apart, _SHOWN)} differ from those of rank "
        f"{shorten([str(rank) for rank in usual[1]], _SHOWN)} (first: {name}): memory or communication of a device is "
        "at fault. "
        "Nothing was saved since; leave that machine out and continue with --train.resume auto"
    )


def parameter_hash(parameter: torch.Tensor) -> int:
    """A hash of the parameter's bits, computed on its device: one sum of 64-bit integers, whatever the order."""
    flat = parameter.detach().reshape(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        weights = torch.arange(start, start + part.numel(), device=flat.device) % 65521 + 1
        total += (part * weights).sum()
    return int(total)

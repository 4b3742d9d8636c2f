"""One rank of a run that `faults.py` disturbs: what goes wrong inside the process, and the imports that are shared.

A fork server imports this module once; ranks forked from it start in a tenth of a second instead of ten.
"""

import errno
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import open_clip
import peft
import torch
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  loads the lazy modules behind them

import llava_mole.data.dataset
import llava_mole.train.train
import llava_mole.train.trainer
from llava_mole.common import files, locks
from llava_mole.data.dataset import SupervisedDataset
from llava_mole.model import checkpoint
from llava_mole.train import checkpointing
from llava_mole.train.checkpointing import CheckpointWriter

PRELOADED = (accelerate, open_clip, peft, torch, transformers)
FILE_LIMIT = 20_000
"""Bytes: the tiny checkpoint's tokenizer and optimizer files are larger."""


@dataclass(frozen=True)
class Sabotage:
    """What goes wrong in a process by itself."""

    nan_ids: tuple[str, ...] = ()
    """Samples whose pixels are NaN."""
    die_in_save: tuple[int, int] | None = None
    """Rank 0 kills itself in its n-th save (from 0), at the m-th call to the file system."""
    failing_saves: dict[int, str] = field(default_factory=dict)
    """n-th save (from 0) -> `no_space` (too little is free), `file_limit` (a write fails half-way), `read_only` (the
    file system has been mounted read-only), `rotation` (the disk is full while an old checkpoint is deleted)."""
    read_only_start: bool = False
    """The run directory's file system is read-only when the run starts."""
    clock_back_s: float = 0.0
    """The clock of rank 0 goes back by so many seconds each time it is read."""
    diverge_at: int | None = None
    """Rank 1 changes a parameter of its own after so many steps."""
    die_at_step: int | None = None
    """Rank 1 kills itself when it has done so many steps, unless the file `died` exists in the run directory."""


def run_rank(
    rank: int, world_size: int, port: int, arguments: Sequence[str], log: str, sabotage: Sabotage, environment: dict
) -> None:
    """Be one rank of `python -m llava_mole.train.train ARGUMENTS` under torchrun. Does not return."""
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **environment,
    )
    torch.set_num_threads(1)
    code = 1
    try:
        install(sabotage, rank)
        code = llava_mole.train.train.main(list(arguments))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no clean-up that could wait for a lost peer


def install(sabotage: Sabotage, rank: int) -> None:
    """Make the process fail as told."""
    if sabotage.nan_ids:
        _poison_samples(set(sabotage.nan_ids))
    if sabotage.failing_saves or sabotage.die_in_save:
        _disturb_saves(sabotage)
    if sabotage.read_only_start:
        locks._create = _refuse_writing
    if rank == 0 and sabotage.clock_back_s:
        readings, original = iter(range(1, 1 << 30)), time.time
        time.time = lambda: original() - next(readings) * sabotage.clock_back_s
    if rank == 1 and sabotage.diverge_at is not None:
        _after_step(sabotage.diverge_at, _change_a_parameter)
    if rank == 1 and sabotage.die_at_step is not None:
        _after_step(sabotage.die_at_step, _die_once)


def _poison_samples(ids: set[str]) -> None:
    original = SupervisedDataset.__getitem__

    def getitem(self: SupervisedDataset, position: int) -> Any:
        example = original(self, position)
        if example.id in ids and example.images is not None:
            # Bytes cannot be NaN; floats go to the tower as they are.
            return replace(example, images=torch.full(example.images.shape, float("nan")))
        return example

    SupervisedDataset.__getitem__ = getitem  # type: ignore[method-assign]


def _disturb_saves(sabotage: Sabotage) -> None:
    original, saves = CheckpointWriter.write, iter(range(1 << 30))

    def write(self: CheckpointWriter, *arguments: Any) -> Path:
        index = next(saves)
        kind = sabotage.failing_saves.get(index)
        if sabotage.die_in_save is not None and index == sabotage.die_in_save[0]:
            _die_at_call(sabotage.die_in_save[1])
        if kind == "no_space":
            checkpoint.shutil.disk_usage, kept = (lambda _: SimpleNamespace(free=0)), checkpoint.shutil.disk_usage
            try:
                return original(self, *arguments)
            finally:
                checkpoint.shutil.disk_usage = kept
        if kind == "read_only":
            Path.mkdir, make = _refuse_writing, Path.mkdir  # type: ignore[method-assign, assignment]
            try:
                return original(self, *arguments)
            finally:
                Path.mkdir = make  # type: ignore[method-assign]
        if kind == "rotation":
            checkpoint._delete, delete = _delete_half, checkpoint._delete
            checkpointing.rotate_checkpoints = partial(_rotate_once, delete=delete)
        if kind == "file_limit":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, hard))
            try:
                return original(self, *arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return original(self, *arguments)

    CheckpointWriter.write = write  # type: ignore[method-assign]
    checkpointing.FINAL_SAVE_WAITS_S = (0.0, 0.1, 0.1)


def _refuse_writing(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def _delete_half(directory: Path) -> None:
    next(path for path in directory.iterdir() if path.is_file()).unlink()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _rotate_once(*arguments: Any, delete: Any) -> None:
    checkpointing.rotate_checkpoints = checkpoint.rotate_checkpoints
    try:
        checkpoint.rotate_checkpoints(*arguments)
    finally:
        checkpoint._delete = delete


def _die_at_call(number: int) -> None:
    """Die before the n-th of the calls that a save makes to write files, flush them, hash them and rename them."""
    calls = iter(range(1 << 30))

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    files.sync = counted(files.sync)
    checkpoint.sha256_of = counted(checkpoint.sha256_of)
    checkpoint.os.replace = counted(os.replace)
    checkpoint.shutil.rmtree = counted(checkpoint.shutil.rmtree)
    checkpointing.save_file = counted(checkpointing.save_file)
    checkpointing.save_config = counted(checkpointing.save_config)


def _after_step(number: int, action: Any) -> None:
    trainer = llava_mole.train.trainer.Trainer
    original = trainer._count

    def count(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if self.progress.step == number:
            action(self)

    trainer._count = count  # type: ignore[method-assign]


def _change_a_parameter(trainer: Any) -> None:
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-3


def _die_once(trainer: Any) -> None:
    marker = trainer.writer.run_dir / "died"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)

"""Ranks and collectives that also work without a process group.

Commands that need no model import this file too, so it does not import PyTorch, which takes seconds.
"""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from llava_mole.common.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def _group() -> Any:
    """`torch.distributed` if this process has a process group, else None. Without PyTorch there is none."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def get_rank() -> int:
    """Rank of this process; 0 without a process group."""
    group = _group()
    return group.get_rank() if group else 0


def get_world_size() -> int:
    """Number of processes; 1 without a process group."""
    group = _group()
    return group.get_world_size() if group else 1


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return get_rank() == 0


def all_reduce_sum(tensor: "torch.Tensor") -> "torch.Tensor":
    """Sum `tensor` over ranks in place and return it."""
    if group := _group():
        group.all_reduce(tensor)
    return tensor


def all_gather_objects(value: object) -> list:
    """`[value of rank 0, value of rank 1, ...]` on every rank."""
    group = _group()
    if group is None:
        return [value]
    values: list = [None] * group.get_world_size()
    group.all_gather_object(values, value)
    return values


def on_main(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 only and return its result on every rank.

    Use it for decisions based on files: ranks that read a shared file system at different moments, or through
    different caches, may see different contents. It is a collective; the result must be picklable and may be large.

    Raises:
        UserError: Raised by `function`; then raised on every rank. Other exceptions end rank 0 and thereby the group.
    """
    outcome: tuple = ()
    if is_main_process():
        try:
            outcome = (function(), None)
        except UserError as caught:
            outcome = (None, caught)
    shared = [outcome]
    if group := _group():
        group.broadcast_object_list(shared, src=0)
    result, error = shared[0]
    if error is not None:
        error.on_every_rank = True
        raise error
    return result


def raise_together(failure: UserError | None) -> None:
    """Raise the failure of the first rank that has one on every rank; a collective."""
    failures = [each for each in all_gather_objects(failure) if each is not None]
    if failures:
        failures[0].on_every_rank = True
        raise failures[0]


def end_rank(code: int) -> NoReturn:
    """End this process with `code`; if a launcher started it as one of several ranks, without Python's finalisation.

    Threads of a process group's backend can outlive the group, because libraries keep references to it. One that
    reaches for the interpreter during its finalisation aborts the process ("terminate called without an active
    exception", SIGABRT), and the launcher reports a finished run as failed. Files and loggers must be closed before.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

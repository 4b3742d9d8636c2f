"""Ranks and collectives that also work without a process group."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from llava_mole.common.errors import UserError

T = TypeVar("T")


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if _initialized() else 0


def get_world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if _initialized() else 1


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return get_rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over ranks in place and return it."""
    if _initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather_objects(value: object) -> list:
    """`[value of rank 0, value of rank 1, ...]` on every rank."""
    if not _initialized():
        return [value]
    values: list = [None] * get_world_size()
    dist.all_gather_object(values, value)
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
    if _initialized():
        dist.broadcast_object_list(shared, src=0)
    result, error = shared[0]
    if error is not None:
        error.on_every_rank = True
        raise error
    return result

"""Evaluation over the ranks that torchrun or `accelerate launch` started.

Every rank has the whole model and answers its own questions. Only small Python objects are exchanged, so gloo serves
CPU and GPU ranks alike.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from llava_mole.eval.questions import Question, take_chunk

_LONGEST_WAIT = timedelta(days=14)
"""Ranks that have finished wait for the slowest; that must not time out."""

T = TypeVar("T")


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Join the ranks that the launcher's environment names, each with its own GPU. Do nothing in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield
        dist.barrier()
    finally:
        # No barrier after an error: the other ranks may never arrive, and waiting for them would hide the error.
        dist.destroy_process_group()


def share_of_rank(questions: Sequence[Question], rank: int, world_size: int) -> list[Question]:
    """Return the questions that `rank` answers; the ranks' numbers differ by at most one.

    Questions about the same images follow each other, in the order in which these first occur, so that an image is
    decoded and encoded on one rank, or on two if it lies at their boundary.
    """
    first: dict[tuple[str, ...], int] = {}
    for position, question in enumerate(questions):
        first.setdefault(question.images, position)
    return list(take_chunk(sorted(questions, key=lambda question: first[question.images]), world_size, rank))

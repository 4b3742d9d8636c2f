"""Simulates how long steps last when all ranks wait for the slowest one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llava_mole.data.batching import grouped_order
from llava_mole.model.flops import ModelShape, recompute_flops, training_flops

Rows = list[list[int]]
"""For each micro-batch of a rank, the indices of its samples in the step."""


@dataclass(frozen=True)
class Samples:
    """Sizes of G samples, int64 [G] each."""

    tokens: npt.NDArray[np.int64]
    supervised: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepTime:
    """The mean step in seconds; the causes add up to `seconds`."""

    seconds: float
    useful: float
    """Forward and backward pass of real tokens, spread evenly over the ranks."""
    padding: float
    recompute: float
    stragglers: float
    """Ranks waiting for the one with the most work."""
    slow: float = 0.0
    """Ranks waiting for a GPU that is slower than the others."""
    communication: float = 0.0
    """Ranks waiting for data, beyond what runs beside the computation."""

    @property
    def straggler_efficiency(self) -> float:
        """Share of the time in which ranks compute."""
        waiting = self.stragglers + self.slow + self.communication
        return 1.0 - waiting / self.seconds if self.seconds else 1.0

    @property
    def useful_share(self) -> float:
        """Share of the time spent on what must be computed."""
        return self.useful / self.seconds if self.seconds else 1.0


def padded_rows(num_samples: int, world_size: int, micro_batch_size: int) -> list[Rows]:
    """Each rank's micro-batches in the order of the plan, as `data.batching.BatchPlan` assigns them."""
    per_pass = world_size * micro_batch_size
    return [
        [
            list(range(start + rank * micro_batch_size, start + (rank + 1) * micro_batch_size))
            for start in range(0, num_samples, per_pass)
        ]
        for rank in range(world_size)
    ]


def grouped_rows(lengths: Sequence[int], world_size: int, micro_batch_size: int) -> list[Rows]:
    """`padded_rows` of the step's samples grouped by length, as in LLaVA; all count as one modality."""
    generator = torch.Generator().manual_seed(0)
    chunks = len(lengths) // micro_batch_size
    order = grouped_order(lengths, micro_batch_size, chunks, generator, by_modality=False)
    dealt = padded_rows(len(lengths), world_size, micro_batch_size)
    return [[[order[index] for index in row] for row in rows] for rows in dealt]


def step_time(
    shape: ModelShape,
    samples: Samples,
    ranks: Sequence[Rows],
    *,
    padded: bool,
    recomputed_layers: int,
    flops_per_s: float,
    lock_step: bool,
    exposed: Callable[[float, bool], float] | None = None,
    slowness_RP: npt.NDArray[np.float64] | None = None,
) -> StepTime:
    """The time of one step.

    Args:
        ranks: each rank's micro-batches.
        padded: whether the samples of a micro-batch are padded to its longest, or packed without padding.
        recomputed_layers: decoder layers that run forward twice.
        flops_per_s: what a GPU sustains while it computes.
        lock_step: whether ranks wait for each other after every micro-batch (ZeRO-2 reduces gradients there) or only
            at the end of the step.
        exposed: seconds that ranks wait for communication in a micro-batch, by its seconds of compute and whether it
            is the step's last. None: no communication.
        slowness_RP: how many times longer each rank takes for each micro-batch; more columns than micro-batches are
            allowed. None: all ranks are equally fast.
    """
    passes = max(len(rows) for rows in ranks)
    shape_RP = (len(ranks), passes)
    row_G = np.zeros(len(samples.tokens), dtype=np.int64)
    for rank, rows in enumerate(ranks):
        for index, row in enumerate(rows):
            row_G[row] = rank * passes + index
    useful_RP, padding_RP, recompute_RP = (
        np.bincount(row_G, weights=part_G / flops_per_s, minlength=len(ranks) * passes).reshape(shape_RP)
        for part_G in _sample_flops(shape, samples, row_G, padded, recomputed_layers)
    )
    useful, padding, recompute = (float(part.sum()) / len(ranks) for part in (useful_RP, padding_RP, recompute_RP))
    busy_RP = (useful_RP + padding_RP + recompute_RP).astype(np.float64)
    in_order = _waited(busy_RP, lock_step)
    slowed = in_order if slowness_RP is None else _waited(busy_RP * slowness_RP[:, :passes], lock_step)
    communication = 0.0
    if exposed is not None:
        each = busy_RP.max(axis=0)
        communication = sum(exposed(float(each[p]), p == passes - 1) for p in range(passes))
    stragglers = in_order - useful - padding - recompute
    total = slowed + communication
    return StepTime(total, useful, padding, recompute, stragglers, slowed - in_order, communication)


def _waited(busy_RP: npt.NDArray[np.float64], lock_step: bool) -> float:
    """Seconds until the last rank has ended all micro-batches."""
    return float(busy_RP.max(axis=0).sum() if lock_step else busy_RP.sum(axis=1).max())


def draw_slowness(
    ranks: int, passes: int, *, jitter: float, slow_share: float, slow_factor: float, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """How many times longer ranks take for micro-batches than a GPU without disturbance, `[ranks, passes]`.

    Args:
        jitter: How much longer a rank takes for a micro-batch, as a share: the size of a normal number with this
            standard deviation, drawn anew each time.
        slow_share: Probability that a GPU is slow throughout.
        slow_factor: Its time over that of the others.
    """
    noise = 1.0 + jitter * np.abs(generator.standard_normal((ranks, passes)))
    slow = np.where(generator.random(ranks) < slow_share, slow_factor, 1.0)
    return noise * slow[:, None]


def _sample_flops(
    shape: ModelShape, samples: Samples, row_G: npt.NDArray[np.int64], padded: bool, recomputed_layers: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """FLOPs of useful work, padding and recomputation per sample, [G] each; `row_G` is the row of each sample."""
    tokens = samples.tokens.astype(float)
    run = tokens
    if padded:
        longest = np.zeros(int(row_G.max()) + 1)
        np.maximum.at(longest, row_G, tokens)
        run = longest[row_G]
    none = np.zeros_like(tokens)
    useful = training_flops(shape, tokens, tokens**2, samples.supervised.astype(float), samples.images.astype(float))
    padding = training_flops(shape, run, run**2, none, none) - training_flops(shape, tokens, tokens**2, none, none)
    return useful, padding, recompute_flops(shape, run, run**2, recomputed_layers)


def mean_step(times: Sequence[StepTime]) -> StepTime:
    """The mean of every part over steps."""
    keys = ("seconds", "useful", "padding", "recompute", "stragglers", "slow", "communication")
    return StepTime(**{key: sum(getattr(time, key) for time in times) / len(times) for key in keys})


def draw_steps(
    pools: Sequence[Samples], shares: Sequence[float], batch: int, steps: int, seed: int
) -> Iterator[Samples]:
    """Draw steps of `batch` samples: the source by its share of the mixture, the lengths from the source's pool."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    tokens, supervised, images = (
        np.concatenate([getattr(pool, key) for pool in pools]) for key in ("tokens", "supervised", "images")
    )
    sizes = np.array([len(pool.tokens) for pool in pools])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    probabilities = np.array(shares, dtype=float) / sum(shares)
    for _ in range(steps):
        source = generator.choice(len(pools), size=batch, p=probabilities)
        index = starts[source] + (generator.random(batch) * sizes[source]).astype(np.int64)
        yield Samples(tokens[index], supervised[index], images[index])

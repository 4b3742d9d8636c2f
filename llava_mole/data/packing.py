"""Which rank takes which samples of a step, and how a rank's samples share rows.

A step's samples are fixed by the plan; only their placement is decided here, so it never changes the result. Samples
are spread by cost, longest first to the rank with the least (LPT), because a step lasts as long as its slowest rank.
"""

import heapq
from collections.abc import Sequence

Rows = list[list[int]]
"""The rows of one rank: indices of the samples that share each row. A row may be empty."""


def sample_cost(length: int, quadratic: float) -> float:
    """Relative work of a sample of `length` tokens: `l + l^2 / quadratic`.

    `quadratic` is the length at which attention costs as much as all linear layers (`model.flops`).
    """
    return length + length * length / quadratic


def assign_step(lengths: Sequence[int], *, world_size: int, capacity: int, quadratic: float) -> list[Rows]:
    """Place a step's samples on ranks and rows.

    Args:
        lengths: Tokens of each of the step's samples.
        world_size: Ranks.
        capacity: Most tokens of a row. A longer sample gets a row of its own.
        quadratic: See `sample_cost`.

    Returns:
        For each rank its rows, the costliest first. Every rank has the same number of rows (the smallest with which
        all samples fit), because gradients are reduced row by row; ranks without work for a row have it empty. Indices
        within a row are in ascending order. The result depends on nothing but the arguments.
    """
    costs = [sample_cost(length, quadratic) for length in lengths]
    ranks = spread(range(len(lengths)), costs, world_size)
    num_rows = max(1, *(-(-sum(lengths[i] for i in samples) // capacity) for samples in ranks))
    while True:
        placed = [_fill_rows(samples, lengths, costs, num_rows, capacity) for samples in ranks]
        complete = [rows for rows in placed if rows is not None]
        if len(complete) == world_size:
            return complete
        num_rows += 1


def spread(samples: Sequence[int], costs: Sequence[float], bins: int) -> list[list[int]]:
    """Longest processing time first: `samples` over `bins` so that the largest total of `costs` is small."""
    heap = [(0.0, index) for index in range(bins)]
    result: list[list[int]] = [[] for _ in range(bins)]
    for sample in sorted(samples, key=lambda i: (-costs[i], i)):
        total, index = heapq.heappop(heap)
        result[index].append(sample)
        heapq.heappush(heap, (total + costs[sample], index))
    return result


def _fill_rows(
    samples: Sequence[int], lengths: Sequence[int], costs: Sequence[float], num_rows: int, capacity: int
) -> Rows | None:
    """`samples` over `num_rows` rows of equal cost where capacity allows, else wherever they fit; None if nowhere."""
    rows = _balanced_rows(samples, lengths, costs, num_rows, capacity)
    if rows is None:
        rows = _first_fit(samples, lengths, num_rows, capacity)
    if rows is None:
        return None
    rows.sort(key=lambda row: (-sum(costs[i] for i in row), row))
    return rows


def _balanced_rows(
    samples: Sequence[int], lengths: Sequence[int], costs: Sequence[float], num_rows: int, capacity: int
) -> Rows | None:
    rows = [sorted(row) for row in spread(samples, costs, num_rows)]
    return rows if all(len(row) < 2 or sum(lengths[i] for i in row) <= capacity for row in rows) else None


def _first_fit(samples: Sequence[int], lengths: Sequence[int], num_rows: int, capacity: int) -> Rows | None:
    """First-fit decreasing."""
    rows: Rows = [[] for _ in range(num_rows)]
    room = [capacity] * num_rows
    for sample in sorted(samples, key=lambda i: (-lengths[i], i)):
        index = next((k for k in range(num_rows) if lengths[sample] <= room[k] or not rows[k]), None)
        if index is None:
            return None
        rows[index].append(sample)
        room[index] -= lengths[sample]
    return [sorted(row) for row in rows]

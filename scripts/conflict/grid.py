"""The grids of the search: which cells, which arms, in which order. docs/conflict.md says why."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from scripts.conflict.loop import ARMS, ROUTERS, Arm, Cell


@dataclass(frozen=True)
class Job:
    """One cell and seed with its arms."""

    cell: Cell
    seed: int
    arms: dict[str, Arm]


CENTRE = Cell(1.0, 64, 1)
"""The cell in which routers are compared first."""
CORE = (CENTRE, Cell(0.0, 64, 1), Cell(0.5, 64, 1), Cell(1.0, 64, 2), Cell(1.0, 32, 1), Cell(0.0, 64, 1, "own"))
"""One step from the centre along every dial."""
FULL = tuple(Cell(c, load, r) for r, load, c in product((1, 2, 4), (32, 64, 128), (0.0, 0.5, 1.0)))
OUTER = (
    "single general",
    "single document",
    "single biomedicine",
    "mix",
    "mix, rank K r",
    "oracle",
    "paper",
    "lead",
    "image",
)
"""Arms of the cells outside the core."""


def _jobs(cells: Sequence[Cell], arms: dict[str, Arm], seeds: Sequence[int]) -> Iterator[Job]:
    for cell in cells:
        for seed in seeds:
            yield Job(cell, seed, arms)


def centre(seeds: Sequence[int]) -> Iterator[Job]:
    """All arms of the phase diagram at the centre."""
    return _jobs([CENTRE], ARMS, seeds)


def core(seeds: Sequence[int]) -> Iterator[Job]:
    """All arms of the phase diagram in the core cells."""
    return _jobs(CORE, ARMS, seeds)


def full(seeds: Sequence[int]) -> Iterator[Job]:
    """The other cells of the phase diagram, with fewer arms."""
    return _jobs([c for c in FULL if c not in CORE], {name: ARMS[name] for name in OUTER}, seeds)


def routers(seeds: Sequence[int]) -> Iterator[Job]:
    """Router variants at the centre."""
    return _jobs([CENTRE], ROUTERS, seeds)


def routers_rank_2(seeds: Sequence[int]) -> Iterator[Job]:
    """Router variants where rank is 2."""
    return _jobs([Cell(1.0, 64, 2)], ROUTERS, seeds)


GRIDS: dict[str, Callable[[Sequence[int]], Iterator[Job]]] = {
    "centre": centre,
    "core": core,
    "full": full,
    "routers": routers,
    "routers-rank-2": routers_rank_2,
}
"""The grids by name."""

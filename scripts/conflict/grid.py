"""The grids of the search: which cells, which arms, in which order. docs/conflict.md says why."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from scripts.conflict.loop import ARMS, MORE_ROUTERS, ROUTERS, Arm, Cell


@dataclass(frozen=True)
class Job:
    """One cell and seed with its arms."""

    cell: Cell
    seed: int
    arms: dict[str, Arm]


CENTRE = Cell(1.0, 32, 1)
"""The cell in which routers are compared."""
CORE = (CENTRE, Cell(0.0, 32, 1), Cell(1.0, 32, 2), Cell(0.5, 32, 1), Cell(0.0, 32, 1, "own"), Cell(1.0, 16, 1))
"""The centre and one step along every dial."""
FULL = tuple(Cell(c, load, r) for r, load, c in product((1, 2, 4), (16, 32, 64), (0.0, 0.5, 1.0)))
"""All combinations."""
HEAVY = tuple(Cell(c, load, r) for r, load, c in product((1, 2), (64, 96, 128), (1.0, 0.0, 0.5)))
"""Loads for models that store 32 facts a domain without loss (docs/conflict.md, amendment 6)."""
FIRST = (
    "single general", "single document", "single biomedicine", "mix", "mix, rank K r", "oracle", "paper", "coupled",
    "lead", "image",
)  # fmt: skip
"""The arms that every cell has."""
FEW = tuple(name for name in FIRST if name not in ("coupled", "lead"))
"""The arms of a cell when time is short."""
LOADED = Cell(1.0, 64, 1)
"""The cell with most conflict on the models of amendment 6, where routers are compared on them."""
RATES = (1 / 3, 1 / 2, 1.0, 3 / 2)
"""Factors on the recipe's learning rate of which every arm gets its own (docs/conflict.md, amendment 9)."""
RANKS = tuple(dataclasses.replace(LOADED, rank=r) for r in (1, 2, 4))
"""The cells in which the learning rate of an arm is chosen, one for each rank."""
REST = ("mix", "oracle", "random", "best", "source")
"""The other arms, with those that they are compared to."""

SECOND: dict[str, Arm] = {
    **{name: ARMS[name] for name in (*FIRST[:6], "paper", "coupled", "best", "image")},
    **{name: ROUTERS[name] for name in ("image, source", "paper, source")},
    "image, source 0.3": dataclasses.replace(
        ROUTERS["image, source"], training={"image_only": True, "source_coef": 0.3}
    ),
    "image, source 1": dataclasses.replace(ROUTERS["image, source"], training={"image_only": True, "source_coef": 1.0}),
}
"""The arms of the second round: those of the first that came out best, with the ones that they are compared to."""

CHOSEN: dict[str, tuple[float, float, float]] = {
    "single": (1.0, 1.0, 1 / 2),
    "mix": (3 / 2, 1.0, 1.0),
    "mix, rank K r": (1.0, 1 / 2, 1 / 2),
    "oracle": (3 / 2, 1.0, 1 / 2),
    "paper": (1.0, 1.0, 1 / 2),
    "coupled": (1.0, 1.0, 1 / 2),
    "best": (1 / 2, 1 / 2, 1 / 2),
    "image": (1.0, 1 / 2, 1 / 2),
    "image, source 1": (1.0, 1 / 2, 1 / 2),
    "paper, source": (1.0, 1.0, 1 / 2),
}
"""Factor on the recipe's learning rate of an arm at `RANKS`, chosen on validation (docs/conflict.md, amendment 10)."""
FINAL: dict[str, tuple[Arm, str]] = {
    **{name: (SECOND[name], name) for name in CHOSEN if name != "single"},
    **{name: (ARMS[name], "single") for name in FIRST[:3]},
    "random": (ARMS["random"], "mix"),
    "paper, source 1": (Arm({}, training={"source_coef": 1.0}), "paper, source"),
}
"""The arms of the second round's results, each with the entry of `CHOSEN` that gives its rate."""


def _jobs(cells: Sequence[Cell], arms: dict[str, Arm], seeds: Sequence[int]) -> Iterator[Job]:
    for cell in cells:
        for seed in seeds:
            yield Job(cell, seed, arms)


def _named(names: Sequence[str]) -> dict[str, Arm]:
    return {name: ARMS[name] for name in names}


def centre(seeds: Sequence[int]) -> Iterator[Job]:
    """The first arms at the centre."""
    return _jobs([CENTRE], _named(FIRST), seeds)


def three(seeds: Sequence[int]) -> Iterator[Job]:
    """The first arms at the centre, without contradiction, and at twice the rank."""
    return _jobs(CORE[:3], _named(FIRST), seeds)


def few(seeds: Sequence[int]) -> Iterator[Job]:
    """Fewer arms without contradiction."""
    return _jobs([CORE[1]], _named(FEW), seeds)


def few_rank_2(seeds: Sequence[int]) -> Iterator[Job]:
    """Fewer arms at twice the rank."""
    return _jobs([CORE[2]], _named(FEW), seeds)


def few_half(seeds: Sequence[int]) -> Iterator[Job]:
    """Fewer arms where half of the facts contradict."""
    return _jobs([CORE[3]], _named(FEW), seeds)


def core(seeds: Sequence[int]) -> Iterator[Job]:
    """The first arms in the core cells."""
    return _jobs(CORE, _named(FIRST), seeds)


def full(seeds: Sequence[int]) -> Iterator[Job]:
    """The first arms in all cells of the phase diagram."""
    return _jobs(FULL, _named(FIRST), seeds)


def heavy(seeds: Sequence[int]) -> Iterator[Job]:
    """Fewer arms at larger loads."""
    return _jobs(HEAVY, _named(FEW), seeds)


def own_load(seeds: Sequence[int]) -> Iterator[Job]:
    """The control for load at `LOADED`: as many facts, none of which contradicts another."""
    return _jobs([dataclasses.replace(LOADED, convention=0.0, agreed="own")], _named(FEW), seeds)


def loaded_routers(seeds: Sequence[int]) -> Iterator[Job]:
    """The arms that `heavy` leaves out, then all router variants, at `LOADED`."""
    left = {name: arm for name, arm in ARMS.items() if name not in FEW} | {"mix": ARMS["mix"]}
    for arms in (left, ROUTERS, MORE_ROUTERS):
        yield from _jobs([LOADED], arms, seeds)


def sourced(seeds: Sequence[int]) -> Iterator[Job]:
    """The two routers with a source loss that came out best at `LOADED`, in other cells."""
    cells = [
        dataclasses.replace(LOADED, convention=0.5),
        dataclasses.replace(LOADED, convention=0.0, agreed="own"),
        dataclasses.replace(LOADED, load=96),
        dataclasses.replace(LOADED, rank=2),
    ]
    arms = _named(("mix", "mix, rank K r", "oracle")) | {
        name: ROUTERS[name] for name in ("image, source", "paper, source")
    }
    return _jobs(cells, arms, seeds)


def with_rate(arm: Arm, factor: float) -> Arm:
    """The arm at a multiple of the recipe's learning rate."""
    return dataclasses.replace(arm, training={**arm.training, "rate": factor})


def rates(seeds: Sequence[int]) -> Iterator[Job]:
    """All arms of the second round at every learning rate, at `RANKS`; `name @ factor` is an arm at a rate."""
    arms = {f"{name} @ {f:.2g}": with_rate(arm, f) for name, arm in SECOND.items() for f in RATES}
    return _jobs(RANKS, arms, seeds)


def second(seeds: Sequence[int]) -> Iterator[Job]:
    """The second round: every arm at its own learning rate, in the order of amendment 9."""
    cells = [
        LOADED,
        dataclasses.replace(LOADED, convention=0.0),
        dataclasses.replace(LOADED, convention=0.5),
        dataclasses.replace(LOADED, convention=0.0, agreed="own"),
        *RANKS[1:],
        dataclasses.replace(LOADED, load=96),
        dataclasses.replace(LOADED, load=96, rank=2),
        dataclasses.replace(LOADED, load=32),
    ]
    yield from _tuned(cells, seeds)


def second_full(seeds: Sequence[int]) -> Iterator[Job]:
    """The second round in all combinations of convention, load and rank."""
    cells = (Cell(c, load, r) for load, r, c in product((96, 64, 32), (1, 2, 4), (1.0, 0.5, 0.0)))
    yield from _tuned(cells, seeds)


def _tuned(cells: Iterable[Cell], seeds: Sequence[int]) -> Iterator[Job]:
    for cell in cells:
        place = [known.rank for known in RANKS].index(cell.rank)
        arms = {name: with_rate(arm, CHOSEN[entry][place]) for name, (arm, entry) in FINAL.items()}
        yield from _jobs([cell], arms, seeds)


def rest(seeds: Sequence[int]) -> Iterator[Job]:
    """The other arms in the core cells."""
    return _jobs(CORE, _named(REST), seeds)


def routers(seeds: Sequence[int]) -> Iterator[Job]:
    """Router variants at the centre."""
    return _jobs([CENTRE], ROUTERS, seeds)


def more_routers(seeds: Sequence[int]) -> Iterator[Job]:
    """The other router variants at the centre."""
    return _jobs([CENTRE], MORE_ROUTERS, seeds)


def routers_rank_2(seeds: Sequence[int]) -> Iterator[Job]:
    """Router variants where rank is 2."""
    return _jobs([dataclasses.replace(CENTRE, rank=2)], ROUTERS, seeds)


GRIDS: dict[str, Callable[[Sequence[int]], Iterator[Job]]] = {
    "centre": centre,
    "three": three,
    "few": few,
    "few-rank-2": few_rank_2,
    "few-half": few_half,
    "core": core,
    "full": full,
    "heavy": heavy,
    "own-load": own_load,
    "loaded-routers": loaded_routers,
    "sourced": sourced,
    "rest": rest,
    "rates": rates,
    "second": second,
    "second-full": second_full,
    "routers": routers,
    "more-routers": more_routers,
    "routers-rank-2": routers_rank_2,
}
"""The grids by name."""

"""Fixtures that several folders share; how tests are spread over workers and which of them need a GPU.

`worlds.*` and `scripts.*` are importable from every test.
"""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # one worker a core; read when torch is imported

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # `worlds` and `scripts`

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor

LONGEST = (
    "test_readme.py",
    "test_ranks.py",
    "test_launch.py",
    "test_faults.py",
    "test_benchmarks.py",
    "test_sharding.py",
    "test_mole_zero2.py",
    "test_tiny_build.py",
    "test_quantized_runs.py",
)
"""The files that take longest, in this order: workers begin with them, so that none has one left at the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `gpu` on a machine without one, and give long files to workers first."""
    import torch

    if not torch.cuda.is_available():
        needing = [item for item in items if item.get_closest_marker("gpu")]
        if needing:
            config.hook.pytest_deselected(items=needing)  # the last line of the output counts them
            items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    if "PYTEST_XDIST_WORKER" in os.environ:
        _longest_first(items)


def _longest_first(items: list[pytest.Item]) -> None:
    """Sort by file: those of `LONGEST`, then others with slow tests, then the rest."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def place(item: pytest.Item) -> tuple[int, bool]:
        name = item.path.name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST), item.path not in slow

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _log_reaches_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """`caplog` listens at the root logger, which the package's entry points cut off."""
    monkeypatch.setattr(logging.getLogger("llava_mole"), "propagate", True)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and two sound sources of 12 records; treat as read-only."""
    from worlds import tiny_models

    directory = tmp_path_factory.mktemp("world")
    tiny_models.make_world(directory, samples=12, text_only_every=12)
    return directory


@pytest.fixture(scope="session")
def mole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of an untrained model with experts; treat as read-only."""
    from worlds.eval_models import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("mole"), "mole")


@pytest.fixture(scope="session")
def predictor(mole_run: Path) -> "Predictor":
    """That model, loaded."""
    from llava_mole.inference.predictor import Predictor

    return Predictor.from_pretrained(mole_run, device="cpu")


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question file with its images beside it; treat as read-only."""
    from worlds.eval_models import make_questions

    return make_questions(tmp_path_factory.mktemp("asked"))

"""Fixtures that several folders share; `worlds.*` is importable from every test; GPU tests run where a GPU is."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # `worlds` and `scripts`

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `gpu` on a machine without one; the count of deselected tests is in the last line."""
    import torch

    if torch.cuda.is_available():
        return
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing:
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


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

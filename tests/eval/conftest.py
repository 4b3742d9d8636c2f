"""Models that the tests of evaluation share, built once."""

from pathlib import Path

import pytest
from eval_models import make_checkpoint, make_questions

from llava_mole.inference.predictor import Predictor


@pytest.fixture(scope="session")
def mole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of an untrained model with experts; treat as read-only."""
    return make_checkpoint(tmp_path_factory.mktemp("mole"), "mole")


@pytest.fixture(scope="session")
def predictor(mole_run: Path) -> Predictor:
    """That model, loaded."""
    return Predictor.from_pretrained(mole_run, device="cpu")


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question file with its images beside it; treat as read-only."""
    return make_questions(tmp_path_factory.mktemp("asked"))

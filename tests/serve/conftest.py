"""The model that the chat's tests share, built once."""

from pathlib import Path

import pytest
from worlds.eval_models import make_checkpoint, make_questions


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of an untrained model with plain LoRA; treat as read-only."""
    return make_checkpoint(tmp_path_factory.mktemp("chat"), "lora")


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image file."""
    folder = tmp_path_factory.mktemp("photo")
    make_questions(folder)
    return str(folder / "images" / "0.png")

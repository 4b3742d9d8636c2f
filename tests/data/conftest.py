"""Fixtures of the data tests."""

import logging
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _log_reaches_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """`caplog` listens at the root logger, which the package's entry points cut off."""
    monkeypatch.setattr(logging.getLogger("llava_mole"), "propagate", True)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and two sound sources of 12 records."""
    import tiny_models

    directory = tmp_path_factory.mktemp("world")
    tiny_models.make_world(directory, samples=12, text_only_every=12)
    return directory

"""Fixtures of the data tests."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _log_reaches_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """`caplog` listens at the root logger, which the package's entry points cut off."""
    monkeypatch.setattr(logging.getLogger("llava_mole"), "propagate", True)

"""A small study whose commands are stand-ins."""

import shutil
from pathlib import Path

import pytest
from worlds.study_world import make_study_world


@pytest.fixture(scope="session")
def study_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data and a base; treat as read-only."""
    return make_study_world(tmp_path_factory.mktemp("study") / "world")


@pytest.fixture
def own_world(tmp_path: Path) -> Path:
    """The same, to change."""
    return make_study_world(tmp_path / "world")


@pytest.fixture
def folder(study_world: Path, tmp_path: Path) -> Path:
    """A folder for study files beside a copy of the base, on the shared models and data."""
    for file in study_world.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def own_gpu_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that run side by side do not share the GPUs that they make up."""
    monkeypatch.setattr("llava_mole.study.runner.GPU_CLAIMS", tmp_path / "gpus")

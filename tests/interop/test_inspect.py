"""`llava-mole inspect` says what a directory holds and whether it is intact."""

import shutil
from pathlib import Path

import pytest
from worlds.eval_models import make_checkpoint

from llava_mole import cli
from llava_mole.common.text import format_bytes
from llava_mole.interop.inspect.describe import count_parameters


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("inspect"), "mole")


def test_checkpoint_and_run_are_described(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(run / "checkpoint-1")]) == 0
    described = capsys.readouterr().out
    for expected in ("verified", "finetune", "vicuna_v1", "mole", str(run.parent / "language_model"), "fingerprint"):
        assert expected in described, expected
    # mlp2x_gelu from width 24 to 32: 24 * 32 + 32 + 32 * 32 + 32 numbers
    (projector,) = [line for line in described.splitlines() if line.startswith("  mm_projector.safetensors")]
    assert "1,856 numbers" in projector
    assert cli.main(["inspect", str(run)]) == 0
    assert described in capsys.readouterr().out


def test_damage_is_reported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.copytree(run / "checkpoint-1", copy / "checkpoint-2")
    with (copy / "checkpoint-2" / "mm_projector.safetensors").open("r+b") as file:
        file.truncate(100)
    assert cli.main(["inspect", str(copy)]) == 2
    printed = capsys.readouterr().out
    assert "checkpoint-2        NOT USABLE" in printed
    assert "mm_projector.safetensors has 100 bytes" in printed
    assert "checkpoint-1        verified, stage finetune, step 1" in printed
    assert cli.main(["inspect", str(copy / "checkpoint-2")]) == 2
    assert "is damaged: mm_projector.safetensors has 100 bytes" in capsys.readouterr().err


def test_other_directories_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "is not a known kind of directory: no manifest.json, checkpoint-<step>," in capsys.readouterr().err


def test_sizes_and_counts(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(())}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert count_parameters(tmp_path / "x.safetensors") == 13
    assert [format_bytes(n) for n in (0, 999, 1000, 1234567, 5 * 10**15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.2 MB",
        "5000.0 TB",
    ]

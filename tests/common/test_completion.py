"""Shell completion: the scripts ask the command's own help, so what they offer exists."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_mole import cli
from llava_mole.common.completion import SCRIPTS
from llava_mole.data.prepare.sources import MODULES


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PATH with a `llava-mole` of this checkout."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "llava-mole").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llava_mole "$@"\n')
    (folder / "llava-mole").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def offered(path: str, *words: str) -> list[str]:
    """What Tab offers in bash after these words."""
    line = " ".join(f"'{word}'" for word in words)
    script = f"{SCRIPTS['bash']}\nCOMP_WORDS=({line})\nCOMP_CWORD={len(words) - 1}\n_llava_mole\n"
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    root = str(Path(cli.__file__).parents[1])
    environment = {"PATH": path, "PYTHONPATH": root, "COLUMNS": "100"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=True, cwd=root)
    return done.stdout.split()


def test_bash_completes_commands_options_and_sources(commands: str) -> None:
    assert offered(commands, "llava-mole", "") == list(cli.SUBCOMMANDS)
    assert offered(commands, "llava-mole", "pre") == ["prepare", "prepare-benchmark"]
    assert offered(commands, "llava-mole", "train", "--train.learning_r") == ["--train.learning_rate"]
    assert set(offered(commands, "llava-mole", "report", "--o")) == {"--out", "--overwrite"}
    assert set(MODULES) <= set(offered(commands, "llava-mole", "prepare", ""))
    assert "--image-root" in offered(commands, "llava-mole", "prepare", "llava-json", "--image")
    assert offered(commands, "llava-mole", "inspect", "runs/") == []  # bash's own completion of files


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts_parse(shell: str, tmp_path: Path) -> None:
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(SCRIPTS[shell])
    subprocess.run([program, "-n", str(tmp_path / "script")], check=True)


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "fish"]) == 0
    assert capsys.readouterr().out == SCRIPTS["fish"]

"""The `llava-mole` command finds its subcommands, quickly, and names them when asked for another one."""

import argparse
import contextlib
import importlib
import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from llava_mole import __version__, cli
from llava_mole.data.prepare.sources import MODULES, get_module


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for name in cli.SUBCOMMANDS:
        assert f"\n  {name} " in printed


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from llava_mole.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


HEAVY = ("torch", "transformers", "peft", "accelerate", "pyarrow", "open_clip", "matplotlib", "deepspeed")
"""Packages that take a good part of a second to import; help that waits for one of them is too slow."""
ENTRY_POINTS = ("llava_mole.eval.model_vqa", "llava_mole.serve.cli")
"""Modules with options of their own that are run with `python -m`."""


def test_no_help_imports_a_heavy_package() -> None:
    """All commands in one process, in order: the first one that imports a package is named."""
    calls = [(name, "--help") for name in cli.SUBCOMMANDS]
    calls += [("prepare", name, "--help") for name in MODULES]
    calls += [(module, "--help") for module in ENTRY_POINTS]
    code = f"""
import contextlib, importlib, io, sys
from llava_mole.cli import main
blamed = {{}}
for call in {calls!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
        if call[0] in {ENTRY_POINTS!r}:
            importlib.import_module(call[0]).main(["--help"])
        else:
            main(call)
    assert "usage: " in printed.getvalue(), call
    for package in {HEAVY!r}:
        if package in sys.modules:
            blamed.setdefault(package, " ".join(call))
print(blamed)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"


def test_the_package_runs_as_a_module_and_gives_its_predictor() -> None:
    """`import llava_mole` stays light; `from llava_mole import Predictor` imports what it needs."""
    done = subprocess.run([sys.executable, "-m", "llava_mole", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__}\n"
    code = "import sys, llava_mole; assert 'Predictor' in llava_mole.__all__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    from llava_mole import Predictor
    from llava_mole.inference import predictor

    assert Predictor is predictor.Predictor
    with pytest.raises(AttributeError, match="no attribute 'Predicter'"):
        importlib.import_module("llava_mole").Predicter  # noqa: B018


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fly"]) == 2
    assert f"no command 'fly'; there are {', '.join(cli.SUBCOMMANDS)}" in capsys.readouterr().err


def test_a_mistyped_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "no command 'trian', did you mean train?; there are train, " in capsys.readouterr().err


def test_every_command_has_its_module() -> None:
    sources = [(get_module(name).__name__, name) for name in MODULES]
    for module, _ in [*cli.SUBCOMMANDS.values(), *sources]:
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("name", [name for name in cli.SUBCOMMANDS if name not in ("train", "prepare")])
def test_arguments_are_forwarded(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: llava-mole {name}" in capsys.readouterr().out


def test_prepare_names_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare"]) == 0
    assert "\n  tiny " in capsys.readouterr().out
    assert cli.main(["prepare", "imagenet"]) == 2
    assert "no source 'imagenet' to prepare; there are tiny, sharegpt4v-pt" in capsys.readouterr().err


def test_prepare_forwards_to_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    import llava_mole.data.prepare.sources.tiny.world

    seen: list[list[str]] = []
    monkeypatch.setattr(llava_mole.data.prepare.sources.tiny.world, "main", lambda argv: seen.append(argv) or 0)
    assert cli.main(["prepare", "tiny", "--out", "somewhere"]) == 0
    assert seen == [["--out", "somewhere"]]


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_option_has_a_help_text_of_at_most_100_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a parser's that adds its options at run time: every parser that prints help is looked at."""
    silent: list[str] = []
    print_help = argparse.ArgumentParser.print_help

    def look(parser: argparse.ArgumentParser, file: Any = None) -> None:
        silent.extend("/".join(a.option_strings) or a.dest for a in parser._actions if not a.help)
        print_help(parser, file)

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", look)
    with contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ")
    assert not silent, f"options of llava-mole {name} without help: {silent}"
    assert not (long := [line for line in printed.splitlines() if len(line) > 100]), "\n".join(long)

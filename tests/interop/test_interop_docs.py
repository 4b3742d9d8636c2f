"""docs/interop.md: its commands parse, its formats exist, and every format is in it."""

import re
import shlex
from pathlib import Path

import pytest

from llava_mole.interop.cli import FORMATS, LAYOUT_NAMES, _parser
from llava_mole.interop.exporting import LAYOUTS

TEXT = (Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`(llava-mole convert [^`]+)`", TEXT)


def test_there_are_commands_for_every_format() -> None:
    named = {shlex.split(command)[shlex.split(command).index("--to") + 1] for command in COMMANDS if "--to" in command}
    assert named - {"FORMAT"} == set(FORMATS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    arguments = _parser().parse_args(shlex.split(command)[2:])
    assert arguments.to in (*FORMATS, "FORMAT")


def test_options_named_in_the_text_exist() -> None:
    known = _parser().format_help()
    training = {"--init_from", "--projector_weights", "--model.language_model"}
    for option in set(re.findall(r"(--[a-z][\w.-]+)", TEXT)) - training:
        assert option in known, option


def test_the_names_of_the_layouts_agree() -> None:
    assert tuple(LAYOUTS) == LAYOUT_NAMES

"""The commands of the documentation: found in its blocks, checked against the parsers, and run in one process."""

import argparse
import contextlib
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("llava-mole", "bash", "python", "pip", "git", "source", "curl", "pre-commit", "printf", "mkdocs", "docker")
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.S | re.M)
_VARIABLE = re.compile(r"^[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Command:
    """One command of a page, with comments removed and continuation lines joined."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its words without variables in front; of a pipeline or loop, those of its last part that we check."""
        text = self.text
        for separator in ("; do ", " | "):
            text = text.rpartition(separator)[2]
        words = shlex.split(text.removesuffix("&").replace("$i", "0").strip(), comments=True)
        while words and _VARIABLE.match(words[0]):
            words.pop(0)
        return words


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block."""
    for _, language, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        yield language, text


def commands(page: Path) -> list[Command]:
    """Those of the page's bash blocks, and of blocks without a language that begin with a program."""
    found = []
    name = page.relative_to(ROOT).as_posix()
    for language, block in blocks(page):
        if language not in ("bash", "") or (not language and not block.strip().startswith(PROGRAMS)):
            continue
        text = re.sub(r"(; do) *\n", r"\1 ", block.replace("\\\n", " "))
        text = re.sub(r"'\{\n.*?\}'", "'{}'", text, flags=re.S)  # a body in JSON
        for line in text.splitlines():
            with_comment = re.sub(r"\s+#\s.*$", "", line).strip()
            if with_comment and not with_comment.startswith(("done", "#")):
                found.append(Command(name, " ".join(with_comment.split())))
    return found


class _Parsed(Exception):
    """Raised in place of the work, when the arguments have been parsed."""


def check(command: Command) -> None:
    """Raise an error unless the command exists, has these options, and its scripts and configurations are there."""
    words = command.words
    for word in words:
        path = re.fullmatch(r"(?:configs|scripts|tests|playground/models/tiny)/[\w./-]+", word)
        assert path is None or (ROOT / word).exists(), f"{command}: {word} does not exist"
    if words[0] == "llava-mole":
        parse(words[1:])
    elif words[:2] == ["python", "-m"] and words[2].startswith(("llava_mole.", "scripts.")):
        assert importlib.util.find_spec(words[2]) is not None, f"{command}: no module {words[2]}"
        if words[2].startswith("llava_mole."):
            _stopped_after_parsing(lambda: importlib.import_module(words[2]).main(words[3:]))


def parse(arguments: Sequence[str]) -> None:
    """Run a command until its arguments are parsed. Raises AssertionError for options that it does not have."""
    from llava_mole.cli import SUBCOMMANDS, main
    from llava_mole.config import parse_run_config

    if arguments[0] == "train":
        given = [word for word in arguments[1:] if word not in ("--dry-run", "--dry-run-load")]
        if (ROOT / given[0]).is_file():
            parse_run_config([str(ROOT / given[0]), *given[1:]])
        return
    assert arguments[0] in SUBCOMMANDS, arguments
    _stopped_after_parsing(lambda: main(arguments))


def _stopped_after_parsing(call: Any) -> None:
    parse_known = argparse.ArgumentParser.parse_known_args
    depth = 0

    def stop(parser: argparse.ArgumentParser, *args: Any, **more: Any) -> Any:
        nonlocal depth
        depth += 1
        parsed, rest = parse_known(parser, *args, **more)
        depth -= 1
        overrides = [word for word in rest if word.startswith("-") and not re.match(r"--\w+\.", word)]
        if depth == 0 and not overrides:
            raise _Parsed
        return parsed, rest

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop), contextlib.suppress(_Parsed):
        code = call()
        raise AssertionError(f"the command ended with {code} before its arguments were parsed")


def run(command: Command, more: Sequence[str] = ()) -> int:
    """Run a command of this package or of scripts/ in this process, in the working directory; its exit code."""
    from llava_mole.cli import main

    words = [*command.words, *more]
    if words[0] == "llava-mole":
        return main(words[1:])
    assert words[0] == "python", command
    if words[1] == "-m":
        return importlib.import_module(words[2]).main(words[3:])
    with mock.patch.object(sys, "argv", words[1:]):
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    return 0

"""Every command of README.md, CONTRIBUTING.md and docs/ runs in a test, or stands on a list with the reason."""

import re
from pathlib import Path

import pytest
import yaml
from worlds.pages import PAGES, ROOT, Command, check, commands

FOUND = [command for page in PAGES for command in commands(page)]
LISTS = yaml.safe_load((Path(__file__).parent / "commands.yaml").read_text(encoding="utf-8"))
ENTRIES = [
    (where, page, beginning)
    for kind in ("run", "not_run")
    for where, entries in LISTS[kind].items()
    for entry in entries
    for page, beginning in entry.items()
]


def test_every_command_is_on_one_list() -> None:
    for command in FOUND:
        of_it = [where for where, page, text in ENTRIES if page == command.page and command.text.startswith(text)]
        assert len(of_it) == 1, (
            f"{command.page}: {command.text!r} is on {of_it or 'no list'} of tests/docs/commands.yaml"
        )


def test_no_entry_is_stale() -> None:
    for _, page, text in ENTRIES:
        assert any(c.page == page and c.text.startswith(text) for c in FOUND), f"{page} has no command {text!r}"
    for test in LISTS["run"]:
        assert (ROOT / test).is_file(), test


@pytest.mark.parametrize("command", FOUND, ids=lambda c: f"{c.page}: {c.text[:50]}")
def test_the_command_has_these_options(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its parser takes the arguments; the scripts, configurations and modules that it names exist."""
    monkeypatch.chdir(ROOT)
    check(command)


def test_named_files_exist() -> None:
    """In all text of all pages."""
    pattern = re.compile(
        r"(?<![\w/.-])(?:configs|scripts|tests|docs|llava_mole)/[\w./-]+\.(?:yaml|sh|py|md|sbatch|png)\b"
    )
    lost = {
        f"{page.name}: {name}"
        for page in PAGES
        for name in pattern.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists() and not name.startswith("scripts/v1_5/")  # LLaVA's
    }
    assert not lost


def test_a_command_that_does_not_exist_is_found() -> None:
    for text in ("llava-mole trian x", "llava-mole eval RUN --bencmarks tiny", "bash scripts/none.sh"):
        with pytest.raises((AssertionError, SystemExit)):
            check(Command("page", text))

"""The Dockerfile is checked by parsing it: there is no docker in the tests."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}


def instructions() -> Iterator[tuple[str, str]]:
    """Instruction and arguments, with continued lines joined and comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, " ".join(rest.split())


PARSED = list(instructions())


def every(word: str) -> list[str]:
    return [rest for found, rest in PARSED if found == word]


def test_only_known_instructions_in_a_possible_order() -> None:
    assert {word for word, _ in PARSED} <= KNOWN
    first = next(index for index, (word, _) in enumerate(PARSED) if word == "FROM")
    assert [word for word, _ in PARSED[:first]] == ["ARG"]  # an argument of FROM stands before the first one
    for text in every("ENTRYPOINT") + every("CMD"):
        assert isinstance(json.loads(text), list)  # the exec form: signals reach the program


def test_the_base_is_an_argument_with_a_stage_for_each_value() -> None:
    assert PARSED[0] == ("ARG", "BASE=cpu")
    *bases, last = every("FROM")
    assert last == "base-${BASE}"
    stages = {match[2]: match[1] for base in bases if (match := re.fullmatch(r"(\S+) AS (\S+)", base))}
    assert set(stages) == {"base-cpu", "base-cuda"}
    assert all(re.search(r":[\w.-]*\d", image) and not image.endswith(":latest") for image in stages.values())


def test_it_ends_as_a_user_without_rights() -> None:
    (user,) = every("USER")
    assert user not in ("root", "0")
    assert any(f"useradd --create-home --uid 10001 {user}" in line for line in every("RUN"))
    after = [word for word, _ in PARSED[PARSED.index(("USER", user)) :]]
    assert "RUN" not in after
    assert "COPY" not in after


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for arguments in every("COPY"):
        *sources, _ = arguments.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(source == name or source.startswith(f"{name}/") for name in allowed), source


def test_what_is_installed_is_pinned_and_exists() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = next(argument for argument in every("ARG") if argument.startswith("EXTRAS=")).partition("=")[2]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (install,) = [line for line in every("RUN") if "pip install" in line]
    assert install == 'pip install --constraint constraints.txt --editable ".[${EXTRAS}]"'
    assert json.loads(every("ENTRYPOINT")[0]) == list(project["scripts"])
    for line in every("RUN"):
        if "apt-get install" in line:
            assert line.startswith("apt-get update && ")
            assert "--no-install-recommends" in line
            assert line.endswith("rm -rf /var/lib/apt/lists/*")


@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_the_build_finds_what_the_project_names(name: str) -> None:
    assert any(name in arguments.split() for arguments in every("COPY"))

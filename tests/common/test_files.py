"""What is written appears complete or not at all, and only where a file or folder may be."""

import os
from pathlib import Path

import pytest

from llava_mole.common.errors import ConfigError
from llava_mole.common.files import atomic_path, refuse_special, write_json


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "x is a pipe and is not replaced; name a file"),
        ("link", "x is a link to file and is not replaced; name a file such as its target"),
        ("dangling", "x is a link to none and is not replaced"),
        ("folder link", "x is a link to folder and is not replaced"),
    ],
)
def test_links_and_pipes_are_not_replaced(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "x"
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"link": "file", "dangling": "none", "folder link": "folder"}[kind])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        write_json(path, {})
    with pytest.raises(ConfigError, match=message), atomic_path(path) as temporary:
        temporary.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not (tmp_path / "file").read_bytes()


def test_a_device_is_not_replaced() -> None:
    with pytest.raises(ConfigError, match="/dev/null is a device and is not replaced"):
        refuse_special(Path("/dev/null"))


def test_below_a_file_there_is_nothing_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuse_special(tmp_path / "file" / "x")
    refuse_special(tmp_path / "file")
    refuse_special(tmp_path)

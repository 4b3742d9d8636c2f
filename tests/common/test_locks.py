"""A lock has one owner at a time, outlives no process, and is never taken from one that may be alive."""

import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llava_mole.common import locks
from llava_mole.common.errors import ConfigError
from llava_mole.common.locks import locked


def owner(**changed) -> str:
    return json.dumps({**locks._describe_this_process(), "token": "theirs", **changed})


def take(path: Path, **options) -> None:
    with locked(path, "the run", "--break true", **options):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_is_held_and_released(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, "the run"):
        with pytest.raises(ConfigError, match=rf"the run is in use by process {os.getpid()} on .* since 20"):
            take(path)
        with pytest.raises(ConfigError, match="in use"):
            take(path, break_lock=True)  # its owner is known to be alive
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())
    take(path)


def test_it_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / ".lock", "the run"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


GONE = {
    "ended": {"pid": 2**22 + 1, "process": "boot/1"},
    "number in use again": {"process": "boot/1"},
    "before a reboot": {"process": "another-boot/1"},
}


@pytest.mark.parametrize("name", GONE)
def test_a_lock_of_an_ended_process_is_taken_over(tmp_path: Path, name: str) -> None:
    path = tmp_path / ".lock"
    path.write_text(owner(**GONE[name]))
    take(path)
    assert not list(tmp_path.iterdir())


def test_a_killed_process_that_nobody_has_waited_for_is_gone(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; from llava_mole.common.locks import locked; from pathlib import Path"
    )
    hold = f"{code}\nwith locked(Path({str(path)!r}), 'it'): print('held', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {child.pid}"):
        take(path)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    take(path)
    child.communicate()


OTHER = {"host": "another-host"}


def test_another_machine_s_lock_is_broken_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(owner(**OTHER))
    with pytest.raises(ConfigError, match="on another-host .* cannot be seen from this machine: .* give --break true"):
        take(path)
    with (
        pytest.raises(ConfigError, match=rf"if it has ended, remove {path}"),
        locked(path, "the run"),
    ):
        pytest.fail("held twice")
    take(path, break_lock=True)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_an_unreadable_lock_is_somebody_s(tmp_path: Path, content: str) -> None:
    path = tmp_path / ".lock"
    path.write_text(content)
    with pytest.raises(ConfigError, match="an unknown host"):
        take(path)
    take(path, break_lock=True)


@pytest.mark.parametrize(
    ("job", "starts", "free"), [("7", "1", True), ("7", "0", False), ("8", "1", False), (None, "1", False)]
)
def test_a_requeued_job_takes_over_its_own_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str | None, starts: str, free: bool
) -> None:
    path = tmp_path / ".lock"
    path.write_text(owner(**OTHER, job="7", job_starts=0))
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", starts)
    if free:
        take(path)
    else:
        with pytest.raises(ConfigError, match="another-host"):
            take(path)


def test_a_lock_that_was_broken_is_not_released_by_its_old_owner(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, "the run"):
        path.write_text(owner())  # broken by somebody, and taken
    assert json.loads(path.read_text())["token"] == "theirs"


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with locked(tmp_path / ".lock", "the run"), pytest.raises(ConfigError, match="in use"):
        take(tmp_path / ".lock")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        take(tmp_path / "none" / ".lock")


def test_only_one_of_many_gets_it(tmp_path: Path) -> None:
    path, inside, most, refused = tmp_path / ".lock", [], [], []
    path.write_text(owner(pid=2**22 + 1, host=platform.node(), process="boot/1"))  # and it has to be taken over first

    def work() -> None:
        for _ in range(20):
            try:
                with locked(path, "the run"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except ConfigError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 160

"""A lock on a folder or file that several processes, on one machine or on several, could write at the same time.

The lock is a small JSON file that names its owner. It is created by a hard link, which is atomic on NFS too. A lock
whose owner is gone is taken over; whether it is gone can be told on the same machine (process, start time, boot) and
after a requeue of the same SLURM job. In every other case the user decides.
"""

import contextlib
import json
import os
import platform
import shlex
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError
from llava_mole.common.files import write_errors
from llava_mole.common.log import get_logger

logger = get_logger(__name__)


class LockedError(ConfigError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, what: str, break_option: str | None = None, break_lock: bool = False) -> Iterator[None]:
    """Hold the lock file `path` during the block.

    Args:
        path: The lock file. Its folder must exist.
        what: What is locked, for messages: a run directory, an answers file.
        break_option: The option that sets `break_lock`, for messages; None if the command has none.
        break_lock: Take a lock over whose owner cannot be checked from here.

    Raises:
        LockedError: another process holds the lock. The message names the host, the process, its start and what to do.
        ConfigError: the file cannot be written.
    """
    owner = _describe_this_process()
    with write_errors(path):
        _acquire(path, owner, what, break_option, break_lock)
    try:
        yield
    finally:
        if _read(path).get("token") == owner["token"]:
            path.unlink(missing_ok=True)


def lock_holder(path: Path) -> str | None:
    """The process that holds the lock `path`, for messages; None if no process is known to hold it.

    A process of another machine counts as its holder: whether it still runs cannot be told from here.
    """
    holder = _read(path)
    return (
        f"{_name(holder)} since {holder.get('since', 'an unknown time')}" if holder and not _is_gone(holder) else None
    )


def _acquire(path: Path, owner: dict[str, Any], what: str, break_option: str | None, break_lock: bool) -> None:
    while not _create(path, owner):
        holder = _read(path)
        if not holder and not path.exists():
            continue  # released since
        gone = _is_gone(holder)
        if gone is False or (gone is None and not break_lock):
            raise LockedError(_busy(path, holder, what, gone, break_option))
        logger.warning("%s: taking over the lock of %s, which is gone", what, _name(holder))
        _remove(path, holder)


def _create(path: Path, owner: dict[str, Any]) -> bool:
    """Create the lock file with its content in one step. False if it exists."""
    draft = path.with_name(f"{path.name}.{owner['token']}")
    draft.write_text(json.dumps(owner), encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        return draft.stat().st_nlink == 2  # NFS: the link was made, its confirmation was lost and repeated
    except OSError:  # a file system without hard links
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(owner, file)
        except FileExistsError:
            return False
    finally:
        draft.unlink()
    return True


def _remove(path: Path, holder: dict[str, Any]) -> None:
    """Remove the lock of `holder`. A lock that another process has taken in the meantime comes back."""
    if _read(path).get("token") != holder.get("token"):
        return
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside).get("token") != holder.get("token"):
        os.link(aside, path)
    aside.unlink()


def _read(path: Path) -> dict[str, Any]:
    """The owner of a lock; empty if there is no lock, or its content is not an owner's."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe_this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "process": _process_identity(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "job_starts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "command": shlex.join(sys.argv)[:300],
        "token": uuid.uuid4().hex[:12],
    }


def _process_identity(pid: int) -> str | None:
    """Boot of the machine and start time of a process, which tell it from a later one of the same number.

    None if there is no such process, or it has ended and only waits for its parent.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return None if state in "ZX" else f"{boot}/{fields[18]}"


def _is_gone(holder: dict[str, Any]) -> bool | None:
    """Whether a lock's owner has ended; None if that cannot be told from this machine."""
    if holder.get("host") == platform.node() and Path("/proc/self/stat").exists():
        return _process_identity(int(holder["pid"])) != holder.get("process")
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and holder.get("job") == job:  # a job is requeued after all its processes have ended
        return True if holder["job_starts"] < int(os.environ.get("SLURM_RESTART_COUNT", "0")) else None
    return None


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"


def _busy(path: Path, holder: dict[str, Any], what: str, gone: bool | None, break_option: str | None) -> str:
    since, command = holder.get("since", "an unknown time"), holder.get("command", "an unknown command")
    message = f"{what} is in use by {_name(holder)} since {since} ({command}); wait for it or stop it"
    if gone is None:
        remove = f"give {break_option}" if break_option else f"remove {path}"
        message += f". It cannot be seen from this machine: if it has ended, {remove}"
    return message

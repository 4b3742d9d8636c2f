"""Stopping a run from outside: SIGTERM, SIGUSR1 or a file ask for it, and all ranks stop after the same step.

A batch system warns before it takes a machine away: SLURM sends the signal of `--signal`, or SIGTERM. A handler only
notes it; the training loop agrees on it with the other ranks (see `faults`), saves, and ends with `EXIT_STOPPED`.
`scripts/_launch.sh` may get the signal in the processes' place. It then makes the file `stop` in the directory that
`LLAVA_MOLE_CONTROL_DIR` names, and finds there how the run ended, which torchrun's own exit code does not say.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType

from llava_mole.common.log import get_logger

CONTROL_DIR = "LLAVA_MOLE_CONTROL_DIR"
STOP_FILE = "stop"
EXIT_CODE_FILE = "exit_code"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_S = 5.0
"""A signal this soon after the first is the same request, which a launcher has passed on once more."""

logger = get_logger(__name__)


class StopRequested(Exception):
    """The run has saved because it was asked to stop. Raised on every rank after the same step."""


class StopSignal:
    """Notes the request to stop while it is entered as a context manager; `requested` may be asked at every step."""

    def __init__(self) -> None:
        self._received: float | None = None
        self._previous: dict[int, object] = {}
        control = control_dir()
        self._file = control / STOP_FILE if control is not None else None

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None or (self._file is not None and self._file.exists())

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = now
        elif now - self._received > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def control_dir() -> Path | None:
    """The directory in which `_launch.sh` and the processes it started on this machine leave word for each other."""
    value = os.environ.get(CONTROL_DIR)
    return Path(value) if value else None


def record_exit_code(code: int) -> bool:
    """Leave the run's exit code where `_launch.sh` looks for it. Returns whether anybody will look."""
    directory = control_dir()
    if directory is None or not directory.is_dir():
        return False
    temporary = directory / f"{EXIT_CODE_FILE}.{os.getpid()}"
    temporary.write_text(f"{code}\n", encoding="utf-8")
    os.replace(temporary, directory / EXIT_CODE_FILE)
    return True


def ignore_stop_signals(_: int = 0) -> None:
    """For data loader workers: a signal to the whole process group must not take them from under the training loop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

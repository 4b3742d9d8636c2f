"""Runs cells: claims them on a shared folder, starts their commands, and records how they ended.

A cell is claimed by a lock file in its folder, so several processes, on one machine or on several, share the work. A
cell is finished when its record `done.json` bears its digest and its outputs exist. A command that is stopped or killed
continues from what it saved (a checkpoint, partial answers) when the cell is taken up again.
"""

import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from llava_mole import __version__
from llava_mole.common.errors import EXIT_STOPPED, ConfigError, DataError
from llava_mole.common.files import read_json, write_errors, write_json
from llava_mole.common.locks import LockedError, lock_holder, locked
from llava_mole.common.log import get_logger
from llava_mole.common.processes import end_with_parent
from llava_mole.common.text import count_of, format_seconds
from llava_mole.config import save_config
from llava_mole.study.cells import CONFIG, LOG, Cell

logger = get_logger(__name__)

CELL, DONE, FAILED, CLAIM = "cell.json", "done.json", "failed.json", ".claim"
TICK_S = 0.2
"""Seconds between two looks at the running commands."""
WAIT_S = 2.0
"""Seconds between two looks at cells that other processes run."""
SAVING_S = 280
"""Seconds that torchrun gives its ranks to save after a signal, within the 300 s of a Slurm job (`submit`)."""
GPU_CLAIMS = Path(tempfile.gettempdir()) / f"llava_mole-{os.getuid()}"
"""Where the commands of all studies of a user on this machine claim their GPUs."""
TAIL_LINES = 6
"""Last lines of a failed command's log that are shown."""
PACKAGES = ("torch", "transformers", "peft", "numpy", "open_clip_torch")


def is_done(cell: Cell) -> bool:
    """Whether the cell is finished and its outputs are there."""
    record = _record(cell.folder / DONE)
    return record.get("digest") == cell.digest and all(path.is_file() for path in cell.outputs)


def state_of(cell: Cell) -> tuple[str, str]:
    """(`done`, `running`, `failed` or `open`, what a reader wants to know about it)."""
    if is_done(cell):
        return "done", format_seconds(_record(cell.folder / DONE).get("seconds", 0.0))
    if (holder := lock_holder(cell.folder / CLAIM)) is not None:
        return "running", holder
    failed = _record(cell.folder / FAILED)
    if failed.get("digest") == cell.digest:
        return "failed", f"exit code {failed.get('exit_code')}, see {cell.folder / LOG}"
    return "open", ""


def _record(path: Path) -> dict[str, Any]:
    """A record of a cell; empty if there is none. It is written atomically, so a damaged one is not the cell's."""
    try:
        value = read_json(path) if path.is_file() else {}
    except DataError:
        return {}
    return value if isinstance(value, dict) else {}


@dataclass
class _Running:
    """A command that runs, with what must be released when it ends."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    claim: contextlib.ExitStack
    started: float
    wall: str
    gpus: list[str]


@dataclass
class Runner:
    """Runs cells until none is left that it may start; `run` is the entry point.

    Args:
        cells: In order: a cell stands after those it needs.
        jobs: Commands at a time.
        wait: Whether to wait for cells that other processes run; else the run ends without them.
        break_lock: Take over the claims of processes on other machines, which cannot be checked from here.
    """

    cells: Mapping[str, Cell]
    jobs: int = 1
    wait: bool = True
    break_lock: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    """Cell -> why it failed, of this run."""
    ran: list[str] = field(default_factory=list)
    """Cells that this run finished."""

    def __post_init__(self) -> None:
        self._running: list[_Running] = []
        self._done: set[str] = set()
        self._busy: dict[str, str] = {}  # cells that other processes run, as the last look found them
        self._told: set[str] = set()
        self._signals = 0
        self._gpus = visible_gpus() if any(cell.gpus for cell in self.cells.values()) else []
        self._has_gpus = bool(self._gpus)
        needed = max((cell.gpus or 0 for cell in self.cells.values()), default=0)
        if self._has_gpus and needed > len(self._gpus):
            raise ConfigError(
                f"the base's commands need {count_of(needed, 'GPU')}, and {count_of(len(self._gpus), 'GPU')} can be "
                "seen here; lower `gpus` and change `launch` of the base"
            )

    def run(self) -> int:
        """Run everything.

        Returns:
            0; 1 if a cell failed or is left to other processes; `EXIT_STOPPED` after a signal.
        """
        self._done = {name for name, cell in self.cells.items() if is_done(cell)}
        logger.info("%s, %d of them finished already", count_of(len(self.cells), "cell"), len(self._done))
        with _handled(self._signal), contextlib.closing(self._bar()) as bar:
            while self._signals == 0:
                self._collect()
                started = self._start() if len(self._running) < self.jobs else False
                self._show(bar)
                if not self._running and not started:
                    if not self._busy or not self.wait:
                        break
                    self._tell()
                    time.sleep(WAIT_S)
                else:
                    time.sleep(TICK_S)
            self._stop()
            self._show(bar)
        if self._signals:
            logger.info("stopped; the same command continues")
            return EXIT_STOPPED
        return self._conclude()

    def _conclude(self) -> int:
        left = [name for name in self.cells if name not in self._done]
        for name, reason in self._busy.items():
            logger.info("%s is left to another process: %s", name, reason)
        for name, reason in self.failed.items():
            logger.error("%s failed: %s", name, reason)
        blocked = len(left) - len(self._busy) - len(self.failed)
        if left and not self.failed:
            logger.error("%s not finished, because other processes have them", count_of(len(left), "cell"))
        if self.failed:
            more = f", and {count_of(blocked, 'cell')} cannot run without them" if blocked > 0 else ""
            logger.error("%s failed%s; the same command tries them again", count_of(len(self.failed), "cell"), more)
        return 1 if left else 0

    def _open_cells(self) -> list[Cell]:
        """The cells that could start now."""
        busy = {running.cell.name for running in self._running}
        return [
            cell
            for name, cell in self.cells.items()
            if name not in self._done and name not in self.failed and name not in busy
            if all(need in self._done for need in cell.needs)
        ]

    def _start(self) -> bool:
        """Start one cell that nobody else has claimed. Returns whether one was started or found to be finished."""
        self._busy = {}
        for cell in self._open_cells():
            if self._has_gpus and (cell.gpus or 0) > len(self._gpus):
                continue  # until a running command gives some back
            claim, gpus = contextlib.ExitStack(), list[str]()
            try:
                with write_errors(cell.folder):
                    cell.folder.mkdir(parents=True, exist_ok=True)
                claim.enter_context(locked(cell.folder / CLAIM, f"cell {cell.name}", "--break-lock", self.break_lock))
                for lock in cell.locks:  # of a command that outlived the process that started it
                    if lock.parent.is_dir():
                        with locked(lock, f"cell {cell.name}", "--break-lock", self.break_lock):
                            pass
                if self._has_gpus and cell.gpus and not is_done(cell):
                    gpus = self._claim_gpus(cell.gpus, claim)
            except LockedError as busy:
                claim.close()
                self._busy[cell.name] = str(busy)
                continue
            if is_done(cell):  # by the process that held the claim
                claim.close()
                self._done.add(cell.name)
                return True
            try:
                self._running.append(self._launch(cell, claim, gpus))
            except BaseException:
                claim.close()
                raise
            return True
        return False

    def _claim_gpus(self, count: int, claim: contextlib.ExitStack) -> list[str]:
        """Claim GPUs that no command of another study on this machine has. Raises LockedError if there are too few."""
        with write_errors(GPU_CLAIMS):
            GPU_CLAIMS.mkdir(parents=True, exist_ok=True, mode=0o700)
        found: list[str] = []
        job = os.environ.get("SLURM_JOB_ID", "")  # Slurm numbers the GPUs of every job from 0
        for gpu in self._gpus:
            if len(found) < count:
                with contextlib.suppress(LockedError):
                    claim.enter_context(locked(GPU_CLAIMS / f"gpu-{job}-{gpu}", f"GPU {gpu}"))
                    found.append(gpu)
        if len(found) < count:
            raise LockedError(f"it needs {count_of(count, 'GPU')}, and other studies on this machine use the others")
        return found

    def _launch(self, cell: Cell, claim: contextlib.ExitStack, gpus: list[str]) -> _Running:
        """Write the cell's files and start its command."""
        known = _record(cell.folder / CELL)
        if known and known.get("digest") != cell.digest:
            raise ConfigError(
                f"{cell.folder} holds the cell {known.get('digest')}, not {cell.digest}; move the folder away"
            )
        (cell.folder / FAILED).unlink(missing_ok=True)
        described = {"digest": cell.digest, "kind": cell.kind, "command": list(cell.command), "needs": list(cell.needs)}
        write_json(cell.folder / CELL, {**described, "identity": cell.identity})
        if cell.config is not None:
            save_config(cell.config, cell.folder / CONFIG)
        environment = dict(os.environ)
        if cell.threads is not None:
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(cell.threads))
        # torchrun kills its ranks this long after it was asked to stop; a large checkpoint takes longer than its 30 s.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_S))
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        with write_errors(cell.folder / LOG):
            log = (cell.folder / LOG).open("ab")
        try:
            process = subprocess.Popen(
                cell.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which lets the command save
                preexec_fn=end_with_parent(),
            )
        except OSError as error:
            log.close()
            raise ConfigError(
                f"{cell.command[0]} cannot be started: {error.strerror}; check `launch` of the base"
            ) from None
        self._gpus = [gpu for gpu in self._gpus if gpu not in gpus]
        logger.info("%s: started", cell.name)
        return _Running(cell, process, log, claim, time.monotonic(), time.strftime("%Y-%m-%d %H:%M:%S"), gpus)

    def _collect(self) -> None:
        """Record the commands that have ended."""
        for running in [r for r in self._running if r.process.poll() is not None]:
            self._running.remove(running)
            self._gpus = sorted([*self._gpus, *running.gpus])
            running.log.close()
            try:
                self._record_end(running)
            finally:
                running.claim.close()

    def _record_end(self, running: _Running) -> None:
        cell, code = running.cell, running.process.returncode
        seconds = time.monotonic() - running.started
        record = {
            "digest": cell.digest,
            "exit_code": code,
            "started": running.wall,
            "seconds": round(seconds, 3),
            "command": list(cell.command),
            "versions": versions(),
        }
        absent = [path for path in cell.outputs if not path.is_file()]
        if code == 0 and not absent:
            write_json(cell.folder / DONE, record)
            self._done.add(cell.name)
            self.ran.append(cell.name)
            logger.info("%s: done in %s", cell.name, format_seconds(seconds))
            return
        if self._signals:  # it was asked to stop
            return
        write_json(cell.folder / FAILED, record)
        reason = f"exit code {code}" if code else f"it did not write {absent[0]}"
        self.failed[cell.name] = f"{reason}; {cell.folder / LOG} ends with\n{_tail(cell.folder / LOG)}"
        logger.error("%s: %s", cell.name, reason)

    def _stop(self) -> None:
        """Ask the commands to save and end, and wait for them; a second signal kills them."""
        for running in self._running:
            running.process.terminate()
        while self._running:
            if self._signals > 1:
                for running in self._running:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(running.process.pid, signal.SIGKILL)
            self._collect()
            time.sleep(TICK_S)

    def _tell(self) -> None:
        for name, reason in self._busy.items():
            if name not in self._told:
                self._told.add(name)
                logger.info("%s: waiting: %s", name, reason)

    def _signal(self, number: int, frame: object) -> None:
        self._signals += 1
        if self._signals == 1:
            logger.info("%s: stopping; running commands save first", signal.Signals(number).name)

    def _bar(self) -> Any:
        return tqdm(total=len(self.cells), unit="cell", desc="study", dynamic_ncols=True, disable=None)

    def _show(self, bar: Any) -> None:
        bar.n = len(self._done)
        if self._running and not bar.disable:
            bar.set_postfix_str(_tail(self._running[0].cell.folder / LOG, 1)[-60:], refresh=False)
        bar.refresh()


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """Route SIGTERM, SIGINT and SIGUSR1 to `handler` during the block."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log; of a line that was redrawn, as progress bars are, its last state."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4000))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join([line for line in shown if line.strip()][-lines:])


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of what its numbers depend on."""
    found = {"llava_mole": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found | {"platform": platform.platform()}


def visible_gpus() -> list[str]:
    """The GPUs that commands may use: those of CUDA_VISIBLE_DEVICES, or all of the machine."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(n) for n in range(torch.cuda.device_count())]


def commands_of(cells: Sequence[Cell]) -> list[str]:
    """The commands of cells, as one would type them."""
    import shlex

    return [
        f"{f'OMP_NUM_THREADS={cell.threads} ' if cell.threads else ''}"
        + shlex.join(["python" if part == sys.executable else part for part in cell.command])
        for cell in cells
    ]

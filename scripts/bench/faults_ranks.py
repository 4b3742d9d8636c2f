"""Starts ranks quickly and ends them roughly: a fork server in the place of torchrun."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = str(Path(__file__).parent)
PEERS_S = 2.0
"""Once a rank is lost, the others get a SIGTERM, and after this time a SIGKILL, as from a launcher."""


class Farm:
    """Forks processes from a server that has imported everything."""

    def __init__(self, preload: Sequence[str] = ("faults_rank",)) -> None:
        """Start the server of this process, which imports `preload`; it is this process's only one."""
        paths = [HERE, str(ROOT), str(ROOT / "tests")]
        sys.path[:0] = [path for path in paths if path not in sys.path]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        kept = dict(os.environ)
        os.environ.update(
            PYTHONPATH=os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
            OMP_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
            CUDA_VISIBLE_DEVICES="",
            DS_ACCELERATOR="cpu",
            PYTHONWARNINGS="ignore::UserWarning",  # semaphores of processes that were killed, many of them
        )
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
        forkserver.ensure_running()
        os.environ.clear()
        os.environ.update(kept)

    def fork(self, target: Callable[..., None], arguments: Sequence[tuple], daemon: bool = False) -> "Ranks":
        """Start one process for each tuple of arguments."""
        processes = [self._context.Process(target=target, args=each, daemon=daemon) for each in arguments]
        for process in processes:
            process.start()
        return Ranks(processes)

    def start(
        self, arguments: Sequence[str], log: Path, sabotage: object = None, world_size: int = 2, **environment: str
    ) -> "Ranks":
        """Start the ranks of one run; what they print goes to `log`.<rank>."""
        from faults_rank import Sabotage, run_rank

        port, sabotage = free_port(), sabotage or Sabotage()
        return self.fork(
            run_rank,
            [
                (rank, world_size, port, list(arguments), f"{log}.{rank}", sabotage, environment)
                for rank in range(world_size)
            ],
            daemon=True,
        )


class Ranks:
    """The processes of one run."""

    def __init__(self, processes: Sequence[BaseProcess]):
        self.processes = processes
        self.started = time.monotonic()

    def kill(self, rank: int) -> bool:
        """`kill -9` one rank. Returns whether it was alive."""
        alive = self.processes[rank].is_alive()
        self.processes[rank].kill()
        return alive

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank or all."""
        for index, process in enumerate(self.processes):
            if rank in (None, index) and process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    os.kill(process.pid, number)  # type: ignore[arg-type]

    def wait(self, timeout_s: float, *, end_together: bool = False) -> list[int] | None:
        """Exit codes of all ranks (minus the signal that killed one), or None if some still run after the time.

        Ranks that `end_together` by themselves are not stopped when one of them has ended.
        """
        deadline, failed = time.monotonic() + timeout_s, False
        while any(process.is_alive() for process in self.processes):
            if not (failed or end_together) and any(
                process.exitcode not in (None, 0, 75) for process in self.processes
            ):
                failed, deadline = True, min(deadline, time.monotonic() + PEERS_S)
                self.signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                self.end()
                return [int(process.exitcode or 0) for process in self.processes] if failed else None
            time.sleep(0.005)
        return [int(process.exitcode or 0) for process in self.processes]

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

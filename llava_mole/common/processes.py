"""Worker processes that do not outlive this one, and their results in order with bounded memory."""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, Generic, Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def open_pool(
    workers: int,
    *,
    method: Literal["spawn", "fork"] = "spawn",
    initializer: Callable[..., object] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Executor:
    """A pool of processes that end with this one, even if it is killed.

    Args:
        workers: Number of processes.
        method: `spawn` starts fresh processes without inherited threads or locks; `fork` starts at once and inherits
            `arguments` without pickling them.
        initializer: Called with `arguments` in each process before any work.
    """
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), initializer, arguments))


def end_with_parent() -> Callable[[], None]:
    """A `preexec_fn` for `subprocess`: the new process gets SIGTERM when this one ends, even if it is killed.

    Linux only (prctl, PR_SET_PDEATHSIG). Call it in the main thread: the signal comes when the creating thread ends.
    """
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        libc.prctl(1, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)

    return prepare


def _start_worker(parent: int, initializer: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    """End this process when its parent is gone. The parent alone reacts to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


class WorkQueue(Generic[Item, Result]):
    """Calls a function for one item after another and returns the results in the order of the items.

    `Executor.map` would take every item before the first call ends; this queue holds at most `ahead` items.

    Args:
        executor: Runs the calls; None runs each one at once in this process.
        ahead: Items that may wait for their own result or for that of an earlier item.
    """

    def __init__(self, executor: Executor | None, ahead: int) -> None:
        self._executor, self._ahead = executor, ahead
        self._waiting: deque[tuple[Item, Future[Result] | Result]] = deque()

    def submit(self, item: Item, function: Callable[..., Result], *arguments: Any) -> list[tuple[Item, Result]]:
        """Call `function(*arguments)` for an item. Returns the oldest items beyond `ahead`, each with its result."""
        if self._executor is None:
            return self.add(item, function(*arguments))
        return self.add(item, self._executor.submit(function, *arguments))

    def add(self, item: Item, result: Future[Result] | Result) -> list[tuple[Item, Result]]:
        """Add an item whose result is known. Returns the same as `submit`."""
        self._waiting.append((item, result))
        return self._take(self._ahead)

    def drain(self) -> list[tuple[Item, Result]]:
        """Return the remaining items with their results; waits for the unfinished ones."""
        return self._take(0)

    def _take(self, keep: int) -> list[tuple[Item, Result]]:
        taken = []
        while len(self._waiting) > keep:
            item, result = self._waiting.popleft()
            taken.append((item, result.result() if isinstance(result, Future) else result))
        return taken

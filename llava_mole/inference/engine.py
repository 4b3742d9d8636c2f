"""Continuous batching: many requests for one or several models, each answered as if it were alone.

One thread computes. Between two steps of decoding it lets waiting requests in while there is room, and frees the places
of those that have ended or were cancelled. The models take turns, one step each; models loaded together share their
base weights (`load_pretrained_models`).
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llava_mole.common.errors import ConfigError, UserError
from llava_mole.common.log import get_logger
from llava_mole.common.text import count_of
from llava_mole.inference.decoding import check_count
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.row_batch import Job, RowBatch

Deliver = Callable[[Sequence[Job]], None]

logger = get_logger(__name__)


class BusyError(UserError):
    """No place is left for a request; it may be sent again later."""


class ClosedError(UserError):
    """The engine takes no requests any more."""


@dataclass(frozen=True)
class EngineLimits:
    """How much is computed at once. Raises ConfigError for a number below 1."""

    rows: int = 16
    """Answers that are decoded together, over all models."""
    waiting: int = 64
    """Requests that may wait for a place."""
    cache_tokens: int = 65536
    """Positions of the key-value caches, padding included, when all answers have reached their limit."""
    prefill_tokens: int = 1024
    """Positions of prompts that are computed in one pass between two steps; a longer prompt is computed alone."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_count(name, value)


@dataclass(frozen=True)
class EngineState:
    """What the engine is doing."""

    running: int
    waiting: int
    steps: int
    """Steps of decoding since the start."""
    cache_bytes: int
    alive: bool
    """Whether the computing thread runs."""


class Engine:
    """Answers jobs. `submit`, `cancel`, `state` and `close` may be called from any thread."""

    def __init__(self, predictors: Mapping[str, Predictor], limits: EngineLimits, deliver: Deliver) -> None:
        """Serve each predictor under its name.

        Args:
            deliver: Called by the computing thread after a step with the jobs that have ended, and with the live jobs
                that have a new token. It must return quickly and not change the jobs.

        Raises:
            ConfigError: as `RowBatch`.
        """
        self.limits = limits
        self._deliver = deliver
        self._batches = {name: RowBatch(predictor) for name, predictor in predictors.items()}
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = self._stopping = False
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="llava-mole-engine", daemon=True)

    def start(self) -> None:
        """Start the computing thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none.

        Raises:
            BusyError: more jobs would wait than `limits.waiting`.
            ClosedError: the engine is closing, or has failed.
            ConfigError: a job alone exceeds `limits.cache_tokens`.
        """
        for job in jobs:
            if len(job.ids) + job.limit > self.limits.cache_tokens:
                raise ConfigError(
                    f"prompt and answer may take {len(job.ids) + job.limit} tokens, but the server keeps "
                    f"{self.limits.cache_tokens} in all; shorten the prompt or ask for fewer tokens"
                )
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise ClosedError("the server is stopping" if self._closing else "the server's model has failed")
            if len(self._waiting) + len(jobs) > self.limits.waiting + max(0, self.limits.rows - self._running()):
                raise BusyError(
                    f"{count_of(len(self._waiting), 'request')} are waiting already, and at most "
                    f"{self.limits.waiting} may; try again later"
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop answering these jobs; their places are free after the present step."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def state(self) -> EngineState:
        """What the engine is doing now."""
        with self._changed:
            size = sum(batch.cache_bytes for batch in self._batches.values())
            return EngineState(self._running(), len(self._waiting), self._steps, size, self._thread.is_alive())

    def close(self, timeout: float | None = None) -> bool:
        """Take no more jobs, finish the present ones within `timeout` seconds (None: however long), and stop.

        Jobs that are left are cancelled. Returns whether all were finished.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if not self._thread.is_alive():
            return True
        self._thread.join(timeout)
        finished = not self._thread.is_alive()
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        return finished

    def _running(self) -> int:
        return sum(len(batch.jobs) for batch in self._batches.values())

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            logger.error("the engine stopped: %s: %s", type(error).__name__, error, exc_info=error)
            raise
        finally:
            self._end_all()

    def _turn(self) -> bool:
        """One step of every model, after letting jobs in. Returns False when the engine is to stop."""
        with self._changed:
            while not (self._waiting or self._running() or self._closing):
                self._changed.wait()
            if self._stopping or (self._closing and not self._waiting and not self._running()):
                return False
            gone = [job for job in self._waiting if job.cancelled]
            for job in gone:
                job.reason = "cancelled"
                self._waiting.remove(job)
            joining = self._next_to_join()
        touched = list(gone)
        if joining:
            touched += self._batches[joining[0].model].join(joining)
        fresh = {id(job) for job in joining}
        for batch in self._batches.values():
            running = batch.jobs
            if running and any(id(job) not in fresh for job in running):
                touched += batch.step()
                self._steps += 1
        news = dict.fromkeys(job for job in touched if job.live or job.reason is not None)
        if news:
            self._deliver(list(news))
        return True

    def _next_to_join(self) -> list[Job]:
        """Take the first waiting jobs for which there is room: of one model, and of similar length."""
        found: list[Job] = []
        while self._waiting:
            job = self._waiting[0]
            if self._running() + len(found) >= self.limits.rows or not self._has_room([*found, job]):
                break
            if found:
                longest = max(len(other.ids) for other in [*found, job])
                shortest = min(len(other.ids) for other in [*found, job])
                many = longest * (len(found) + 1) > self.limits.prefill_tokens
                if job.model != found[0].model or many or longest > 2 * shortest:
                    break
            found.append(self._waiting.popleft())
        return found

    def _has_room(self, joining: Sequence[Job]) -> bool:
        """Whether the caches keep within their limit if these jobs join and all answers reach their limits."""
        total = 0
        for name, batch in self._batches.items():
            jobs = [*batch.jobs, *(job for job in joining if job.model == name)]
            total += len(jobs) * max((len(job.ids) + job.limit for job in jobs), default=0)
        return total <= self.limits.cache_tokens

    def _end_all(self) -> None:
        with self._changed:
            left = [*self._waiting, *(job for batch in self._batches.values() for job in batch.jobs)]
            self._waiting.clear()
            for job in left:
                job.reason = "cancelled" if self._closing else "error"
                job.error = None if self._closing else "internal error"
            for batch in self._batches.values():
                batch.drop_ended()
        if left:
            self._deliver(left)

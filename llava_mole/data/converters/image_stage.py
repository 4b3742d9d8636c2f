"""The step between drafts and rows: images are looked at (or unpacked) in a pool of processes, in bounded memory."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llava_mole.common.errors import DataError
from llava_mole.data.converters.base import Draft, Embedded
from llava_mole.data.converters.image_files import CheckImages, ImageFacts, ImageRoot, Note, look, path_problem, unpack
from llava_mole.data.converters.tiff_pages import tiff_page, unpack_page
from llava_mole.data.image_bytes import decode_base64

CHUNK_ROWS = 64
CHUNK_BYTES = 16 << 20
"""A chunk is what one process is given at a time; about three a process are in flight."""

Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ImagePolicy:
    """How images are treated."""

    root: Path
    """What paths in records are relative to."""
    unpacked: Path
    """Where images that come in records (or are copied) go."""
    check: CheckImages
    copy: bool = False
    """Copy image files under their hash, too, instead of leaving them in place."""
    workers: int = 1


class Task(NamedTuple):
    """One image to look at."""

    data: str | bytes
    """Absolute file name, bytes, or base64 text."""
    kind: str
    """`file`, `copy`, `page` (of a TIFF file, to be copied), `bytes`."""
    name: str
    """Path relative to the root, or what messages call an image without one."""
    group: str


class Looked(NamedTuple):
    """A draft whose images were looked at."""

    draft: Draft
    facts: tuple[ImageFacts, ...]
    unpacked: set[bool]
    """Whether each of its images is in the prepared set's own folder; both where some are."""


def run_task(task: Task, unpacked: Path, decode: bool) -> ImageFacts:
    """Do one task. Damage of any kind is a fact, not an exception."""
    if task.kind == "file":
        return look(str(task.data), task.name, decode=decode)[0]
    if task.kind == "page":
        return unpack_page(str(task.data), unpacked, task.group, task.name)
    notes: tuple[Note, ...] = ()
    try:
        if task.kind == "copy":
            data = Path(str(task.data)).read_bytes()
        elif isinstance(task.data, str):
            if any(space in task.data for space in " \n\r\t"):
                notes = (Note("base64-spaces", task.name),)
            data = decode_base64(task.data)
        else:
            data = task.data
    except DataError as error:
        return ImageFacts(task.name, None, Note("base64", f"{task.name}: {error}"))
    except OSError as error:
        return ImageFacts(task.name, None, Note("missing-image", f"{task.name}: {error.strerror}"))
    facts = unpack(data, unpacked, task.group, task.name, decode=decode)
    return facts._replace(notes=notes + facts.notes)


def run_tasks(tasks: list[Task], unpacked: Path, decode: bool) -> list[ImageFacts]:
    """The facts of several tasks, in order. Runs in a worker process."""
    return [run_task(task, unpacked, decode) for task in tasks]


def watch_parent(parent: int) -> None:
    """Start a thread that ends this process when its parent is gone, be it killed. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def open_pool(workers: int) -> Executor:
    """A pool of fresh processes (no inherited threads or locks), which do not outlive this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=watch_parent, initargs=(os.getpid(),))


class Journal:
    """What was found out about image files: each is looked at once, also across a restart.

    The file lies beside the unfinished output. In memory a good image takes two integers: its name's 64-bit hash, and
    its size.
    """

    def __init__(self, path: Path) -> None:
        self._good: dict[int, int] = {}
        self._other: dict[str, ImageFacts] = {}
        if path.is_file():
            whole = 0
            with path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"]\n"):  # the process was killed while it wrote
                        break
                    self._remember(_facts_from(json.loads(line)))
                    whole += len(line)
            os.truncate(path, whole)  # else the next line would become one with the half
        self._file = path.open("a", encoding="utf-8")

    def get(self, name: str) -> ImageFacts | None:
        """The facts of a file, if known."""
        packed = self._good.get(hash(name))
        if packed is not None:
            return ImageFacts(name, (packed >> 32, packed & 0xFFFFFFFF), None)
        return self._other.get(name)

    def add(self, facts: ImageFacts) -> None:
        """Remember a file, but not one that cannot be used: it may have been replaced when it is asked for again."""
        if facts.problem is None and self.get(facts.path) is None:
            self._remember(facts)
            self._file.write(json.dumps(facts) + "\n")

    def _remember(self, facts: ImageFacts) -> None:
        if facts.problem is None and not facts.notes and facts.size is not None:
            self._good[hash(facts.path)] = facts.size[0] << 32 | facts.size[1]
        else:
            self._other[facts.path] = facts

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _facts_from(value: Any) -> ImageFacts:
    path, size, problem, notes = value
    return ImageFacts(
        path,
        None if size is None else (size[0], size[1]),
        None if problem is None else Note(*problem),
        tuple(Note(*note) for note in notes),
    )


class _Chunk:
    """Drafts that wait for their images."""

    def __init__(self) -> None:
        self.rows: list[tuple[Draft, list[ImageFacts | int]]] = []
        """Each draft with its facts, or the positions of its tasks."""
        self.tasks: list[Task] = []
        self.positions: dict[str, int] = {}
        self.bytes = 0
        self.future: Future[list[ImageFacts]] | None = None
        self.done: list[ImageFacts] = []

    def add_task(self, task: Task, once: bool) -> int:
        """Position of the task; a file that several drafts of the chunk share is one."""
        if once and task.name in self.positions:
            return self.positions[task.name]
        self.tasks.append(task)
        self.bytes += len(task.data) if task.kind == "bytes" else 0
        position = len(self.tasks) - 1
        if once:
            self.positions[task.name] = position
        return position


def look_at_images(
    drafts: Iterable[Draft], policy: ImagePolicy, journal: Journal | None = None
) -> Generator[Looked, None, None]:
    """The drafts in order, each with what was found out about its images.

    With `check` `none` or `exist` and images left in place nothing is opened: `none` looks at the path's text alone,
    `exist` adds one `lstat`. Images that come in records are unpacked whatever `check` is, and decoded with `decode`.
    """
    root = ImageRoot(policy.root)
    decode = policy.check == "decode"
    find = path_problem if policy.check == "none" and not policy.copy else root.problem
    open_files = decode or policy.copy
    pool: Executor | None = None
    waiting: deque[_Chunk] = deque()
    chunk = _Chunk()

    def facts_of(draft: Draft, number: int, image: str | Embedded) -> ImageFacts | int:
        if isinstance(image, Embedded):
            name = f"{draft.where} image {number + 1}"
            return chunk.add_task(Task(image.data, "bytes", name, draft.source), once=False)
        problem = find(image)
        kind = "copy" if policy.copy else "file"
        if problem is not None and problem.kind == "missing-image":
            image, kind, problem = page_instead(image, kind, problem)
        if problem is not None or not open_files:
            return ImageFacts(image, None, problem)
        known = None if journal is None or policy.copy else journal.get(image)
        if known is not None:
            return known
        task = Task(os.path.join(root.folder, image), kind, image, draft.source)
        return chunk.add_task(task, once=True)

    def page_instead(image: str, kind: str, problem: Note) -> tuple[str, str, Note | None]:
        """What a missing image is if it is a page of a TIFF file that is there."""
        page = tiff_page(image)
        if page is None or root.problem(page[0]) is not None:
            return image, kind, problem
        if policy.copy:
            return image, "page", None
        if page[1] == 0:  # what readers of the file see
            return page[0], kind, None
        return image, kind, Note("tiff-page", image)

    def submit() -> None:
        nonlocal pool, chunk
        if chunk.tasks and policy.workers > 1:
            pool = pool or open_pool(policy.workers)
            chunk.future = pool.submit(run_tasks, chunk.tasks, policy.unpacked, decode)
        elif chunk.tasks:
            chunk.done = run_tasks(chunk.tasks, policy.unpacked, decode)
        waiting.append(chunk)
        chunk = _Chunk()

    def finished(ready: _Chunk) -> Iterator[Looked]:
        results = ready.done if ready.future is None else ready.future.result()
        if journal is not None and not policy.copy:
            for task, facts in zip(ready.tasks, results, strict=True):
                if task.kind == "file":
                    journal.add(facts)
        for draft, parts in ready.rows:
            found = tuple(results[part] if isinstance(part, int) else part for part in parts)
            yield Looked(draft, found, {policy.copy or image == "" for image in draft.images})

    try:
        for draft in drafts:
            parts: list[ImageFacts | int] = [facts_of(draft, i, image) for i, image in enumerate(draft.images)]
            if not chunk.rows and not chunk.tasks and not waiting:
                yield Looked(draft, tuple(parts), {False} if parts else set())  # type: ignore[arg-type]  # no task, so no position
                continue
            if chunk.tasks:
                draft.images = tuple("" if isinstance(image, Embedded) else image for image in draft.images)
            chunk.rows.append((draft, parts))
            if len(chunk.rows) >= CHUNK_ROWS or chunk.bytes >= CHUNK_BYTES:
                submit()
                while waiting and len(waiting) > 3 * policy.workers:
                    yield from finished(waiting.popleft())
        submit()
        while waiting:
            yield from finished(waiting.popleft())
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

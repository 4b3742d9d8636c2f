"""Check or unpack the images of raw samples, in worker processes and in bounded memory."""

import json
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from llava_mole.common.errors import DataError
from llava_mole.common.processes import WorkQueue, open_pool
from llava_mole.data.prepare.defects import Issue
from llava_mole.data.prepare.images import (
    ImageInfo,
    ImageRoot,
    decode_base64,
    look,
    path_problem,
    tiff_page,
    unpack,
    unpack_page,
)
from llava_mole.data.prepare.samples import Embedded, RawSample

CheckImages = Literal["none", "exist", "decode"]
CheckedSample = tuple[RawSample, tuple[ImageInfo, ...]]
"""A sample and its images."""

BATCH_SAMPLES = 64
BATCH_BYTES = 16 << 20
"""Largest batch of a process, in samples and in bytes of embedded images. About three batches a process wait."""


class Task(NamedTuple):
    """One image that a worker process opens."""

    data: str | bytes
    """Absolute file name, bytes, or base64 text."""
    kind: Literal["file", "copy", "page", "bytes"]
    """`page` copies a page of a TIFF file; `bytes` unpacks an embedded image."""
    name: str
    """Path relative to the root, or the name of an embedded image in messages."""
    group: str


class Batch(NamedTuple):
    """Samples whose images are opened together."""

    samples: list[tuple[RawSample, list[ImageInfo | Task]]]
    """Each sample with what is known, or what is to be done, about its images."""
    tasks: dict[str, Task]
    """The distinct tasks by name."""


class ImageChecker:
    """Finds out what can be said about the images of samples.

    With `check` `none` or `exist`, images that are left in place are not opened: `none` reads the path's text alone,
    `exist` adds one `lstat`. Embedded images are always unpacked, and with `decode` also decoded.

    Args:
        root: Folder that the paths in records are relative to.
        unpacked: Folder for images that are embedded in records (or copied).
        journal: Files in place that were opened earlier.
        check: How image files are checked.
        copy: Also copy image files, named by their hash, instead of leaving them in place.
        workers: Number of processes; 1 opens the images in this process.
    """

    def __init__(
        self, root: ImageRoot, unpacked: Path, journal: "Journal", check: CheckImages, copy: bool, workers: int
    ) -> None:
        self._root, self._unpacked, self._journal = root, unpacked, journal
        self._copy, self._decode, self._workers = copy, check == "decode", workers
        self._find_problem = path_problem if check == "none" and not copy else self._root.problem

    def check(self, samples: Iterable[RawSample]) -> Generator[CheckedSample, None, None]:
        """Yield the samples in order, each with what is known about its images."""
        pool = open_pool(self._workers) if self._workers > 1 else None  # it starts processes with its first call
        queue: WorkQueue[Batch, list[ImageInfo]] = WorkQueue(pool, 3 * self._workers)
        try:
            for batch in self._batches(samples):
                arguments = (list(batch.tasks.values()), self._unpacked, self._decode)
                yield from self._finish(
                    queue.submit(batch, run_tasks, *arguments) if batch.tasks else queue.add(batch, [])
                )
            yield from self._finish(queue.drain())
        finally:
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self, samples: Iterable[RawSample]) -> Iterator[Batch]:
        """Plan the samples; a file that several samples of a batch share is one task."""
        batch, size = Batch([], {}), 0
        for sample in samples:
            parts = [self._plan(sample, number, image) for number, image in enumerate(sample.images, 1)]
            batch.samples.append((sample, parts))
            for part in parts:
                if isinstance(part, Task):
                    batch.tasks.setdefault(part.name, part)
                    size += len(part.data) if part.kind == "bytes" else 0
            if len(batch.samples) >= BATCH_SAMPLES or size >= BATCH_BYTES:
                yield batch
                batch, size = Batch([], {}), 0
        yield batch

    def _plan(self, sample: RawSample, number: int, image: str | Embedded) -> ImageInfo | Task:
        """Check the path of an image, without opening the file."""
        if isinstance(image, Embedded):
            return Task(image.data, "bytes", f"{sample.where} image {number}", sample.source)
        kind: Literal["file", "copy", "page"] = "copy" if self._copy else "file"
        problem = self._find_problem(image)
        if problem is not None and problem.kind == "missing-image":
            page = tiff_page(image)
            if page is not None and self._root.problem(page[0]) is None:
                if self._copy:
                    kind, problem = "page", None
                elif page[1] == 0:  # the page that readers of the file see
                    image, problem = page[0], None
                else:
                    problem = Issue("tiff-page", image)
        if problem is not None or not (self._copy or self._decode):
            return ImageInfo(image, None, problem)
        return self._journal.get(image) or Task(os.path.join(self._root.folder, image), kind, image, sample.source)

    def _finish(self, finished: list[tuple[Batch, list[ImageInfo]]]) -> Iterator[CheckedSample]:
        """Put the results of the tasks in their places."""
        for (samples, tasks), infos in finished:
            results = dict(zip(tasks, infos, strict=True))
            for name, task in tasks.items():
                if task.kind == "file":
                    self._journal.add(results[name])
            for sample, parts in samples:
                yield sample, tuple([results[part.name] if isinstance(part, Task) else part for part in parts])


def run_tasks(tasks: list[Task], unpacked: Path, decode: bool) -> list[ImageInfo]:
    """Run several tasks in order. Called in a worker process."""
    return [run_task(task, unpacked, decode) for task in tasks]


def run_task(task: Task, unpacked: Path, decode: bool) -> ImageInfo:
    """Open, copy or unpack one image. A damaged image is a `problem` of the result, not an exception."""
    if task.kind == "file":
        return look(str(task.data), task.name, decode=decode)[0]
    if task.kind == "page":
        return unpack_page(str(task.data), unpacked, task.group, task.name)
    notes: tuple[Issue, ...] = ()
    data = task.data
    try:
        if task.kind == "copy":
            data = Path(str(data)).read_bytes()
        elif isinstance(data, str):
            if any(space in data for space in " \n\r\t"):
                notes = (Issue("base64-spaces", task.name),)
            data = decode_base64(data)
    except DataError as error:
        return ImageInfo(task.name, None, Issue("base64", f"{task.name}: {error}"))
    except OSError as error:
        return ImageInfo(task.name, None, Issue("missing-image", f"{task.name}: {error.strerror}"))
    info = unpack(data, unpacked, task.group, task.name, decode=decode)
    return info._replace(notes=notes + info.notes)


class Journal:
    """The usable image files in place that were opened, so that each is opened once, also across a restart.

    Damaged files are not listed: the user may replace them before the next call. An image takes about 400 bytes of
    memory.

    Args:
        path: The list, beside the unfinished output; each line is an `ImageInfo`.
    """

    def __init__(self, path: Path) -> None:
        self._known: dict[str, ImageInfo] = {}
        self._file = path.open("a+b")
        self._file.seek(0)
        while (line := self._file.readline()).endswith(b"]\n"):
            name, size, _, notes = json.loads(line)
            self._known[name] = ImageInfo(name, tuple(size), None, tuple(Issue(*note) for note in notes))
        # A process that was killed left half a line, which the next one must not be joined to.
        self._file.truncate(self._file.tell() - len(line))

    def get(self, path: str) -> ImageInfo | None:
        """What is known about an image file, if anything."""
        return self._known.get(path)

    def add(self, info: ImageInfo) -> None:
        """Remember an image file that can be used."""
        if info.problem is None and info.path not in self._known:
            self._known[info.path] = info
            self._file.write(json.dumps(info).encode() + b"\n")

    def close(self) -> None:
        """Close the list."""
        self._file.close()

"""From raw to checked samples: their images are checked or unpacked in worker processes, in bounded memory."""

import json
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

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

BATCH_SAMPLES = 64
BATCH_BYTES = 16 << 20
"""A process gets one batch at a time, of so many samples or bytes of embedded images; about three a process wait."""


@dataclass(frozen=True)
class ImagePolicy:
    """How images are treated."""

    root: Path
    """What paths in records are relative to."""
    unpacked: Path
    """Folder for images that are embedded in records (or copied)."""
    check: CheckImages
    copy: bool = False
    """Also copy image files, named by their hash, instead of leaving them in place."""
    workers: int = 1


class CheckedSample(NamedTuple):
    """A sample whose images were checked."""

    sample: RawSample
    images: tuple[ImageInfo, ...]
    image_locations: set[bool]
    """True if an image lies in the prepared set's own folder, False if one lies below the image root."""


class Task(NamedTuple):
    """One image that a worker process opens."""

    data: str | bytes
    """Absolute file name, bytes, or base64 text."""
    kind: Literal["file", "copy", "page", "bytes"]
    """`page` is a page of a TIFF file, to be copied; `bytes` is an embedded image, to be unpacked."""
    name: str
    """Path relative to the root, or the name of an embedded image in messages."""
    group: str


Planned = tuple[RawSample, list[ImageInfo | Task]]
"""A sample, and for each of its images what is known or what is to be done."""


def check_images(
    samples: Iterable[RawSample], policy: ImagePolicy, journal: "Journal | None" = None
) -> Generator[CheckedSample, None, None]:
    """Yield the samples in order, each with what is known about its images.

    With `check` `none` or `exist` and images left in place, nothing is opened: `none` reads the path's text alone,
    `exist` adds one `lstat`. Embedded images are always unpacked, and with `decode` also decoded.
    """
    checker = _Checker(policy, journal)
    pool = open_pool(policy.workers) if policy.workers > 1 else None  # it starts processes with its first call
    queue: WorkQueue[tuple[list[Planned], list[Task]], list[ImageInfo]] = WorkQueue(pool, 3 * policy.workers)
    try:
        for batch in _batches(map(checker.plan, samples)):
            tasks = _distinct_tasks(batch)
            if tasks:
                arguments = (tasks, policy.unpacked, policy.check == "decode")
                finished = queue.submit((batch, tasks), run_tasks, *arguments)
            else:
                finished = queue.add((batch, tasks), [])
            for item, infos in finished:
                yield from checker.finish(*item, infos)
        for item, infos in queue.drain():
            yield from checker.finish(*item, infos)
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _batches(planned: Iterable[Planned]) -> Iterator[list[Planned]]:
    batch: list[Planned] = []
    size = 0
    for sample, parts in planned:
        batch.append((sample, parts))
        size += sum(len(part.data) for part in parts if isinstance(part, Task) and part.kind == "bytes")
        if len(batch) >= BATCH_SAMPLES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _distinct_tasks(batch: list[Planned]) -> list[Task]:
    """The tasks of a batch; a file that several samples share is one task."""
    tasks: dict[str, Task] = {}
    for _, parts in batch:
        for part in parts:
            if isinstance(part, Task):
                tasks.setdefault(part.name, part)
    return list(tasks.values())


class _Checker:
    """Plans the tasks of a sample, and puts their results in their places."""

    def __init__(self, policy: ImagePolicy, journal: "Journal | None") -> None:
        self._root = ImageRoot(policy.root)
        self._copy = policy.copy
        self._find_problem = path_problem if policy.check == "none" and not policy.copy else self._root.problem
        self._opens_files = policy.check == "decode" or policy.copy
        self._journal = None if policy.copy else journal

    def plan(self, sample: RawSample) -> Planned:
        """Check the paths of a sample's images, without opening any file."""
        return sample, [self._plan_image(sample, number, image) for number, image in enumerate(sample.images, 1)]

    def _plan_image(self, sample: RawSample, number: int, image: str | Embedded) -> ImageInfo | Task:
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
        if problem is not None or not self._opens_files:
            return ImageInfo(image, None, problem)
        known = None if self._journal is None else self._journal.get(image)
        return known or Task(os.path.join(self._root.folder, image), kind, image, sample.source)

    def finish(self, batch: list[Planned], tasks: list[Task], infos: list[ImageInfo]) -> Iterator[CheckedSample]:
        """Yield the samples of a batch, given the results of its tasks."""
        results = {}
        for task, info in zip(tasks, infos, strict=True):
            results[task.name] = info
            if self._journal is not None and task.kind == "file":
                self._journal.add(info)
        for sample, parts in batch:
            images = tuple([results[part.name] if isinstance(part, Task) else part for part in parts])
            locations = {self._copy or isinstance(image, Embedded) for image in sample.images}
            yield CheckedSample(sample, images, locations)


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
    try:
        if task.kind == "copy":
            data = Path(str(task.data)).read_bytes()
        elif isinstance(task.data, str):
            if any(space in task.data for space in " \n\r\t"):
                notes = (Issue("base64-spaces", task.name),)
            data = decode_base64(task.data)
        else:
            data = task.data
    except DataError as error:
        return ImageInfo(task.name, None, Issue("base64", f"{task.name}: {error}"))
    except OSError as error:
        return ImageInfo(task.name, None, Issue("missing-image", f"{task.name}: {error.strerror}"))
    info = unpack(data, unpacked, task.group, task.name, decode=decode)
    return info._replace(notes=notes + info.notes)


class Journal:
    """What is known about image files in place, so that each is opened once, also across a restart.

    The file lies beside the unfinished output. In memory, a good image takes two integers: the 64-bit hash of its
    path, and its size.
    """

    def __init__(self, path: Path) -> None:
        self._good: dict[int, int] = {}
        self._other: dict[str, ImageInfo] = {}
        if path.is_file():
            whole = 0
            with path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"]\n"):  # the process was killed while it wrote
                        break
                    self._remember(_info_from(json.loads(line)))
                    whole += len(line)
            os.truncate(path, whole)  # else the next line would be joined to the incomplete one
        self._file = path.open("a", encoding="utf-8")

    def get(self, path: str) -> ImageInfo | None:
        """What is known about an image file, if anything."""
        packed = self._good.get(hash(path))
        if packed is not None:
            return ImageInfo(path, (packed >> 32, packed & 0xFFFFFFFF), None)
        return self._other.get(path)

    def add(self, info: ImageInfo) -> None:
        """Remember an image, unless it cannot be used: the user may replace it before the next call."""
        if info.problem is None and self.get(info.path) is None:
            self._remember(info)
            self._file.write(json.dumps(info) + "\n")

    def _remember(self, info: ImageInfo) -> None:
        if info.problem is None and not info.notes and info.size is not None:
            self._good[hash(info.path)] = info.size[0] << 32 | info.size[1]
        else:
            self._other[info.path] = info

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _info_from(value: Any) -> ImageInfo:
    path, size, problem, notes = value
    return ImageInfo(
        path, tuple(size) if size else None, Issue(*problem) if problem else None, tuple(Issue(*note) for note in notes)
    )

"""Opens every image of a run once, and compares the images with those of the evaluation."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llava_mole.analysis.check.report import FindingsFile, SourceFindings
from llava_mole.common.errors import DataError
from llava_mole.common.processes import WorkQueue
from llava_mole.config import ImageModes
from llava_mole.data.images import REFUSED_BY
from llava_mole.data.json_stream import iterate_json
from llava_mole.data.prepare.defects import Issue
from llava_mole.data.prepare.files import walk
from llava_mole.data.prepare.images import EXTENSIONS, ImageInfo, ImageRoot, look
from llava_mole.data.sources import ImageReader

_BATCH = 64
"""Images that a worker process gets at a time."""
_AHEAD = 8
"""Unfinished batches at a time."""
_SUFFIXES = {f".{extension}" for group in EXTENSIONS.values() for extension in group}


def key_of(data: bytes) -> int:
    """64 bits of the BLAKE2b hash of `data`; the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class SeenImage(NamedTuple):
    """An image file that was opened."""

    info: ImageInfo
    key: int | None
    """`key_of` its content; None if it could not be read."""


def look_and_hash(files: list[tuple[str | bytes, str]]) -> list[SeenImage]:
    """Decode images, given as (absolute name or content, name in messages), and hash them. Runs in a worker process."""
    seen = []
    for file, name in files:
        try:
            data = file if isinstance(file, bytes) else Path(file).read_bytes()
        except OSError as error:
            problem = Issue("corrupt-image", f"{name}: cannot be read: {error.strerror}")
            seen.append(SeenImage(ImageInfo(name, None, problem), None))
        else:
            seen.append(SeenImage(look(data, name, decode=True)[0], key_of(data)))
    return seen


class OpenedImages:
    """The image files opened so far, of all sources: their hashes, and the information to report.

    Args:
        huge_pixels: Images with more pixels are reported.
    """

    def __init__(self, huge_pixels: int) -> None:
        self.huge_pixels = huge_pixels
        self.names: set[int] = set()
        """Hashes of absolute file names."""
        self.contents: set[int] = set()
        """`key_of` the contents."""
        self.reported: dict[int, ImageInfo] = {}
        """By the hash of the absolute name."""

    def remember(self, file: str, seen: SeenImage) -> None:
        """Keep what is needed when another source names the file."""
        if seen.key is not None:
            self.contents.add(seen.key)
        info = seen.info
        if info.problem is not None or info.notes or self.is_huge(info):
            self.reported[hash(file)] = info

    def is_huge(self, info: ImageInfo) -> bool:
        """Whether a usable image has more than `huge_pixels`."""
        return info.problem is None and info.size is not None and info.size[0] * info.size[1] > self.huge_pixels


class SourceImages:
    """Opens the images of one source; a file is opened once in a run, but reported for every source that names it.

    Args:
        folder: Root of the image paths.
        follow_links: Whether links may lead out of it.
        modes: See `DataConfig.image_modes`.
        source, findings: Receive the numbers and the list.
        opened: The images that earlier sources opened; this one's are added.
        pool: Decodes the images; None decodes in this process.
        reader: Reads images that are no local files.
    """

    def __init__(
        self,
        folder: str,
        follow_links: bool,
        modes: ImageModes,
        source: SourceFindings,
        findings: FindingsFile,
        opened: OpenedImages,
        pool: Executor | None,
        reader: ImageReader | None = None,
    ) -> None:
        self._root = ImageRoot(Path(folder), follow_links=follow_links)
        self._reader = reader
        self._refused = REFUSED_BY[modes]
        self._source, self._findings, self._opened = source, findings, opened
        self._batch: list[_Waiting] = []
        """Images waiting for a full batch."""
        self._queue: WorkQueue[list[_Waiting], list[SeenImage]] = WorkQueue(pool, _AHEAD)

    def add(self, path: str, where: str) -> None:
        """Check an image that the source names for the first time, in record `where`."""
        try:
            data = self._reader.read(path) if self._reader is not None else None
        except DataError as error:
            self._findings.add(self._source, "missing-image", where, str(error))
            return
        problem = self._root.problem(path) if data is None else None
        if problem is not None:
            self._findings.add(self._source, problem.kind, where, problem.detail)
            return
        root = self._root.folder if data is None else self._source.name
        file = os.path.join(root, path)
        name = hash(file)
        if name not in self._opened.names:
            self._opened.names.add(name)
            self._batch.append(_Waiting(file, path, where, data))
            if len(self._batch) == _BATCH:
                self._submit()
        elif name in self._opened.reported:
            self._report(self._opened.reported[name], path, where)

    def finish(self) -> None:
        """Wait for the images that are not yet decoded."""
        if self._batch:
            self._submit()
        self._settle(self._queue.drain())

    def _submit(self) -> None:
        batch, self._batch = self._batch, []
        files = [(image.data or image.file, image.path) for image in batch]
        self._settle(self._queue.submit(batch, look_and_hash, files))

    def _settle(self, finished: list[tuple[list["_Waiting"], list[SeenImage]]]) -> None:
        for batch, results in finished:
            for image, seen in zip(batch, results, strict=True):
                self._opened.remember(image.file, seen)
                self._report(seen.info, image.path, image.where)

    def _report(self, info: ImageInfo, path: str, where: str) -> None:
        for issue in info.notes if info.problem is None else (info.problem, *info.notes):
            kind = "refused-image" if issue.kind in self._refused else issue.kind
            # Another source may call the file by another name.
            self._findings.add(self._source, kind, where, path + issue.detail.removeprefix(info.path))
        if self._opened.is_huge(info) and info.size is not None:
            self._findings.add(self._source, "huge-image", where, f"{path}: {info.size[0]} x {info.size[1]}")


class _Waiting(NamedTuple):
    """An image that is not yet decoded."""

    file: str
    """Absolute name."""
    path: str
    where: str
    data: bytes | None
    """Its content, if it is no local file."""


def evaluation_files(places: Sequence[str]) -> list[Path]:
    """Every image of the given folders, with those that links lead to, and question files, each file once.

    The images of a question file are looked for in its folder, in the folder above, and in `images` in the folder
    above (where `llava-mole prepare` writes them).

    Raises:
        DataError: a place is neither a folder nor a file, or holds no image; or no image of a question file is found.
    """
    files: dict[str, Path] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            found = sorted(p for p in walk(path, True) if p.suffix.lower() in _SUFFIXES and p.is_file())
        elif path.is_file():
            found = _of_questions(path)
        else:
            raise DataError(f"check.evaluation_images: {place} is neither a folder nor a question file")
        if not found:
            raise DataError(f"check.evaluation_images: {place} has no image; name another place, or leave it out")
        files.update((os.path.realpath(file), file) for file in found)
    return list(files.values())


def _of_questions(path: Path) -> list[Path]:
    """The images of a question file that exist."""
    names: dict[str, None] = {}
    for value, line in iterate_json(path):
        if not isinstance(value, dict):
            raise DataError(f"{path}:{line}: {type(value).__name__} found; a question is a JSON object")
        names |= dict.fromkeys(_named(value))
    if not names:
        return []
    roots = [ImageRoot(folder) for folder in (path.parent, path.parent.parent, path.parent.parent / "images")]
    root = next((root for root in roots if any(root.problem(name) is None for name in list(names)[:20])), None)
    if root is None:
        folders = ", ".join(root.folder for root in roots)
        raise DataError(f"{path}: its images are in none of {folders}; name the folder of the images instead")
    return [Path(root.folder, name) for name in names if root.problem(name) is None]


def _named(line: dict[str, Any]) -> Iterator[str]:
    """The images of a question: `image` and `images`, each a path or a list of them."""
    for value in (line.get("image"), line.get("images")):
        yield from (name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str))


def find_overlap(files: Sequence[Path], trained_on: set[int]) -> tuple[int, list[str]]:
    """Count the distinct evaluation images, and list the files of those that are also trained on.

    Args:
        files: See `evaluation_files`.
        trained_on: `key_of` the content of each image of the run.
    """
    seen: set[int] = set()
    shared = []
    for path in tqdm(files, desc="evaluation images", unit="image", delay=3.0, disable=None):
        key = key_of(path.read_bytes())
        if key in trained_on and key not in seen:
            shared.append(str(path))
        seen.add(key)
    return len(seen), shared

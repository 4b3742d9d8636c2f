"""Decoding every image of a run once, while its records are read, and what is found in it."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llava_mole.analysis.check.report import FindingsFile, Keys, SourceFindings, key_of, key_of_text
from llava_mole.common.errors import DataError
from llava_mole.data.json_stream import iterate_json
from llava_mole.data.prepare.images import EXTENSIONS, ImageFacts, ImageRoot, Note, look

_CHUNK = 64
_AHEAD = 8
"""Chunks that are handed over before the oldest one's result is taken."""


class SeenImage(NamedTuple):
    """An image file that was opened."""

    facts: ImageFacts
    key: int | None
    """Of the file's content; None where it could not be read."""


def look_and_hash(files: list[tuple[str, str]]) -> list[SeenImage]:
    """Decode files, given as (absolute name, name in messages), and hash their content. Runs in a worker process."""
    seen = []
    for file, name in files:
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            problem = Note("corrupt-image", f"{name}: cannot be read: {error.strerror}")
            seen.append(SeenImage(ImageFacts(name, None, problem), None))
        else:
            seen.append(SeenImage(look(data, name, decode=True)[0], key_of(data)))
    return seen


class OpenedImages:
    """All image files that were opened so far, for all sources: their keys, and facts of those that are worth a word.

    Args:
        huge_pixels: Larger images are worth one.
    """

    def __init__(self, huge_pixels: int) -> None:
        self.huge_pixels = huge_pixels
        self.names = Keys()
        """Of absolute file names."""
        self.contents = Keys()
        self.noted: dict[int, ImageFacts] = {}
        """By the key of the absolute name."""

    def remember(self, file: str, seen: SeenImage) -> None:
        """Keep what another source that names the file needs."""
        if seen.key is not None:
            self.contents.add(seen.key)
        facts = seen.facts
        if facts.problem is not None or facts.notes or self.is_huge(facts):
            self.noted[key_of_text(file)] = facts

    def is_huge(self, facts: ImageFacts) -> bool:
        """Whether a sound image has more than `huge_pixels`."""
        return facts.problem is None and facts.size is not None and facts.size[0] * facts.size[1] > self.huge_pixels


class SourceImages:
    """The images of one source: each file is opened once in a run, and what was found counts for every source of it.

    Args:
        folder: The source's image folder.
        source: Takes the numbers.
        findings: Takes the list.
        opened: What earlier sources have opened; grows.
        pool: Decodes; None decodes in this process.
    """

    def __init__(
        self,
        folder: str,
        source: SourceFindings,
        findings: FindingsFile,
        opened: OpenedImages,
        pool: Executor | None,
    ) -> None:
        self._root = ImageRoot(Path(folder))
        self._source, self._findings, self._opened, self._pool = source, findings, opened, pool
        self._files: list[tuple[str, str]] = []
        self._wheres: list[str] = []
        self._waiting: deque[tuple[list[tuple[str, str]], list[str], Future[list[SeenImage]] | list[SeenImage]]] = (
            deque()
        )

    def add(self, path: str, where: str) -> None:
        """Look at an image that the source has not named before; `where` is the record that names it."""
        problem = self._root.problem(path)
        if problem is not None:
            self._findings.add(self._source, problem.kind, where, problem.detail)
            return
        file = os.path.join(self._root.folder, path)
        if not self._opened.names.add(key_of_text(file)):
            facts = self._opened.noted.get(key_of_text(file))
            if facts is not None:
                self._list(facts, path, where)
            return
        self._files.append((file, path))
        self._wheres.append(where)
        if len(self._files) == _CHUNK:
            self._hand_over()

    def finish(self) -> None:
        """Wait for the images that are still being looked at."""
        self._hand_over()
        while self._waiting:
            self._settle()

    def _hand_over(self) -> None:
        files, wheres = self._files, self._wheres
        self._files, self._wheres = [], []
        if files:
            pool = self._pool
            results = pool.submit(look_and_hash, files) if pool is not None else look_and_hash(files)
            self._waiting.append((files, wheres, results))
        while len(self._waiting) > _AHEAD:
            self._settle()

    def _settle(self) -> None:
        files, wheres, results = self._waiting.popleft()
        done = results.result() if isinstance(results, Future) else results
        for (file, path), where, seen in zip(files, wheres, done, strict=True):
            self._opened.remember(file, seen)
            self._list(seen.facts, path, where)

    def _list(self, facts: ImageFacts, path: str, where: str) -> None:
        notes = facts.notes if facts.problem is None else (facts.problem, *facts.notes)
        for note in notes:
            # Another source may call the file by another name.
            self._findings.add(self._source, note.kind, where, path + note.detail.removeprefix(facts.path))
        if self._opened.is_huge(facts) and facts.size is not None:
            self._findings.add(self._source, "huge-image", where, f"{path}: {facts.size[0]} x {facts.size[1]}")


_SUFFIXES = {f".{extension}" for group in EXTENSIONS.values() for extension in group}


def evaluation_files(places: Sequence[str]) -> list[Path]:
    """Every image of the folders and question files given, each file once.

    The images of a question file are looked for below its folder, the folder above, and that one's `images` (where
    `llava-mole prepare` puts them).

    Raises:
        DataError: a place that is neither, that has no image, or a question file none of whose images is found.
    """
    files: dict[str, Path] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        elif path.is_file():
            found = _of_questions(path)
        else:
            raise DataError(f"check.evaluation_images: {place} is neither a folder nor a question file")
        if not found:
            raise DataError(f"check.evaluation_images: {place} has no image; name another place, or leave it out")
        files.update((os.path.realpath(file), file) for file in found)
    return list(files.values())


def _of_questions(path: Path) -> list[Path]:
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


def find_overlap(files: Sequence[Path], trained_on: Keys) -> tuple[int, list[str]]:
    """How many different evaluation images there are, and the files of those that are trained on as well.

    Args:
        files: See `evaluation_files`.
        trained_on: `key_of` the content of each image of the run.
    """
    seen = Keys()
    shared = []
    for path in tqdm(files, desc="evaluation images", unit="image", delay=3.0, disable=None):
        key = key_of(path.read_bytes())
        if seen.add(key) and key in trained_on:
            shared.append(str(path))
    return len(seen), shared

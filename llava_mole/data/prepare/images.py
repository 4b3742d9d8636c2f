"""The step between drafts and rows: images are looked at (or unpacked) in a pool of processes, in bounded memory."""

import base64
import binascii
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import stat
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from llava_mole.common.errors import DataError
from llava_mole.common.text import is_text
from llava_mole.data.images import DECODER_ERRORS, FORMATS
from llava_mole.data.prepare.drafts import Draft, Embedded

LARGEST_IMAGE = 64 << 20
"""Most bytes of an encoded image."""
_DATA_URL = re.compile(rb"data:[^,]{0,200};base64,")
_BLANKS = b" \t\r\n"


def decode_base64(text: str | bytes, *, largest: int = LARGEST_IMAGE) -> bytes:
    """The bytes of base64 text. Blanks and line breaks in it, a `data:...;base64,` in front and a missing padding are
    forgiven, as is the URL-safe alphabet; everything else is an error.

    Raises:
        DataError: other characters, a length that cannot be, nothing, or more than `largest` bytes.
    """
    if len(text) > 2 * largest:
        raise DataError(f"base64 text of {len(text):,} characters; an image may have {largest:,} bytes")
    try:
        data = text.encode("ascii") if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError:
        raise DataError("not base64: it holds characters that are not ASCII") from None
    match = _DATA_URL.match(data)
    data = data[match.end() if match else 0 :].translate(None, _BLANKS)
    data = data.rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    if not data:
        raise DataError("not base64: it is empty")
    try:
        decoded = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise DataError(f"not base64: {' '.join(str(error).split())}") from None
    if len(decoded) > largest:
        raise DataError(f"an image of {len(decoded):,} bytes; it may have {largest:,}")
    return decoded


CheckImages = Literal["none", "exist", "decode"]

EXTENSIONS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("jpg", "jpeg"),
    "PNG": ("png", "apng"),
    "GIF": ("gif",),
    "WEBP": ("webp",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
"""Pillow's name of a format -> extensions, the one that unpacked files get first."""

_MOST_FOLDERS = 50_000
_LONGEST_NAME = 100


class Note(NamedTuple):
    """Something worth counting about an image, by the kinds of `defects.KINDS`."""

    kind: str
    detail: str


class ImageFacts(NamedTuple):
    """What was found out about an image."""

    path: str
    """Relative to the image folder of the prepared set."""
    size: tuple[int, int] | None
    """(width, height) in pixels; None where the file was not opened."""
    problem: Note | None
    """Why it cannot be used."""
    notes: tuple[Note, ...] = ()


def path_problem(path: str) -> Note | None:
    """What is wrong with an image path as text; nothing is opened."""
    if not path.isascii() and not is_text(path):
        return Note("bad-text", f"{path[:200]!a} holds half of a surrogate pair, which is no character")
    if "://" in path or path.startswith("data:"):
        return Note("remote-image", path[:200])
    if not path or path[0] == "/" or "\0" in path or (".." in path and ".." in path.replace("\\", "/").split("/")):
        return Note("outside-image", repr(path[:200]))
    return None


class ImageRoot:
    """The folder that the records' image paths are relative to; nothing outside it is touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self._parents: dict[str, str | None] = {}

    def problem(self, path: str) -> Note | None:
        """What keeps an image from being read: its path, a link that leads out, or no such file. One `lstat`."""
        problem = path_problem(path)
        if problem is not None:
            return problem
        parent, _, name = path.rpartition("/")
        try:
            folder = self._parents[parent]
        except KeyError:
            folder = self._resolve(parent)
        if folder is None:
            return Note("outside-image", f"{path!r} leads out of {self.folder} through a link")
        file = f"{folder}/{name}"
        try:
            mode = os.lstat(file).st_mode
        except (OSError, ValueError):
            return Note("missing-image", path)
        if stat.S_ISLNK(mode):
            target = os.path.realpath(file)
            if not self._inside(target):
                return Note("outside-image", f"{path!r} is a link to {target}")
            return None if os.path.isfile(target) else Note("missing-image", path)
        return None if stat.S_ISREG(mode) else Note("missing-image", f"{path!r} is no file")

    def _resolve(self, parent: str) -> str | None:
        if len(self._parents) >= _MOST_FOLDERS:
            self._parents.clear()
        folder = os.path.realpath(os.path.join(self.folder, parent))
        result = folder if self._inside(folder) else None
        self._parents[parent] = result
        return result

    def _inside(self, target: str) -> bool:
        return target == self.folder or target.startswith(self.folder.rstrip(os.sep) + os.sep)


def look(source: str | bytes, path: str, *, decode: bool) -> tuple[ImageFacts, str]:
    """Open an image file (or its bytes), and decode it if asked to.

    Args:
        source: Name of the file, or its bytes.
        path: What the facts say as `path`; its extension is compared with the content.
        decode: Decode every pixel of the first frame; else the header only.

    Returns:
        The facts, and the extension that belongs to the content ("" if unknown).
    """
    notes: list[Note] = []
    size: tuple[int, int] | None = None
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            size = image.size
            extensions = EXTENSIONS.get(image.format or "", ((image.format or "bin").lower(),))
            given = path.rpartition(".")[2].lower()
            if given != path.lower() and given in _KNOWN_EXTENSIONS and given not in extensions:
                notes.append(Note("wrong-extension", f"{path} holds {image.format}"))
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                notes.append(Note("animated-image", f"{path} has {image.n_frames} frames"))
            if image.mode == "CMYK":
                notes.append(Note("cmyk-image", path))
            if decode:
                image.seek(0)
                image.load()
    except (Image.DecompressionBombError, MemoryError) as error:
        return ImageFacts(path, size, Note("too-large-image", f"{path}: {error}")), ""
    except DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ImageFacts(path, size, Note("corrupt-image", f"{path}: {reason}")), ""
    return ImageFacts(path, size, None, tuple(notes)), extensions[0]


_KNOWN_EXTENSIONS = {extension for group in EXTENSIONS.values() for extension in group}


def unpack(data: bytes, folder: Path, group: str, name: str, *, decode: bool) -> ImageFacts:
    """Write an image once as `folder/<group>/<sha1>.<ext>`, the extension that of its content.

    Args:
        data: The file's bytes; more than `LARGEST_IMAGE` are refused.
        folder: The prepared set's image folder.
        group: Folder below it; characters that do not belong into a name are replaced.
        name: What messages call the image.
        decode: See `look`; an image that is there already was decoded when it was written.

    Raises:
        DataError: the file cannot be written, such as to a full disk.
    """
    if len(data) > LARGEST_IMAGE:
        detail = f"{name}: {len(data):,} bytes; an image may have {LARGEST_IMAGE:,}"
        return ImageFacts(name, None, Note("too-large-image", detail))
    digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    group = safe_name(group)
    facts, extension = look(data, name, decode=False)
    if facts.problem is None and decode and not (folder / group / f"{digest}.{extension}").is_file():
        facts, extension = look(data, name, decode=True)
    if facts.problem is not None:
        return facts
    path = f"{group}/{digest}.{extension}"
    target = folder / path
    if not target.is_file():
        temporary = target.with_name(f".{digest}.{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, target)
        except OSError as error:
            raise DataError(
                f"{target}: cannot be written: {error.strerror or error}; make room or give another --out, then call "
                "again: images that are there stay"
            ) from None
    return facts._replace(path=path)


def safe_name(text: str) -> str:
    """A file name made of `text`: letters, digits, `-`, `_` and `.`, never a hidden, empty or very long one."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).lstrip(".")
    if len(name.encode()) > _LONGEST_NAME:  # a file system takes 255 bytes
        digest = hashlib.sha1(text.encode(errors="replace"), usedforsecurity=False).hexdigest()[:12]
        return f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{digest}"
    return name or "images"


_PAGE = re.compile(r"(.+\.tiff?)\.([0-9]{1,6})", re.IGNORECASE | re.DOTALL)
_PLAIN_MODES = ("1", "L", "RGB")


def tiff_page(path: str) -> tuple[str, int] | None:
    """The TIFF file and the page, from 0, that a path speaks of; None for another path."""
    match = _PAGE.fullmatch(path)
    return None if match is None else (match[1], int(match[2]))


def unpack_page(path: str, folder: Path, group: str, name: str) -> ImageFacts:
    """Write one page as `folder/<group>/<sha1>.png`.

    Args:
        path: File name with the page's number behind it.
        folder: The prepared set's image folder.
        group: Folder below it.
        name: What messages call the image.

    Returns:
        The facts; a page that is not there or is damaged is one of them.

    Raises:
        DataError: the page cannot be written.
    """
    found = tiff_page(path)
    if found is None:
        return ImageFacts(name, None, Note("missing-image", name))
    buffer = io.BytesIO()
    try:
        with Image.open(found[0], formats=FORMATS) as image:
            image.seek(found[1])
            page = image if image.mode in _PLAIN_MODES else image.convert("RGB")
            page.save(buffer, "PNG")
    except (Image.DecompressionBombError, MemoryError) as error:
        return ImageFacts(name, None, Note("too-large-image", f"{name}: {error}"))
    except DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ImageFacts(name, None, Note("corrupt-image", f"{name}: {reason}"))
    return unpack(buffer.getvalue(), folder, group, name, decode=False)


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

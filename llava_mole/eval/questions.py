"""Question files: JSON lines in LLaVA's format, read strictly, and their split into chunks.

A line is `{"question_id": 7, "image": "a/b.png", "text": "...", "category": "..."}`. `image` and `category` are
optional; `image` may also be a list of paths, and may be called `images`. The text may say with `<image>` where each
image stands; without any, images come first. `answer` or `answers`, where present, is what the metrics compare with.
Other keys are kept for the metrics and otherwise ignored.

Files are given as `FILE` or `GROUP=FILE`. Scores and routing are reported by group; without one, a question's
`category` is its group.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llava_mole.common.errors import ConfigError, DataError, PromptError
from llava_mole.data.images import resolve_image
from llava_mole.data.records import IMAGE_NAME, marker_problem

NO_GROUP = "all"
"""Group of a question with neither a group nor a category."""

WINDOW = 8
"""Batches that are sorted by length together."""

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One line of a question file."""

    question_id: str | int
    text: str
    """The question; with as many `<image>` as images, or with none."""
    images: tuple[str, ...]
    """Paths relative to the image folder, in the order of their placeholders."""
    group: str
    """Its scores are reported under this name."""
    category: str | None
    """Kind of question, which may divide a group further."""
    where: str
    """`file:line`, for messages."""

    @property
    def key(self) -> str:
        """Identity of the question: 7 and "7" are the same."""
        return str(self.question_id)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises DataError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def read_json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return every object of a JSON-lines file with its `file:line`. Blank lines are skipped.

    Raises:
        DataError: no such file, or a line that is not a JSON object.
    """
    objects = []
    # Not splitlines(), which also splits at characters that JSON allows inside a text, such as U+2028.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error}); the file needs one JSON object per line") from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: {type(value).__name__} found; the file needs one JSON object per line")
        objects.append((where, value))
    return objects


def parse_named_file(argument: str) -> tuple[str | None, Path]:
    """Split `GROUP=FILE` or `FILE`; an existing file whose name contains `=` is a file."""
    group, separator, name = argument.partition("=")
    if not separator or Path(argument).is_file():
        return None, Path(argument)
    return group, Path(name)


def resolve_argument(argument: str) -> str:
    """Return `[GROUP=]FILE` with the absolute path, with which a report finds the file from any directory."""
    group, path = parse_named_file(argument)
    return str(path.resolve()) if group is None else f"{group}={path.resolve()}"


def read_questions(arguments: Sequence[str]) -> list[Question]:
    """Return all questions of the files, in order. Takes and raises what `read_question_lines` does."""
    return [question for question, _ in read_question_lines(arguments)]


def read_question_lines(arguments: Sequence[str]) -> list[tuple[Question, dict[str, Any]]]:
    """Return all questions of the files, in order, with their complete lines, in which `image` is a path or a list.

    Args:
        arguments: `FILE` or `GROUP=FILE` each.

    Raises:
        DataError: unreadable file or line, missing or duplicate `question_id`, field of the wrong type, or no question
            at all.
    """
    found: dict[str, tuple[Question, dict[str, Any]]] = {}
    for argument in arguments:
        group, path = parse_named_file(argument)
        for where, line in read_json_lines(path):
            question = _parse(line, where, group)
            first, _ = found.setdefault(question.key, (question, line))
            if first is not question:
                raise DataError(
                    f"{where}: question_id {question.question_id!r} was already used at {first.where}; ids must differ"
                )
            image = question.images[0] if len(question.images) == 1 else list(question.images) or None
            if line.get("image") != image:
                line["image"] = image
    if not found:
        raise DataError(f"{', '.join(arguments)}: no questions in it")
    return list(found.values())


def _parse(line: dict[str, Any], where: str, group: str | None) -> Question:
    question_id = line.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, (str, int)) or question_id == "":
        found = repr(question_id) if "question_id" in line else "nothing"
        raise DataError(f"{where}: question_id must be a number or a non-empty text; found {found}")
    for key, required in (("text", True), ("category", False), ("answer", False)):
        value = line.get(key)
        if not isinstance(value, str) and (required or value is not None):
            found = f"{value!r}" if key in line else "nothing"
            raise DataError(f"{where}: {key!r} must be a text; found {found}")
    return Question(
        question_id=question_id,
        text=line["text"],
        images=_images(line, where),
        group=group or line.get("category") or NO_GROUP,
        category=line.get("category"),
        where=where,
    )


def _images(line: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return the paths in `image` or `images`, each a path or a list of paths; none if there are none."""
    found: dict[str, tuple[str, ...]] = {}
    for key in ("image", "images"):
        value = line.get(key)
        given = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(given, list) or not all(isinstance(path, str) for path in given):
            raise DataError(f"{where}: {key!r} must be a path or a list of paths; found {value!r}")
        if given:
            found[key] = tuple(given)
    for key, value in line.items() if not found else ():
        if value and isinstance(value, (str, list, dict)) and IMAGE_NAME.fullmatch(key):
            raise DataError(
                f"{where}: {key!a} is {str(value)[:80]!a}, but the image of a question is read from 'image' or "
                "'images' only, and it would be asked without one; rename the key"
            )
    if len(set(found.values())) > 1:
        raise DataError(f"{where}: 'image' and 'images' name different images; keep one of these keys")
    return next(iter(found.values()), ())


def take_chunk(items: Sequence[T], num_chunks: int, chunk_idx: int) -> Sequence[T]:
    """Return contiguous chunk `chunk_idx` of `num_chunks`; every item is in one chunk, and sizes differ by at most one.

    With more chunks than items some chunks are empty. The chunks in order are the items in order.

    Raises:
        ConfigError: fewer than one chunk, or an index outside 0..num_chunks-1.
    """
    if num_chunks < 1:
        raise ConfigError(f"--num-chunks is {num_chunks}; it must be at least 1")
    if not 0 <= chunk_idx < num_chunks:
        raise ConfigError(f"--chunk-idx is {chunk_idx}; with {num_chunks} chunks it must be 0 to {num_chunks - 1}")
    return items[len(items) * chunk_idx // num_chunks : len(items) * (chunk_idx + 1) // num_chunks]


def check_images(questions: Sequence[Question], folder: Path, *, follow_links: bool = False) -> None:
    """Check the images of all questions, before a model is loaded.

    Args:
        follow_links: Whether symbolic links may lead out of `folder`.

    Raises:
        DataError: names the first question whose image is not a file inside `folder`, or whose text has another number
            of `<image>` than it has images.
    """
    for question in questions:
        if problem := marker_problem(question.text, len(question.images)):
            raise DataError(f"{question.where}: {problem}")
    with_image = [question for question in questions if question.images]
    if with_image and not folder.is_dir():
        raise DataError(f"--image-folder {folder} is not a directory; {with_image[0].where} needs an image from it")
    for question in with_image:
        try:
            for image in question.images:
                resolve_image(image, folder, follow_links=follow_links)
        except DataError as error:
            raise DataError(f"{question.where}: {error}") from None


@contextmanager
def errors_named_after(questions: Sequence[Question]) -> Iterator[None]:
    """Turn an error about the n-th prompt into one about the n-th question, with its file and line."""
    try:
        yield
    except PromptError as error:
        raise DataError(f"{questions[error.position].where}: {error.problem}") from None


def windows(
    questions: Sequence[Question], folder: Path, batch_size: int, *, follow_links: bool = False
) -> Iterator[tuple[Sequence[Question], list[list[Path]]]]:
    """Yield the questions in windows of `WINDOW` batches, and the files of each question's images.

    Files rather than images, because only one batch is decoded at a time: a document page takes 15 MB when decoded.

    Raises:
        DataError: an image is not a file inside `folder`.
    """
    for start in range(0, len(questions), WINDOW * batch_size):
        window = questions[start : start + WINDOW * batch_size]
        names = dict.fromkeys(image for question in window for image in question.images)
        files = {name: resolve_image(name, folder, follow_links=follow_links) for name in names}
        yield window, [[files[image] for image in question.images] for question in window]

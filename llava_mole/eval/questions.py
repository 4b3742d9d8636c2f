"""Question files: JSON lines in LLaVA's format, read strictly, and their split into chunks.

A line is `{"question_id": 7, "image": "a/b.png", "text": "...", "category": "..."}`. `image` and `category` may be
absent; `image` may also be a list of one path, and be called `images`. `answer`, where present, is what `eval/score.py`
compares with. Other keys are allowed and ignored.

Files are given as `FILE` or `DOMAIN=FILE`. The domain groups the scores; a file without one is grouped by `category`.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llava_mole.common.errors import ConfigError, DataError, PromptError

NO_DOMAIN = "all"
"""Domain of a question with neither a domain nor a category."""

WINDOW = 8
"""Batches that are sorted by length together."""

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One line of a question file."""

    question_id: str | int
    text: str
    """The question without the image placeholder."""
    image: str | None
    """Path relative to the image folder, or None for a question about no image."""
    domain: str
    """What its accuracy is reported under."""
    category: str | None
    """Kind of question, for the finer break-down."""
    answer: str | None
    where: str
    """`file:line`, for messages."""

    @property
    def key(self) -> str:
        """Identity of the question: 7 and "7" are the same one."""
        return str(self.question_id)


def read_text(path: Path) -> str:
    """A file of UTF-8 text. Raises DataError where it is absent or something else."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def read_json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every object of a JSON-lines file with its `file:line`. Blank lines are skipped.

    Raises:
        DataError: no such file, or a line that is no JSON object.
    """
    objects = []
    # Not splitlines(): it also splits at characters that JSON allows inside a text, such as U+2028.
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
    """`DOMAIN=FILE` or `FILE`; an existing file whose name holds `=` is a file."""
    domain, separator, name = argument.partition("=")
    if not separator or Path(argument).is_file():
        return None, Path(argument)
    return domain, Path(name)


def read_questions(arguments: Sequence[str]) -> list[Question]:
    """All questions of the files, in order.

    Args:
        arguments: `FILE` or `DOMAIN=FILE` each.

    Raises:
        DataError: unreadable file or line, missing or duplicate `question_id`, field of the wrong type, several images,
            no question.
    """
    return [question for question, _ in read_question_lines(arguments)]


def read_question_lines(arguments: Sequence[str]) -> list[tuple[Question, dict[str, Any]]]:
    """All questions of the files with their whole lines, `image` a path in them. Raises as `read_questions` does."""
    found: dict[str, tuple[Question, dict[str, Any]]] = {}
    for argument in arguments:
        domain, path = parse_named_file(argument)
        for where, line in read_json_lines(path):
            question = _parse(line, where, domain)
            first, _ = found.setdefault(question.key, (question, line))
            if first is not question:
                raise DataError(
                    f"{where}: question_id {question.question_id!r} was already used at {first.where}; ids must differ"
                )
            if line.get("image") != question.image:
                line["image"] = question.image
    if not found:
        raise DataError(f"{', '.join(arguments)}: no questions in it")
    return list(found.values())


def _parse(line: dict[str, Any], where: str, domain: str | None) -> Question:
    question_id = line.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, (str, int)) or question_id == "":
        found = repr(question_id) if "question_id" in line else "nothing"
        raise DataError(f"{where}: question_id must be a number or a text that is not empty; found {found}")
    for key, required in (("text", True), ("category", False), ("answer", False)):
        value = line.get(key)
        if not isinstance(value, str) and (required or value is not None):
            found = f"{value!r}" if key in line else "nothing"
            raise DataError(f"{where}: {key!r} must be a text; found {found}")
    return Question(
        question_id=question_id,
        text=line["text"],
        image=_image(line, where),
        domain=domain or line.get("category") or NO_DOMAIN,
        category=line.get("category"),
        answer=line.get("answer"),
        where=where,
    )


def _image(line: dict[str, Any], where: str) -> str | None:
    """The path in `image` or `images`, each a path or a list of paths; None where neither names one."""
    paths: list[str] = []
    for key in ("image", "images"):
        value = line.get(key)
        given = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(given, list) or not all(isinstance(path, str) for path in given):
            raise DataError(f"{where}: {key!r} must be a path or a list of one path; found {value!r}")
        paths += [path for path in given if path not in paths]
    if len(paths) > 1:
        raise DataError(f"{where}: {len(paths)} images ({', '.join(paths)}); a question is about one image or none")
    return paths[0] if paths else None


def take_chunk(items: Sequence[T], num_chunks: int, chunk_idx: int) -> Sequence[T]:
    """Contiguous chunk `chunk_idx` of `num_chunks`; sizes differ by one at most, and every item is in one chunk.

    With more chunks than items some chunks are empty. The chunks in order are the items in order.

    Raises:
        ConfigError: fewer than one chunk, or an index outside 0..num_chunks-1.
    """
    if num_chunks < 1:
        raise ConfigError(f"--num-chunks is {num_chunks}; it must be at least 1")
    if not 0 <= chunk_idx < num_chunks:
        raise ConfigError(f"--chunk-idx is {chunk_idx}; with {num_chunks} chunks it must be 0 to {num_chunks - 1}")
    return items[len(items) * chunk_idx // num_chunks : len(items) * (chunk_idx + 1) // num_chunks]


def check_images(questions: Sequence[Question], folder: Path) -> None:
    """Raise DataError that names the first question whose image is no file inside `folder`."""
    from llava_mole.data.images import resolve_image

    with_image = [question for question in questions if question.image is not None]
    if with_image and not folder.is_dir():
        raise DataError(f"--image-folder {folder} is no directory; {with_image[0].where} needs an image from it")
    for question in with_image:
        try:
            resolve_image(question.image or "", folder)
        except DataError as error:
            raise DataError(f"{question.where}: {error}") from None


@contextmanager
def naming(questions: Sequence[Question]) -> Iterator[None]:
    """Errors of the block about the n-th of its prompts become errors of the n-th question, with file and line."""
    try:
        yield
    except PromptError as error:
        raise DataError(f"{questions[error.position].where}: {error.problem}") from None


def windows(
    questions: Sequence[Question], folder: Path, batch_size: int
) -> Iterator[tuple[Sequence[Question], list[Path | None]]]:
    """The questions in pieces of some batches, each with the files of its images.

    Files, because whoever decodes them needs one batch at a time: pages of documents take 15 MB each when decoded.

    Raises:
        DataError: an image is no file inside `folder`.
    """
    from llava_mole.data.images import resolve_image

    for start in range(0, len(questions), WINDOW * batch_size):
        window = questions[start : start + WINDOW * batch_size]
        names = dict.fromkeys(question.image for question in window if question.image is not None)
        files = {name: resolve_image(name, folder) for name in names}
        yield window, [None if question.image is None else files[question.image] for question in window]

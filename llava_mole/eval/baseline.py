"""The baseline every accuracy stands beside: always give the commonest answer to the same question string.

It needs no image, so a model that does not beat it has learned the answers' statistics and nothing from the images.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_mole.common.errors import DataError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.eval.questions import NO_DOMAIN, Question, parse_named_file


class MajorityBaseline:
    """Commonest (normalised) answer per question string; for an unseen string the commonest answer of all."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        """`pairs` are (question, normalised answer); ties go to the alphabetically first answer."""
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question, answer in pairs:
            by_question[question_string(question)][answer] += 1
            overall[answer] += 1
        self._answers = {question: _commonest(counts) for question, counts in by_question.items()}
        self._fallback = _commonest(overall) if overall else None

    def predict(self, question: str) -> str | None:
        """The baseline's answer; None where it was built from nothing."""
        return self._answers.get(question_string(question), self._fallback)

    def knows(self, question: str) -> bool:
        """Whether this question string occurred among the pairs."""
        return question_string(question) in self._answers


def _commonest(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def question_string(text: str) -> str:
    """A question's text as compared: without image placeholder and surrounding blanks."""
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def training_pairs(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of every user turn and its reply in a LLaVA JSON file. Raises DataError as the reader does."""
    from llava_mole.data.store import read_records

    pairs = []
    for record in read_records(path, "train"):
        for asked, replied in zip(record.turns[::2], record.turns[1::2], strict=False):
            pairs.append((asked.text, replied.text))
    return pairs


def read_train_files(arguments: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Training pairs per domain from `DOMAIN=FILE` or `FILE` (then for every domain, under the key "all").

    Raises:
        DataError: a file is missing or malformed.
    """
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for argument in arguments:
        domain, path = parse_named_file(argument)
        if not path.is_file():
            raise DataError(f"--train-file {argument}: no such file {path}")
        pairs[domain or NO_DOMAIN] += training_pairs(path)
    return dict(pairs)


def answered_pairs(questions: Iterable[Question]) -> list[tuple[str, str]]:
    """(question, answer) of the test questions themselves."""
    return [(question.text, question.answer) for question in questions if question.answer is not None]

"""The majority baseline: how often the commonest answer to a question is right, without looking at an image."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.common.text import plain
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.data.store import read_records
from llava_mole.eval.answers import Answers
from llava_mole.eval.benchmarks.benchmark import BenchmarkQuestions
from llava_mole.eval.metrics.exact import plain_exact
from llava_mole.eval.metrics.table import gold
from llava_mole.eval.questions import NO_GROUP, parse_named_file
from llava_mole.eval.scoring.aggregate import share_entry

Pairs = Sequence[tuple[str, str]]
"""(question, answer) each."""


class MajorityBaseline:
    """The commonest normalised answer to each question text; for an unseen text, the commonest answer of all."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        """Count the answers of (question, answer) pairs. Ties go to the alphabetically first answer."""
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question, answer in pairs:
            by_question[_question_text(question)][plain(answer)] += 1
            overall[plain(answer)] += 1
        self._answers = {question: _commonest(counts) for question, counts in by_question.items()}
        self._fallback = _commonest(overall) if overall else ""

    def predict(self, question: str) -> str:
        """Return the baseline's answer; empty if there were no pairs."""
        return self._answers.get(_question_text(question), self._fallback)

    def knows(self, question: str) -> bool:
        """Whether this question text occurred among the pairs."""
        return _question_text(question) in self._answers


def _commonest(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _question_text(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def read_train_files(arguments: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Read every user turn with its reply from `[GROUP=]FILE`s in LLaVA's JSON format.

    Returns:
        Group -> pairs; those of files without a group, which count for every group, are under `NO_GROUP`.

    Raises:
        DataError: a malformed file.
    """
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for argument in arguments:
        group, path = parse_named_file(argument)
        for record in read_records(path, "train"):
            turns = zip(record.turns[::2], record.turns[1::2], strict=False)
            pairs[group or NO_GROUP] += [(asked.text, replied.text) for asked, replied in turns]
    return dict(pairs)


def score_groups(loaded: BenchmarkQuestions, answers: Answers) -> dict[str, Any]:
    """Count right answers by group and category, beside those of the majority baseline.

    The baseline comes from the benchmark's training files. If there are none, or they are not on this machine, it comes
    from the test itself, which no real predictor could know: a question text that occurs once then counts as right.

    Returns:
        `majority_from` (`train` or `test`) and `groups`: name -> `share_entry` with `empty_answers`, `categories` (name
        -> `share_entry`) and `majority` (a `share_entry` with `unseen_questions`).

    Raises:
        DataError: a question without exactly one gold answer, a malformed training file, or a group without pairs.
    """
    files = loaded.train_files or []
    present = bool(files) and all(parse_named_file(argument)[1].is_file() for argument in files)
    train = read_train_files(files) if present else None
    groups: dict[str, Any] = {}
    for group in dict.fromkeys(question.group for question in loaded.questions):
        members = [(q, gold(line)) for q, line in zip(loaded.questions, loaded.lines, strict=True) if q.group == group]
        pairs = [(q.text, wanted) for q, wanted in members] if train is None else _pairs_of(train, group)
        baseline = MajorityBaseline(pairs)
        hits = [plain_exact(answers[q.key]["text"], wanted) for q, wanted in members]
        guessed = sum(plain_exact(baseline.predict(q.text), wanted) for q, wanted in members)
        categories: dict[str, list[bool]] = defaultdict(list)
        for (question, _), hit in zip(members, hits, strict=True):
            if question.category is not None:
                categories[question.category].append(hit)
        groups[group] = share_entry(sum(hits), len(members)) | {
            "empty_answers": sum(not answers[q.key]["text"].strip() for q, _ in members),
            "categories": {name: share_entry(sum(found), len(found)) for name, found in sorted(categories.items())},
            "majority": share_entry(guessed, len(members))
            | {"unseen_questions": sum(not baseline.knows(q.text) for q, _ in members)},
        }
    return {"majority_from": "test" if train is None else "train", "groups": groups}


def _pairs_of(train: Mapping[str, Pairs], group: str) -> Pairs:
    pairs = [*train.get(group, ()), *(train.get(NO_GROUP, ()) if group != NO_GROUP else ())]
    if not pairs:
        given = ", ".join(train) or "none"
        raise DataError(f"--train-file gives nothing for group {group!r} (groups given: {given}); add {group}=FILE")
    return pairs

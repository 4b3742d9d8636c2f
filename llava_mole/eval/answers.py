"""Answer files: JSON lines in LLaVA's format, complete or absent.

While a run goes on, answers collect in `<file>.partial`, whose first line describes the run. A run that was cut off
continues from it; a run with other settings refuses it. The finished file is written beside it and renamed into
place, in the order of the questions, so a file under its final name always holds every answer.
"""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.errors import ConfigError, DataError
from llava_mole.eval.questions import Question, read_json_lines
from llava_mole.log import get_logger

logger = get_logger(__name__)


def answer_record(question: Question, text: str, model_id: str) -> dict[str, Any]:
    """One line of an answers file. `answer_id` is a function of model, question and answer, 22 characters long."""
    digest = hashlib.sha256(json.dumps([model_id, question.key, text]).encode()).digest()
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": text,
        "answer_id": base64.urlsafe_b64encode(digest[:16]).decode().rstrip("="),
        "model_id": model_id,
        "metadata": {},
    }


def write_text_atomically(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class AnswerFile:
    """Collects the answers to `questions` and writes them to `path` once they are complete."""

    def __init__(self, path: Path, questions: Sequence[Question], run: dict[str, Any], *, overwrite: bool = False):
        """Open or continue.

        Args:
            run: What the answers depend on (model, decoding, questions), plain JSON values.
            overwrite: Start over, whatever exists. The existing file stays until the new one is complete.

        Raises:
            ConfigError: `path` exists, or a partial file of a run with other settings does.
            DataError: a partial file that cannot be read.
        """
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._questions = {question.key: question for question in questions}
        self._answers: dict[str, dict[str, Any]] = {}
        if path.exists() and not overwrite:
            raise ConfigError(f"answers file {path} exists; give --overwrite to replace it, or another --answers-file")
        path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite or not self._continue_partial(run):
            self.partial.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")

    @property
    def pending(self) -> list[Question]:
        """Questions without an answer, in order."""
        return [question for key, question in self._questions.items() if key not in self._answers]

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append answers to the partial file, on disk when this returns."""
        with self.partial.open("a", encoding="utf-8") as file:
            for record in records:
                self._answers[str(record["question_id"])] = record
                file.write(json.dumps(record) + "\n")

    def finish(self) -> None:
        """Write the complete file under its final name and remove the partial one.

        Raises:
            DataError: a question has no answer.
        """
        missing = self.pending
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} of {len(self._questions)} questions have no answer, the first is "
                f"{missing[0].where}; the answers so far are in {self.partial}"
            )
        lines = [json.dumps(self._answers[key]) + "\n" for key in self._questions]
        write_text_atomically(self.path, "".join(lines))
        self.partial.unlink()

    def _continue_partial(self, run: dict[str, Any]) -> bool:
        """Take over the answers of an earlier, cut-off run. False where there is none."""
        if not self.partial.exists():
            return False
        self._drop_torn_line()
        lines = read_json_lines(self.partial)
        if not lines:
            return False
        header = lines[0][1].get("run")
        if not isinstance(header, dict):
            raise DataError(f"{self.partial}: its first line does not describe a run; give --overwrite to start over")
        run = json.loads(json.dumps(run))
        for key in dict.fromkeys([*run, *header]):
            if run.get(key) != header.get(key):
                raise ConfigError(
                    f"{self.partial} comes from a run with {key} {header.get(key)!r}, this one has {run.get(key)!r}; "
                    "give --overwrite to start over, or another --answers-file"
                )
        for where, record in lines[1:]:
            key = str(record.get("question_id"))
            if key not in self._questions:
                raise DataError(f"{where}: no question has the id {key!r}; give --overwrite to start over")
            self._answers[key] = record
        logger.info("%s: continuing after %d answers", self.partial, len(self._answers))
        return True

    def _drop_torn_line(self) -> None:
        """A process that died while writing leaves a last line without its end; that answer is computed again."""
        content = self.partial.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.partial.open("r+b") as file:
                file.truncate(whole)


def read_answers(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Answers by question id (as text), of one file or of the files of all chunks.

    Raises:
        DataError: unreadable line, missing `question_id` or `text`, or two answers to one question.
    """
    answers: dict[str, dict[str, Any]] = {}
    for path in paths:
        for where, record in read_json_lines(path):
            if "question_id" not in record or not isinstance(record.get("text"), str):
                raise DataError(f"{where}: an answer needs 'question_id' and 'text'")
            if answers.setdefault(str(record["question_id"]), record) is not record:
                raise DataError(f"{where}: a second answer to question {record['question_id']!r}")
    return answers

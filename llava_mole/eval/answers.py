"""Answer files: JSON lines in LLaVA's format, complete or absent.

While a run is in progress, answers collect in `<file>.partial`, whose first line describes the run; ranks above 0 write
`<file>.partial.<rank>`. An interrupted run continues from all of them, on any number of ranks; a run with other
settings refuses them. The finished file is written beside them and renamed into place, in the order of the questions,
so a file under its final name always holds every answer. One process (with its ranks) writes a file at a time and
holds `<file>.lock`.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from llava_mole.common.distributed import all_gather_objects, get_rank, on_main
from llava_mole.common.errors import ConfigError, DataError
from llava_mole.common.files import refuse_existing, refuse_special, write_errors, write_text
from llava_mole.common.locks import locked
from llava_mole.common.log import get_logger
from llava_mole.eval.questions import Question, read_json_lines

logger = get_logger(__name__)

Answers = Mapping[str, Mapping[str, Any]]
"""Lines of an answers file by question id as text, as `read_answers` returns them."""


def answer_record(question: Question, text: str, model_id: str) -> dict[str, Any]:
    """Return one line of an answers file. `answer_id` (22 characters) depends on model, question and answer only."""
    digest = hashlib.sha256(json.dumps([model_id, question.key, text]).encode()).digest()
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": text,
        "answer_id": base64.urlsafe_b64encode(digest[:16]).decode().rstrip("="),
        "model_id": model_id,
        "metadata": {},
    }


def lock_answers(path: Path, break_lock: bool = False) -> AbstractContextManager[None]:
    """The lock of an answers file, for a `with`. Raises ConfigError in its `with` if another process holds it."""
    lock = path.with_name(f"{path.name}.lock")
    return locked(lock, f"the answers file {path}", "--break-lock", break_lock)


class AnswerFile:
    """Collects the answers to `questions` and writes them to `path` once they are complete.

    Every method except `add` is a collective of the ranks that evaluate together.
    """

    def __init__(
        self,
        path: Path,
        questions: Sequence[Question],
        run: dict[str, Any],
        *,
        overwrite: bool = False,
        break_lock: bool = False,
    ):
        """Open or continue.

        Args:
            run: What the answers depend on (model, decoding, questions), plain JSON values.
            overwrite: Start over. An existing file stays until the new one is complete.
            break_lock: Take over a lock whose owner cannot be checked from here.

        Raises:
            ConfigError: `path` exists or is a link, device or pipe, or a partial file of a run with other settings
                exists; another process is writing it now; or it cannot be written.
            DataError: a partial file cannot be read.
        """
        self.path = path
        rank = get_rank()
        self.partial = path.with_name(f"{path.name}.partial" + (f".{rank}" if rank else ""))
        self._questions = {question.key: question for question in questions}
        self._lock = ExitStack()
        try:
            # One rank reads the files, so that all ranks continue from the same answers.
            self._answered: set[str] = on_main(lambda: self._open(run, overwrite, break_lock))
        except BaseException:
            self.close()
            raise
        if not self.partial.exists() or self.partial.stat().st_size == 0:
            self.add([{"run": run}])

    @property
    def pending(self) -> list[Question]:
        """The questions that no rank had answered when this was opened, in order."""
        return [question for key, question in self._questions.items() if key not in self._answered]

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append answers to this rank's partial file; they are on disk when this returns.

        Raises:
            ConfigError: the file cannot be written; what it already holds is kept.
        """
        with write_errors(self.partial), self.partial.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the complete file under its final name, remove the partial ones and release the lock.

        Raises:
            DataError: a question has no answer, or two different ones.
        """
        all_gather_objects(None)  # wait until every rank has written its answers
        on_main(self._publish)
        self.close()

    def close(self) -> None:
        """Let other processes continue from the partial files. The end of the process does the same."""
        self._lock.close()

    def _open(self, run: dict[str, Any], overwrite: bool, break_lock: bool) -> set[str]:
        refuse_existing(self.path, overwrite=overwrite)
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(lock_answers(self.path, break_lock))
        refuse_existing(self.path, overwrite=overwrite)  # the process that held the lock may just have finished
        with write_errors(self.partial):
            for partial in [self.partial, *self._partials()]:
                refuse_special(partial)
        if overwrite:
            for partial in self._partials():
                os.truncate(partial, 0)
            return set()
        answered: set[str] = set()
        for partial in self._partials():
            answered.update(self._continue(partial, run))
        if answered:
            logger.info("%s: continuing after %d answers", self.partial, len(answered))
        return answered

    def _partials(self) -> list[Path]:
        """Return the partial files of all ranks, in order."""
        name = re.compile(re.escape(f"{self.path.name}.partial") + r"(\.\d+)?")
        found = [path for path in self.path.parent.iterdir() if name.fullmatch(path.name)]
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def _publish(self) -> None:
        answers: dict[str, dict[str, Any]] = {}
        for partial in self._partials():
            for where, record in read_json_lines(partial)[1:]:
                if answers.setdefault(str(record.get("question_id")), record) != record:
                    raise DataError(f"{where}: another answer to question {record.get('question_id')!r} than before")
        missing = [question for key, question in self._questions.items() if key not in answers]
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} of {len(self._questions)} questions have no answer, the first is "
                f"{missing[0].where}; the answers so far are in {self.partial}"
            )
        write_text(self.path, "".join(json.dumps(answers[key]) + "\n" for key in self._questions))
        for partial in self._partials():
            partial.unlink()

    def _continue(self, partial: Path, run: dict[str, Any]) -> list[str]:
        """Return the ids that `partial`, left by an interrupted run, has answers to."""
        _drop_torn_line(partial)
        lines = read_json_lines(partial)
        if not lines:
            return []
        header = lines[0][1].get("run")
        if not isinstance(header, dict):
            raise DataError(f"{partial}: its first line does not describe a run; give --overwrite to start over")
        run = json.loads(json.dumps(run))
        for key in dict.fromkeys([*run, *header]):
            if run.get(key) != header.get(key):
                raise ConfigError(
                    f"{partial} comes from a run with {key} {header.get(key)!r}, this one has {run.get(key)!r}; "
                    "give --overwrite to start over, or another --answers-file"
                )
        answered = []
        for where, record in lines[1:]:
            answered.append(str(record.get("question_id")))
            if answered[-1] not in self._questions:
                raise DataError(
                    f"{where}: no question has the id {record.get('question_id')!r}; give --overwrite to start over"
                )
        return answered


def _drop_torn_line(partial: Path) -> None:
    """Remove an incomplete last line, left by a process that died while writing; its answer is computed again."""
    content = partial.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with partial.open("r+b") as file:
            file.truncate(whole)


def read_answers(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the answers by question id (as text), of one file or of the files of all chunks.

    Raises:
        DataError: unreadable line, missing `question_id` or `text`, two answers to one question, or answers of two
            models. Answers without a `model_id` are taken as they are.
    """
    answers: dict[str, dict[str, Any]] = {}
    first: tuple[str, Any] = ("", None)  # place and model of the first answer that names one
    for path in paths:
        for where, record in read_json_lines(path):
            if "question_id" not in record or not isinstance(record.get("text"), str):
                raise DataError(f"{where}: an answer needs 'question_id' and 'text'")
            if answers.setdefault(str(record["question_id"]), record) is not record:
                raise DataError(f"{where}: a second answer to question {record['question_id']!r}")
            model = record.get("model_id")
            if first[1] is None and model is not None:
                first = (where, model)
            if model not in (None, first[1]):
                raise DataError(
                    f"{where}: an answer of model {model!r}, but {first[0]} is one of {first[1]!r}; score each "
                    "model's answers on their own"
                )
    return answers

"""Answer files: JSON lines in LLaVA's format, complete or absent.

While a run goes on, answers collect in `<file>.partial`, whose first line describes the run; ranks above 0 write
`<file>.partial.<rank>`. A run that was cut off continues from all of them, on any number of ranks; a run with other
settings refuses them. The finished file is written beside them and renamed into place, in the order of the questions,
so a file under its final name always holds every answer.
"""

import base64
import glob
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.distributed import all_gather_objects, get_rank, on_main
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
    """Collects the answers to `questions` and writes them to `path` once they are complete. Its methods are collectives
    of the ranks that evaluate together, but for `add`."""

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
        rank = get_rank()
        self.partial = path.with_name(f"{path.name}.partial" + (f".{rank}" if rank else ""))
        self._questions = {question.key: question for question in questions}
        # One rank looks at the files, so that all go on from the same answers.
        self._answered: set[str] = on_main(lambda: self._open(run, overwrite))
        if not self.partial.exists():
            self.partial.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")

    @property
    def pending(self) -> list[Question]:
        """Questions that no rank had answered when this was opened, in order."""
        return [question for key, question in self._questions.items() if key not in self._answered]

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append answers to this rank's partial file, on disk when this returns."""
        with self.partial.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the complete file under its final name and remove the partial ones.

        Raises:
            DataError: a question has no answer, or two different ones.
        """
        all_gather_objects(None)  # until every rank has written its answers
        on_main(self._publish)

    def _open(self, run: dict[str, Any], overwrite: bool) -> set[str]:
        if self.path.exists() and not overwrite:
            raise ConfigError(
                f"answers file {self.path} exists; give --overwrite to replace it, or another --answers-file"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for partial in self._partials():
                partial.unlink()
            return set()
        answered: set[str] = set()
        for partial in self._partials():
            answered.update(self._continue(partial, run))
        if answered:
            logger.info("%s: continuing after %d answers", self.partial, len(answered))
        return answered

    def _partials(self) -> list[Path]:
        """The partial files of all ranks, in order."""
        name = f"{self.path.name}.partial"
        found = [path for path in self.path.parent.glob(f"{glob.escape(name)}*") if _is_partial(path.name, name)]
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
        lines = [json.dumps(answers[key]) + "\n" for key in self._questions]
        write_text_atomically(self.path, "".join(lines))
        for partial in self._partials():
            partial.unlink()

    def _continue(self, partial: Path, run: dict[str, Any]) -> list[str]:
        """Ids that `partial`, left by an earlier, cut-off run, has answers to."""
        _drop_torn_line(partial)
        lines = read_json_lines(partial)
        if not lines:
            partial.unlink()
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
        for where, record in lines[1:]:
            if str(record.get("question_id")) not in self._questions:
                raise DataError(
                    f"{where}: no question has the id {record.get('question_id')!r}; give --overwrite to start over"
                )
        return [str(record["question_id"]) for _, record in lines[1:]]


def _is_partial(name: str, partial: str) -> bool:
    return name == partial or (name.startswith(f"{partial}.") and name[len(partial) + 1 :].isdecimal())


def _drop_torn_line(partial: Path) -> None:
    """A process that died while writing leaves a last line without its end; that answer is computed again."""
    content = partial.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with partial.open("r+b") as file:
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

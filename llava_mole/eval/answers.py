"""Answer files: JSON lines in LLaVA's format, complete or absent.

While a run goes on, answers collect in `<file>.partial`, whose first line describes the run; ranks above 0 write
`<file>.partial.<rank>`. A run that was cut off continues from all of them, on any number of ranks; a run with other
settings refuses them. The finished file is written beside them and renamed into place, in the order of the questions,
so a file under its final name always holds every answer. One process (with its ranks) writes a file at a time.
"""

import base64
import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from llava_mole.common.distributed import all_gather_objects, get_rank, on_main
from llava_mole.common.errors import ConfigError, DataError
from llava_mole.common.log import get_logger
from llava_mole.eval.questions import Question, read_json_lines

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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ConfigError where the block cannot write `path`: a full disk, a folder without permission."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}; make room, or name another place"
        ) from error


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the whole new one.

    Raises:
        ConfigError: it cannot be written; nothing of it is left then.
    """
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_bytes_atomically` of the text as UTF-8."""
    write_bytes_atomically(path, text.encode())


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise ConfigError unless a file may be written at `path`. Asked before the work, not after it."""
    with writing(path):
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; name a file")
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; give --overwrite to replace it, or another name")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{path} cannot be written: {folder} is not a directory that may be written to")


class AnswerFile:
    """Collects the answers to `questions` and writes them to `path` once they are complete. Its methods are collectives
    of the ranks that evaluate together, but for `add`."""

    def __init__(self, path: Path, questions: Sequence[Question], run: dict[str, Any], *, overwrite: bool = False):
        """Open or continue.

        Args:
            run: What the answers depend on (model, decoding, questions), plain JSON values.
            overwrite: Start over, whatever exists. The existing file stays until the new one is complete.

        Raises:
            ConfigError: `path` exists, or a partial file of a run with other settings does; another process is
                writing it at this moment; a file that cannot be written.
            DataError: a partial file that cannot be read.
        """
        self.path = path
        rank = get_rank()
        self.partial = path.with_name(f"{path.name}.partial" + (f".{rank}" if rank else ""))
        self._questions = {question.key: question for question in questions}
        self._lock: TextIO | None = None
        try:
            # One rank looks at the files, so that all go on from the same answers.
            self._answered: set[str] = on_main(lambda: self._open(run, overwrite))
        except BaseException:
            self.close()
            raise
        if not self.partial.exists() or self.partial.stat().st_size == 0:
            self.add([{"run": run}])

    @property
    def pending(self) -> list[Question]:
        """Questions that no rank had answered when this was opened, in order."""
        return [question for key, question in self._questions.items() if key not in self._answered]

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append answers to this rank's partial file, on disk when this returns.

        Raises:
            ConfigError: the file cannot be written; what it holds already is not lost.
        """
        with writing(self.partial), self.partial.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the complete file under its final name and remove the partial ones.

        Raises:
            DataError: a question has no answer, or two different ones.
        """
        all_gather_objects(None)  # until every rank has written its answers
        on_main(self._publish)

    def close(self) -> None:
        """Let other processes continue what this one leaves; the end of the process does so, too."""
        if self._lock is not None:
            self._lock.close()

    def _open(self, run: dict[str, Any], overwrite: bool) -> set[str]:
        refuse_existing(self.path, overwrite=overwrite)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        if self.path.exists() and not overwrite:  # the process that had the lock has just finished
            self.partial.unlink()
            refuse_existing(self.path, overwrite=overwrite)
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

    def _locked(self) -> TextIO:
        """The partial file of rank 0, which one process at a time has open like this."""
        while True:
            file = self.partial.open("a", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise ConfigError(
                    f"{self.path}: another process is writing it at this moment; wait for it, or give another "
                    "--answers-file"
                ) from None
            except OSError as error:
                logger.warning("%s: no locks here (%s); write it from one process only", self.path, error.strerror)
            try:
                if os.path.samestat(os.fstat(file.fileno()), self.partial.stat()):
                    return file
            except FileNotFoundError:
                pass
            file.close()  # the process that had it has removed it meanwhile

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

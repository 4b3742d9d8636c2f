"""Answer files have LLaVA's fields, appear complete or not at all, and continue after an interruption."""

import contextlib
import errno
import json
import os
import socket
from pathlib import Path

import pytest

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval import answers
from llava_mole.eval.answers import AnswerFile, answer_record, read_answers
from llava_mole.eval.questions import Question

RUN = {"model": "m", "decoding": {"temperature": 0.0}}


def make_questions(n: int) -> list[Question]:
    return [Question(i, f"question {i}", (), "all", None, f"q.jsonl:{i + 1}") for i in range(n)]


def records(questions: list[Question]) -> list[dict]:
    return [answer_record(q, f"answer {q.question_id} \u2028", "m") for q in questions]


def write_all(path: Path, questions: list[Question]) -> bytes:
    output = AnswerFile(path, questions, RUN)
    output.add(records(questions))
    output.finish()
    return path.read_bytes()


def test_record_has_llavas_fields() -> None:
    (question,) = make_questions(1)
    record = answer_record(question, "red", "run_checkpoint-5")
    assert list(record) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (record["question_id"], record["prompt"], record["text"]) == (0, "question 0", "red")
    assert (record["model_id"], record["metadata"]) == ("run_checkpoint-5", {})
    assert len(record["answer_id"]) == 22
    assert record == answer_record(question, "red", "run_checkpoint-5")
    assert record["answer_id"] != answer_record(question, "blue", "run_checkpoint-5")["answer_id"]


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    questions = make_questions(3)
    path = tmp_path / "new" / "a.jsonl"
    output = AnswerFile(path, questions, RUN)
    output.add(records(questions[:2]))
    with pytest.raises(DataError, match=r"1 of 3 questions have no answer, the first is q\.jsonl:3"):
        output.finish()
    assert not path.exists()
    output.add(records(questions[2:]))
    output.finish()
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]
    assert [json.loads(line)["question_id"] for line in path.read_text().split("\n")[:-1]] == [0, 1, 2]


@pytest.mark.parametrize("torn_bytes", [0, 1, 30])
def test_interrupted_run_continues_to_the_same_file(tmp_path: Path, torn_bytes: int) -> None:
    questions = make_questions(5)
    whole = write_all(tmp_path / "whole.jsonl", questions)
    path = tmp_path / "a.jsonl"
    first = AnswerFile(path, questions, RUN)
    first.add(records([questions[3], questions[0]]))
    content = first.partial.read_bytes()
    first.partial.write_bytes(content[: len(content) - torn_bytes])
    first.close()

    second = AnswerFile(path, questions, RUN)
    expected = [1, 2, 4] if torn_bytes == 0 else [0, 1, 2, 4]
    assert [q.question_id for q in second.pending] == expected
    second.add(records(second.pending))
    second.finish()
    assert path.read_bytes() == whole


def test_partial_file_torn_in_its_first_line_starts_over(tmp_path: Path) -> None:
    questions = make_questions(2)
    (tmp_path / "a.jsonl.partial").write_text('{"run": {"mod')
    assert len(AnswerFile(tmp_path / "a.jsonl", questions, RUN).pending) == 2
    assert json.loads((tmp_path / "a.jsonl.partial").read_text()) == {"run": RUN}


def test_partial_file_of_another_run_is_refused(tmp_path: Path) -> None:
    questions = make_questions(2)
    AnswerFile(tmp_path / "a.jsonl", questions, RUN).add(records(questions[:1]))
    with pytest.raises(ConfigError, match=r"comes from a run with model 'm', this one has 'other'; give --overwrite"):
        AnswerFile(tmp_path / "a.jsonl", questions, RUN | {"model": "other"})
    assert len(AnswerFile(tmp_path / "a.jsonl", questions, RUN | {"model": "other"}, overwrite=True).pending) == 2


def test_foreign_partial_files_are_refused(tmp_path: Path) -> None:
    questions = make_questions(2)
    partial = tmp_path / "a.jsonl.partial"
    partial.write_text('{"question_id": 0, "text": "x"}\n')
    with pytest.raises(DataError, match="its first line does not describe a run"):
        AnswerFile(tmp_path / "a.jsonl", questions, RUN)
    partial.write_text(json.dumps({"run": RUN}) + '\n{"question_id": 9, "text": "x"}\n')
    with pytest.raises(DataError, match=r"partial:2: no question has the id 9;"):
        AnswerFile(tmp_path / "a.jsonl", questions, RUN)


def test_existing_file_needs_overwrite_and_stays_until_replaced(tmp_path: Path) -> None:
    questions = make_questions(2)
    path = tmp_path / "a.jsonl"
    before = write_all(path, questions)
    with pytest.raises(ConfigError, match=r"a\.jsonl exists; give --overwrite"):
        AnswerFile(path, questions, RUN)
    output = AnswerFile(path, questions, RUN, overwrite=True)
    assert path.read_bytes() == before
    output.add([answer_record(q, "new", "m") for q in questions])
    output.finish()
    assert [record["text"] for record in read_answers([path]).values()] == ["new", "new"]


def test_one_process_at_a_time_writes_a_file(tmp_path: Path) -> None:
    questions = make_questions(2)
    path = tmp_path / "a.jsonl"
    first = AnswerFile(path, questions, RUN)
    for overwrite in (False, True):
        with pytest.raises(
            ConfigError, match=rf"answers file .*a\.jsonl is in use by process {os.getpid()} on .*; wait for"
        ):
            AnswerFile(path, questions, RUN, overwrite=overwrite, break_lock=True)
    first.add(records(questions))
    first.finish()
    with pytest.raises(ConfigError, match=r"a\.jsonl exists; give --overwrite"):
        AnswerFile(path, questions, RUN)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_process_that_finishes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = make_questions(2)
    path = tmp_path / "a.jsonl"
    other = AnswerFile(path, questions, RUN)
    other.add(records(questions))
    lock_answers = answers.lock_answers

    def slow(*arguments):
        other.finish()  # after this process has looked for the file, before it has the lock
        return lock_answers(*arguments)

    monkeypatch.setattr(answers, "lock_answers", slow)
    with pytest.raises(ConfigError, match=r"a\.jsonl exists; give --overwrite"):
        AnswerFile(path, questions, RUN)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert len(read_answers([path])) == 2


def test_a_lock_of_another_machine_is_broken_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.lock").write_text('{"host": "elsewhere", "pid": 7, "token": "theirs"}')
    with pytest.raises(ConfigError, match="process 7 on elsewhere .* if it has ended, give --break-lock"):
        AnswerFile(tmp_path / "a.jsonl", make_questions(1), RUN)
    AnswerFile(tmp_path / "a.jsonl", make_questions(1), RUN, break_lock=True).close()
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl.partial"]


def special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):  # a socket's name must be short
            server.bind(path.name)
    else:
        path.symlink_to({"device": "/dev/null", "dangling": "missing", "link": "target"}[kind])
    (path.parent / "target").write_text("somebody's")


@pytest.mark.parametrize("kind", ["pipe", "socket", "link", "dangling", "device"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.partial", "a.jsonl.partial.1"])
def test_links_pipes_and_devices_are_not_replaced(tmp_path: Path, kind: str, name: str) -> None:
    special(tmp_path / name, kind)
    before = {path.name: path.lstat() for path in tmp_path.iterdir()}
    for overwrite in (False, True):
        with pytest.raises(
            ConfigError, match=rf"{name} (exists|is a (pipe|socket|link to .*) and is not replaced; name a file)"
        ):
            AnswerFile(tmp_path / "a.jsonl", make_questions(1), RUN, overwrite=overwrite)
    assert {path.name: path.lstat() for path in tmp_path.iterdir()} == before
    assert (tmp_path / "target").read_text() == "somebody's"


def test_a_device_is_not_replaced() -> None:
    with pytest.raises(ConfigError, match="/dev/null is a device and is not replaced; name a file"):
        AnswerFile(Path("/dev/null"), make_questions(1), RUN, overwrite=True)


def test_a_full_disk_is_a_users_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    questions = make_questions(3)
    path = tmp_path / "a.jsonl"
    output = AnswerFile(path, questions, RUN)
    output.add(records(questions[:2]))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"a\.jsonl\.partial cannot be written: No space left on device"):
            output.add(records(questions[2:]))
    output.close()
    output = AnswerFile(path, questions, RUN)
    output.add(records(output.pending))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"a\.jsonl cannot be written: No space left on device; make room"):
            output.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl.lock", "a.jsonl.partial"]
    output.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert len(read_answers([path])) == 3


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, "is a directory; name a file"),
        (tmp_path / "file" / "a.jsonl", "file is not a directory that may be written to"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(ConfigError, match=message):
            AnswerFile(path, make_questions(1), RUN, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_question_gives_an_empty_file(tmp_path: Path) -> None:
    assert write_all(tmp_path / "a.jsonl", []) == b""


def test_answers_of_chunks_are_read_together_and_checked(tmp_path: Path) -> None:
    questions = make_questions(4)
    write_all(tmp_path / "0.jsonl", questions[:2])
    write_all(tmp_path / "1.jsonl", questions[2:])
    paths = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    assert list(read_answers(paths)) == ["0", "1", "2", "3"]
    with pytest.raises(DataError, match=r"0\.jsonl:1: a second answer to question 0"):
        read_answers([*paths, paths[0]])
    paths[0].write_text('{"question_id": 1}\n')
    with pytest.raises(DataError, match=r"0\.jsonl:1: an answer needs 'question_id' and 'text'"):
        read_answers(paths)


@pytest.mark.parametrize("models", [["m", "n"], ["m", "m", "n", "m"], [None, "m", "n"], ["m", None, 3]])
def test_answers_of_two_models_are_refused(tmp_path: Path, models: list) -> None:
    paths = []
    for n, model in enumerate(models):
        paths.append(tmp_path / f"{n}.jsonl")
        record = {"question_id": n, "text": "x"} | ({} if model is None else {"model_id": model})
        paths[-1].write_text(json.dumps(record) + "\n")
    with pytest.raises(
        DataError, match=r"\d\.jsonl:1: an answer of model ('n'|3), but .*\d\.jsonl:1 is one of 'm'; score"
    ):
        read_answers(paths)
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(path.read_text() for path in paths))
    with pytest.raises(DataError, match=r"whole\.jsonl:\d: an answer of model"):
        read_answers([whole])
    assert len(read_answers(paths[:1])) == 1


def test_added_answers_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = make_questions(2)
    output = AnswerFile(tmp_path / "a.jsonl", questions, RUN)
    sizes = []
    monkeypatch.setattr("os.fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    output.add(records(questions))
    assert sizes == [(tmp_path / "a.jsonl.partial").stat().st_size]

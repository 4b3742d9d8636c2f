"""The files for the benchmarks' servers, in LLaVA's formats."""

import dataclasses
import io
import json
import re
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from worlds.benchmark_answers import command, write_answers, write_chart

from llava_mole import cli
from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.benchmarks.benchmark import load_questions
from llava_mole.eval.benchmarks.registry import get_benchmark
from llava_mole.eval.benchmarks.submission import check_submission, write_xlsx


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    return write_chart(tmp_path)


def submission(
    folder: Path, name: str, lines: list[dict], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> bytes:
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = [{"question_id": line["question_id"], "text": t} for line, t in zip(lines, texts, strict=True)]
    (folder / "a.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    arguments = command(folder, "--submission", str(folder / "s"), "--data-root", str(folder), benchmark=name)
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert cli.main(arguments) == 2
    assert "exists; give --overwrite" in capsys.readouterr().err
    return (folder / "s").read_bytes()


def test_vqa_v2_submission_covers_the_whole_test_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 2, "text": "Q?"}\n')
    (tmp_path / "a.jsonl").write_text('{"question_id": 2, "text": "x"}\n')
    root = ["--data-root", str(tmp_path)]
    assert cli.main(command(tmp_path, "--submission", str(tmp_path / "s"), *root, benchmark="vqav2")) == 2
    assert "llava_vqav2_mscoco_test2015.jsonl: no such file; the server wants" in capsys.readouterr().err
    (tmp_path / "eval" / "vqav2").mkdir(parents=True)
    everything = tmp_path / "eval" / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl"
    for text, message in (
        ('{"id": 1}', ":1: no 'question_id' in it"),
        ('{"question_id": 1}', "1 of the 1 questions asked"),
    ):
        everything.write_text(text)
        assert cli.main(command(tmp_path, "--submission", str(tmp_path / "s"), *root, benchmark="vqav2")) == 2
        assert message in capsys.readouterr().err
    everything.write_text("".join(f'{{"question_id": {n}}}\n' for n in (1, 2)))
    lines = [{"question_id": 2, "text": "Q?", "image": "2.jpg"}]
    content = json.loads(submission(tmp_path, "vqav2", lines, ["The two dogs."], capsys))
    assert content == [{"question_id": 1, "answer": ""}, {"question_id": 2, "answer": "2 dogs"}]
    assert not (tmp_path / "a.score.json").exists()


@pytest.mark.parametrize(
    ("name", "extra", "expected"),
    [
        ("vizwiz", {"image": "v.jpg"}, [{"image": "v.jpg", "answer": "red car"}]),
        ("gqa", {"answer": "red car"}, [{"questionId": 3, "prediction": "a red car"}]),
        ("mmvet", {}, {"v1_3": "A red car."}),
        ("seed", {"answer": "A", "category": "image"}, {"question_id": 3, "prediction": "A red car."}),
    ],
)
def test_json_submissions(
    name: str, extra: dict, expected: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"question_id": 3, "text": "Q?", **extra}]
    assert json.loads(submission(tmp_path, name, lines, ["A red car."], capsys)) == expected


def test_mmbench_submission_is_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"index": "241", "question": "Which <one>?", "hint": "h", "A": "x", "B": "y", "C": "", "D": "", "answer": "A"}
    row |= {"category": "c", "source": "s", "l2-category": "l", "comment": "", "split": "dev"}
    content = submission(
        tmp_path, "mmbench", [{"question_id": "241", "text": "Q?", "answer": "A", "row": row}], ["A"], capsys
    )
    (tmp_path / "s.xlsx").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "s.xlsx") as archive:
        parts = {name: ElementTree.fromstring(archive.read(name)) for name in archive.namelist()}
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    table = [
        ["".join(cell.itertext()) for cell in line.iter(f"{space}c")]
        for line in parts["xl/worksheets/sheet1.xml"].iter(f"{space}row")
    ]
    assert table[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert table[1] == ["241", "Which <one>?", "x", "y", "", "", "A", "A", "dev"]
    assert "[Content_Types].xml" in parts


def test_sheet_has_legal_texts_and_numbers_in_the_index_only() -> None:
    content = write_xlsx([["index", "A"], ["241", "007"], ["x", "a\x00\x1b\ud800\uffff\U0001f600b"]])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sheet = archive.read("xl/worksheets/sheet1.xml").decode()
    assert [cell.text for cell in ElementTree.fromstring(sheet.encode()).iter() if cell.tag.endswith("}v")] == ["241"]
    assert ">007<" in sheet
    assert ">a\U0001f600b<" in sheet


@pytest.mark.parametrize(("name", "message"), [("mmbench", "no 'row' (dict)"), ("vizwiz", "no 'image' (str)")])
def test_submission_needs_its_fields(name: str, message: str, chart: Path) -> None:
    (chart / "q.jsonl").write_text('{"question_id": 1, "text": "Q1?"}\n')
    write_answers(chart, "1")
    with pytest.raises(DataError, match=re.escape(f"q.jsonl:1: {message}")):
        check_submission(load_questions(get_benchmark(name), files=[str(chart / "q.jsonl")]))


def test_vqa_v2_needs_its_option(chart: Path) -> None:
    questions = load_questions(get_benchmark("vqav2"), files=[str(chart / "q.jsonl")])
    data = dataclasses.replace(questions.benchmark.data, options={})
    benchmark = dataclasses.replace(questions.benchmark, data=data)
    with pytest.raises(ConfigError, match="submission vqa_v2 needs data.options.all_questions"):
        check_submission(dataclasses.replace(questions, benchmark=benchmark))


def test_benchmarks_with_and_without_a_server(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(chart, benchmark="vqav2")) == 2
    assert "benchmark vqav2 is scored by a server; give --submission FILE" in capsys.readouterr().err
    assert cli.main(command(chart, "--submission", str(chart / "s"))) == 2
    assert "benchmark chartqa has no server" in capsys.readouterr().err

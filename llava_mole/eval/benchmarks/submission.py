"""Files for the benchmarks' servers, in the layouts of LLaVA's `convert_*_for_submission` scripts."""

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.answers import Answers
from llava_mole.eval.benchmarks.benchmark import BenchmarkQuestions
from llava_mole.eval.metrics.normalise import m4c_normalise
from llava_mole.eval.questions import read_json_lines

MMBENCH_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
MMBENCH_COLUMN = 6
"""Where LLaVA inserts the column `prediction`."""

NEEDED: Mapping[str, tuple[str, type]] = {"mmbench": ("row", dict), "viz_wiz": ("image", str)}
"""Format -> the field of a question line that it needs, and the field's type."""


def check_submission(loaded: BenchmarkQuestions) -> None:
    """Check, before the work, that everything the submission needs is there.

    Raises:
        ConfigError: the benchmark's file lacks an option that its format needs.
        DataError: a file or a question's field is missing.
    """
    kind = loaded.benchmark.submission
    if kind == "vqa_v2":
        _all_ids(loaded)
    field, wanted = NEEDED.get(kind or "", ("", object))
    for question, line in zip(loaded.questions, loaded.lines, strict=True):
        if field and not isinstance(line.get(field), wanted):
            raise DataError(f"{question.where}: no {field!r} ({wanted.__name__}), which the submission file contains")


def _all_ids(loaded: BenchmarkQuestions) -> list[Any]:
    """Return the ids of the complete test set, to which every question must belong. Raises as `check_submission`."""
    name = loaded.benchmark.data.options.get("all_questions")
    if not name:
        raise ConfigError(
            f"benchmark {loaded.benchmark.name}: submission vqa_v2 needs data.options.all_questions, the question file "
            "of the complete test set"
        )
    path = loaded.root / name
    if not path.is_file():
        raise DataError(f"{path}: no such file; the server wants an answer to each of its questions")
    ids = []
    for where, line in read_json_lines(path):
        if "question_id" not in line:
            raise DataError(f"{where}: no 'question_id' in it")
        ids.append(line["question_id"])
    foreign = {question.key for question in loaded.questions} - set(map(str, ids))
    if foreign:
        raise DataError(f"{path}: {len(foreign)} of the {len(loaded.questions)} questions asked are not in it")
    return ids


def _texts(loaded: BenchmarkQuestions, answers: Answers) -> list[tuple[Any, Mapping[str, Any], str]]:
    """Return (question id as in the file, question line, answer) in the questions' order."""
    return [
        (question.question_id, line, answers[question.key]["text"])
        for question, line in zip(loaded.questions, loaded.lines, strict=True)
    ]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def vqa_v2(loaded: BenchmarkQuestions, answers: Answers) -> bytes:
    """Write `[{"question_id", "answer"}]` over the complete test set (option `all_questions`), normalised.

    Questions that were not asked have the answer `""`. Raises DataError as `check_submission` does.
    """
    given = {str(name): text for name, _, text in _texts(loaded, answers)}
    return _json(
        [{"question_id": name, "answer": m4c_normalise(given.get(str(name), ""))} for name in _all_ids(loaded)]
    )


def viz_wiz(loaded: BenchmarkQuestions, answers: Answers) -> bytes:
    """Write `[{"image", "answer"}]`, normalised. Raises DataError as `check_submission` does."""
    check_submission(loaded)
    return _json([{"image": line["image"], "answer": m4c_normalise(text)} for _, line, text in _texts(loaded, answers)])


def gqa(loaded: BenchmarkQuestions, answers: Answers) -> bytes:
    """Write `[{"questionId", "prediction"}]` for GQA's `eval.py`: trailing periods removed, lower case."""
    return _json(
        [{"questionId": name, "prediction": text.rstrip(".").lower()} for name, _, text in _texts(loaded, answers)]
    )


def seed(loaded: BenchmarkQuestions, answers: Answers) -> bytes:
    """Write JSON lines `{"question_id", "prediction"}`."""
    return b"".join(_json({"question_id": n, "prediction": text}) + b"\n" for n, _, text in _texts(loaded, answers))


def mm_vet(loaded: BenchmarkQuestions, answers: Answers) -> bytes:
    """Write `{"v1_<question id>": answer}`."""
    return _json({f"v1_{name}": text for name, _, text in _texts(loaded, answers)})


def mmbench(loaded: BenchmarkQuestions, answers: Answers) -> bytes:
    """Write an .xlsx sheet of the TSV's rows without `MMBENCH_DROPPED`, the answer as seventh column `prediction`."""
    check_submission(loaded)
    rows = _texts(loaded, answers)
    columns = [name for name in rows[0][1]["row"] if name not in MMBENCH_DROPPED]
    table = [[*columns[:MMBENCH_COLUMN], "prediction", *columns[MMBENCH_COLUMN:]]]
    for _, line, text in rows:
        cells = [str(line["row"].get(name) or "") for name in columns]
        table.append([*cells[:MMBENCH_COLUMN], text, *cells[MMBENCH_COLUMN:]])
    return write_xlsx(table)


def write_xlsx(table: list[list[str]]) -> bytes:
    """Return a workbook (Office Open XML, ECMA-376) with one sheet of texts, the first row its header.

    Whole numbers in the column `index` are numbers. Characters that XML 1.0 does not allow are left out. The same table
    gives the same bytes.
    """

    def cell(name: str, value: str) -> str:
        if name == "index" and value.isascii() and value.isdigit() and len(value) < 16:
            return f"<c><v>{int(value)}</v></c>"
        legal = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", value)
        return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(legal, quote=False)}</t></is></c>'

    head = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    sheet_type = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    rows = "".join(f"<row>{''.join(map(cell, table[0], row))}</row>" for row in table)
    files = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{sheet_type}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{sheet_type}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships">'
        f'<Relationship Id="r1" Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}">'
        '<sheets><sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships">'
        f'<Relationship Id="r1" Type="{office}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{rows}</sheetData></worksheet>',
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), head + text)
    return buffer.getvalue()


WRITERS: Mapping[str, Callable[[BenchmarkQuestions, Answers], bytes]] = {
    writer.__name__: writer for writer in (vqa_v2, viz_wiz, gqa, seed, mm_vet, mmbench)
}
"""Format -> writer."""
SUFFIXES: Mapping[str, str] = {name: ".json" for name in WRITERS} | {"seed": ".jsonl", "mmbench": ".xlsx"}
"""Format -> ending of the file's name."""

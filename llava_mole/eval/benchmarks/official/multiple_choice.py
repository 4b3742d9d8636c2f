"""ScienceQA, SEED-Bench and MMBench: the options are part of the question's text."""

import base64
import csv
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from llava_mole.common.errors import DataError
from llava_mole.common.files import read_json, write_bytes
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.eval.benchmarks.official import base
from llava_mole.eval.benchmarks.official.base import Converted, Line, make_line, need
from llava_mole.eval.metrics.choice import LETTERS

MMBENCH_OPTIONS = ("A", "B", "C", "D")
MISSING = ("", "nan", "none")


def science_qa(raw: Path, options: Mapping[str, str]) -> Converted:
    """Join LLaVA's `llava_test_CQM-A.json` (text) with ScienceQA's `problems.json` (answer, number of choices).

    Questions with an image form the group `image`, the others `text`, as LLaVA's IMG-accuracy counts them.
    """
    path = base.find(raw, base.option(options, "file"))
    problems_path = base.find(raw, "problems.json", "data/scienceqa/problems.json")
    problems = read_json(problems_path)
    lines: list[Line] = []
    for item in base.read_list(path):
        where, identifier = item.where, str(item["id"])
        if not isinstance(problems, dict) or identifier not in problems:
            raise DataError(f"{where}: {problems_path} has no problem {identifier}")
        problem = problems[identifier]
        answer, choices = need(problem, "answer", where), need(problem, "choices", where)
        turns = base.need_list(item, "conversations", where)
        text = str(need(turns[0] if turns else None, "value", where))
        if not isinstance(choices, list) or answer not in range(min(len(choices), len(LETTERS))):
            raise DataError(f"{where}: answer {answer!r} of {problems_path} is not the number of one of its choices")
        line: Line = {
            "question_id": identifier,
            "text": base.without(text, base.LETTER),
            "category": "image" if "image" in item or DEFAULT_IMAGE_TOKEN in text else "text",
            "answer": LETTERS[answer],
            "choices": len(choices),
        }
        if "image" in item:
            line["image"] = item["image"]
        lines.append(line)
    return Converted(lines, base.find(raw, "images/test", "test", "."), [path, problems_path])


def seed(raw: Path, options: Mapping[str, str]) -> Converted:
    """Join LLaVA's `llava-seed-bench.jsonl` (text, image) with `SEED-Bench.json` (answer, image or video)."""
    path, reference = base.find(raw, base.option(options, "file")), base.find(raw, "SEED-Bench.json")
    known = {str(question["question_id"]): question for question in base.read_list(reference, "questions")}
    lines: list[Line] = []
    for line in base.read_lines(path):
        identifier = str(line["question_id"])
        if identifier not in known:
            raise DataError(f"{line.where}: {reference} has no question {identifier}")
        line |= {
            "question_id": known[identifier]["question_id"],  # as the submission file has it: LLaVA's is a number
            "text": base.without(str(line["text"]), base.LETTER),
            "category": str(known[identifier].get("data_type", "image")),
            "answer": known[identifier]["answer"],
        }
        lines.append(line)
    left = len(known.keys() - {str(line["question_id"]) for line in lines})
    remarks = [f"{left} of {len(known)} questions of {reference} are not in {path}; LLaVA counts them as wrong"]
    return Converted(lines, raw, [path, reference], remarks if left else [])


def mmbench(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert MMBench's TSV, whose base64 images are written to `<raw>/images`.

    The text is the hint, the question and the options `A. ...` up to the first missing one. Each question is asked
    once, as LLaVA does by default.
    """
    path = base.find(raw, base.option(options, "file"))
    folder = raw / "images"
    folder.mkdir(exist_ok=True)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines: list[Line] = []
    for n, row in enumerate(_tsv_rows(path)):
        where = f"{path}: row {n + 1}"
        index = need(row, "index", where)
        if not re.fullmatch(r"[\w-]+", index):
            raise DataError(f"{where}: index {index!r} must be of letters, digits, _ and -: it names the image")
        picture = folder / f"{index}.jpg"
        try:
            content = base64.b64decode(need(row, "image", where), validate=True)
        except ValueError as error:
            raise DataError(f"{where}: its image is not valid base64 ({error})") from None
        write_bytes(picture, content)
        choices = [(letter, row.get(letter, "")) for letter in MMBENCH_OPTIONS]
        choices = list(itertools.takewhile(lambda choice: choice[1].lower() not in MISSING, choices))
        parts = [row.get("hint", ""), need(row, "question", where), *(f"{letter}. {text}" for letter, text in choices)]
        text = "\n".join(part for part in parts if part.lower() not in MISSING)
        kept = {key: value for key, value in row.items() if key != "image"}
        line = make_line(index, picture.name, text, row=kept)
        if row.get("answer", "").strip():
            line["answer"] = row["answer"].strip()
        lines.append(line)
    return Converted(lines, folder, [path])


def _tsv_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows. Raises DataError for a file that is not TSV, or a row with more or fewer columns."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for n, row in enumerate(csv.DictReader(file, delimiter="\t")):
                if None in row or None in row.values():
                    raise DataError(f"{path}: row {n + 1} does not have the columns of the first line")
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as TSV: {error}") from None

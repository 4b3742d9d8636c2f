"""UReader's test files: ChartQA and TabFact with their own answers, the DUE tasks with the DUE references."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.common.text import count_of
from llava_mole.eval.benchmarks.official.base import (
    Converted,
    Line,
    find,
    need,
    need_list,
    option,
    read_lines,
    read_list,
)

IMAGES = ("ureader_images", "images", ".")
DUE = ("benchmark_files/DUE", "DUE", "meta")
SAME_QUESTION = 0.95
"""Share of questions that must equal the references they are aligned with."""


def _rows(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (where, image, question, answer) of a UReader test file, whose second turn is the question."""
    for number, row in enumerate(read_lines(path), 1):
        where = f"{path}:{number}"
        turns = need(row, "conversations", where)
        if not isinstance(turns, list) or len(turns) < 3 or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{where}: 'conversations' needs the image's, the user's and the assistant's turn")
        image = need(row, "image", where)
        image = image[0] if isinstance(image, list) and image else image
        if not isinstance(image, str):
            raise DataError(f"{where}: 'image' must be a path or a list of paths; found {image!r}")
        yield where, image, str(need(turns[1], "value", where)), str(need(turns[2], "value", where))


def ureader(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert a test file whose own answers are the gold ones: TabFact."""
    path = find(raw, option(options, "file"), f"ureader_json/{options['file']}")
    stem = path.stem
    lines: list[Line] = [
        {"question_id": f"{stem}-{n}", "image": image, "text": question, "answer": answer}
        for n, (_, image, question, answer) in enumerate(_rows(path))
    ]
    return Converted(lines, find(raw, *IMAGES), [path])


def chart_qa(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert UReader's ChartQA test file.

    A row is `human` or `augmented` according to ChartQA's own `test_human.json` and `test_augmented.json`, if they are
    in `raw` (or `ChartQA/test`), else `unknown`. Without UReader's file, those two are the questions.
    """
    splits: dict[tuple[str, str], str] = {}
    official: list[tuple[str, Line]] = []
    sources = []
    for split in ("human", "augmented"):
        for name in (f"test_{split}.json", f"ChartQA/test/test_{split}.json", f"test/test_{split}.json"):
            if (raw / name).is_file():
                sources.append(raw / name)
                for item in read_list(raw / name):
                    official.append((split, item))
                    splits[str(item.get("imgname")), str(item.get("query")).strip()] = split
                break
    name = option(options, "file")
    path = next((p for p in (raw / name, raw / "ureader_json" / name) if p.is_file()), None)
    if path is None:
        if len(sources) != 2:
            raise DataError(f"{raw}: neither {name} nor test_human.json and test_augmented.json in it")
        lines: list[Line] = [
            {
                "question_id": f"{split}-{n}",
                "image": str(need(item, "imgname", f"test_{split}.json: item {n}")),
                "text": str(need(item, "query", f"test_{split}.json: item {n}")),
                "category": split,
                "answer": str(need(item, "label", f"test_{split}.json: item {n}")),
            }
            for n, (split, item) in enumerate(official)
        ]
        return Converted(lines, find(raw, "png", "ChartQA/test/png", "test/png", "."), sources)
    lines = []
    for n, (_, image, question, answer) in enumerate(_rows(path)):
        split = splits.get((Path(image).name, question.strip()), "unknown")
        lines.append(
            {"question_id": f"{path.stem}-{n}", "image": image, "text": question, "category": split, "answer": answer}
        )
    unknown = sum(line["category"] == "unknown" for line in lines)
    remarks = [f"{unknown} of {len(lines)} questions have no known split (human or augmented)"] if unknown else []
    return Converted(lines, find(raw, *IMAGES), [path, *sources], remarks)


def _references(raw: Path, task: str) -> tuple[Path, list[Line]]:
    folder = find(raw, *DUE)
    path = find(folder, f"{task}/test/document.jsonl", f"{task}/test.jsonl")
    return path, read_lines(path)


def _aligned(raw: Path, options: Mapping[str, str], read: Callable[[Mapping[str, Any], str], Line]) -> Converted:
    """Convert a question-answering task, whose test file has the references' documents in order, a row per annotation.

    Within a document, a row gets the annotation whose key is its question, as the DUE scorer matches them; the others
    are matched in order.
    """
    path = find(raw, option(options, "file"), f"ureader_json/{options['file']}")
    reference, documents = _references(raw, option(options, "due"))
    blocks = [need_list(document, "annotations", f"{reference}") for document in documents]
    rows = list(_rows(path))
    count = sum(map(len, blocks))
    if len(rows) != count:
        raise DataError(f"{path} has {len(rows)} questions, {reference} {count}; documents are aligned by position")
    lines: list[Line] = []
    same = 0
    for block in blocks:
        members = rows[len(lines) : len(lines) + len(block)]
        keys = [str(need(annotation, "key", f"{reference}")) for annotation in block]
        chosen, matched = _match([question for _, _, question, _ in members], keys)
        same += matched
        for (where, image, question, _), index in zip(members, chosen, strict=True):
            found = read(block[index], where)
            lines.append({"question_id": f"{path.stem}-{len(lines)}", "image": image, "text": question, **found})
    if same < SAME_QUESTION * len(rows):
        raise DataError(f"{path}: only {same} of {len(rows)} questions are those of the same document in {reference}")
    other = len(rows) - same
    remarks = [f"{other} of {len(rows)} questions differ from the references' and got theirs by position"]
    return Converted(lines, find(raw, *IMAGES), [path, reference], remarks if other else [])


def _match(questions: Sequence[str], keys: Sequence[str]) -> tuple[list[int], int]:
    """Return the index of each question's key, and how many questions have a key with the same text.

    Equal texts are matched first, then those with equal `_letters`; the others are matched in order.
    """
    chosen: dict[int, int] = {}
    free = list(range(len(keys)))
    for form in (str, _letters):
        for n, question in enumerate(questions):
            index = next((k for k in free if form(keys[k]) == form(question)), None)
            if n not in chosen and index is not None:
                chosen[n] = index
                free.remove(index)
    matched = len(chosen)
    for n in range(len(questions)):
        if n not in chosen:
            chosen[n] = free.pop(0)
    return [chosen[n] for n in range(len(questions))], matched


def _letters(text: str) -> str:
    """Return what is compared of a question: UReader's rows have "minor revisions" of the first 100 characters."""
    return re.sub(r"[\W_]+", "", text[:100]).lower()


def _values(annotation: Mapping[str, Any], where: str) -> list[Line]:
    """Return an annotation's values. Raises DataError if it has none."""
    values = need(annotation, "values", where)
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise DataError(
            f"{where}: the reference {annotation.get('key')!r} needs a list of 'values', at least one; found {values!r}"
        )
    return values


def due_anls(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert DocVQA or InfographicsVQA: the golds are the first value's `value_variants`."""

    def read(annotation: Mapping[str, Any], where: str) -> Line:
        return {"answers": need(_values(annotation, where)[0], "value_variants", where)}

    return _aligned(raw, options, read)


def due_wtq(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert WikiTableQuestions: the golds are all values."""

    def read(annotation: Mapping[str, Any], where: str) -> Line:
        return {"answers": [need(value, "value", where) for value in _values(annotation, where)]}

    return _aligned(raw, options, read)


def due_key_values(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert DeepForm or Kleister Charity, whose questions ask for a category of a document.

    The text names the category, and the image's name up to `.pdf` the document; the golds are the category's values in
    the references.
    """
    path = find(raw, option(options, "file"), f"ureader_json/{options['file']}")
    categories = option(options, "categories").split()
    reference, documents = _references(raw, option(options, "due"))
    fields = {str(need(d, "name", f"{reference}")): _spellings(d, f"{reference}") for d in documents}
    lines: list[Line] = []
    asked = set()
    for n, (where, image, question, _) in enumerate(_rows(path)):
        document = Path(image).name.split(".pdf")[0]
        category = next((c for c in categories if c in question), None)
        if category is None:
            raise DataError(f"{where}: the question names none of {', '.join(categories)}: {question!r}")
        if document not in fields:
            raise DataError(f"{where}: document {document!r} is not in {reference}")
        asked.add((document, category))
        lines.append(
            {
                "question_id": f"{path.stem}-{n}",
                "image": image,
                "text": question,
                "field": f"{document}/{category}",
                "values": fields[document].get(category, []),
            }
        )
    unasked = sum(len(values) for d, keys in fields.items() for key, values in keys.items() if (d, key) not in asked)
    # The published recall counts these values too; spread evenly, any part of the questions has its share of them.
    for n, line in enumerate(lines):
        if share := (n + 1) * unasked // len(lines) - n * unasked // len(lines):
            line["unasked"] = share
    remarks = (
        [f"no question asks for {count_of(unasked, 'value')} of the references; the recall counts them"]
        if unasked
        else []
    )
    return Converted(lines, find(raw, *IMAGES), [path, reference], remarks)


def _spellings(document: Mapping[str, Any], where: str) -> dict[str, list[list[str]]]:
    """Return key -> its values in a document, each with all accepted spellings."""
    found: dict[str, list[list[str]]] = {}
    for annotation in need_list(document, "annotations", where):
        for value in need_list(annotation, "values", where):
            spellings = [need(value, "value", where)]
            spellings += need_list(value, "value_variants", where) if "value_variants" in value else []
            found.setdefault(str(need(annotation, "key", where)), []).append([str(text) for text in spellings])
    return found


def doc_vqa_val(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert DocVQA's official validation file: `data[].questionId, question, answers, image`."""
    path = find(raw, option(options, "file"))
    lines: list[Line] = [
        {
            "question_id": need(item, "questionId", f"{path}: item {n}"),
            "image": need(item, "image", f"{path}: item {n}"),
            "text": need(item, "question", f"{path}: item {n}"),
            "answers": need(item, "answers", f"{path}: item {n}"),
        }
        for n, item in enumerate(read_list(path, "data"))
    ]
    return Converted(lines, raw, [path])

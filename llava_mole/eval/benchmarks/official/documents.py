"""UReader's test files: ChartQA and TabFact with their own answers, the DUE tasks with the DUE references."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.common.text import count_of
from llava_mole.eval.benchmarks.official import base
from llava_mole.eval.benchmarks.official.base import Converted, Item, Line, make_line, need

IMAGES = ("ureader_images", "images", ".")
DUE = ("benchmark_files/DUE", "DUE", "meta")
SAME_QUESTION = 0.95
"""Share of questions that must equal the references they are aligned with."""


def _rows(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (where, image, question, answer) of a UReader test file, whose second turn is the question."""
    for row in base.read_lines(path):
        turns, image = row["conversations"], row["image"]
        if not isinstance(turns, list) or len(turns) < 3 or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{row.where}: 'conversations' needs the image's, the user's and the assistant's turn")
        image = image[0] if isinstance(image, list) and image else image
        if not isinstance(image, str):
            raise DataError(f"{row.where}: 'image' must be a path or a list of paths; found {image!r}")
        question, answer = (str(need(turn, "value", row.where)) for turn in turns[1:3])
        yield row.where, image, question, answer


def ureader(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert a test file whose own answers are the gold ones: TabFact."""
    path = base.find(raw, base.option(options, "file"), f"ureader_json/{options['file']}")
    rows = enumerate(_rows(path))
    lines = [make_line(f"{path.stem}-{n}", image, text, answer=answer) for n, (_, image, text, answer) in rows]
    return Converted(lines, base.find(raw, *IMAGES), [path])


def chart_qa(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert UReader's ChartQA test file.

    A row is `human` or `augmented` according to ChartQA's own `test_human.json` and `test_augmented.json`, if they are
    in `raw` (or `ChartQA/test`), else `unknown`. Without UReader's file, those two are the questions.
    """
    official: list[tuple[str, Item]] = []
    sources = []
    for split in ("human", "augmented"):
        names = (f"test_{split}.json", f"ChartQA/test/test_{split}.json", f"test/test_{split}.json")
        for source in [raw / name for name in names if (raw / name).is_file()][:1]:
            sources.append(source)
            official += [(split, item) for item in base.read_list(source)]
    name = base.option(options, "file")
    path = next((p for p in (raw / name, raw / "ureader_json" / name) if p.is_file()), None)
    lines: list[Line] = []
    if path is None:
        if len(sources) != 2:
            raise DataError(f"{raw}: neither {name} nor test_human.json and test_augmented.json in it")
        for n, (split, item) in enumerate(official):
            image, text, answer = (str(item[key]) for key in ("imgname", "query", "label"))
            lines.append(make_line(f"{split}-{n}", image, text, category=split, answer=answer))
        return Converted(lines, base.find(raw, "png", "ChartQA/test/png", "test/png", "."), sources)
    splits = {(str(item.get("imgname")), str(item.get("query")).strip()): split for split, item in official}
    for n, (_, image, text, answer) in enumerate(_rows(path)):
        split = splits.get((Path(image).name, text.strip()), "unknown")
        lines.append(make_line(f"{path.stem}-{n}", image, text, category=split, answer=answer))
    unknown = sum(line["category"] == "unknown" for line in lines)
    remarks = [f"{unknown} of {len(lines)} questions have no known split (human or augmented)"] if unknown else []
    return Converted(lines, base.find(raw, *IMAGES), [path, *sources], remarks)


def _references(raw: Path, task: str) -> tuple[Path, list[Item]]:
    folder = base.find(raw, *DUE)
    path = base.find(folder, f"{task}/test/document.jsonl", f"{task}/test.jsonl")
    return path, base.read_lines(path)


def _aligned(raw: Path, options: Mapping[str, str], golds: Callable[[list[Line], str], Any]) -> Converted:
    """Convert a question-answering task, whose test file has the references' documents in order, a row per annotation.

    Within a document, a row gets the annotation whose key is its question, as the DUE scorer matches them; the others
    are matched in order.

    Args:
        golds: (an annotation's values, where) -> gold answers.
    """
    path = base.find(raw, base.option(options, "file"), f"ureader_json/{options['file']}")
    reference, documents = _references(raw, base.option(options, "due"))
    blocks = [base.need_list(document, "annotations", document.where) for document in documents]
    rows = list(_rows(path))
    count = sum(map(len, blocks))
    if len(rows) != count:
        raise DataError(f"{path} has {len(rows)} questions, {reference} {count}; documents are aligned by position")
    lines: list[Line] = []
    same = 0
    for document, block in zip(documents, blocks, strict=True):
        members = rows[len(lines) : len(lines) + len(block)]
        keys = [str(need(annotation, "key", document.where)) for annotation in block]
        chosen, matched = _match([question for _, _, question, _ in members], keys)
        same += matched
        for (where, image, question, _), index in zip(members, chosen, strict=True):
            answers = golds(_values(block[index], where), where)
            lines.append(make_line(f"{path.stem}-{len(lines)}", image, question, answers=answers))
    if same < SAME_QUESTION * len(rows):
        raise DataError(f"{path}: only {same} of {len(rows)} questions are those of the same document in {reference}")
    other = len(rows) - same
    remarks = [f"{other} of {len(rows)} questions differ from the references' and got theirs by position"]
    return Converted(lines, base.find(raw, *IMAGES), [path, reference], remarks if other else [])


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
    """Return the first 100 characters as lower-case letters and digits: UReader's rows have "minor revisions"."""
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
    return _aligned(raw, options, lambda values, where: need(values[0], "value_variants", where))


def due_wtq(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert WikiTableQuestions: the golds are all values."""
    return _aligned(raw, options, lambda values, where: [need(value, "value", where) for value in values])


def due_key_values(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert DeepForm or Kleister Charity, whose questions ask for a category of a document.

    The text names the category, and the image's name up to `.pdf` the document; the golds are the category's values in
    the references.
    """
    path = base.find(raw, base.option(options, "file"), f"ureader_json/{options['file']}")
    categories = base.option(options, "categories").split()
    reference, documents = _references(raw, base.option(options, "due"))
    fields = {str(document["name"]): _spellings(document) for document in documents}
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
        values = fields[document].get(category, [])
        lines.append(make_line(f"{path.stem}-{n}", image, question, field=f"{document}/{category}", values=values))
    unasked = sum(len(values) for d, keys in fields.items() for key, values in keys.items() if (d, key) not in asked)
    # The published recall counts these values too; spread evenly, any part of the questions has its share of them.
    for n, line in enumerate(lines):
        if share := (n + 1) * unasked // len(lines) - n * unasked // len(lines):
            line["unasked"] = share
    remarks = [f"no question asks for {count_of(unasked, 'value')} of the references; the recall counts them"]
    return Converted(lines, base.find(raw, *IMAGES), [path, reference], remarks if unasked else [])


def _spellings(document: Item) -> dict[str, list[list[str]]]:
    """Return key -> its values in a document, each with all accepted spellings."""
    found: dict[str, list[list[str]]] = {}
    for annotation in base.need_list(document, "annotations", document.where):
        for value in base.need_list(annotation, "values", document.where):
            spellings = [need(value, "value", document.where)]
            spellings += base.need_list(value, "value_variants", document.where) if "value_variants" in value else []
            found.setdefault(str(need(annotation, "key", document.where)), []).append([str(text) for text in spellings])
    return found


def doc_vqa_val(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert DocVQA's official validation file: `data[].questionId, question, answers, image`."""
    path = base.find(raw, base.option(options, "file"))
    lines = [
        make_line(item["questionId"], item["image"], item["question"], answers=item["answers"])
        for item in base.read_list(path, "data")
    ]
    return Converted(lines, raw, [path])

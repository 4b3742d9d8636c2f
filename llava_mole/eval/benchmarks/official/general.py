"""PathVQA, TextVQA, POPE, MME, GQA, Tiny LVLM-eHub, and LLaVA's own question files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.common.files import read_json
from llava_mole.eval.benchmarks.official.base import (
    SHORT_ANSWER,
    Converted,
    Line,
    find,
    need,
    option,
    read_lines,
    read_list,
    without,
)
from llava_mole.eval.metrics.path_vqa import is_closed
from llava_mole.eval.questions import read_text

PATH_VQA_CLOSED = " Please choose from the following two options: [yes, no]"
OCR_HINT = "\nReference OCR token: "
MME_REQUEST = "Please answer yes or no."


def path_vqa(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert PathVQA's test split: the question file of `llava-mole prepare pathvqa`, or LLaVA-Med's `test.json`.

    A question whose gold answer is yes or no is `closed` and any other `open`, whatever `answer_type` says.
    """
    path = find(raw, *option(options, "files").split())
    lines: list[Line] = [
        {
            "question_id": identifier,
            "image": image,
            "text": without(str(question), "").removesuffix(PATH_VQA_CLOSED).rstrip(),
            "category": "closed" if is_closed(str(answer)) else "open",
            "answer": str(answer),
        }
        for identifier, image, question, answer in _path_vqa_rows(path)
    ]
    return Converted(lines, find(raw, "images", "."), [path])


def _path_vqa_rows(path: Path) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Yield (id, image, question, answer) of a question file or of LLaVA-Med's list."""
    if path.suffix == ".jsonl":
        for n, item in enumerate(read_lines(path)):
            where = f"{path}:{n + 1}"
            identifier, image = need(item, "question_id", where), need(item, "image", where)
            yield identifier, image, need(item, "text", where), need(item, "answer", where)
        return
    for n, item in enumerate(read_list(path)):
        where = f"{path}: item {n}"
        turns = item.get("conversations", item.get("conversatons"))  # LLaVA-Med's file has the misspelt key
        if not isinstance(turns, list) or len(turns) < 2:
            raise DataError(f"{where}: 'conversations' needs a question and an answer")
        question, answer = (need(turn, "value", where) for turn in turns[:2])
        yield need(item, "id", where), need(item, "image", where), question, answer


def text_vqa(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert TextVQA's validation split, the official `TextVQA_0.5.1_val.json`.

    The option `hints` names LLaVA's question file, which is joined by (image, question in lower case) for its line
    `Reference OCR token: ...`.
    """
    path = find(raw, option(options, "file"))
    items = read_list(path, "data")
    hints: dict[tuple[str, str], str] = {}
    sources = [path]
    if "hints" in options:
        source = find(raw, options["hints"])
        sources.append(source)
        for line in read_lines(source):
            text = without(str(need(line, "text", str(source))), SHORT_ANSWER)
            question, _, tokens = text.partition(OCR_HINT)
            hints[str(need(line, "question_id", str(source))), question.lower()] = tokens
    lines: list[Line] = []
    for n, item in enumerate(items):
        where = f"{path}: item {n}"
        image, question = str(need(item, "image_id", where)), str(need(item, "question", where))
        if "hints" in options:
            if (image, question.lower()) not in hints:
                raise DataError(f"{where}: {sources[1]} has no question {question!r} about image {image}")
            question += OCR_HINT + hints[image, question.lower()]
        lines.append(
            {
                "question_id": need(item, "question_id", where),
                "image": f"{image}.jpg",
                "text": question,
                "answers": need(item, "answers", where),
            }
        )
    return Converted(lines, find(raw, "train_images", "train_val_images/train_images", "."), sources)


def pope(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert POPE's `coco_pope_{random,popular,adversarial}.json`, which are JSON lines.

    Their ids repeat, so each is preceded by its split. LLaVA's own release of the random file has 2,910 rows.
    """
    lines: list[Line] = []
    sources = []
    for split in ("random", "popular", "adversarial"):
        path = find(raw, f"coco_pope_{split}.json", f"coco/coco_pope_{split}.json")
        sources.append(path)
        for n, item in enumerate(read_lines(path)):
            where = f"{path}:{n + 1}"
            lines.append(
                {
                    "question_id": f"{split}-{need(item, 'question_id', where)}",
                    "image": need(item, "image", where),
                    "text": need(item, "text", where),
                    "category": split,
                    "answer": need(item, "label", where),
                }
            )
    return Converted(lines, find(raw, "val2014", "."), sources)


def mme(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert MME's release, whose lines are a question, a tab, and Yes or No.

    The files are `<subtask>/*.txt` with the images beside them, or `<subtask>/questions_answers_YN/*.txt` and
    `<subtask>/images/*`. The request to answer yes or no is removed, as in LLaVA and lmms-eval when they ask for a
    single word or phrase.
    """
    root = find(raw, "MME_Benchmark_release_version", "MME_Benchmark_release", ".")
    lines: list[Line] = []
    sources = []
    for subtask in option(options, "subtasks").split():
        folder = root / subtask
        split_up = (folder / "questions_answers_YN").is_dir()
        files = sorted((folder / "questions_answers_YN" if split_up else folder).glob("*.txt"))
        if not files:
            raise DataError(f"{folder}: no question files *.txt in it")
        pictures = {p.stem: p for p in (folder / "images" if split_up else folder).glob("*") if p.suffix != ".txt"}
        for path in files:
            if path.stem not in pictures:
                raise DataError(f"{path}: no image {path.stem}.* for it")
            sources.append(path)
            for n, row in enumerate(read_text(path).splitlines()):
                question, tab, answer = row.rpartition("\t")
                if not tab:
                    raise DataError(f"{path}:{n + 1}: no tab between question and answer")
                lines.append(
                    {
                        "question_id": f"{subtask}/{path.stem}/{n}",
                        "image": str(pictures[path.stem].relative_to(root)),
                        "text": question.strip().removesuffix(MME_REQUEST).rstrip(),
                        "category": subtask,
                        "answer": answer.strip(),
                    }
                )
    return Converted(lines, root, sources)


def gqa(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert GQA's balanced test-dev questions: `{id: {"question", "imageId", "answer"}}`."""
    path = find(raw, option(options, "file"), f"data/{options['file']}")
    questions = read_json(path)
    if not isinstance(questions, dict):
        raise DataError(f"{path}: an object of questions by id is needed")
    lines: list[Line] = [
        {
            "question_id": name,
            "image": f"{need(item, 'imageId', f'{path}: {name}')}.jpg",
            "text": need(item, "question", f"{path}: {name}"),
            "answer": need(item, "answer", f"{path}: {name}"),
        }
        for name, item in questions.items()
    ]
    return Converted(lines, find(raw, "images", "data/images", "."), [path])


def llava_questions(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert LLaVA's question file of a benchmark that a server scores; its prompt suffix is removed."""
    path = find(raw, option(options, "file"))
    lines = read_lines(path)
    for n, line in enumerate(lines):
        line["text"] = without(str(need(line, "text", f"{path}:{n + 1}")), options.get("suffix", ""))
        line.pop("category", None)
    return Converted(lines, find(raw, *option(options, "images").split(), "."), [path])


DATASET = "dataset.json"


def tiny_ehub(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert the folders of `options["folders"]`: `FOLDER=GROUP` or `FOLDER`, separated by blanks.

    Their `dataset.json` is a list of `{"image_path", "question", "gt_answers": text or list}`. Only the file name of
    `image_path` counts; its folders are those of another machine.
    """
    lines: list[Line] = []
    sources = []
    for entry in option(options, "folders").split():
        folder, _, group = entry.partition("=")
        path = raw / folder / DATASET
        if not path.is_file():
            raise DataError(f"{path}: no such file; Tiny LVLM-eHub has a folder {folder} with {DATASET} in it")
        sources.append(path)
        for number, item in enumerate(read_list(path)):
            where = f"{path}: item {number}"
            golds = need(item, "gt_answers", where)
            lines.append(
                {
                    "question_id": f"{folder}-{number}",
                    "image": f"{folder}/{Path(str(need(item, 'image_path', where))).name}",
                    "text": need(item, "question", where),
                    "category": group or folder,
                    "answers": [str(gold) for gold in golds] if isinstance(golds, list) else [str(golds)],
                }
            )
    return Converted(lines, raw, sources)

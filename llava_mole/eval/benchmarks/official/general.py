"""PathVQA, TextVQA, POPE, MME, GQA, Tiny LVLM-eHub, and LLaVA's own question files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.common.files import read_json
from llava_mole.eval.benchmarks.official import base
from llava_mole.eval.benchmarks.official.base import Converted, Line, make_line, need
from llava_mole.eval.metrics.path_vqa import is_closed
from llava_mole.eval.questions import read_text

PATH_VQA_CLOSED = " Please choose from the following two options: [yes, no]"
OCR_HINT = "\nReference OCR token: "
MME_REQUEST = "Please answer yes or no."
DATASET = "dataset.json"


def path_vqa(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert PathVQA's test split: the question file of `llava-mole prepare pathvqa`, or LLaVA-Med's `test.json`.

    A question whose gold answer is yes or no is `closed` and any other `open`, whatever `answer_type` says.
    """
    path = base.find(raw, *base.option(options, "files").split())
    lines: list[Line] = []
    for identifier, image, question, answer in _path_vqa_rows(path):
        text = base.without(str(question), "").removesuffix(PATH_VQA_CLOSED).rstrip()
        category = "closed" if is_closed(str(answer)) else "open"
        lines.append(make_line(identifier, image, text, category=category, answer=str(answer)))
    return Converted(lines, base.find(raw, "images", "."), [path])


def _path_vqa_rows(path: Path) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Yield (id, image, question, answer) of a question file or of LLaVA-Med's list."""
    if path.suffix == ".jsonl":
        for item in base.read_lines(path):
            yield item["question_id"], item["image"], item["text"], item["answer"]
        return
    for item in base.read_list(path):
        turns = item.get("conversations", item.get("conversatons"))  # LLaVA-Med's file has the misspelt key
        if not isinstance(turns, list) or len(turns) < 2:
            raise DataError(f"{item.where}: 'conversations' needs a question and an answer")
        question, answer = (need(turn, "value", item.where) for turn in turns[:2])
        yield item["id"], item["image"], question, answer


def text_vqa(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert TextVQA's validation split, the official `TextVQA_0.5.1_val.json`.

    The option `hints` names LLaVA's question file, which is joined by (image, question in lower case) for its line
    `Reference OCR token: ...`.
    """
    sources = [base.find(raw, base.option(options, "file"))]
    hints: dict[tuple[str, str], str] = {}
    if "hints" in options:
        sources.append(base.find(raw, options["hints"]))
        for line in base.read_lines(sources[1]):
            question, _, tokens = base.without(str(line["text"]), base.SHORT_ANSWER).partition(OCR_HINT)
            hints[str(line["question_id"]), question.lower()] = tokens
    lines: list[Line] = []
    for item in base.read_list(sources[0], "data"):
        image, question = str(item["image_id"]), str(item["question"])
        if "hints" in options:
            if (image, question.lower()) not in hints:
                raise DataError(f"{item.where}: {sources[1]} has no question {question!r} about image {image}")
            question += OCR_HINT + hints[image, question.lower()]
        lines.append(make_line(item["question_id"], f"{image}.jpg", question, answers=item["answers"]))
    return Converted(lines, base.find(raw, "train_images", "train_val_images/train_images", "."), sources)


def pope(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert POPE's `coco_pope_{random,popular,adversarial}.json`, which are JSON lines.

    Their ids repeat, so each is preceded by its split. LLaVA's own release of the random file has 2,910 rows.
    """
    lines: list[Line] = []
    sources = []
    for split in ("random", "popular", "adversarial"):
        sources.append(base.find(raw, f"coco_pope_{split}.json", f"coco/coco_pope_{split}.json"))
        for item in base.read_lines(sources[-1]):
            name = f"{split}-{item['question_id']}"
            lines.append(make_line(name, item["image"], item["text"], category=split, answer=item["label"]))
    return Converted(lines, base.find(raw, "val2014", "."), sources)


def mme(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert MME's release, whose lines are a question, a tab, and Yes or No.

    The files are `<subtask>/*.txt` with the images beside them, or `<subtask>/questions_answers_YN/*.txt` and
    `<subtask>/images/*`. The request to answer yes or no is removed, as in LLaVA and lmms-eval when they ask for a
    single word or phrase.
    """
    root = base.find(raw, "MME_Benchmark_release_version", "MME_Benchmark_release", ".")
    lines: list[Line] = []
    sources = []
    for subtask in base.option(options, "subtasks").split():
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
                name, image = f"{subtask}/{path.stem}/{n}", str(pictures[path.stem].relative_to(root))
                text = question.strip().removesuffix(MME_REQUEST).rstrip()
                lines.append(make_line(name, image, text, category=subtask, answer=answer.strip()))
    return Converted(lines, root, sources)


def gqa(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert GQA's balanced test-dev questions: `{id: {"question", "imageId", "answer"}}`."""
    path = base.find(raw, base.option(options, "file"), f"data/{options['file']}")
    questions = read_json(path)
    if not isinstance(questions, dict):
        raise DataError(f"{path}: an object of questions by id is needed")
    lines: list[Line] = []
    for name, item in questions.items():
        image, text, answer = (need(item, key, f"{path}: {name}") for key in ("imageId", "question", "answer"))
        lines.append(make_line(name, f"{image}.jpg", text, answer=answer))
    return Converted(lines, base.find(raw, "images", "data/images", "."), [path])


def llava_questions(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert LLaVA's question file of a benchmark that a server scores; its prompt suffix is removed."""
    path = base.find(raw, base.option(options, "file"))
    lines = base.read_lines(path)
    for line in lines:
        line["text"] = base.without(str(line["text"]), options.get("suffix", ""))
        line.pop("category", None)
    return Converted([*lines], base.find(raw, *base.option(options, "images").split(), "."), [path])


def tiny_ehub(raw: Path, options: Mapping[str, str]) -> Converted:
    """Convert the folders of `options["folders"]`: `FOLDER=GROUP` or `FOLDER`, separated by blanks.

    Their `dataset.json` is a list of `{"image_path", "question", "gt_answers": text or list}`. Only the file name of
    `image_path` counts; its folders are those of another machine.
    """
    lines: list[Line] = []
    sources = []
    for entry in base.option(options, "folders").split():
        folder, _, group = entry.partition("=")
        path = raw / folder / DATASET
        if not path.is_file():
            raise DataError(f"{path}: no such file; Tiny LVLM-eHub has a folder {folder} with {DATASET} in it")
        sources.append(path)
        for n, item in enumerate(base.read_list(path)):
            golds = item["gt_answers"]
            answers = [str(gold) for gold in golds] if isinstance(golds, list) else [str(golds)]
            image = f"{folder}/{Path(str(item['image_path'])).name}"
            category = group or folder
            lines.append(make_line(f"{folder}-{n}", image, item["question"], category=category, answers=answers))
    return Converted(lines, raw, sources)

"""Tiny LVLM-eHub: `<Name>/dataset.json` folders with the images beside it."""

from collections.abc import Mapping
from pathlib import Path

from llava_mole.common.errors import DataError
from llava_mole.eval.converters.base import Converted, Line, need, option, read_list

DATASET = "dataset.json"


def convert(raw: Path, options: Mapping[str, str]) -> Converted:
    """Every folder that `options["folders"]` names, `FOLDER=GROUP` or `FOLDER`, blank-separated.

    A `dataset.json` is a list of `{"image_path", "question", "gt_answers": text or list}`; `image_path` may name
    folders of the machine where it was made, of which the last part counts.
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

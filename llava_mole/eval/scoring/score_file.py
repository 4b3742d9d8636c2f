"""Score files: JSON that holds a benchmark's numbers, each question's scores, and everything that decided them.

docs/evaluation.md describes the keys. A file of another format is refused rather than guessed at: scoring answers again
takes seconds.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.common.files import read_json, write_text

FORMAT = 2
SCORE_SUFFIX = ".score.json"
"""Replaces `.jsonl` in the name of an answers file."""

_KEYS = {
    **{"benchmark": str, "numbers": dict, "definition": object, "per_question": object, "question_set": str},
    **{"prompt": dict, "total": int, "empty_answers": int, "dropped": dict, "groups": dict, "questions": list},
    **{"image_folder": str, "answers": list, "model_path": str, "routing": (str, type(None))},
}
_OPTIONAL = {"majority_from": str}


def write_score_file(path: Path, scores: Mapping[str, Any]) -> None:
    """Write scores atomically, each long column of `per_question` on one line. Raises ConfigError if it cannot."""
    units = scores["per_question"]
    text = json.dumps({key: value for key, value in scores.items() if key != "per_question"}, indent=2)
    fields = ",\n      ".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in units["fields"].items())
    columns = f'    "ids": {json.dumps(units["ids"])},\n    "groups": {json.dumps(units["groups"])},\n'
    block = f'"per_question": {{\n{columns}    "fields": {{\n      {fields}\n    }}\n  }}'
    write_text(path, f"{text[:-2]},\n  {block}\n}}\n")


def read_score_file(path: Path) -> dict[str, Any]:
    """Read a score file.

    Raises:
        DataError: a file of another format, or one that lacks or damages a value that a report shows.
    """
    scores = read_json(path)
    found = scores.get("format") if isinstance(scores, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{path}: not a score file of format {FORMAT} (found {found!r}); score the answers again, with the "
            "`llava-mole eval` or `llava-mole score` command that wrote it"
        )
    absent = [key for key in _KEYS if key not in scores]
    if absent:
        raise DataError(f"{path}: no {', '.join(absent)} in it; score the answers again")

    def check(name: str, right: bool, value: Any) -> None:
        if not right:
            raise DataError(f"{path}: {name} is damaged ({value!r}); score the answers again")

    for key, kind in {**_KEYS, **_OPTIONAL}.items():
        check(key, key not in scores or isinstance(scores[key], kind), scores.get(key))  # type: ignore[arg-type]
    for name, entry in scores["numbers"].items():
        ratio = ("k", "n") if isinstance(entry, dict) and "k" in entry else ()
        empty = isinstance(entry, dict) and entry.get("value", 0) is None
        check(f"number {name!r}", empty or _has_numbers(entry, "value", "low", "high", *ratio), entry)
    check("prompt", isinstance(scores["prompt"].get("variant"), str), scores["prompt"])
    if "majority_from" in scores:
        check("groups", bool(scores["groups"]), scores["groups"])
        keys = ("value", "low", "high", "k", "n")
        for name, entry in scores["groups"].items():
            right = _has_numbers(entry, *keys) and _has_numbers(entry.get("majority"), *keys)
            check(f"group {name!r}", right, entry)
    return scores


def _has_numbers(entry: Any, *keys: str) -> bool:
    """Whether these are finite numbers in it; JSON cannot represent NaN and infinity."""
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), (int, float)) and abs(entry[key]) < math.inf for key in keys
    )

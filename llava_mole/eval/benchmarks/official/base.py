"""Shared by the converters: reading official files, and the type of the result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.common.files import read_json
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.eval.questions import read_json_lines

Line = dict[str, Any]

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass
class Converted:
    """The result of a converter."""

    lines: list[Line]
    images: Path
    """The folder that the lines' image paths are relative to."""
    sources: list[Path]
    remarks: list[str] = field(default_factory=list)
    """Notes for the user, one line each."""


class Item(dict[str, Any]):
    """An object of an official file. Asking for a key it does not have raises a DataError that names its place."""

    def __init__(self, value: Mapping[str, Any], where: str):
        super().__init__(value)
        self.where = where

    def __missing__(self, key: str) -> Any:
        return need(self, key, self.where)


def read_list(path: Path, key: str | None = None) -> list[Item]:
    """Return the objects of a JSON file that is a list, or has one under `key`. Raises DataError for another file."""
    value = read_json(path)
    if key is not None and isinstance(value, dict):
        value = value.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{path}: a list of objects{f' under {key!r}' if key else ''} is needed")
    return [Item(item, f"{path}: item {n}") for n, item in enumerate(value)]


def read_lines(path: Path) -> list[Item]:
    """Return the objects of a JSON-lines file. Raises DataError for another file."""
    return [Item(line, where) for where, line in read_json_lines(path)]


def make_line(question_id: Any, image: Any, text: Any, **others: Any) -> Line:
    """Return a question line; `others` are its category, gold answers and other keys that the metrics read."""
    return {"question_id": question_id, "image": image, "text": text, **others}


def need(item: Any, key: str, where: str) -> Any:
    """Return `item[key]`. Raises DataError that names the place if it is missing."""
    if not isinstance(item, Mapping) or key not in item:
        found = ", ".join(map(str, item)) if isinstance(item, Mapping) else repr(item)
        raise DataError(f"{where}: no {key!r} in it; found {found or 'nothing'}")
    return item[key]


def need_list(item: Any, key: str, where: str) -> list[Any]:
    """Return `item[key]`. Raises DataError that names the place if it is missing or not a list."""
    value = need(item, key, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: {key!r} must be a list; found {value!r}")
    return value


def option(options: Mapping[str, str], key: str) -> str:
    """Return a converter's option from the benchmark's file. Raises ConfigError if it is missing."""
    if key not in options:
        raise ConfigError(f"data.options.{key} is missing in the benchmark's file")
    return options[key]


def find(raw: Path, *names: str) -> Path:
    """Return the first of the paths below `raw` that exists. Raises DataError that lists them if none does."""
    for name in names:
        if (raw / name).exists():
            return raw / name
    raise DataError(f"{raw}: none of {', '.join(names)} in it")


def without(text: str, suffix: str) -> str:
    """Return a question of LLaVA's files without the image placeholder and the suffix, which the benchmark adds."""
    text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return text.removesuffix(suffix.strip()).rstrip("\n") if suffix else text

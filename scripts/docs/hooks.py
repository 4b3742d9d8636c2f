"""Hooks of mkdocs.yml: the configuration reference is written from the dataclasses while the site is built."""

import dataclasses
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from llava_mole.common.keys import ANY
from llava_mole.config import PATHS, RANGES, Option, RunConfig, options

ROOT = Path(__file__).parents[2]
PLACE = "<!-- every key -->"
"""Where docs/configuration.md gets the tables."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the tables; name the file where a link leads out of docs/, which is not part of the site."""
    markdown = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)
    if page.file.src_uri == "configuration.md":
        if PLACE not in markdown:
            raise ValueError(f"docs/configuration.md lacks {PLACE!r}")
        return markdown.replace(PLACE, reference())
    return markdown


def reference() -> str:
    """A table of keys, types, defaults and meanings for each section of a configuration, in order."""
    sections: dict[str, list[Option]] = {"": []}
    for option in options():
        name = option.key.rpartition(".")[0]
        sections.setdefault(name, []).append(option)
    parts = []
    for name, found in sections.items():
        title = name.replace(f".{ANY}", ".NAME") if name else "Top level"
        rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
        rows += [" | ".join(["", *_cells(option), ""]).strip() for option in found]
        parts.append("\n".join([f"## {title}", "", _about(found[0].section), "", *rows]))
    return "\n\n".join(parts)


def _about(section: type) -> str:
    """The docstring of the dataclass, first paragraph, as one line."""
    return " ".join((section.__doc__ or "").split("\n\n")[0].split()) if section is not RunConfig else ""


def _cells(option: Option) -> tuple[str, str, str, str]:
    key = option.key.rpartition(".")[2]
    values = _values(option.kind)
    if option.key in PATHS:
        values = values.replace("text", "path")
    if (allowed := RANGES.get(option.key)) and allowed.rule != "must be a number":
        values += ", " + allowed.rule.removeprefix("must be ").removeprefix("is a ").replace("must not be", "not")
    return f"`{key}`", _escaped(values), _escaped(_default(option)), _escaped(option.meaning)


def _default(option: Option) -> str:
    field = next(f for f in dataclasses.fields(option.section) if f.name == option.key.rpartition(".")[2])
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(kind: Any) -> str:
    """A type as YAML's words: `"zero2"`, a whole number, a list of texts ..."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_values(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {_values(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"mapping to {_values(get_args(kind)[1])}"
    names = {
        bool: "true, false",
        int: "whole number",
        float: "number",
        str: "text",
        type(None): "null",
        Any: "anything",
    }
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")

"""Dotted keys of nested settings: the known one nearest to a mistyped one, and the line of a YAML file that has it."""

import difflib
import os
from collections.abc import Collection
from pathlib import Path

ANY = "*"
"""Stands for any name in a known key, as in `data.sources.*.annotations`."""


def nearest(key: str, known: Collection[str]) -> str | None:
    """The known key that `key` most likely means; None if none is similar.

    A key that lacks its section (`learning_rate`) or has a wrong one is found by its last name.
    """
    parts = key.split(".")
    spelled = [with_names(candidate, parts) for candidate in known]
    found = difflib.get_close_matches(key, spelled, n=1, cutoff=0.75)
    if not found or found[0].count(".") != key.count("."):
        last = {candidate.split(".")[-1]: candidate for candidate in reversed(spelled)}
        by_name = difflib.get_close_matches(parts[-1], last, n=1, cutoff=0.8)
        found = [last[name] for name in by_name] or found
    return found[0] if found else None


def with_names(known: str, parts: list[str]) -> str:
    """A known key whose `*` are replaced by the names at these places of a given key."""
    words = known.split(".")
    return ".".join(
        parts[place] if word == ANY and place < len(parts) else word.replace(ANY, "NAME")
        for place, word in enumerate(words)
    )


def find_line(file: Path, key: str) -> str | None:
    """`FILE:LINE` of a key in a YAML file, or in the file that a section of it names. None if it is in neither."""
    import yaml

    try:
        node = yaml.compose(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    parts = key.split(".")
    while isinstance(node, yaml.MappingNode):
        entry = next(((name, value) for name, value in node.value if name.value == parts[0]), None)
        if entry is None:
            return None
        name, node = entry
        parts = parts[1:]
        if not parts:
            return f"{file}:{name.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode) and str(node.value).endswith((".yaml", ".yml")):
        return find_line(Path(os.path.normpath(file.parent / node.value)), ".".join(parts))
    return None

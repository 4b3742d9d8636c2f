"""Dotted keys of nested settings, as jsonargparse reads them from YAML files and the command line.

Its messages about them are made readable here: the line of a wrong key or value, and the key that was meant.
"""

import difflib
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

ANY = "*"
"""Stands for any name in a known key, as in `data.sources.*.annotations`."""
_UNKNOWN = (
    re.compile(r"Group '(?P<section>[^']+)' does not accept option '(?P<name>[^']+)'"),
    re.compile(r"key \"(?P<mapping>[\w.]+)\": .*Option '(?P<name>[^']+)' is not accepted"),
    re.compile(r"Option '(?P<name>[^']+)' is not accepted"),
)
"""What jsonargparse says about a key that a section, the values of a mapping or the whole does not have."""
_WRONG = (
    re.compile(r'^Parser key "(?P<key>[^"]+)": Expected a (?P<kind>.+?)\. Got value: (?P<value>.*)$'),
    re.compile(r'^Parser key "(?P<key>[^"]+)": [^.]*Subtypes: \[(?P<kind>.+?)\] Err.* Given value: (?P<value>.*)$'),
)
"""What it says about a value of the wrong type."""
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null"}


def explained(message: str, file: Path | None, arguments: Sequence[str], known: Collection[str]) -> str:
    """A message of jsonargparse, with the place of the key and the known key nearest to an unknown one.

    Args:
        message: Of its ArgumentError.
        file: The YAML file that was read, if any.
        arguments: Of the command line.
        known: All keys.
    """
    message = " ".join(message.split())
    if message.startswith("unrecognized arguments: "):
        words = message.split(": ", 1)[1].split()
        given = [word for word in words if word.startswith("--")] or words
        return "; ".join(_meant(word, word.removeprefix("--").partition("=")[0], known) for word in given)
    where = f"{file}: " if file is not None else ""
    if wrong := next((match for pattern in _WRONG if (match := pattern.match(message))), None):
        key, kind = wrong["key"], re.sub(r"typing\.|<class '(\w+)'>", r"\1", wrong["kind"])
        as_option = any(argument.partition("=")[0] == f"--{key}" for argument in arguments)
        place = "--" if as_option else f"{_line(file, key)[0]}" or where
        return f"{place}{key} must be {_allowed(kind)}, not {wrong['value']!r}"
    unknown = next((match.groupdict() for pattern in _UNKNOWN if (match := pattern.search(message))), None)
    if unknown is None:
        return where + message
    before = unknown.get("section") or (f"{unknown['mapping']}.{ANY}" if unknown.get("mapping") else "")
    line, key = _line(file, f"{before}.{unknown['name']}" if before else unknown["name"])
    return (line or where) + _meant(key, key, known)


def _line(file: Path | None, key: str) -> tuple[str, str]:
    """`FILE:LINE: ` of a key below a file, empty if it is not there, and the key with the names found for each `*`."""
    found = find_line(file, key) if file is not None else None
    return (f"{found[0]}: ", found[1]) if found else ("", key.replace(ANY, "NAME"))


def _allowed(kind: str) -> str:
    """What a type allows, in words."""
    if kind.startswith("Literal["):
        return f"one of {kind.removeprefix('Literal[').removesuffix(']')}"
    if kind.startswith(("dict", "list")):
        return "a mapping of names to values" if kind.startswith("dict") else "a list"
    return " or ".join(_WORDS.get(one, one) for one in kind.split(", "))


def _meant(given: str, key: str, known: Collection[str]) -> str:
    """Says that a key is unknown and which one is meant, with dashes if it was given as an option."""
    found = nearest(key, known)
    dashes = "--" if given.startswith("--") or "=" in given else ""
    return f"{given} is unknown" + ("" if found is None else f"; did you mean {dashes}{found}?")


def nearest(key: str, known: Collection[str]) -> str | None:
    """The known key that `key` most likely means; None if none is similar.

    A key that lacks its section (`learning_rate`) or has a wrong one is found by its last name.
    """
    parts = key.split(".")
    spelled = [_with_names(candidate, parts) for candidate in known]
    found = difflib.get_close_matches(key, spelled, n=1, cutoff=0.75)
    if not found or found[0].count(".") != key.count("."):
        last = {candidate.split(".")[-1]: candidate for candidate in reversed(spelled)}
        by_name = difflib.get_close_matches(parts[-1], last, n=1, cutoff=0.8)
        found = [last[name] for name in by_name] or found
    return found[0] if found else None


def _with_names(known: str, parts: Sequence[str]) -> str:
    """A known key whose `*` are replaced by the names at these places of a given key."""
    words = enumerate(known.split("."))
    return ".".join((parts[n] if n < len(parts) else "NAME") if word == ANY else word for n, word in words)


def find_line(file: Path, key: str) -> tuple[str, str] | None:
    """`FILE:LINE` of a key in a YAML file or in a file that a section of it names, and the key as it is there.

    A `*` in the key is any name. None if the key is nowhere.
    """
    return next(_places(file, key.split("."), []), None)


def _places(file: Path, parts: Sequence[str], before: list[str]) -> Iterator[tuple[str, str]]:
    import yaml

    def below(node: yaml.Node | None, parts: Sequence[str], before: list[str]) -> Iterator[tuple[str, str]]:
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if parts[0] in (ANY, name.value) and len(parts) == 1:
                    yield f"{file}:{name.start_mark.line + 1}", ".".join([*before, name.value])
                elif parts[0] in (ANY, name.value):
                    yield from below(value, parts[1:], [*before, str(name.value)])
        elif isinstance(node, yaml.ScalarNode) and str(node.value).endswith((".yaml", ".yml")):
            yield from _places(Path(os.path.normpath(file.parent / node.value)), parts, before)

    try:
        root = yaml.compose(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    yield from below(root, parts, before)

"""Reads YAML into dataclasses strictly: an unknown, repeated or missing key or a wrong type is an error naming the key.

jsonargparse, which reads run configurations, ignores an unknown section and does not say which entry of a nested list
or mapping is wrong.
"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llava_mole.common.errors import ConfigError

T = TypeVar("T")
LARGEST = 1e308


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key; YAML's own reader would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for n, key in enumerate(keys):
            if key in keys[:n]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path, kind: type[T]) -> T:
    """Read the dataclass `kind` from a file.

    Raises:
        ConfigError: unreadable file, unknown, repeated or missing key, or value of another type; the message names it.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    return read_value(kind, value, f"{path}")


def read_value(kind: type[T], value: Any, where: str) -> T:
    """Build the dataclass `kind` from plain values. Raises ConfigError as `load_yaml` does, beginning with `where`."""
    return typing.cast(T, _read(kind, value, where, ""))


def _read(kind: Any, value: Any, where: str, key: str) -> Any:
    """Return `value` as a `kind`: a dataclass, list[...], dict[str, ...], a union with None, or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)

    def check(right: bool, must: str) -> None:
        if not right:
            raise ConfigError(f"{where}: {key or 'the file'} must {must}; found {value!r}")

    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(arguments[0], value, where, key)
    if dataclasses.is_dataclass(kind):
        check(isinstance(value, dict), "map keys to values")
        return _read_fields(kind, value, where, f"{key}." if key else "")
    if origin is list:
        check(isinstance(value, list), "be a list")
        return [_read(arguments[0], item, where, f"{key}[{n}]") for n, item in enumerate(value)]
    if origin is dict:
        check(isinstance(value, dict) and all(isinstance(name, str) for name in value), "map names to values")
        return {name: _read(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        check(abs(value) < LARGEST, "be a finite number")  # JSON cannot represent NaN
        return float(value)
    check(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), f"be {kind.__name__}")
    return value


def _read_fields(kind: Any, value: dict[Any, Any], where: str, prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {known.name: known for known in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ConfigError(f"{where}: unknown key {prefix}{name}; allowed are {', '.join(fields)}")
    for name, known in fields.items():
        required = known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{where}: {prefix}{name} is missing")
    return kind(**{name: _read(hints[name], item, where, f"{prefix}{name}") for name, item in value.items()})

"""YAML files into dataclasses: every key is known and there once, every value has the field's type, or the file is
refused."""

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
    """Refuses a key that comes twice, of which YAML's own reader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for n, key in enumerate(keys):
            if key in keys[:n]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path, kind: type[T]) -> T:
    """The dataclass `kind` from the file.

    Raises:
        ConfigError: unreadable file, unknown, repeated or missing key, or value of another type; the message names it.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    return read_value(kind, value, f"{path}")


def read_value(kind: type[T], value: Any, where: str) -> T:
    """The dataclass `kind` from plain values. Raises ConfigError as `load_yaml` does; `where` begins the message."""
    return typing.cast(T, _read(kind, value, where, ""))


def _read(kind: Any, value: Any, where: str, key: str) -> Any:
    """`value` as a `kind`, which is a dataclass, list[...], dict[str, ...], a union with None, or a plain type."""
    at = f"{where}: {key or 'the file'}"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(next(a for a in arguments if a is not type(None)), value, where, key)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where, key, at)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{at} must be a list; found {value!r}")
        return [_read(arguments[0], item, where, f"{key}[{n}]") for n, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{at} must map names to values; found {value!r}")
        return {name: _read(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) < LARGEST:  # NaN is no JSON
            raise ConfigError(f"{at} must be a finite number; found {value!r}")
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{at} must be {kind.__name__}; found {value!r}")
    return value


def _read_fields(kind: Any, value: Any, where: str, key: str, at: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{at} must map keys to values; found {value!r}")
    hints, prefix = typing.get_type_hints(kind), f"{key}." if key else ""
    fields = {known.name: known for known in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ConfigError(f"{where}: unknown key {prefix}{name}; allowed are {', '.join(fields)}")
    for name, known in fields.items():
        required = known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{where}: {prefix}{name} is missing")
    return kind(**{name: _read(hints[name], item, where, f"{prefix}{name}") for name, item in value.items()})

"""JSON of any size: values, lines and errors as if the file were read whole, in the memory of a few records."""

import contextlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_mole.common.errors import DataError
from llava_mole.data import json_stream
from llava_mole.data.json_stream import iterate_json


@pytest.fixture(params=[7, 64, 1 << 20], ids=lambda size: f"blocks of {size}")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The window moves by this many bytes: every value is cut somewhere."""
    monkeypatch.setattr(json_stream, "_BLOCK", request.param)
    return request.param


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


VALUES: list[Any] = [
    {"id": 1, "text": "größer 图 🦉", "nested": [{"a": [1, 2, [3]]}, None, True]},
    'a string with ] and , and \\ and " and \n and [',
    -12345678901234567890,
    0.25e-3,
    [],
    {},
    "",
    False,
    {"long": "x" * 300},
    7,
]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_values_of_a_list(style: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(VALUES, **style))
    assert [value for value, _ in iterate_json(path)] == VALUES


@pytest.mark.usefixtures("block")
def test_lines_are_counted_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '\n[\n1, 2\n,\n\n{"a":\n3}, "x\\ny"\r\n ,4 ]\n')
    assert list(iterate_json(path)) == [(1, 3), (2, 3), ({"a": 3}, 6), ("x\ny", 7), (4, 8)]
    path = write(tmp_path / "b.jsonl", '\ufeff1\n\n {"a": 3} \r\n"\u2028"\n4')
    assert list(iterate_json(path)) == [(1, 1), ({"a": 3}, 3), ("\u2028", 4), (4, 5)]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[1,\n{"a": 2,}]', ":2: not valid JSON: "),
        ("[1,\n2,\n tru]", ":3: not valid JSON: Expecting value (column 2)"),
        ('[{"a": 1},   {"b" 2}]', ":1: not valid JSON: Expecting ':' delimiter (column 19)"),
        ("[1,\n\n" + '"abc', ":3: not valid JSON: Unterminated string"),
        ("[1,\n2", ":2: not valid JSON: ',' or ']' expected, found the end of the file"),
        ("[1\n2]", ":2: not valid JSON: ',' or ']' expected, found '2'"),
        ("[1]\n\n2", ":3: not valid JSON: more text after the end"),
        ("[1,\n]", ":2: not valid JSON: Expecting value"),
        ("", ":1: not a JSON list"),
        ("\n\n{}", ":3: not a JSON list"),
        (b'[1,\n2,\n"' + b"x" * 100 + b'\xff"]', ":3: byte 0xff is not UTF-8"),
        (b'["\xe5\x9b', ":1: byte 0xe5 is not UTF-8"),
        ("[" * 100_000, ":1: not valid JSON: nested too deeply"),
        ("[" + "1" * 5000 + "]", ":1: not valid JSON: Exceeds the limit"),
        ("[1, \0]", ":1: not valid JSON: Expecting value"),
    ],
)
def test_damage_is_named_with_its_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError) as caught:
        list(iterate_json(path))
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_a_line_of_100_mb_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"id": 1}\n{"id": "')
        file.seek(100 << 20)  # a sparse file of NUL bytes
        file.write(b'"}\n')
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a\.jsonl:2: a record of more than 1,048,576 bytes"):
            list(iterate_json(path, largest_value=1 << 20))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(DataError, match=r"a\.jsonl:2: a record of more than 67,108,864 bytes"):
        list(iterate_json(path))


@pytest.mark.parametrize("end", ['"]', ""])
def test_an_element_that_is_too_large_is_refused_early(end: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[1,\n"' + "x" * (30 << 20) + end)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a\.json:2: a record of more than 1,048,576 bytes"):
            list(iterate_json(path, largest_value=1 << 20))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    record = json.dumps({"text": "y" * 1000})
    path = write(tmp_path / "a.json", "[" + ",\n".join([record] * 20_000) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in iterate_json(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 10 << 20  # of 20 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_bytes_are_reported_as_they_are_read(name: str, tmp_path: Path) -> None:
    text = "\n".join(["[1]"] * 5) if name.endswith("l") else "[1,\n2]"
    path = write(tmp_path / name, text)
    seen: list[int] = []
    list(iterate_json(path, on_read=seen.append))
    assert sum(seen) == os.path.getsize(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(json_values, max_size=6), size=st.integers(1, 40), indent=st.sampled_from([None, 0, 2]))
def test_any_list_is_read_as_json_reads_it(values: list, size: int, indent: int | None, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(values, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_BLOCK", size)
        assert [value for value, _ in iterate_json(path)] == json.loads(path.read_text())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=60), st.text(alphabet='[]{},:"\\ \n\t0123e+-.tfn\ufeff图', max_size=60)))
def test_any_bytes_are_values_or_our_error(content: bytes | str, tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        path = write(tmp_path / name, content)
        with contextlib.suppress(DataError):
            list(iterate_json(path))

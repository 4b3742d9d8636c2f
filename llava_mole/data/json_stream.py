"""JSON files of any size, one value at a time: JSONL, or one list a file.

A list is decoded through a window of text that moves over the file, so a list of gigabytes takes a few megabytes of
memory. Every value comes with the line it starts on.
"""

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llava_mole.common.errors import DataError

LARGEST_VALUE = 64 << 20
"""Most bytes (characters in a list) of one value: beyond it the file is damaged or hostile, and memory is at stake."""
_BLOCK = 1 << 20
_GAP = re.compile(r"[ \t\r\n]*")
_BLANK = object()
_DECODER = json.JSONDecoder()
_NEAR_THE_END = 16
"""An error so close to the end of the window may come from its end: `tru`, `\\u12`, a missing bracket."""


def iterate_json(
    path: str | os.PathLike[str],
    *,
    largest_value: int = LARGEST_VALUE,
    on_read: Callable[[int], object] | None = None,
    on_error: Callable[[int, str], object] | None = None,
) -> Iterator[tuple[Any, int]]:
    """The values of a JSONL file (its name ends in `.jsonl`), or else the elements of a JSON list, in order.

    Args:
        path: UTF-8, with or without a byte order mark.
        largest_value: Most bytes of a line, or characters of an element.
        on_read: Called with the number of bytes just read, for a progress bar.
        on_error: Called with line and problem of a JSONL line that is no JSON, no UTF-8, too large or too deeply
            nested, which is then passed over; without it such a line raises. In a list nothing can be passed over.

    Yields:
        `(value, line)`, the line it starts on, from 1. JSONL lines without text are passed over.

    Raises:
        DataError: the file cannot be read, is no UTF-8 or no JSON, or holds a value that is too large or too deeply
            nested; the message starts with `file:line`.
    """
    path = Path(path)
    read = on_read or _ignore
    try:
        with path.open("rb") as file:
            if path.suffix == ".jsonl":
                yield from _lines(file, path, largest_value, read, on_error)
            else:
                yield from _Window(file, path, largest_value, read).elements()
    except OSError as error:
        raise DataError(f"{path}: cannot read the annotation file: {error.strerror}") from None


def _ignore(_: int) -> None:
    """No progress bar."""


def _lines(
    file: BinaryIO,
    path: Path,
    largest: int,
    read: Callable[[int], object],
    on_error: Callable[[int, str], object] | None,
) -> Iterator[tuple[Any, int]]:
    # A binary file breaks lines at "\n" only, not at the separators that JSON allows inside strings.
    line = 0
    while data := file.readline(largest + 1):
        line += 1
        read(len(data))
        try:
            if len(data) > largest:
                raise ValueError(f"{_too_large(largest)}; JSONL has one record a line")
            value = _parse_line(data, line)
        except ValueError as error:
            if on_error is None:
                raise DataError(f"{path}:{line}: {error}") from None
            on_error(line, str(error))
            while not data.endswith(b"\n") and (data := file.readline(_BLOCK)):
                read(len(data))
            continue
        if value is not _BLANK:
            yield value, line


def _parse_line(data: bytes, line: int) -> Any:
    """The value of a line, or `_BLANK`. Raises ValueError with the complete message."""
    try:
        text = data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_no_utf8(data[error.start])) from None
    if not text.strip():
        return _BLANK
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (column {error.colno}); JSONL has one record a line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(_unusual(error)) from None


class _Window:
    """A piece of the file's text, from which elements are decoded one after the other."""

    def __init__(self, file: BinaryIO, path: Path, largest: int, read: Callable[[int], object]) -> None:
        self._file, self._path, self._largest, self._read = file, path, largest, read
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._position = 0
        self._line = 1
        """Line of `_text[_counted]`."""
        self._counted = 0
        self._column = 0
        """Characters of the first line of `_text` that have been dropped from it."""
        self._newlines = 0
        """In all text that has been decoded."""
        self._ended = False

    def elements(self) -> Iterator[tuple[Any, int]]:
        if self._next_character() != "[":
            raise self._error(
                "not a JSON list; LLaVA's format is one list of records, and a file with one record a line must be "
                "named .jsonl"
            )
        self._position += 1
        expect_value = self._next_character() != "]"
        while expect_value:
            line = self._current_line()
            yield self._decode(), line
            expect_value = self._next_character() == ","
            if expect_value:
                self._position += 1
                self._next_character()
        found = self._next_character()
        if found != "]":
            shown = repr(found) if found else "the end of the file"
            raise self._error(f"not valid JSON: ',' or ']' expected, found {shown}; is the file complete?")
        self._position += 1
        if self._next_character():
            raise self._error("not valid JSON: more text after the end of the list")

    def _next_character(self) -> str:
        """The character at the position, after white space; empty at the end of the file."""
        while True:
            match = _GAP.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._more(_BLOCK)

    def _decode(self) -> Any:
        """The value at the position, behind which the position is then."""
        decode = _DECODER.raw_decode
        while True:
            problem, end = None, len(self._text)
            try:
                value, end = decode(self._text, self._position)
            except json.JSONDecodeError as error:
                problem = error
            except (ValueError, RecursionError) as error:
                raise self._error(_unusual(error)) from None
            size = end - self._position
            # "1", "1." and "1e+" may be the beginnings of another number.
            complete = problem is None and (end + len("e+") < len(self._text) or self._ended)
            if size > self._largest:
                raise self._error(_too_large(self._largest))
            if complete:
                self._position = end
                return value
            if problem is not None and (self._ended or not self._may_be_cut(problem)):
                raise self._json_error(problem)
            # The window grows by what it holds, so a large value is tried a few times only.
            self._more(max(_BLOCK, size))

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.pos >= len(self._text) - _NEAR_THE_END or error.msg.startswith("Unterminated string")

    def _more(self, size: int) -> None:
        """Drop what has been used and read on."""
        self._current_line()
        start = self._text.rfind("\n", 0, self._position) + 1
        self._column = self._position - start + (0 if start else self._column)
        kept, self._text = self._text[self._position :], ""
        self._counted = self._position = 0
        data = self._file.read(size)
        self._read(len(data))
        self._ended = not data
        try:
            new = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            line = 1 + self._newlines + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self._path}:{line}: {_no_utf8(error.object[error.start])}") from None
        self._newlines += new.count("\n")
        self._text = kept + new

    def _current_line(self) -> int:
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def _error(self, message: str) -> DataError:
        return DataError(f"{self._path}:{self._current_line()}: {message}")

    def _json_error(self, error: json.JSONDecodeError) -> DataError:
        line = self._current_line() + self._text.count("\n", self._position, error.pos)
        start = self._text.rfind("\n", 0, error.pos) + 1
        column = error.pos - start + 1 + (0 if start else self._column)
        return DataError(f"{self._path}:{line}: not valid JSON: {error.msg} (column {column})")


def _too_large(largest: int) -> str:
    return f"a record of more than {largest:,} bytes; is the file damaged? Images belong into files of their own"


def _no_utf8(byte: int) -> str:
    return f"byte {byte:#04x} is not UTF-8; convert the file"


def _unusual(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "not valid JSON: nested too deeply"
    return f"not valid JSON: {' '.join(str(error).split())[:200]}"

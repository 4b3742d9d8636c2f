"""JSON files of any size, one value at a time: JSONL, or a file that holds one list, also compressed.

A list is decoded from a window of text that moves over the file, so a list of gigabytes takes a few megabytes of
memory. Every value comes with the line on which it starts.
"""

import codecs
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llava_mole.common.errors import DataError

COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
"""Suffixes of compressed files, which pyarrow unpacks while they are read."""
PACKED = (*COMPRESSED, ".xz", ".lzma", ".br", ".z", ".zip", ".7z", ".rar")
"""Suffixes of compressed files, read or not."""
_LINES = (".jsonl", ".ndjson")
JSON_SUFFIXES = tuple(name + packed for name in (".json", *_LINES) for packed in ("", *COMPRESSED))
"""Ends of the names of JSON files, in lower case."""
LARGEST_VALUE = 64 << 20
"""Most bytes of a line, or characters of an element. A larger value means a damaged or hostile file."""
_BLOCK = 1 << 20
_GAP = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_NEAR_THE_END = 16
"""An error this close to the end of the window may be caused by it: `tru`, `\\u12`, a missing bracket."""


def iterate_json(
    path: str | os.PathLike[str],
    *,
    largest_value: int = LARGEST_VALUE,
    on_read: Callable[[int], object] = lambda size: None,
    on_error: Callable[[int, str], object] | None = None,
) -> Iterator[tuple[Any, int]]:
    """Yield the values of a JSONL file (named `.jsonl` or `.ndjson`) or the elements of a JSON list, in order.

    Args:
        path: UTF-8, with or without a byte order mark; one of `COMPRESSED` may follow in the name.
        largest_value: Most bytes of a line, or characters of an element.
        on_read: Called with the number of bytes just read (and unpacked), for a progress bar.
        on_error: Called with the line and the problem of a JSONL line that is not valid (JSON, UTF-8, size, nesting),
            which is then skipped. Without it such a line raises. A damaged list always raises.

    Yields:
        `(value, line)` with the line, from 1, on which the value starts. Blank lines of JSONL are skipped.

    Raises:
        DataError: the file cannot be read, is compressed in another way or is not UTF-8 or JSON, or a value is too
            large or too deeply nested; the message starts with `file:line`.
    """
    path = Path(path)
    if path.suffix.lower() in PACKED and not _compression(path):
        raise DataError(f"{path}: {path.suffix} files are not read; unpack it, or use one of {', '.join(COMPRESSED)}")
    try:
        with _open(path) as file:
            if path.name.lower().removesuffix(_compression(path)).endswith(_LINES):
                yield from _lines(file, path, largest_value, on_read, on_error)
            else:
                yield from _Window(file, path, largest_value, on_read).elements()
    except OSError as error:
        # Errors of unpacking have no number.
        reason = error.strerror or f"{' '.join(str(error).split())}; is it damaged or not complete?"
        raise DataError(f"{path}: cannot read the annotation file: {reason}") from None


def _compression(path: Path) -> str:
    """The suffix of a compressed file in lower case; empty for another file."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def _open(path: Path) -> BinaryIO:
    """The file for reading, unpacked if it is compressed. Raises OSError."""
    if not _compression(path):
        return path.open("rb")
    import pyarrow as pa

    names = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
    return io.BufferedReader(pa.input_stream(str(path), compression=names[_compression(path)]), _BLOCK)


def _lines(
    file: BinaryIO,
    path: Path,
    largest: int,
    on_read: Callable[[int], object],
    on_error: Callable[[int, str], object] | None,
) -> Iterator[tuple[Any, int]]:
    # A binary file breaks lines only at "\n", not at the separators that JSON allows inside strings.
    line = 0
    while data := file.readline(largest + 1):
        line += 1
        on_read(len(data))
        problem, text = "", ""
        if len(data) > largest:
            problem = f"{_too_large(largest)}; JSONL has one record per line"
        else:
            try:
                text = data.decode("utf-8-sig" if line == 1 else "utf-8")
                value = json.loads(text) if text.strip() else None
            except (ValueError, RecursionError) as error:
                problem = _problem(error)
        if problem:
            if on_error is None:
                raise DataError(f"{path}:{line}: {problem}")
            on_error(line, problem)
            while not data.endswith(b"\n") and (data := file.readline(_BLOCK)):
                on_read(len(data))
        elif text.strip():
            yield value, line


class _Window:
    """The part of the file from which elements are decoded."""

    def __init__(self, file: BinaryIO, path: Path, largest: int, on_read: Callable[[int], object]) -> None:
        self._file, self._path, self._largest, self._on_read = file, path, largest, on_read
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._position, self._ended = "", 0, False
        self._line, self._counted = 1, 0
        """The line of `_text[_counted]`."""
        self._column = 0
        """Characters of the first line of `_text` that were removed from it."""

    def elements(self) -> Iterator[tuple[Any, int]]:
        if self._peek() != "[":
            raise self._error(
                "not a JSON list; LLaVA's format is one list of records, and a file with one record per line must be "
                "named .jsonl (also .jsonl.gz, .jsonl.zst)"
            )
        self._position += 1
        more = self._peek() != "]"
        while more:
            line = self._current_line()
            yield self._decode(), line
            more = self._peek() == ","
            if more:
                self._position += 1
                self._peek()
        found = self._peek()
        if found != "]":
            shown = repr(found) if found else "the end of the file"
            raise self._error(f"not valid JSON: ',' or ']' expected, found {shown}; is the file complete?")
        self._position += 1
        if self._peek():
            raise self._error("not valid JSON: more text after the end of the list")

    def _peek(self) -> str:
        """Advance over white space and return the next character; empty at the end of the file."""
        while True:
            self._position = _GAP.match(self._text, self._position).end()  # type: ignore[union-attr]  # matches always
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._read_on(_BLOCK)

    def _decode(self) -> Any:
        """Decode the value at the position and advance past it."""
        while True:
            problem, end = None, len(self._text)
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                problem = error
            except (ValueError, RecursionError) as error:
                raise self._error(_problem(error)) from None
            if end - self._position > self._largest:
                raise self._error(_too_large(self._largest))
            if problem is None:
                # "1", "1." and "1e+" may be the beginning of another number.
                if end + len("e+") < len(self._text) or self._ended:
                    self._position = end
                    return value
            elif self._ended or not (
                problem.pos >= len(self._text) - _NEAR_THE_END or problem.msg.startswith("Unterminated string")
            ):
                start = self._text.rfind("\n", 0, problem.pos) + 1
                column = problem.pos - start + 1 + (0 if start else self._column)
                raise self._error(f"not valid JSON: {problem.msg} (column {column})", problem.pos)
            # The window grows by its own size, so a large value is tried only a few times.
            self._read_on(max(_BLOCK, end - self._position))

    def _read_on(self, size: int) -> None:
        """Remove the text before the position and append up to `size` bytes."""
        self._current_line()
        start = self._text.rfind("\n", 0, self._position) + 1
        self._column = self._position - start + (0 if start else self._column)
        self._text = self._text[self._position :]
        self._counted = self._position = 0
        data = self._file.read(size)
        self._on_read(len(data))
        self._ended = not data
        try:
            self._text += self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self._path}:{line}: {_problem(error)}") from None

    def _current_line(self) -> int:
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def _error(self, message: str, position: int = 0) -> DataError:
        line = self._current_line() + self._text.count("\n", self._position, max(position, self._position))
        return DataError(f"{self._path}:{line}: {message}")


def _problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.object[error.start]:#04x} is not UTF-8; convert the file"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno}); JSONL has one record per line"
    if isinstance(error, RecursionError):
        return "not valid JSON: nested too deeply"
    return f"not valid JSON: {' '.join(str(error).split())[:200]}"


def _too_large(largest: int) -> str:
    return f"a record of more than {largest:,} bytes; is the file damaged? Images belong in files of their own"

"""Text that people read: tables, sizes, times and lists, written one way everywhere."""

import argparse
from collections.abc import Collection, Sequence

HELP_WIDTH = 100
"""Columns of a command's help."""
UNPAIRED_SURROGATE = "unpaired surrogate; remove it"
"""Ends a message about a text that fails `is_text`."""


def whole_number(text: str) -> int:
    """Read an option's value, a whole number of at least 1; argparse reports the error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def is_text(text: str) -> bool:
    """Whether `text` can be encoded as UTF-8. An unpaired surrogate, which JSON can spell, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain(text: str) -> str:
    """A text as plain matching compares it: lower case, without outer blanks and without one trailing period."""
    return text.strip().removesuffix(".").strip().lower()


def format_seconds(seconds: float) -> str:
    """A duration, for example `42s`, `3m 05s`, `2h 07m` or `3d 04h`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def format_bytes(size: int) -> str:
    """A size with a decimal unit, for example `12.3 MB`."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min((len(str(size)) - 1) // 3, len(units) - 1)
    return f"{size / 1000**power:.{1 if power else 0}f} {units[power]}"


def count_of(number: int, noun: str) -> str:
    """A number with its noun, for example `1 rank`, `3,000 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shorten(names: Sequence[str], shown: int = 3) -> str:
    """The first names and how many follow, for example `a, b, c and 2 more`."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest:,} more" if rest > 0 else "")


def format_table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Columns padded to their widest cell, two blanks between them, a rule under the first row.

    Args:
        rows: The header and the rows, all of one length.
        right: Columns, from 0, that are aligned to the right.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in cells).rstrip())
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])

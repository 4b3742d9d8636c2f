"""Text that people read: tables, sizes and lists, written one way everywhere."""

from collections.abc import Sequence


def format_bytes(size: int) -> str:
    """With a decimal unit, for example `12.3 MB`."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min((len(str(size)) - 1) // 3, len(units) - 1)
    return f"{size / 1000**power:.{1 if power else 0}f} {units[power]}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, two blanks between them, a rule under the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])

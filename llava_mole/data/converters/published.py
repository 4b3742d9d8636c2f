"""What is published about the sets, and how it looks beside what was converted."""

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


@functools.cache
def published_counts() -> dict[str, Any]:
    """Source -> split -> sub-source (or `total`) -> count; a text such as `558K` is rounded."""
    return json.loads((files(__package__) / "published.json").read_text(encoding="utf-8"))


def report_text(report: Mapping[str, Any]) -> str:
    """The tables that `prepare` prints: counts by split and sub-source, and defects by kind."""
    published = published_counts().get(report["published"], {})
    rows: list[tuple[str, ...]] = [("split", "sub-source", "records", "no image", "published")]
    splits = list(dict.fromkeys(record["split"] for record in report["records"]))
    for split in sorted(splits, key=("train", "val", "test").index):
        known = published.get(split, {})
        records = [record for record in report["records"] if record["split"] == split]
        for record in sorted(records, key=lambda record: -record["kept"]):
            rows.append(_row(split, record["sub_source"], [record], known.get(record["sub_source"])))
        absent = [name for name in known if name != "total" and name not in {r["sub_source"] for r in records}]
        rows += [(split, name, "-", "-", _number(known[name])) for name in absent]
        if len(records) + len(absent) > 1 or "total" in known:
            rows.append(_row(split, "total", records, known.get("total")))
    lines = _table(rows, right_from=2)
    if published:
        lines.append(f"(published: {published['from']})")
    if report["defects"]:
        defects: list[tuple[str, ...]] = [("defect", "records", "what was done", "meaning")]
        defects += [(d["kind"], _number(d["count"]), d["action"], d["meaning"]) for d in report["defects"]]
        lines += ["", *_table(defects, right_from=1, right_to=2)]
    if report["ignored_keys"]:
        keys = ", ".join(f"{key} ({_number(count)})" for key, count in report["ignored_keys"].items())
        lines += ["", f"ignored keys: {keys}"]
    return "\n".join(lines).encode(errors="replace").decode()  # names in raw data may be no text


def _row(split: str, name: str, records: list[dict[str, Any]], known: Any) -> tuple[str, ...]:
    kept = sum(record["kept"] for record in records)
    dropped = sum(record["dropped_for_images"] for record in records)
    return split, name, _number(kept), _number(dropped), _number(known)


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"about {value}"


def _table(rows: list[tuple[str, ...]], right_from: int, right_to: int | None = None) -> list[str]:
    """Lines of a table whose columns `right_from` to `right_to` hold numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) if right_to is None else right_to
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if right_from <= i < last else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]

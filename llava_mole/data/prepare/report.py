"""What is published about the sets, and how it looks beside what was converted."""

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.data.prepare.drafts import Draft
from llava_mole.data.prepare.images import safe_name


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


class QuestionFiles:
    """Writes `<folder>/<split>.jsonl`, or `<split>_<category>.jsonl` for each set of a source with several test files.

    Every round of a conversation is a question: `question_id`, `image` (absent where there is none), `text` without the
    marker, `category`, `answer`, `answers` and `answer_type`. Ids that come again get a suffix.
    """

    def __init__(self, folder: Path, by_source: bool) -> None:
        self._folder = folder
        self._by_source = by_source
        self._files: dict[str, TextIO] = {}
        self._ids: dict[str, int] = {}
        """Every id -> the last number that was put behind it."""
        self.counts: dict[str, int] = {}
        """Questions of each file."""

    def add(self, draft: Draft, image: str | None) -> None:
        """Append the questions of a draft with one image or none."""
        category = draft.category or draft.source
        rounds = [
            (question.text, answer.text)
            for question, answer in zip(draft.turns[::2], draft.turns[1::2], strict=False)
            if answer.text.strip()
        ]
        name = f"{draft.split}_{safe_name(draft.source)}" if self._by_source else draft.split
        for number, (question, answer) in enumerate(rounds, 1):
            identifier = draft.id if len(rounds) == 1 else f"{draft.id}-{number}"
            line: dict[str, object] = {"question_id": self._unused(identifier)}
            if image is not None:
                line["image"] = image
            line["text"] = question.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            line |= {"category": category, "answer": answer, "answers": [answer]}
            if draft.answer_type is not None:
                line["answer_type"] = draft.answer_type
            self._file(name).write(json.dumps(line) + "\n")
            self.counts[name] += 1

    def _unused(self, identifier: str) -> str:
        unused = identifier
        while unused in self._ids:
            self._ids[identifier] += 1
            unused = f"{identifier}#{self._ids[identifier]}"
        self._ids[unused] = 1
        return unused

    def _file(self, name: str) -> TextIO:
        if name not in self._files:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files[name] = (self._folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n")
            self.counts[name] = 0
        return self._files[name]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

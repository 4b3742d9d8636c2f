"""The report of `prepare` (counts beside the published ones, and defects by kind), and its question files."""

import functools
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

from llava_mole.common.text import format_table
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.data.prepare.defects import SHOWN_KINDS
from llava_mole.data.prepare.images import safe_name
from llava_mole.data.prepare.samples import SPLITS, RawSample, without_marker


@functools.cache
def published_counts() -> dict[str, Any]:
    """Return source -> split -> sub-source (or `total`) -> count; a rounded count is a text such as `558K`."""
    return json.loads((files(__package__) / "published.json").read_text(encoding="utf-8"))


def report_text(report: Mapping[str, Any]) -> str:
    """Return the tables that `prepare` prints: counts by split and sub-source, and defects by kind."""
    published = published_counts().get(report["published"], {})
    rows: list[tuple[str, ...]] = [("split", "sub-source", "records", "no image", "published")]
    for split in SPLITS:
        known = published.get(split, {})
        records = [record for record in report["records"] if record["split"] == split]
        if not records:
            continue
        for record in sorted(records, key=lambda record: -record["kept"]):
            rows.append(_row(split, record["sub_source"], [record], known.get(record["sub_source"])))
        absent = [name for name in known if name != "total" and name not in {r["sub_source"] for r in records}]
        rows += [(split, name, "-", "-", _number(known[name])) for name in absent]
        if len(records) + len(absent) > 1 or "total" in known:
            rows.append(_row(split, "total", records, known.get("total")))
    parts = [format_table(rows, right=(2, 3, 4))]
    if published:
        parts.append(f"(published: {published['from']})")
    if report["defects"]:
        defects: list[tuple[str, ...]] = [("defect", "records", "action", "meaning")]
        defects += [(d["kind"], _number(d["count"]), d["action"], d["meaning"]) for d in report["defects"]]
        parts += ["", format_table(defects, right=(1,))]
        parts += [f"{d['kind']}, first: {d['first']}" for d in report["defects"] if d["kind"] in SHOWN_KINDS]
    if report["ignored_keys"]:
        keys = ", ".join(f"{key} ({_number(count)})" for key, count in report["ignored_keys"].items())
        parts += ["", f"ignored keys: {keys}"]
    return "\n".join(parts).encode(errors="replace").decode()  # names in raw data may hold unpaired surrogates


def _row(split: str, name: str, records: list[dict[str, Any]], known: Any) -> tuple[str, ...]:
    kept = sum(record["kept"] for record in records)
    dropped = sum(record["dropped_for_images"] for record in records)
    return split, name, _number(kept), _number(dropped), _number(known)


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"about {value}"


class QuestionFiles:
    """Writes `<folder>/<split>.jsonl`, or one `<split>_<sub-source>.jsonl` for each sub-source.

    Every round of a conversation is a question: `question_id`, `image` (a path, or a list of them), `text`,
    `category`, `answer`, `answers` and, where the source has it, `answer_type`. Repeated ids get a suffix.

    Args:
        folder: Created with the first question.
        by_sub_source: Whether each sub-source gets a file of its own.
    """

    def __init__(self, folder: Path, by_sub_source: bool) -> None:
        self._folder = folder
        self._by_sub_source = by_sub_source
        self._files: dict[str, TextIO] = {}
        self._ids: dict[str, int] = {}
        """Id -> the last number that was appended to it."""
        self.counts: dict[str, int] = {}
        """Questions in each file."""

    def add(self, sample: RawSample, images: Sequence[str]) -> None:
        """Append the questions of a sample.

        A question is about the images that have been shown up to its round, and text keeps its `<image>` if these are
        several. If some belong to earlier rounds, they come first.
        """
        several, rounds = len(images) > 1, []
        shown = 0 if several else len(images)
        for user, model in zip(sample.turns[::2], sample.turns[1::2], strict=False):
            text, own = without_marker(user.text), user.text.count(DEFAULT_IMAGE_TOKEN)
            if several:
                text = f"{DEFAULT_IMAGE_TOKEN}\n" * shown + user.text if own and shown + own > 1 else text
                shown += own
            if model.text.strip():
                rounds.append((text.strip(), images[:shown], model.text))
        name = f"{sample.split}_{safe_name(sample.source)}" if self._by_sub_source else sample.split
        for number, (question, own_images, answer) in enumerate(rounds, 1):
            identifier = sample.id if len(rounds) == 1 else f"{sample.id}-{number}"
            line: dict[str, object] = {"question_id": self._unused(identifier)}
            if own_images:
                line["image"] = own_images[0] if len(own_images) == 1 else list(own_images)
            line["text"] = question
            line |= {"category": sample.category or sample.source, "answer": answer, "answers": [answer]}
            if sample.answer_type is not None:
                line["answer_type"] = sample.answer_type
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

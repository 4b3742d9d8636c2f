"""What is wrong with raw data, by kind: counted for the report and listed, one line each, in `defects.jsonl`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

Action = Literal["dropped", "repaired", "kept"]

KINDS: dict[str, str] = {
    "missing-image": "the image file is not there",
    "outside-image": "absolute path, '..', or a link that leads out of the image folder",
    "remote-image": "the image is a web address; nothing is downloaded",
    "corrupt-image": "the image cannot be decoded",
    "too-large-image": "more pixels than Pillow decodes (a decompression bomb)",
    "animated-image": "several frames; training sees the first",
    "cmyk-image": "CMYK pixels; training sees them converted to RGB",
    "wrong-extension": "the content is of another format than the file's name says",
    "base64": "the base64 text is not valid",
    "base64-spaces": "white space inside the base64 text",
    "no-image": "a record without an image where each must have one",
    "several-images": "more than one image",
    "several-images-question": "a test row with more than one image; the evaluation reads one",
    "tiff-page": "a page of a TIFF file that is not its first; --images unpack takes it out",
    "id-again": "an id that an earlier record has; `where` tells them apart",
    "empty-answer": "no answer with text",
    "none-answer": "the answer is the word None, which the source uses for an absent field",
    "unknown-role": "a turn of a role that has no meaning here",
    "merged-turns": "neighbouring turns of one role, joined",
    "turn-order": "turns do not alternate, or none is the user's",
    "first-answer": "an answer that no question precedes",
    "marker": "the number of <image> markers and of images differ, or a marker stands in an answer",
    "marker-again": "several markers in one turn for one image",
    "misspelt-key": "a key that the source misspells",
    "many-sources": "more sub-sources than are told apart; counted as `images` or `text`",
    "ignored-keys": "keys that training does not read",
    "system-turn": "a system prompt of its own; the template brings one",
    "no-instruction": "no instruction, and none to draw one from",
    "bad-record": "a value of the wrong type",
    "bad-json": "a line that is no JSON",
    "bad-text": "characters that are no text",
}
"""Kind -> what it means."""


class Defects:
    """Counts defects and lists them in a file.

    Args:
        path: The list file; each line is `{"where", "kind", "action", "detail"}`. None lists nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.counts: Counter[tuple[str, Action]] = Counter()
        self.ignored_keys: Counter[str] = Counter()
        """How many records hold each key that training does not read."""
        self._file = None if path is None else path.open("w", encoding="utf-8", newline="\n")

    def add(self, kind: str, where: str, detail: str = "", action: Action = "dropped") -> None:
        """Count one defect; `kind` is one of `KINDS`."""
        if kind not in KINDS:
            raise KeyError(kind)
        self.counts[kind, action] += 1
        if self._file is not None:
            line = {"where": where, "kind": kind, "action": action, "detail": detail[:300]}
            self._file.write(json.dumps(line, ensure_ascii=True) + "\n")

    def close(self) -> None:
        """Close the list file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def rows(self) -> list[dict[str, Any]]:
        """`{kind, action, count, meaning}`, most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [
            {"kind": kind, "action": action, "count": count, "meaning": KINDS[kind]}
            for (kind, action), count in ordered
        ]

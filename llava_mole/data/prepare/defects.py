"""Defects of raw data: the table of their kinds, shared with `check-data`, and the counter of `prepare`."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

KINDS: dict[str, str] = {
    # Records.
    "bad-json": "a line that is not JSON",
    "bad-record": "a value of the wrong type, or a shape that the template cannot hold",
    "bad-text": "an unpaired surrogate, which UTF-8 cannot encode",
    "duplicate": "a record that appears again, word for word",
    "id-again": "an id that an earlier record has; `where` tells them apart",
    "ignored-keys": "keys that training does not read",
    "misspelt-key": "a key that the source misspells",
    "many-sources": "too many sub-sources; counted as `images` or `text`",
    "no-instruction": "no instruction, and none to draw one from",
    # Turns.
    "unknown-role": "a turn of an unknown role",
    "turn-order": "turns that do not alternate, or none from the user",
    "merged-turns": "consecutive turns of one role, joined",
    "first-answer": "an answer before the first question",
    "system-turn": "a system prompt in the record; the template has its own",
    "empty-answer": "an answer without text",
    "none-answer": "the answer is the word None, which the source uses for an absent field",
    "marker": "the numbers of <image> markers and images differ, or an answer holds a marker",
    "marker-again": "several markers in one turn for one image",
    "special-token": "a control token inside a text, which data.special_tokens keeps, escapes or refuses",
    "chat-marker": "a word that the template writes around turns (such as USER:) inside a text",
    "image-like": "a text like <img> or <image_1>; only <image> stands for an image",
    "image-key": "an image, video or sound under a key that is not read; name it image or images",
    # Length in tokens.
    "too-long": "longer than data.max_length; with data.max_length_policy error training does not start",
    "truncated": "longer than data.max_length, cut at the end",
    "shortened": "longer than data.max_length, trained on without its oldest rounds",
    "dropped": "longer than data.max_length, left out",
    "image-cut": "an image beyond data.max_length",
    "masked": "no supervised token, or none before data.max_length",
    # Images.
    "missing-image": "the image file does not exist",
    "outside-image": "absolute path, '..', or a link that leads out of the image folder",
    "remote-image": "a web address instead of a path; nothing is downloaded",
    "corrupt-image": "the image cannot be decoded",
    "too-large-image": "more pixels than Pillow decodes (a decompression bomb), or too many bytes",
    "huge-image": "more pixels than check.huge_pixels",
    "narrow-image": "too narrow for data.image_aspect_ratio anyres; training takes another record in its place",
    "animated-image": "several frames; training sees the first",
    "deep-image": "16-bit, 32-bit or float pixels; data.image_modes says what training sees",
    "not-finite-image": "NaN or infinite pixels",
    "transparent-image": "transparent pixels; data.image_modes says what training sees",
    "rotated-image": "stored rotated (EXIF); data.image_modes says what training sees",
    "refused-image": "pixels that data.image_modes refuses",
    "cmyk-image": "CMYK pixels; training sees them converted to RGB",
    "wrong-extension": "the content has another format than the file name says",
    "base64": "the base64 text is not valid",
    "base64-spaces": "white space inside the base64 text",
    "no-image": "a record without an image in a source where every record must have one",
    "several-images": "more than one image",
    "tiff-page": "a page of a TIFF file other than the first; --images unpack extracts it",
}
"""Kind -> what it means."""

REFUSED_RECORD = ("bad-json", "bad-record", "unknown-role", "marker", "marker-again", "turn-order", "empty-answer",
                  "bad-text", "image-cut", "image-key", "masked", "too-long")  # fmt: skip
"""Kinds of defects with which training does not start."""
OVERLONG_RECORD = ("truncated", "shortened", "dropped")
"""Kinds of records longer than `data.max_length` that `data.max_length_policy` allows."""
MISSING_IMAGE = ("missing-image", "outside-image", "remote-image")
BAD_IMAGE = ("corrupt-image", "too-large-image", "refused-image", "narrow-image")
SHOWN_KINDS = ("deep-image", "not-finite-image", "transparent-image", "rotated-image", "refused-image", "image-key")
"""Kinds of which reports also print the first."""

Action = Literal["dropped", "repaired", "kept"]


class Issue(NamedTuple):
    """One defect: a kind of `KINDS`, and what exactly was found."""

    kind: str
    detail: str


class SkipRecord(Exception):
    """Raised to leave out the current record; `usable_samples` counts it and continues."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class Defects:
    """Counts defects and lists them in a file.

    Args:
        path: The list file; each line is `{"where", "kind", "action", "detail"}`. None counts only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.counts: Counter[tuple[str, Action]] = Counter()
        self.first: dict[str, str] = {}
        """Kind -> where and what the first defect was."""
        self.ignored_keys: Counter[str] = Counter()
        """How many records hold each key that training does not read."""
        self._file = None if path is None else path.open("w", encoding="utf-8", newline="\n")

    def add(self, kind: str, where: str, detail: str = "", action: Action = "dropped") -> None:
        """Count one defect. Raises KeyError if `kind` is not in `KINDS`."""
        if kind not in KINDS:
            raise KeyError(kind)
        self.counts[kind, action] += 1
        self.first.setdefault(kind, f"{where}: {detail[:300]}")
        if self._file is not None:
            line = {"where": where, "kind": kind, "action": action, "detail": detail[:300]}
            self._file.write(json.dumps(line, ensure_ascii=True) + "\n")

    def add_ignored_keys(self, keys: Iterable[Any], where: str) -> None:
        """Count the keys of one record that training does not read, if there are any."""
        names = sorted(map(str, keys))
        if names:
            self.ignored_keys.update(names)
            self.add("ignored-keys", where, ", ".join(names), "kept")

    def close(self) -> None:
        """Close the list file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def rows(self) -> list[dict[str, Any]]:
        """Return `{kind, action, count, meaning, first}` for each kind and action, most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [
            {"kind": kind, "action": action, "count": count, "meaning": KINDS[kind], "first": self.first[kind]}
            for (kind, action), count in ordered
        ]

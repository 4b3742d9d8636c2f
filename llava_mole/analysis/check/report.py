"""How the findings of `llava-mole check-data` are judged and shown: limits, table, JSON, picture."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from llava_mole.common.figures import COLORS, new_figure, save_figure, tidy
from llava_mole.config import CheckConfig

BAD_RECORD = ("bad-json", "bad-record", "unknown-role", "marker", "marker-again", "turn-order", "empty-answer",
              "bad-text", "image-cut", "masked", "too-long")  # fmt: skip
"""Kinds of findings that training refuses."""
MISSING_IMAGE = ("missing-image", "outside-image", "remote-image")
BAD_IMAGE = ("corrupt-image", "too-large-image")
NOTED_IMAGE = ("huge-image", "cmyk-image", "animated-image", "wrong-extension")


@dataclass
class SourceFindings:
    """What was found in one source."""

    name: str
    records: int = 0
    """Including those that cannot be used."""
    text_only: int = 0
    images: int = 0
    """Different image files."""
    duplicates: int = 0
    truncated: int = 0
    """Longer than `data.max_length`, and cut, shortened or dropped as `data.max_length_policy` says."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Findings by kind."""
    tokens: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Tokens of every usable record before any cut; empty where they were not counted."""

    def share(self, kinds: Iterable[str], of: int) -> float:
        """Findings of some kinds as a share."""
        return sum(self.kinds[kind] for kind in kinds) / of if of else 0.0


class FindingsFile:
    """Lists every finding, one JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, source: SourceFindings, kind: str, where: str, detail: str) -> None:
        """Count a finding and list it."""
        source.kinds[kind] += 1
        line = {"source": source.name, "kind": kind, "where": where, "detail": detail[:300]}
        self._file.write(json.dumps(line) + "\n")


MEANINGS = {
    "bad-json": "a line that is no JSON",
    "bad-record": "a value of the wrong type, or a shape that the template cannot hold",
    "unknown-role": "a turn that is neither human nor gpt",
    "marker": "the number of <image> markers and of images differ, or a marker stands in an answer",
    "marker-again": "several markers for one image",
    "turn-order": "turns do not alternate",
    "empty-answer": "no answer with text",
    "bad-text": "characters that are no text",
    "image-cut": "an image behind data.max_length",
    "masked": "no supervised token, or none before data.max_length",
    "too-long": "longer than data.max_length; with data.max_length_policy error training does not start",
    "truncated": "longer than data.max_length, cut at the end",
    "shortened": "longer than data.max_length, trained on without its oldest rounds",
    "dropped": "longer than data.max_length, left out",
    "duplicate": "a record that is there again, word for word",
    "missing-image": "the image file is not there",
    "outside-image": "an image path that leads out of the image folder",
    "remote-image": "a web address instead of an image path",
    "corrupt-image": "the image does not decode",
    "too-large-image": "more pixels than Pillow decodes",
    "huge-image": "more than check.huge_pixels",
    "cmyk-image": "CMYK pixels, trained on as RGB",
    "animated-image": "several frames, the first is trained on",
    "wrong-extension": "content of another format than the name says",
}


class Verdict(NamedTuple):
    """One limit of the configuration and how a source does."""

    source: str
    limit: str
    """Field of section `check`."""
    share: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the share is within the limit."""
        return self.share <= self.allowed


IMAGE_LIMITS = ("max_missing_images", "max_bad_images", "max_overlap")


def left_out(*, tokens: bool, images: bool, evaluation: bool) -> dict[str, str]:
    """The limits that were not checked, each with the reason.

    Args:
        tokens: Whether tokens were counted.
        images: Whether images were opened.
        evaluation: Whether there are evaluation images to compare with.
    """
    limits = {} if tokens else {"max_truncated": "--no-tokens"}
    if not images:
        return {**limits, **dict.fromkeys(IMAGE_LIMITS, "--no-images")}
    return limits if evaluation else {**limits, "max_overlap": "check.evaluation_images is empty"}


def judge(
    sources: Sequence[SourceFindings], overlap: float, check: CheckConfig, not_checked: Collection[str] = ()
) -> list[Verdict]:
    """Every limit that was checked for every source, and that of the overlap."""
    verdicts = []
    for source in sources:
        records = source.records
        shares = {
            "max_bad_records": source.share(BAD_RECORD, records),
            "max_missing_images": source.share(MISSING_IMAGE, source.images),
            "max_bad_images": source.share(BAD_IMAGE, source.images),
            "max_truncated": source.truncated / records if records else 0.0,
            "max_duplicates": source.duplicates / records if records else 0.0,
        }
        verdicts += [
            Verdict(source.name, limit, share, getattr(check, limit))
            for limit, share in shares.items()
            if limit not in not_checked
        ]
    if "max_overlap" not in not_checked:
        verdicts.append(Verdict("evaluation images", "max_overlap", overlap, check.max_overlap))
    return verdicts


def report_text(
    sources: Sequence[SourceFindings],
    evaluated: int,
    shared: Sequence[str],
    verdicts: Sequence[Verdict],
    not_checked: Mapping[str, str],
) -> str:
    """What is printed: a line a source, the findings by kind, and which limits are passed and which not checked."""
    rows: list[tuple[str, ...]] = [
        ("source", "records", "text only", "images", "mean tokens", "longest", "truncated", "duplicates")
    ]
    for source in sources:
        tokens = source.tokens
        mean, longest = (f"{tokens.mean():.0f}", f"{tokens.max()}") if tokens.size else ("-", "-")
        numbers = (source.records, source.text_only, source.images)
        more = (source.truncated, source.duplicates)
        rows.append((source.name, *(f"{n:,}" for n in numbers), mean, longest, *(f"{n:,}" for n in more)))
    lines = _table(rows)
    kinds = [(source, kind, count) for source in sources for kind, count in source.kinds.most_common()]
    if kinds:
        found: list[tuple[str, ...]] = [("source", "finding", "number", "meaning")]
        found += [(source.name, kind, f"{count:,}", MEANINGS[kind]) for source, kind, count in kinds]
        lines += ["", *_table(found, left=(0, 1, 3))]
    else:
        lines += ["", "no findings"]
    if evaluated:
        lines += ["", f"evaluation images: {evaluated:,}, of which {len(shared):,} are trained on"]
        lines += [f"  {name}" for name in shared[:5]]
    lines.append("")
    for verdict in verdicts:
        if not verdict.passed:
            share = f"{verdict.share:.2%} > {verdict.allowed:.2%}"
            lines.append(f"FAILED  {verdict.source}: {share} (check.{verdict.limit})")
    failed = sum(not verdict.passed for verdict in verdicts)
    lines.append(f"{len(verdicts) - failed} of {len(verdicts)} limits passed")
    if not_checked:
        lines.append("not checked: " + ", ".join(f"{limit} ({reason})" for limit, reason in not_checked.items()))
    return "\n".join(lines)


def report_values(
    sources: Sequence[SourceFindings],
    evaluated: int,
    shared: Sequence[str],
    verdicts: Sequence[Verdict],
    not_checked: Mapping[str, str],
) -> dict[str, Any]:
    """The same as plain values; `passed` speaks of the limits that were checked."""
    return {
        "passed": all(verdict.passed for verdict in verdicts),
        "sources": [
            {
                "name": source.name,
                "records": source.records,
                "text_only": source.text_only,
                "images": source.images,
                "truncated": source.truncated,
                "duplicates": source.duplicates,
                "findings": dict(source.kinds),
                "tokens": _quantiles(source),
            }
            for source in sources
        ],
        "evaluation_images": {"files": evaluated, "trained_on": list(shared)},
        "limits": [{**verdict._asdict(), "passed": verdict.passed} for verdict in verdicts],
        "not_checked": dict(not_checked),
    }


def _quantiles(source: SourceFindings) -> dict[str, float]:
    if not source.tokens.size:
        return {}
    points = np.quantile(source.tokens, (0.5, 0.9, 0.99))
    names = ("median", "p90", "p99")
    quantiles = {name: float(point) for name, point in zip(names, points, strict=True)}
    return {"mean": float(source.tokens.mean()), **quantiles, "max": float(source.tokens.max())}


def draw_lengths(sources: Sequence[SourceFindings], max_length: int, path: Path) -> Path:
    """A histogram of token lengths for each source, with the cut at `max_length`, as PNG."""
    counted = [source for source in sources if source.tokens.size]
    figure = new_figure(8, 1.2 + 1.6 * len(counted))
    longest = max(int(source.tokens.max()) for source in counted)
    # Where nothing comes near the cut, the picture is of the lengths, not of the empty room up to it.
    end = max(longest, max_length) if max_length <= 2 * longest else longest
    width = max(1, end // 80)
    edges = np.arange(0, end + 1 + width, width)  # whole numbers, the longest record included
    for number, source in enumerate(counted):
        axes = figure.add_subplot(len(counted), 1, number + 1)
        axes.hist(source.tokens, bins=edges, color=COLORS[number % len(COLORS)])
        axes.set_xlim(0, end + 1)
        if max_length <= end:
            axes.axvline(max_length, color="#444444", linestyle="--", linewidth=1)
        cut = f"{source.truncated:,} beyond" if source.truncated else "none beyond"
        last = number == len(counted) - 1
        title = f"{source.name}: {source.tokens.size:,} records, {cut} max_length {max_length:,}"
        tidy(axes, title, "tokens" if last else "", "records")
    return save_figure(figure, path)


def _table(rows: list[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


_EMPTY = 0


def key_of(data: bytes) -> int:
    """64 bits of the BLAKE2b hash of `data`, never 0; the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def key_of_text(text: str) -> int:
    """The key of a text; halves of surrogate pairs, which JSON can spell, are allowed."""
    return key_of(text.encode("utf-8", "surrogatepass"))


class Keys:
    """A set of keys, made by `key_of`: open addressing with linear probing, at most 70 % full."""

    def __init__(self) -> None:
        self._slots = array("Q", (_EMPTY,)) * 1024
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: int) -> bool:
        return self._slots[self._slot(key)] != _EMPTY

    def add(self, key: int) -> bool:
        """Add a key; returns whether it is new."""
        slot = self._slot(key)
        if self._slots[slot] != _EMPTY:
            return False
        self._slots[slot] = key
        self._count += 1
        if self._count > 0.7 * len(self._slots):
            self._grow()
        return True

    def _slot(self, key: int) -> int:
        """Where the key is, or the empty slot where it belongs."""
        slots = self._slots
        mask = len(slots) - 1
        slot = key & mask
        while slots[slot] not in (_EMPTY, key):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", (_EMPTY,)) * (2 * len(old))
        for key in old:
            if key != _EMPTY:
                self._slots[self._slot(key)] = key

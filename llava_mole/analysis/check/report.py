"""How the findings of `llava-mole check-data` are counted, judged and shown: limits, tables, JSON, figure."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from llava_mole.common.figures import COLORS, new_figure, save_figure, tidy
from llava_mole.common.text import format_table
from llava_mole.config import CheckConfig
from llava_mole.data.prepare.defects import BAD_IMAGE, KINDS, MISSING_IMAGE, REFUSED_RECORD


@dataclass
class SourceFindings:
    """What was found in one source."""

    name: str
    records: int = 0
    """All records, including those that cannot be used."""
    text_only: int = 0
    images: int = 0
    """Distinct image files."""
    duplicates: int = 0
    truncated: int = 0
    """Records longer than `data.max_length` that `data.max_length_policy` cuts, shortens or drops."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Findings by kind."""
    tokens: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Tokens of each usable record before any cut; empty if they were not counted."""

    def share(self, kinds: Iterable[str], of: int) -> float:
        """The findings of some kinds, divided by `of`."""
        return sum(self.kinds[kind] for kind in kinds) / of if of else 0.0


class FindingsFile:
    """Writes every finding as one JSON line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, source: SourceFindings, kind: str, where: str, detail: str) -> None:
        """Count a finding and list it."""
        source.kinds[kind] += 1
        line = {"source": source.name, "kind": kind, "where": where, "detail": detail[:300]}
        self._file.write(json.dumps(line) + "\n")


class Verdict(NamedTuple):
    """One limit of the configuration and the share that it is compared with."""

    source: str
    limit: str
    """Field of section `check`."""
    share: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the share is within the limit."""
        return self.share <= self.allowed


def left_out(*, tokens: bool, images: bool, evaluation: bool) -> dict[str, str]:
    """The limits that are not checked, each with the reason.

    Args:
        tokens: Whether tokens were counted.
        images: Whether images were opened.
        evaluation: Whether there are evaluation images to compare with.
    """
    limits = {} if tokens else {"max_truncated": "--no-tokens"}
    if not images:
        return limits | dict.fromkeys(("max_missing_images", "max_bad_images", "max_overlap"), "--no-images")
    return limits if evaluation else limits | {"max_overlap": "check.evaluation_images is empty"}


def judge(
    sources: Sequence[SourceFindings], overlap: float, check: CheckConfig, not_checked: Collection[str] = ()
) -> list[Verdict]:
    """Compare every checked limit with the share of each source, and `max_overlap` with `overlap`."""
    verdicts = []
    for source in sources:
        records = source.records
        shares = {
            "max_bad_records": source.share(REFUSED_RECORD, records),
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
    """The printed report: one line a source, the findings by kind, the failed limits and those not checked."""
    rows: list[tuple[str, ...]] = [
        ("source", "records", "text only", "images", "mean tokens", "longest", "truncated", "duplicates")
    ]
    for source in sources:
        tokens = source.tokens
        mean, longest = (f"{tokens.mean():.0f}", f"{tokens.max()}") if tokens.size else ("-", "-")
        numbers = (source.records, source.text_only, source.images)
        more = (source.truncated, source.duplicates)
        rows.append((source.name, *(f"{n:,}" for n in numbers), mean, longest, *(f"{n:,}" for n in more)))
    lines = [format_table(rows, right=range(1, 8))]
    kinds = [(source, kind, count) for source in sources for kind, count in source.kinds.most_common()]
    if kinds:
        found: list[tuple[str, ...]] = [("source", "finding", "number", "meaning")]
        found += [(source.name, kind, f"{count:,}", KINDS[kind]) for source, kind, count in kinds]
        lines += ["", format_table(found, right=(2,))]
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
    """The report as JSON values; `passed` covers the limits that were checked."""
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
    """Write a PNG with a histogram of token lengths for each source and a line at `max_length`; returns its path."""
    counted = [source for source in sources if source.tokens.size]
    figure = new_figure(8, 1.2 + 1.6 * len(counted))
    longest = max(int(source.tokens.max()) for source in counted)
    # If no record comes near the cut, the axis ends at the longest record.
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

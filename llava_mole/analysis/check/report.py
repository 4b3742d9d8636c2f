"""The findings of `llava-mole check-data`: counted, judged by limits, and shown as tables, JSON and a figure."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from llava_mole.common.figures import COLORS, new_figure, save_figure, tidy
from llava_mole.common.text import format_table
from llava_mole.config import CheckConfig
from llava_mole.data.prepare.defects import BAD_IMAGE, KINDS, MISSING_IMAGE, REFUSED_RECORD, SHOWN_KINDS


@dataclass
class SourceFindings:
    """The findings in one source."""

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
    first: dict[str, str] = field(default_factory=dict)
    """Kind -> where and what the first finding was."""
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
        source.first.setdefault(kind, f"{where}: {detail[:300]}")
        line = {"source": source.name, "kind": kind, "where": where, "detail": detail[:300]}
        self._file.write(json.dumps(line) + "\n")


def left_out(*, tokens: bool, images: bool, evaluation: bool) -> dict[str, str]:
    """The limits that are not checked, each with the reason.

    Args:
        tokens: Whether tokens were counted.
        images: Whether images were opened.
        evaluation: Whether evaluation images were given.
    """
    limits = {} if tokens else {"max_truncated": "--no-tokens"}
    if not images:
        return limits | dict.fromkeys(("max_missing_images", "max_bad_images", "max_overlap"), "--no-images")
    return limits if evaluation else limits | {"max_overlap": "check.evaluation_images is empty"}


def judge(
    sources: Sequence[SourceFindings], overlap: float, check: CheckConfig, not_checked: Collection[str]
) -> list[dict[str, Any]]:
    """Compare every checked limit with the share of each source, and `max_overlap` with `overlap`."""
    compared = []
    for source in sources:
        records = source.records
        shares = {
            "max_bad_records": source.share(REFUSED_RECORD, records),
            "max_missing_images": source.share(MISSING_IMAGE, source.images),
            "max_bad_images": source.share(BAD_IMAGE, source.images),
            "max_truncated": source.truncated / records if records else 0.0,
            "max_duplicates": source.duplicates / records if records else 0.0,
        }
        compared += [(source.name, limit, share) for limit, share in shares.items()]
    compared.append(("evaluation images", "max_overlap", overlap))
    limits = []
    for name, limit, share in compared:
        if limit not in not_checked:
            allowed = getattr(check, limit)
            passed = share <= allowed
            limits.append({"source": name, "limit": limit, "share": share, "allowed": allowed, "passed": passed})
    return limits


def report_text(report: Mapping[str, Any]) -> str:
    """The printed form of `report_values`: sources, findings by kind, failed limits, and limits not checked."""
    rows = [("source", "records", "text only", "images", "mean tokens", "longest", "truncated", "duplicates")]
    found = [("source", "finding", "number", "meaning")]
    for source in report["sources"]:
        records, text_only, images, truncated, duplicates = (
            f"{source[key]:,}" for key in ("records", "text_only", "images", "truncated", "duplicates")
        )
        mean, longest = (f"{source['tokens'][key]:.0f}" if source["tokens"] else "-" for key in ("mean", "max"))
        rows.append((source["name"], records, text_only, images, mean, longest, truncated, duplicates))
        for kind, count in Counter(source["findings"]).most_common():
            found.append((source["name"], kind, f"{count:,}", KINDS[kind]))
    lines = [format_table(rows, right=range(1, 8)), ""]
    lines.append(format_table(found, right=(2,)) if len(found) > 1 else "no findings")
    for source in report["sources"]:
        first = source["first_findings"]
        lines += [f"{source['name']}, first {kind}: {first[kind]}" for kind in SHOWN_KINDS if kind in first]
    evaluated, shared = (report["evaluation_images"][key] for key in ("files", "trained_on"))
    if evaluated:
        lines += ["", f"evaluation images: {evaluated:,}, of which {len(shared):,} are trained on"]
        lines += [f"  {name}" for name in shared[:5]]
    lines.append("")
    failed = [limit for limit in report["limits"] if not limit["passed"]]
    for limit in failed:
        share = f"{limit['share']:.2%} > {limit['allowed']:.2%}"
        lines.append(f"FAILED  {limit['source']}: {share} (check.{limit['limit']})")
    lines.append(f"{len(report['limits']) - len(failed)} of {len(report['limits'])} limits passed")
    if report["not_checked"]:
        reasons = (f"{limit} ({reason})" for limit, reason in report["not_checked"].items())
        lines.append("not checked: " + ", ".join(reasons))
    return "\n".join(lines)


def report_values(
    sources: Sequence[SourceFindings],
    evaluated: int,
    shared: Sequence[str],
    limits: Sequence[Mapping[str, Any]],
    not_checked: Mapping[str, str],
) -> dict[str, Any]:
    """The report as JSON values; `passed` covers the limits that were checked.

    Args:
        evaluated: Number of evaluation images.
        shared: Files of those that are trained on.
        limits: See `judge`.
        not_checked: See `left_out`.
    """
    return {
        "passed": all(limit["passed"] for limit in limits),
        "sources": [
            {
                "name": source.name,
                "records": source.records,
                "text_only": source.text_only,
                "images": source.images,
                "truncated": source.truncated,
                "duplicates": source.duplicates,
                "findings": dict(source.kinds),
                "first_findings": dict(source.first),
                "tokens": _quantiles(source),
            }
            for source in sources
        ],
        "evaluation_images": {"files": evaluated, "trained_on": list(shared)},
        "limits": list(limits),
        "not_checked": dict(not_checked),
    }


def _quantiles(source: SourceFindings) -> dict[str, float]:
    if not source.tokens.size:
        return {}
    median, p90, p99 = np.quantile(source.tokens, (0.5, 0.9, 0.99)).tolist()
    mean, longest = float(source.tokens.mean()), float(source.tokens.max())
    return {"mean": mean, "median": median, "p90": p90, "p99": p99, "max": longest}


def draw_lengths(sources: Sequence[SourceFindings], max_length: int, path: Path) -> Path:
    """Write a PNG with a histogram of token lengths for each source and a line at `max_length`. Returns its path."""
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
        axes.set_xlim(0, edges[-1])  # the last bar whole
        if max_length <= end:
            axes.axvline(max_length, color="#444444", linestyle="--", linewidth=1)
        cut = f"{source.truncated:,} beyond" if source.truncated else "none beyond"
        last = number == len(counted) - 1
        title = f"{source.name}: {source.tokens.size:,} records, {cut} max_length {max_length:,}"
        tidy(axes, title, "tokens" if last else "", "records")
    return save_figure(figure, path)

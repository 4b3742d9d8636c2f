"""What folders of training data hold: one that `prepare` wrote, several of them, and the tiny world's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.common.files import read_json
from llava_mole.common.text import count_of, format_bytes, format_table
from llava_mole.data.prepare.pipeline import DEFECTS, IMAGES, QUESTIONS, REPORT, TRAIN
from llava_mole.data.store import MANIFEST, is_prepared, read_manifest

PREPARED = {
    "source": "a data set that `llava-mole prepare` wrote",
    "sets": "a folder of data sets that `llava-mole prepare` wrote",
    "tiny": "the tiny world's data",
}
"""Kind of folder -> what it is."""


def prepared_kind(path: Path) -> str | None:
    """The key of PREPARED that a directory is; None if it is none of them."""
    if _is_source(path):
        return "source"
    if (path / MANIFEST).is_file():
        manifest = _read(path / MANIFEST)
        return "tiny" if {"seed", "counts", "sha256"} <= manifest.keys() else None
    return "sets" if _sets_in(path) else None


def describe_prepared(path: Path, kind: str) -> tuple[list[str], bool]:
    """Lines about a directory of this kind, and whether everything in it is intact."""
    lines = [f"{path}: {PREPARED[kind]}"]
    if kind == "source":
        described, intact = _describe_source(path)
    elif kind == "tiny":
        described, intact = _describe_tiny(path)
    else:
        described, intact = _describe_sets(_sets_in(path))
    return [*lines, *described], intact


def _is_source(path: Path) -> bool:
    report = path / REPORT
    return report.is_file() and {"source", "records", "questions"} <= _read(report).keys()


def _sets_in(path: Path) -> list[Path]:
    """The prepared sets and sources directly in a directory, by name."""
    return sorted(p for p in path.iterdir() if p.is_dir() and (_is_source(p) or _is_set(p)))


def _is_set(path: Path) -> bool:
    return is_prepared(path) and str(_read(path / MANIFEST).get("format", "")).startswith("llava_mole.prepared/")


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it is none."""
    try:
        value = read_json(path)
    except DataError:
        return {}
    return value if isinstance(value, dict) else {}


def _size_of_set(directory: Path) -> tuple[str, str, str]:
    """Records, size and state of a prepared set."""
    try:
        manifest = read_manifest(directory)
    except DataError as error:
        return "", "", f"NOT USABLE: {error}"
    size = format_bytes(sum(shard["bytes"] for shard in manifest["shards"]))
    return f"{manifest['rows']:,}", size, "all shards of the recorded size"


def _describe_source(path: Path) -> tuple[list[str], bool]:
    report = _read(path / REPORT)
    lines = [f"  {'source':<27} {report['source']}", f"  {'raw data':<27} {report.get('raw')}"]
    intact = True
    if (path / TRAIN).is_dir():
        rows, size, state = _size_of_set(path / TRAIN)
        intact = bool(rows)
        lines.append(f"  {'training records':<27} {f'{rows}, {size}, {state}' if intact else state}")
        counted = len(list((path / TRAIN).glob("lengths-*.npy")))
        told = f"stored for {count_of(counted, 'pair')} of tokenizer and template" if counted else "none yet"
        lines.append(f"  {'token counts':<27} {told}")
    defects = sum(row.get("count", 0) for row in report.get("defects", []))
    lines.append(f"  {'defects':<27} {count_of(defects, 'record')}" + (f", in {path / DEFECTS}" if defects else ""))
    table = [("split", "sub-source", "records")]
    table += [(row["split"], row["sub_source"], f"{row['kept']:,}") for row in report["records"]]
    lines += ["", format_table(table, right={2}), ""]
    if (path / TRAIN).is_dir():
        lines += ["use it:", f"  data.sources.NAME.annotations: {path / TRAIN}"]
        lines.append(f"  data.sources.NAME.image_folder: {path / IMAGES}")
        if (path / IMAGES).is_symlink():
            lines.append("  data.sources.NAME.follow_links: true")
    for name, count in report["questions"].items():
        file = path / QUESTIONS / f"{name}.jsonl"
        lines.append(f"  llava-mole eval RUN --questions {file} ...   ({count_of(count, 'question')})")
    return lines, intact


def _describe_sets(sets: list[Path]) -> tuple[list[str], bool]:
    rows, intact = [("folder", "source", "records", "size", "state")], True
    for path in sets:
        source = str(_read(path / REPORT).get("source", "")) if _is_source(path) else ""
        directory = path / TRAIN if source else path
        if source and not directory.is_dir():
            rows.append((path.name, source, "", "", "questions only"))
            continue
        records, size, state = _size_of_set(directory)
        intact = intact and bool(records)
        rows.append((path.name, source, records, size, state))
    return ["", format_table(rows, right={2, 3}), "", "`llava-mole inspect FOLDER` describes each"], intact


def _describe_tiny(path: Path) -> tuple[list[str], bool]:
    from llava_mole.data.prepare.sources.tiny.world import tree_digest

    manifest = _read(path / MANIFEST)
    digest, files = tree_digest(path)
    intact = digest == manifest["sha256"]
    state = f"{files:,}, " + ("as they were written (sha256)" if intact else "NOT as they were written (sha256)")
    shown = {key: value for key, value in manifest.items() if isinstance(value, int | str) and key != "sha256"}
    lines = [f"  {key:<27} {state if key == 'files' else value}" for key, value in shown.items()]
    counts: Mapping[str, Mapping[str, int]] = manifest["counts"]
    kinds = list(dict.fromkeys(kind for own in counts.values() for kind in own))
    table = [("part", *kinds)]
    table += [(name, *(f"{own[kind]:,}" if kind in own else "" for kind in kinds)) for name, own in counts.items()]
    lines += ["", format_table(table, right=set(range(1, len(kinds) + 1))), ""]
    again = "" if intact else f"write it again: llava-mole prepare tiny --out {path}"
    return [*lines, again or "use it: configs/mixtures/tiny.yaml names its parts"], intact

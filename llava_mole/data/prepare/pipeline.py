"""Convert raw files to a prepared set with question files, images and a report, all or nothing.

Everything is written to `.<out>.partial` beside `out` and renamed at the end. If the process is killed, the next call
with the same arguments continues: it does not open images again that were unpacked or checked. It reads the records
again from the start, which takes a twentieth of the time and gives the same rows in the same order. The result
therefore does not depend on interruptions.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.common.files import remove, write_bytes, write_json
from llava_mole.common.locks import locked
from llava_mole.common.text import UNPAIRED_SURROGATE, is_text
from llava_mole.config import ImageModes
from llava_mole.data.images import REFUSED_BY
from llava_mole.data.prepare.defects import Defects, Issue
from llava_mole.data.prepare.image_pool import CheckImages, ImageChecker, Journal
from llava_mole.data.prepare.images import ImageInfo, ImageRoot
from llava_mole.data.prepare.report import QuestionFiles, published_counts
from llava_mole.data.prepare.samples import TEXT_ONLY, WITH_IMAGES, Embedded, RawSample, Source, SourceOptions
from llava_mole.data.store import PreparedRow, StoreWriter

TRAIN, QUESTIONS, IMAGES = "train", "questions", "images"
REPORT, DEFECTS = "report.json", "defects.jsonl"
"""Contents of a prepared folder."""
MOST_SUB_SOURCES = 512
"""Limit on distinct sub-sources; the rest are pooled as `images` and `text`."""
_JOURNAL, _REQUEST = "checked.jsonl", "request.json"
"""Additional contents of a partial folder."""


@dataclass(frozen=True)
class Request:
    """One call of `prepare`."""

    source: Source
    raw: Path
    out: Path
    image_root: Path
    options: SourceOptions
    check: CheckImages
    modes: ImageModes = "llava"
    copy: bool = False
    workers: int = 1
    missing_images: Literal["drop", "error"] = "drop"
    overwrite: bool = False

    def identity(self) -> bytes:
        """Return all that determines the result, as JSON; a partial output of another identity is not continued."""
        values = {
            "source": self.source.name,
            "raw": str(self.raw),
            "image_root": str(self.image_root),
            "options": asdict(self.options),
            "check": self.check,
            "image_modes": self.modes,
            "copy": self.copy,
            "missing_images": self.missing_images,
        }
        return json.dumps(values, sort_keys=True).encode()


def prepare(request: Request) -> dict[str, Any]:
    """Convert a source. Returns the report, which is also in `<out>/report.json`.

    Raises:
        ConfigError: `out` is not empty or lies inside the searched folder, or another process is preparing it.
        DataError: the raw data are missing or cannot be used, or no record of them is left.
    """
    out = request.out
    partial, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.old"
    _check_out(request)
    partial.mkdir(parents=True, exist_ok=True)
    with locked(out.parent / f".{out.name}.lock", f"--out {out}"):
        if old.exists() and not out.exists():  # an earlier call was killed between the two renames of `_publish`
            os.replace(old, out)
        _check_out(request)
        _clear_partial(partial, request)
        report = _write(request, partial)
        _publish(partial, out, old)
    return report


def _check_out(request: Request) -> None:
    out = request.out
    if request.raw.is_dir():
        inside, outside = Path(os.path.realpath(out)), Path(os.path.realpath(request.raw))
        if inside == outside or (request.source.searches and inside.is_relative_to(outside)):
            raise ConfigError(
                f"--out {out} lies inside --raw {request.raw}, so the next call would read what this one wrote; name "
                "another --out"
            )
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not request.overwrite:
            raise ConfigError(f"{out} exists; give --overwrite to replace it, or name another --out")
        if not (out / REPORT).is_file():
            raise ConfigError(f"{out} holds no {REPORT}, so `prepare` did not write it; remove it yourself")


def _write(request: Request, folder: Path) -> dict[str, Any]:
    """Write everything into `folder`. Returns the report."""
    with contextlib.ExitStack() as stack:
        defects = stack.enter_context(contextlib.closing(Defects(folder / DEFECTS)))
        journal = stack.enter_context(contextlib.closing(Journal(folder / _JOURNAL)))
        root = ImageRoot(request.image_root, follow_links=request.options.follow_links)
        checker = ImageChecker(root, folder / IMAGES, journal, request.check, request.copy, request.workers)
        output = stack.enter_context(contextlib.closing(_Output(request, folder, defects)))
        samples = _pool_sub_sources(request.source.iterate(request.raw, request.options, defects), defects)
        checked = stack.enter_context(contextlib.closing(checker.check(samples)))
        bar = tqdm(checked, desc=f"preparing {request.source.name}", unit=" records", mininterval=1.0, disable=None)
        for sample, images in stack.enter_context(bar):
            output.add(sample, images)
        return output.finish()


def _pool_sub_sources(samples: Iterable[RawSample], defects: Defects) -> Iterator[RawSample]:
    """Yield the samples; sub-sources after the first `MOST_SUB_SOURCES` get a common name."""
    seen: set[str] = {TEXT_ONLY, WITH_IMAGES}
    for sample in samples:
        if sample.source not in seen:
            if len(seen) < MOST_SUB_SOURCES + 2:
                seen.add(sample.source)
            else:
                defects.add("many-sources", sample.where, sample.source, "repaired")
                sample.source = WITH_IMAGES if sample.images else TEXT_ONLY
        yield sample


class _Output:
    """The prepared set and the question files of one call, written to `folder`, and the counts for its report."""

    def __init__(self, request: Request, folder: Path, defects: Defects) -> None:
        self._request, self._folder, self._defects = request, folder, defects
        self._rows = StoreWriter(folder / TRAIN, name=request.source.name)
        self._questions = QuestionFiles(folder / QUESTIONS, request.source.questions_by_sub_source)
        self._kept: Counter[tuple[str, str]] = Counter()
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._ids: set[int] = set()
        self._unpacked: set[bool] = set()
        """Has True if images lie in the prepared set's own folder, and False if images lie below the image root."""
        self._from_parquet = False

    def add(self, sample: RawSample, images: Sequence[ImageInfo]) -> None:
        """Write a sample with its images to the prepared set, to the question files, or to both. Raises DataError."""
        options, copy = self._request.options, self._request.copy
        self._from_parquet = self._from_parquet or ".parquet:" in sample.where
        trains = sample.split in options.train_splits
        key = (TRAIN, sample.source) if trains else (sample.split, sample.category or sample.source)
        if not self._is_usable(sample, images):
            self._dropped[key] += 1
            return
        asked = sample.split in options.test_splits and not sample.again
        if not trains and not asked:
            return
        self._kept[key] += 1
        self._unpacked |= {copy or isinstance(image, Embedded) for image in sample.images}
        if len(self._unpacked) > 1:
            raise DataError(
                f"{sample.where}: some images are inside the records and others are files; --images unpack copies "
                "all of them into one folder"
            )
        if trains:
            self._add_row(sample, images)
        if asked:
            self._questions.add(sample, [image.path for image in images])

    def _is_usable(self, sample: RawSample, images: Sequence[ImageInfo]) -> bool:
        """Whether the id and all images of a sample can be used; counts their problems and oddities."""
        where, request = sample.where, self._request
        problem = None
        for image in images:
            problem = problem or image.problem
            for note in image.notes:
                if note.kind in REFUSED_BY[request.modes]:
                    problem = problem or Issue("refused-image", note.detail)
                    continue
                action: Literal["repaired", "kept"] = "repaired" if note.kind == "base64-spaces" else "kept"
                self._defects.add(note.kind, where, note.detail, action)
        if problem is None and not is_text(sample.id):
            problem = Issue("bad-text", f"'id': {UNPAIRED_SURROGATE}")
        if problem is None:
            return True
        if request.missing_images == "error" and problem.kind == "missing-image":
            raise DataError(
                f"{where}: image {problem.detail!r} is not a file below {request.image_root}; put it there, name "
                "another --image-root, or leave such records out with --missing-images drop"
            )
        self._defects.add(problem.kind, where, problem.detail)
        return False

    def _add_row(self, sample: RawSample, images: Sequence[ImageInfo]) -> None:
        identity = hash(sample.id)
        if identity in self._ids:
            self._defects.add("id-again", sample.where, sample.id, "kept")
        self._ids.add(identity)
        sizes = tuple([image.size for image in images if image.size is not None])
        self._rows.add(
            PreparedRow(
                id=sample.id,
                source=sample.source,
                images=tuple([image.path for image in images]),
                turns=sample.turns,
                image_sizes=sizes if len(sizes) == len(images) else (),
                answer_type=sample.answer_type,
                where=sample.where,
            )
        )

    def finish(self) -> dict[str, Any]:
        """Complete the folder and return the report. Raises DataError if no record is left."""
        request = self._request
        if not self._kept:
            dropped = [row for row in self._defects.rows()[:3] if row["action"] == "dropped"]
            worst = ", ".join(f"{row['count']} x {row['kind']}" for row in dropped)
            raise DataError(f"{request.raw}: no usable record ({worst or 'the files hold none'})")
        report = self._report()
        if True not in self._unpacked:  # then <out>/images links to the image root
            images = self._folder / IMAGES
            remove(images)  # images of records that were left out in the end
            home = os.path.join(os.path.realpath(self._folder.parent), request.out.name)
            os.symlink(os.path.relpath(os.path.realpath(request.image_root), home), images)
        if self._rows.rows:
            self._rows.finish(report)
        write_json(self._folder / REPORT, report, indent=1)
        return report

    def _report(self) -> dict[str, Any]:
        """Counts by split and sub-source, and every kind of defect."""
        request, kept, dropped = self._request, self._kept, self._dropped
        name = request.source.name
        from_parquet = self._from_parquet and f"{name}-parquet" in published_counts()
        checks = {"check_images": request.check, "image_modes": request.modes, "missing_images": request.missing_images}
        return {
            "source": name,
            "published": f"{name}-parquet" if from_parquet else name,
            "raw": str(request.raw),
            "image_root": str(request.image_root),
            "options": asdict(request.options) | checks,
            "records": [
                {"split": split, "sub_source": source, "kept": kept[split, source],
                 "dropped_for_images": dropped[split, source]}
                for split, source in sorted(kept.keys() | dropped.keys())
            ],
            "questions": self._questions.counts,
            "defects": self._defects.rows(),
            "ignored_keys": dict(sorted(self._defects.ignored_keys.items())),
        }  # fmt: skip

    def close(self) -> None:
        """Close the files and remove an unfinished prepared set."""
        self._rows.close()
        self._questions.close()


def _clear_partial(partial: Path, request: Request) -> None:
    """Remove the files of an interrupted call, except those with which the same request continues.

    Raises:
        ConfigError: the folder is not one that `prepare` left.
    """
    path, identity = partial / _REQUEST, request.identity()
    if not path.is_file() and any(partial.iterdir()):
        raise ConfigError(f"{partial} holds no {_REQUEST}, so `prepare` did not write it; remove it yourself")
    same = path.is_file() and path.read_bytes() == identity
    for entry in partial.iterdir():
        continued = same and entry.name in (IMAGES, _JOURNAL) and not entry.is_symlink()
        if not continued:
            remove(entry)
    write_bytes(path, identity)


def _publish(partial: Path, out: Path, old: Path) -> None:
    """Rename the complete folder to `out`; an older output is renamed to `old` first and removed at the end.

    The files with which an interrupted call continues are removed last, so that it can be continued until then.
    """
    if not (partial / IMAGES).is_symlink():
        for folder, _, names in os.walk(partial / IMAGES):
            for name in names:
                if name.startswith("."):  # left by a process that was killed while it wrote
                    os.unlink(os.path.join(folder, name))
    os.sync()  # one call for a million images
    if out.exists():
        remove(old)  # left by a call that was killed while it removed it
        os.replace(out, old)
    os.replace(partial, out)
    for name in (_JOURNAL, _REQUEST):
        (out / name).unlink(missing_ok=True)
    remove(old)

"""`prepare`: from raw files to a prepared set, its question files, its images and its report, all or nothing.

Everything is written to `.<out>.partial` beside `out`, which then takes its name. When the process is killed, the next
call with the same arguments goes on: images that were unpacked and image files that were checked are not looked at
again. The records are read again from the start, which takes a twentieth of the time and gives the same rows in the
same order, so that the result does not depend on how often the work was interrupted.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.common.log import get_logger
from llava_mole.common.text import is_text
from llava_mole.data.prepare.drafts import TEXT_ONLY, WITH_IMAGES, Action, Converter, Defects, Draft, Options
from llava_mole.data.prepare.images import CheckImages, ImagePolicy, Journal, Looked, Note, look_at_images
from llava_mole.data.prepare.report import QuestionFiles, published_counts
from llava_mole.data.store import PreparedRow, StoreWriter

TRAIN, QUESTIONS, IMAGES = "train", "questions", "images"
"""What lies in a prepared folder, beside `report.json` and `defects.jsonl`."""
REPORT, DEFECTS = "report.json", "defects.jsonl"
MOST_SOURCES = 512
"""Sub-sources that are told apart: more are no grouping, and a shard's index of them is small."""
logger = get_logger(__name__)
_KEPT_FROM_PARTIAL = {IMAGES, "checked.jsonl", "request.json", "lock"}


@dataclass(frozen=True)
class Request:
    """One call of `prepare`."""

    source: str
    raw: Path
    out: Path
    image_root: Path
    options: Options
    check: CheckImages
    copy: bool = False
    workers: int = 1
    missing_images: Literal["drop", "error"] = "drop"
    overwrite: bool = False

    def identity(self) -> dict[str, Any]:
        """What decides the result: a partial output of another request is not continued."""
        values = asdict(self)
        for key in ("workers", "overwrite", "out"):
            del values[key]
        return json.loads(json.dumps(values, default=str, sort_keys=True))


def prepare(converter: Converter, request: Request) -> dict[str, Any]:
    """Convert a source. Returns the report, which is also in `<out>/report.json`.

    Raises:
        ConfigError: `out` holds something already or lies inside what is searched, or another process is preparing it.
        DataError: the raw data are not there or cannot be used, or nothing of them is left.
    """
    out, partial = request.out, request.out.parent / f".{request.out.name}.partial"
    _check_out(converter, request)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial / "lock", out):
        _put_back(out)
        _check_out(converter, request)
        _clear_partial(partial, request)
        report = _write(converter, request, partial)
        _publish(partial, out)
    return report


def _check_out(converter: Converter, request: Request) -> None:
    out = request.out
    if request.raw.is_dir():
        inside, outside = Path(os.path.realpath(out)), Path(os.path.realpath(request.raw))
        if inside == outside or (converter.searches and inside.is_relative_to(outside)):
            raise ConfigError(
                f"--out {out} lies inside --raw {request.raw}, so that the next call would read what this one wrote; "
                "give another --out"
            )
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not request.overwrite:
            raise ConfigError(f"{out} is there already; --overwrite replaces it, or give another --out")
        if not (out / REPORT).is_file():
            raise ConfigError(f"{out} holds no {REPORT}, so `prepare` did not write it; remove it yourself")


def _write(converter: Converter, request: Request, folder: Path) -> dict[str, Any]:
    defects = Defects(folder / DEFECTS)
    journal = Journal(folder / "checked.jsonl")
    policy = ImagePolicy(request.image_root, folder / IMAGES, request.check, request.copy, request.workers)
    questions = QuestionFiles(folder / QUESTIONS, by_source=converter.name in ("m3it", "ureader"))
    writer = StoreWriter(folder / TRAIN, name=converter.name)
    kept: Counter[tuple[str, str]] = Counter()
    dropped: Counter[tuple[str, str]] = Counter()
    ids: set[int] = set()
    drafts = _few_sources(converter.iterate(request.raw, request.options, defects), defects)
    stage = look_at_images(drafts, policy, journal)
    bar = tqdm(stage, desc=f"preparing {converter.name}", unit=" records", mininterval=1.0, disable=None)
    from_parquet = False
    homes: set[bool] = set()
    try:
        for looked in bar:
            draft = looked.draft
            from_parquet = from_parquet or ".parquet:" in draft.where
            trains = draft.split in request.options.train_splits
            key = (TRAIN if trains else draft.split, draft.source if trains else draft.category or draft.source)
            if not _usable(looked, request, defects):
                dropped[key] += 1
                continue
            images, sizes = _images(looked)
            asked = draft.split in request.options.test_splits and not draft.again
            if asked and len(images) > 1:
                action: Action = "kept" if trains else "dropped"
                defects.add("several-images-question", draft.where, f"{len(images)} images", action)
                asked = False
            if not trains and not asked:
                continue
            kept[key] += 1
            homes |= looked.unpacked
            if len(homes) > 1:
                raise DataError(
                    f"{draft.where}: some images come in the records and others are files; --images unpack gathers "
                    "them all"
                )
            if trains:
                identity = hash(draft.id)
                if identity in ids:
                    defects.add("id-again", draft.where, draft.id, "kept")
                ids.add(identity)
                writer.add(
                    PreparedRow(
                        id=draft.id,
                        source=draft.source,
                        images=images,
                        turns=draft.turns,
                        image_sizes=sizes,
                        answer_type=draft.answer_type,
                        where=draft.where,
                    )
                )
            if asked:
                questions.add(draft, images[0] if images else None)
        if not kept:
            worst = ", ".join(
                f"{row['count']} x {row['kind']}" for row in defects.rows()[:3] if row["action"] == "dropped"
            )
            raise DataError(f"{request.raw}: no record is left to be written ({worst or 'the files hold none'})")
        name = f"{converter.name}-parquet" if from_parquet else converter.name
        report = make_report(name, request, kept, dropped, defects, questions.counts)
        if True not in homes:  # so that <out>/images is the image folder wherever the images are
            home = os.path.join(os.path.realpath(folder.parent), request.out.name)
            if (folder / IMAGES).is_dir():  # unpacked for rows that were left out after all
                shutil.rmtree(folder / IMAGES)
            os.symlink(os.path.relpath(os.path.realpath(request.image_root), home), folder / IMAGES)
        if writer.rows:
            writer.finish(report)
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    finally:
        bar.close()
        stage.close()
        writer.close()
        questions.close()
        defects.close()
        journal.close()
    return report


def _few_sources(drafts: Iterable[Draft], defects: Defects) -> Iterator[Draft]:
    """The drafts, those of the sub-sources after the first `MOST_SOURCES` under a common name."""
    seen: set[str] = {TEXT_ONLY, WITH_IMAGES}
    for draft in drafts:
        if draft.source not in seen:
            if len(seen) < MOST_SOURCES + 2:
                seen.add(draft.source)
            else:
                defects.add("many-sources", draft.where, draft.source, "repaired")
                draft.source = WITH_IMAGES if draft.images else TEXT_ONLY
        yield draft


def _usable(looked: Looked, request: Request, defects: Defects) -> bool:
    """Whether all images of a draft can be used; what is wrong or strange about them is counted."""
    where = looked.draft.where
    problem = None
    for fact in looked.facts:
        problem = problem or fact.problem
        for note in fact.notes:
            repaired = note.kind == "base64-spaces"
            defects.add(note.kind, where, note.detail, "repaired" if repaired else "kept")
    if problem is None and not looked.draft.id.isascii() and not is_text(looked.draft.id):
        problem = Note("bad-text", "the id holds half of a surrogate pair, which is no character")
    if problem is None:
        return True
    if request.missing_images == "error" and problem.kind == "missing-image":
        raise DataError(
            f"{where}: image {problem.detail!r} is no file below {request.image_root}; put it there, name another "
            "--image-root, or leave such records out with --missing-images drop"
        )
    defects.add(problem.kind, where, problem.detail)
    return False


def _images(looked: Looked) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Paths and, where all were opened, sizes."""
    if len(looked.facts) == 1:
        (fact,) = looked.facts
        return (fact.path,), () if fact.size is None else (fact.size,)
    sizes = tuple(fact.size for fact in looked.facts if fact.size is not None)
    return tuple(fact.path for fact in looked.facts), sizes if len(sizes) == len(looked.facts) else ()


def make_report(
    name: str,
    request: Request,
    kept: Counter[tuple[str, str]],
    dropped: Counter[tuple[str, str]],
    defects: Defects,
    questions: dict[str, int],
) -> dict[str, Any]:
    """Counts by split and sub-source beside the published ones, and every kind of defect."""
    options = {**asdict(request.options), "check_images": request.check, "missing_images": request.missing_images}
    return {
        "source": request.source,
        "published": name if name in published_counts() else request.source,
        "raw": str(request.raw),
        "image_root": str(request.image_root),
        "options": options,
        "records": [
            {"split": split, "sub_source": name, "kept": kept[split, name], "dropped_for_images": dropped[split, name]}
            for split, name in sorted(kept.keys() | dropped.keys())
        ],
        "questions": questions,
        "defects": defects.rows(),
        "ignored_keys": dict(sorted(defects.ignored_keys.items())),
    }


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another process is preparing it at this moment; wait for it") from None
        except OSError as error:
            logger.warning("%s: no locks here (%s); prepare it from one process only", out, error.strerror)
        yield


def _clear_partial(partial: Path, request: Request) -> None:
    """Leave of an interrupted attempt what the same request can go on with."""
    identity = request.identity()
    path = partial / "request.json"
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == identity
    except (OSError, ValueError):
        same = False
    for entry in partial.iterdir():
        if entry.name == "lock" or (same and entry.name in _KEPT_FROM_PARTIAL and not entry.is_symlink()):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    path.write_text(json.dumps(identity, indent=1), encoding="utf-8")


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _put_back(out: Path) -> None:
    """Undo half a publication: an older output that was moved aside takes its name again."""
    old = _old(out)
    if old.exists() and not out.exists():
        os.replace(old, out)


def _publish(partial: Path, out: Path) -> None:
    """Give the complete folder its name; an older one is moved aside first and removed after.

    What an interrupted attempt needs to go on is removed last, so that it can at every moment before.
    """
    if not (partial / IMAGES).is_symlink():
        for folder, _, names in os.walk(partial / IMAGES):
            for name in names:
                if name.startswith("."):  # left by a process that was killed while it wrote
                    os.unlink(os.path.join(folder, name))
    os.sync()  # one call for a million images
    old = _old(out)
    if out.exists():
        if old.exists():  # of a call that was killed while it removed it
            shutil.rmtree(old)
        os.replace(out, old)
    os.replace(partial, out)
    for name in ("checked.jsonl", "request.json", "lock"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)

"""`llava-mole prepare tiny --out playground/data/tiny`: write the data of the tiny world.

Three domains (general, document, biomedicine) with disjoint train, validation and test splits, stage-1 captions of the
train images, and a few photographs. Choices (rates, steps, methods) belong on the validation split. The seed determines
everything. Image paths in the records are relative to the output folder. The folder appears complete or not at all. A
second call verifies an existing folder and does not change it.

With --facts the splits also hold questions whose answers only training can teach: --facts says how many a domain has,
--convention which share of them the domains answer differently. Data conflict is made of these two. `SPLIT_facts.jsonl`
holds the fact questions of `SPLIT_questions.jsonl` alone.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import Any, TypeVar, cast

from tqdm import tqdm

from llava_mole.common.errors import DataError, command
from llava_mole.common.files import read_json, sha256_of, write_json
from llava_mole.common.text import HELP_WIDTH
from llava_mole.data.prepare.sources.tiny import biomedicine, document, general
from llava_mole.data.prepare.sources.tiny.facts import CATEGORIES, MOST_FACTS, FactSample, draw, facts
from llava_mole.data.prepare.sources.tiny.samples import DOMAINS, Question, Sample, balance, draw_test

SUMMARY = "generated: three small domains, --out playground/data/tiny"
T = TypeVar("T")


def progress(items: Iterable[T], label: str, unit: str) -> "tqdm[T]":
    """`tqdm` over `items`; if stderr is not a terminal, at most one line every 30 seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(items, desc=label, unit=unit, mininterval=0.2 if terminal else 30, leave=terminal, ascii=not terminal)


FORMAT = 3
"""Increased when the same seed starts to give other data."""
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry")
MAX_TURNS = 6
"""Most questions in one training record; they share the image and the system prompt."""
MOST_IMAGES = {"val": 1000, "test": 2000}
"""Most images drawn for a held-out split (easy-VQA has fewer); those without a chosen question are not written."""
FACT_SPLITS = {"train": "train", "val": "validation", "test": "test"}
PACKAGES = ("easy-vqa", "scikit-image", "numpy", "pillow")


@dataclass(frozen=True)
class Size:
    """How much data of each domain is written."""

    train: int = 4000
    """Train images; the general domain has 3,500."""
    val: int = 800
    """Validation questions."""
    test: int = 2100
    """Test questions. A little less is drawn, as all answers to a question are drawn together."""
    facts: int = 0
    """Facts to be learned; 0 writes none."""
    convention: float = 0.0
    """Share of the facts that the domains answer differently."""

    def check(self) -> None:
        """Raise DataError if a number is out of range."""
        if min(self.train, self.val, self.test) < 1:
            raise DataError(
                f"--train-per-domain {self.train}, --val-per-domain {self.val}, --test-per-domain {self.test}: "
                "each must be at least 1"
            )
        if not 0 <= self.facts <= MOST_FACTS:
            raise DataError(f"--facts {self.facts}: must be 0 (none) to {MOST_FACTS}")
        if not 0 <= self.convention <= 1:
            raise DataError(f"--convention {self.convention}: must be a share, 0 to 1")


@dataclass(frozen=True)
class Facts:
    """The fact questions of a data set (`facts`)."""

    load: int
    convention: float

    def draw(self, domain: str, images: Sequence[int], count: int, split: str, seed: int) -> list[FactSample]:
        """Draw `count` fact questions about images, which are given and returned as numbers of samples."""
        asked = facts(domain, self.load, self.convention, seed)
        return draw(asked, [str(index) for index in images], count, cast(Any, FACT_SPLITS[split]), seed)


def domain_samples(domain: str, split: str, count: int, seed: int) -> tuple[list[Sample], dict[str, Path]]:
    """Return at most `count` samples of a domain's split, and name -> original file for those that are copied."""
    if domain == "general":
        return general.load(split, count)
    rng = Random(f"{seed}-{domain}-{split}")
    if domain == "biomedicine":
        return biomedicine.generate(count, split, rng), {}
    return document.generate(count, rng, held_out_documents(split, seed)), {}


@functools.cache
def held_out_documents(split: str, seed: int) -> frozenset[bytes]:
    """Return the pixels of the documents that a split must not have: all that earlier ones of this seed may have.

    `test` comes first, then `val`, then `train` (and the tower's training).
    """
    if split == "test":
        return frozenset()
    earlier = {"val": "test", "train": "val"}[split]
    before = held_out_documents(earlier, seed)
    samples = document.generate(MOST_IMAGES[earlier], Random(f"{seed}-document-{earlier}"), before)
    return before | {sample.image.tobytes() for sample in samples}


def training_records(domain: str, samples: Sequence[Sample], rng: Random) -> list[dict[str, Any]]:
    """Return LLaVA records with up to `MAX_TURNS` balanced questions each; images without questions are left out."""
    turns: dict[int, list[Question]] = {}
    for index, question in balance(samples, rng):
        turns.setdefault(index, []).append(question)
    records = []
    for index, asked in turns.items():
        rng.shuffle(asked)
        name = samples[index].name
        rounds = [(question.text, question.answer) for question in asked[:MAX_TURNS]]
        records.append(llava_record(f"{domain}-train-{name}", image_path(domain, "train", name), rounds))
    rng.shuffle(records)
    return records


def llava_record(ident: str, image: str, rounds: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return questions and answers about one image in LLaVA's format."""
    turns = []
    for number, (question, answer) in enumerate(rounds):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": ident, "image": image, "conversations": turns}


def image_path(domain: str, split: str, name: str) -> str:
    """Return the path of an image, relative to the output folder."""
    return f"{domain}/images/{split}/{name}.png"


def held_out_questions(
    domain: str, split: str, samples: Sequence[Sample], asked: Facts | None, rng: Random, seed: int, limit: int
) -> list[tuple[int, Question]]:
    """Return at most `limit` balanced (number of the sample, question) pairs, and as many fact questions if any."""
    drawn = draw_test(balance(samples, rng), rng, limit)
    if asked is not None:
        used = sorted({index for index, _ in drawn})
        drawn += [(int(fact.image), fact.question) for fact in asked.draw(domain, used, len(drawn), split, seed)]
    return drawn


def write_split(
    out: Path,
    domain: str,
    split: str,
    samples: Sequence[Sample],
    files: dict[str, Path],
    seed: int,
    limit: int,
    asked: Facts | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write one split of one domain. Returns its counts for the manifest and its caption records."""
    rng = Random(f"{seed}-{domain}-{split}-questions")
    folder = out / domain
    (folder / "images" / split).mkdir(parents=True)
    used: Sequence[int] = range(len(samples))
    if split == "train":
        records = training_records(domain, samples, rng)
        if asked is not None:
            for number, fact in enumerate(asked.draw(domain, used, len(samples), split, seed)):
                path = image_path(domain, split, samples[int(fact.image)].name)
                rounds = [(fact.question.text, fact.question.answer)]
                records.append(llava_record(f"{domain}-fact-{number:05d}", path, rounds))
            rng.shuffle(records)
    else:
        drawn = held_out_questions(domain, split, samples, asked, rng, seed, limit)
        used_set = {index for index, _ in drawn}
        used = [index for index in used if index in used_set]
        records, lines = [], []
        for number, (index, question) in enumerate(drawn):
            path = image_path(domain, split, samples[index].name)
            ident = f"{domain}-{split}-{number:04d}"
            records.append(llava_record(ident, path, [(question.text, question.answer)]))
            line = {"question_id": ident, "image": path, "text": question.text, "category": question.category}
            lines.append(json.dumps(line | {"answer": question.answer}))
        (folder / f"{split}_questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if asked is not None:
            asked_of = zip(lines, drawn, strict=True)
            of_facts = [line for line, (_, question) in asked_of if question.category in CATEGORIES]
            (folder / f"{split}_facts.jsonl").write_text("\n".join(of_facts) + "\n", encoding="utf-8")
    write_records(folder / f"{split}.json", records)
    captions = []
    for index in progress(used, f"{domain} {split}", "image"):
        sample = samples[index]
        path = image_path(domain, split, sample.name)
        if sample.name in files:
            shutil.copyfile(files[sample.name], out / path)
        else:
            sample.image.save(out / path)
        described = [("Describe the image.", sample.caption)]
        captions.append(llava_record(f"{domain}-caption-{sample.name}", path, described))
    questions = [turn["value"] for record in records for turn in record["conversations"][::2]]
    counts = {"images": len(captions), "records": len(records), "questions": len(questions)}
    return counts, captions


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a JSON list with one record a line: a line number identifies a record."""
    lines = ",\n".join(json.dumps(record) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_photos(folder: Path) -> None:
    """Save a few of scikit-image's photographs for the chat demonstration."""
    from PIL import Image
    from skimage import data

    folder.mkdir()
    for name in PHOTOS:
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png", compress_level=1)


def tree_digest(root: Path) -> tuple[str, int]:
    """Return the digest of the paths and contents of all files below `root` but the manifest, and their number."""
    digest = hashlib.sha256()
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path != root / "manifest.json")
    for path in paths:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest(), len(paths)


def write(out: Path, wanted: Size, seed: int) -> dict[str, Any]:
    """Write the data set into the empty folder `out`. Returns the manifest."""
    counts: dict[str, Any] = {}
    captions: list[dict[str, Any]] = []
    asked = Facts(wanted.facts, wanted.convention) if wanted.facts else None
    for domain in DOMAINS:
        limits = {"train": wanted.train, "val": wanted.val, "test": wanted.test}
        for split, limit in limits.items():
            count = limit if split == "train" else min(MOST_IMAGES[split], limit + 200)
            samples, files = domain_samples(domain, split, count, seed)
            counts[f"{domain}/{split}"], described = write_split(out, domain, split, samples, files, seed, limit, asked)
            captions += described if split == "train" else []
    Random(f"{seed}-captions").shuffle(captions)
    (out / "captions").mkdir()
    write_records(out / "captions" / "train.json", captions)
    counts["captions"] = {"records": len(captions)}
    write_photos(out / "photos")
    digest, files_written = tree_digest(out)
    return request(wanted, seed) | {"counts": counts, "files": files_written, "sha256": digest}


def request(wanted: Size, seed: int) -> dict[str, Any]:
    """Return the part of the manifest that determines the files. Raises DataError if a package is missing."""
    try:
        versions = {name: version(name) for name in PACKAGES}
    except PackageNotFoundError as error:
        raise DataError(
            f"the tiny world needs the package {error.name}, which is not installed; `pip install {error.name}`"
        ) from None
    return {
        "format": FORMAT,
        "seed": seed,
        "train_per_domain": wanted.train,
        "val_per_domain": wanted.val,
        "test_per_domain": wanted.test,
        "facts": wanted.facts,
        "convention": wanted.convention,
        "versions": versions,
    }


def is_complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds the data of the request `wanted`, with every file as it was written."""
    try:
        manifest = read_json(out / "manifest.json")
    except DataError:
        return False
    return {key: manifest.get(key) for key in wanted} == wanted and tree_digest(out)[0] == manifest.get("sha256")


def build(out: Path, wanted: Size | None = None, seed: int = 0) -> bool:
    """Write the data set to `out` unless it is already there. Returns whether anything was written.

    Raises:
        DataError: a size is out of range, `out` holds files that this command did not write, or a package is missing.
    """
    wanted = wanted or Size()
    wanted.check()
    if is_complete(out, request(wanted, seed)):
        return False
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "manifest.json").is_file())):
        raise DataError(f"{out}: holds other files (no manifest.json); give an empty or a new folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        manifest = write(new, wanted, seed)
        write_json(new / "manifest.json", manifest, indent=1)
        if out.exists():
            os.rename(out, Path(temporary, "old"))
        os.rename(new, out)
    return True


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="llava-mole prepare tiny",
        formatter_class=functools.partial(argparse.HelpFormatter, width=HELP_WIDTH),
        description=__doc__,
    )
    size = Size()
    parser.add_argument("--out", type=Path, default=Path("playground/data/tiny"), help="folder to write (%(default)s)")
    for split, what in (("train", "train images"), ("val", "validation questions"), ("test", "test questions")):
        default = getattr(size, split)
        parser.add_argument(
            f"--{split}-per-domain", type=int, default=default, metavar="N", help=f"{what} (%(default)s)"
        )
    parser.add_argument("--facts", type=int, default=0, metavar="N", help="facts to learn in each domain (%(default)s)")
    parser.add_argument(
        "--convention",
        type=float,
        metavar="C",
        help="share of the facts, 0 to 1, that the domains answer differently; needs --facts (0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="determines everything (%(default)s)")
    given = parser.parse_args(arguments)
    if given.convention is not None and not given.facts:
        raise DataError(f"--convention {given.convention}: it is a share of the facts; give their number with --facts")
    wanted = Size(
        given.train_per_domain, given.val_per_domain, given.test_per_domain, given.facts, given.convention or 0.0
    )
    written = build(given.out, wanted, given.seed)
    manifest = read_json(given.out / "manifest.json")
    print(f"tiny world: {'written to' if written else 'already in'} {given.out} (sha256 {manifest['sha256'][:12]})")
    for name, counts in manifest["counts"].items():
        print(f"  {name:20s} " + ", ".join(f"{number:,} {kind}" for kind, number in Counter(counts).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

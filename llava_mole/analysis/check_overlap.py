"""Images that are both trained on and evaluated on, by the content of their files."""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from llava_mole.analysis.check_data import hash_of
from llava_mole.data.converters.image_files import EXTENSIONS, ImageRoot
from llava_mole.errors import DataError
from llava_mole.eval.questions import read_json_lines

_SUFFIXES = {f".{extension}" for group in EXTENSIONS.values() for extension in group}


def evaluation_files(places: Sequence[str]) -> Iterator[Path]:
    """Every image of the folders and question files given.

    The images of a question file are looked for below its folder, the folder above, and that one's `images` (where
    `llava-mole prepare` puts them).

    Raises:
        DataError: a place that is neither, or a question file none of whose images is found.
    """
    for place in places:
        path = Path(place)
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        elif path.is_file():
            yield from _of_questions(path)
        else:
            raise DataError(f"check.evaluation_images: {place} is neither a folder nor a question file")


def _of_questions(path: Path) -> Iterator[Path]:
    names = [line["image"] for _, line in read_json_lines(path) if isinstance(line.get("image"), str)]
    if not names:
        return
    roots = [ImageRoot(folder) for folder in (path.parent, path.parent.parent, path.parent.parent / "images")]
    root = next((root for root in roots if any(root.problem(name) is None for name in names[:20])), None)
    if root is None:
        folders = ", ".join(root.folder for root in roots)
        raise DataError(f"{path}: its images are in none of {folders}; name the folder of the images instead")
    for name in dict.fromkeys(names):
        if root.problem(name) is None:
            yield Path(root.folder, name)


def find_overlap(places: Sequence[str], trained_on: Collection[bytes]) -> tuple[int, list[str]]:
    """How many different evaluation images there are, and the files of those that are trained on as well."""
    hashes: set[bytes] = set()
    shared = []
    files = {os.path.realpath(path): path for path in evaluation_files(places)}
    for path in tqdm(files.values(), desc="evaluation images", unit="image", delay=3.0, disable=None):
        digest = hash_of(path.read_bytes())
        if digest in trained_on and digest not in hashes:
            shared.append(str(path))
        hashes.add(digest)
    return len(hashes), shared

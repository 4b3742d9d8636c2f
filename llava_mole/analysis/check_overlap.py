"""Images that are both trained on and evaluated on, by the content of their files."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_mole.analysis.check_keys import Keys, key_of
from llava_mole.data.converters.image_files import EXTENSIONS, ImageRoot
from llava_mole.errors import DataError
from llava_mole.eval.questions import read_json_lines

_SUFFIXES = {f".{extension}" for group in EXTENSIONS.values() for extension in group}


def evaluation_files(places: Sequence[str]) -> list[Path]:
    """Every image of the folders and question files given, each file once.

    The images of a question file are looked for below its folder, the folder above, and that one's `images` (where
    `llava-mole prepare` puts them).

    Raises:
        DataError: a place that is neither, that has no image, or a question file none of whose images is found.
    """
    files: dict[str, Path] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        elif path.is_file():
            found = _of_questions(path)
        else:
            raise DataError(f"check.evaluation_images: {place} is neither a folder nor a question file")
        if not found:
            raise DataError(f"check.evaluation_images: {place} has no image; name another place, or leave it out")
        files.update((os.path.realpath(file), file) for file in found)
    return list(files.values())


def _of_questions(path: Path) -> list[Path]:
    names = list(dict.fromkeys(name for _, line in read_json_lines(path) for name in _named(line)))
    if not names:
        return []
    roots = [ImageRoot(folder) for folder in (path.parent, path.parent.parent, path.parent.parent / "images")]
    root = next((root for root in roots if any(root.problem(name) is None for name in names[:20])), None)
    if root is None:
        folders = ", ".join(root.folder for root in roots)
        raise DataError(f"{path}: its images are in none of {folders}; name the folder of the images instead")
    return [Path(root.folder, name) for name in names if root.problem(name) is None]


def _named(line: dict[str, Any]) -> Iterator[str]:
    """The images of a question: `image` and `images`, each a path or a list of them."""
    for value in (line.get("image"), line.get("images")):
        yield from (name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str))


def find_overlap(files: Sequence[Path], trained_on: Keys) -> tuple[int, list[str]]:
    """How many different evaluation images there are, and the files of those that are trained on as well.

    Args:
        files: See `evaluation_files`.
        trained_on: `key_of` the content of each image of the run.
    """
    seen = Keys()
    shared = []
    for path in tqdm(files, desc="evaluation images", unit="image", delay=3.0, disable=None):
        key = key_of(path.read_bytes())
        if seen.add(key) and key in trained_on:
            shared.append(str(path))
    return len(seen), shared

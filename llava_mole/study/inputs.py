"""Digests of what runs read: files, models, data sets with their images, and benchmarks.

A digest is computed from contents, so it does not change when a file is copied or made again. Contents that have been
read once are remembered by names, sizes and times of change, because a model's weights take a minute to read.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from llava_mole.common.errors import DataError
from llava_mole.common.files import read_json, sha256_of, sha256_of_json, write_json
from llava_mole.config import SourceConfig, is_remote
from llava_mole.data.remote import Access
from llava_mole.data.shard_files import find_shards, is_sharded
from llava_mole.data.store import SELF_HASH, is_prepared, read_manifest, read_records
from llava_mole.eval.benchmarks.benchmark import load_questions
from llava_mole.eval.benchmarks.registry import get_benchmark
from llava_mole.eval.questions import parse_named_file

MISSING = "missing"
UNSCORED = ("title", "position", "notes", "published")
"""Keys of a benchmark that no answer and no score depends on."""
UNREAD = ("made_by", "report", SELF_HASH)
"""Keys of a prepared set's manifest that say when it was made, and differ if it is made again."""


class Inputs:
    """Computes digests; everything that is missing is collected in `missing`.

    Args:
        cache: JSON file in which contents that have been read are remembered; None remembers nothing.
    """

    def __init__(self, cache: Path | None = None):
        self.missing: list[str] = []
        """Every time that something was looked for in vain."""
        self._cache_file = cache
        self._known: dict[str, str] = {}
        self._fresh: dict[str, str] = {}  # results within this process
        if cache is not None and cache.is_file():
            try:
                self._known = dict(read_json(cache))
            except (DataError, TypeError, ValueError):
                self._known = {}  # a cache that cannot be read is made again

    def save(self) -> None:
        """Write the cache. What another process has added in the meantime is lost, and only read again."""
        if self._cache_file is not None:
            write_json(self._cache_file, dict(sorted(self._known.items())), indent=0)

    def model(self, directory: str) -> str:
        """Every file of a language model's directory."""
        root = Path(directory)
        return (
            self.files(root, sorted(p for p in root.rglob("*") if p.is_file())) if root.is_dir() else self._lost(root)
        )

    def file(self, path: str) -> str:
        """One file."""
        return self.files(Path(path).parent, [Path(path)])

    def projector(self, path: str) -> str:
        """A projector's file, or the weights of all checkpoints of a run."""
        if Path(path).is_dir():
            root = Path(path)
            found = sorted(p for p in root.rglob("*.safetensors") if "trainer" not in p.relative_to(root).parts)
            return self.files(root, found) if found else self._lost(root)
        return self.file(path)

    def source(self, name: str, source: SourceConfig, *, images: bool) -> str:
        """A data set: its annotations and, with `images`, the contents of the images that they name.

        A prepared set is identified by its manifest, which has the digests of its shards; its images are not read.
        Local shards are read with the images inside them, remote ones are told apart by size and ETag.
        """
        path = Path(source.annotations)
        if is_sharded(source.annotations):
            kind, shards = find_shards(source.annotations, Access())
            if is_remote(source.annotations):  # contents are told apart by what the server says of them
                return sha256_of_json([kind, [[shard.path, shard.size, shard.tag] for shard in shards]])
            root = Path(shards[0].path).parent
            return sha256_of_json([kind, self.files(root, [Path(shard.path) for shard in shards])])
        if not path.exists():
            return self._lost(path)
        if is_prepared(path):
            return sha256_of_json({k: v for k, v in read_manifest(path).items() if k not in UNREAD})
        annotations = self.file(str(path))
        if not images:
            return annotations
        names = sorted({image for record in read_records(path, name) for image in record.images})
        folder = Path(source.image_folder)
        return sha256_of_json([annotations, self.files(folder, [folder / image for image in names])])

    def benchmark(self, name: str, data_root: Path, *, images: bool) -> str:
        """A benchmark: how it asks and scores, its questions with their answers, training splits and images."""
        benchmark = get_benchmark(name)
        key = f"benchmark {name} below {data_root}, {images}"
        if key not in self._fresh:
            try:
                loaded = load_questions(benchmark, data_root=data_root)
            except DataError as error:
                self.missing.append(str(error))
                return MISSING
            definition = {k: v for k, v in asdict(benchmark).items() if k not in UNSCORED}
            trained = [parse_named_file(argument)[1] for argument in loaded.train_files or []]
            shown = sorted({image for q in loaded.questions for image in q.images}) if images else []
            folder = loaded.image_folder
            parts = [
                definition,
                loaded.fingerprint(),
                *(self.file(str(f)) for f in trained),
            ]
            self._fresh[key] = sha256_of_json([*parts, self.files(folder, [folder / image for image in shown])])
        return self._fresh[key]

    def files(self, root: Path, paths: Sequence[Path]) -> str:
        """The names, relative to `root`, and contents of files."""
        try:
            stats = [(path, path.stat()) for path in paths]
        except OSError as error:
            return self._lost(Path(error.filename or root))
        named = [[str(p.absolute()), s.st_size, s.st_mtime_ns] for p, s in stats]
        signature = sha256_of_json([str(root.absolute()), named])
        if signature not in self._known:
            digest = hashlib.sha256()
            for path in _shown(paths, f"reading {root}"):
                digest.update(f"{path.relative_to(root)}\0{sha256_of(path)}\n".encode())
            self._known[signature] = digest.hexdigest()
        return self._known[signature]

    def _lost(self, path: Path) -> str:
        self.missing.append(str(path))
        return MISSING


def _shown(paths: Sequence[Path], title: str) -> Iterable[Path]:
    """The paths, with progress if that may take more than a few seconds."""
    return tqdm(paths, desc=title, unit="file", leave=False, disable=None if len(paths) > 1000 else True)

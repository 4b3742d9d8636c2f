"""Opens a source of the configuration, whatever form it has: its records, and the reader of its images."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from llava_mole.common.files import sha256_of_json
from llava_mole.config import DataConfig, ImageModes, SourceConfig, is_remote
from llava_mole.data.anyres import Size
from llava_mole.data.images import Oddity, image_size, load_image, open_image, open_size, resolve_image
from llava_mole.data.records import Record
from llava_mole.data.remote import Access
from llava_mole.data.shard_files import is_sharded
from llava_mole.data.shard_images import RemoteFolder, ShardImages, Storage
from llava_mole.data.shard_index import ShardRecords, open_shards
from llava_mole.data.shards import parse_reference
from llava_mole.data.store import content_digest, is_prepared, read_records


class ImageReader:
    """Reads the images of one source: from its shards, a folder on this machine or one on a server.

    Can be pickled into loader workers.

    Args:
        folder: Root of the image paths.
        follow_links: Whether symbolic links may lead out of a local folder.
        shards: Reads what lies in shards.
        remote: Reads from `folder` if that is on a server.
    """

    def __init__(
        self,
        folder: str,
        *,
        follow_links: bool = False,
        shards: ShardImages | None = None,
        remote: RemoteFolder | None = None,
    ) -> None:
        self.folder, self.follow_links = folder, follow_links
        self._shards, self._remote = shards, remote

    @property
    def is_distant(self) -> bool:
        """Whether images come from a server, so that fetching them at once pays."""
        return self._remote is not None or (self._shards is not None and self._shards.is_distant)

    def load(
        self,
        path: str,
        *,
        draft_size: int | None = None,
        modes: ImageModes = "llava",
        on_odd: Callable[[str, Oddity], object] | None = None,
    ) -> Image.Image:
        """An image as RGB, see `images.open_image`.

        Raises:
            DataError: as `images.load_image`.
            StorageError: what holds the image fails.
        """
        data = self.read(path)
        if data is None:
            return load_image(
                path,
                self.folder,
                draft_size=draft_size,
                modes=modes,
                on_odd=on_odd,
                follow_links=self.follow_links,
            )
        return open_image(data, name=self.name_of(path), draft_size=draft_size, modes=modes, on_odd=on_odd)

    def size(self, path: str, modes: ImageModes = "llava") -> Size:
        """Width and height of what `load` returns, from the head of the file. Raises as `load`."""
        data = self.read(path)
        if data is None:
            return image_size(path, self.folder, modes=modes, follow_links=self.follow_links)
        return open_size(io.BytesIO(data), self.name_of(path), modes)

    def read(self, path: str) -> bytes | None:
        """The bytes of an image; None for a file in a local folder. Raises as `load`."""
        place = parse_reference(path) if self._shards is not None else None
        if place is not None and self._shards is not None:
            return self._shards.read(place)
        return self._remote.read(path) if self._remote is not None else None

    def prefetch(self, paths: Iterable[str]) -> None:
        """Fetch images from servers at once; `load` then finds them. Raises StorageError."""
        paths = list(paths)
        if self._shards is not None:
            self._shards.prefetch(place for place in map(parse_reference, paths) if place is not None)
        if self._remote is not None:
            self._remote.prefetch(path for path in paths if self._shards is None or parse_reference(path) is None)

    def check(self, path: str) -> None:
        """Raise DataError for an image that is not there. What lies in shards was checked when they were indexed."""
        if self._shards is not None and parse_reference(path) is not None:
            return
        if self._remote is not None:
            self._remote.check(path)
        else:
            resolve_image(path, self.folder, follow_links=self.follow_links)

    def name_of(self, path: str) -> str:
        """The name of an image in messages."""
        place = parse_reference(path) if self._shards is not None else None
        return path if place is None else place.name


def storage_of(data: DataConfig) -> Storage:
    """Cache and time limits of a configuration."""
    access = Access(data.remote_timeout, data.remote_retries)
    return Storage(Path(data.cache_dir), int(data.cache_gb * 1e9), access)


def open_source(data: DataConfig, name: str) -> tuple[Sequence[Record], ImageReader]:
    """The records of a source, and the reader of its images. Shards are indexed if they are not yet.

    Raises:
        DataError: as `read_records` and `open_shards`.
        StorageError, ConfigError: as `open_shards`.
    """
    source, storage = data.sources[name], storage_of(data)
    records = (
        open_shards(source.annotations, name, storage)
        if is_sharded(source.annotations)
        else read_records(source.annotations, name)
    )
    reader = ImageReader(
        source.image_folder,
        follow_links=source.follow_links or data.follow_links,
        shards=records.shards if isinstance(records, ShardRecords) else None,
        remote=RemoteFolder(source.image_folder, storage) if is_remote(source.image_folder) else None,
    )
    return records, reader


def source_digest(records: Sequence[Record], annotations: str) -> str:
    """SHA-256 (hex) of the content of a source: for shards, of texts and places of the images. See `content_digest`."""
    if isinstance(records, ShardRecords):
        return sha256_of_json([shard["sha256"] for shard in records.manifest["shards"]])
    return content_digest(annotations)


def is_there(source: SourceConfig) -> bool:
    """Whether the records of a source exist; those on a server count as existing."""
    return Path(source.annotations).is_file() or is_prepared(source.annotations) or is_sharded(source.annotations)


def has_folder(source: SourceConfig) -> bool:
    """Whether the image folder of a source exists, or none is needed because images lie in shards or on a server."""
    needed = not is_sharded(source.annotations) and not is_remote(source.image_folder)
    return not needed or Path(source.image_folder).is_dir()

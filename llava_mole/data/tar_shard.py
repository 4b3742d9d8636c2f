"""WebDataset shards: tar files in which the members of a sample stand side by side and share a name.

`0001.json` and `0001.jpg` are a sample: its record, and its image. The name of a sample ends at the first dot of the
file name. In place of `.json` there may be a caption, `.txt`. Nothing is unpacked: members are found by their headers.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from llava_mole.common.errors import DataError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.data.json_stream import LARGEST_VALUE
from llava_mole.data.prepare.files import CheckedHeader
from llava_mole.data.prepare.images import EXTENSIONS
from llava_mole.data.shards import Reference, Sample, check_image_size

_BLOCK = tarfile.BLOCKSIZE
_SAMPLE_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_IMAGES = frozenset(extension for group in EXTENSIONS.values() for extension in group)
_AGAIN = "write or download the shard again"


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    offset: int
    """Of its first byte."""
    size: int


def tar_members(path: Path, name: str) -> Iterator[Member]:
    """Yield the files of a tar file in order, by their headers.

    Args:
        name: Of the tar file, for messages.

    Raises:
        DataError: it is damaged or ends early, or a member is a link or device or has a name that leads elsewhere.
    """
    length, end = os.path.getsize(path), 0
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=CheckedHeader) as opened:
                while (header := opened.next()) is not None:
                    opened.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                    end = header.offset_data + (header.size + _BLOCK - 1) // _BLOCK * _BLOCK
                    if header.offset_data + header.size > length:
                        raise DataError(
                            f"{name}: is cut short: member {header.name[:100]!r} ends at byte "
                            f"{header.offset_data + header.size:,}, the file has {length:,}; {_AGAIN}"
                        )
                    if _is_elsewhere(header.name):
                        raise DataError(f"{name}: member {header.name[:100]!r} leads out of the shard; it is not read")
                    if header.isdir():
                        continue
                    if not header.isreg() or header.issparse():
                        kind = "link" if header.issym() or header.islnk() else "device or sparse file"
                        raise DataError(f"{name}: member {header.name[:100]!r} is a {kind}; it is not read")
                    yield Member(header.name, header.offset_data, header.size)
        except tarfile.TarError as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{name}: is no sound tar file: {reason}; {_AGAIN} (compressed ones: unpack)") from None
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise DataError(f"{name}: is cut short: it has no end mark at byte {end:,}; {_AGAIN}")


def _is_elsewhere(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return not parts or parts[0] == "/" or ".." in parts or ":" in parts[0] or "\0" in name


def tar_samples(path: Path, number: int, name: str, ignored: dict[str, int]) -> Iterator[Sample]:
    """Yield the samples of a WebDataset shard.

    Args:
        path: The file.
        number: Of the file in its source, for references.
        name: Of the file, for messages.
        ignored: Receives how many members were not read, by extension.

    Raises:
        DataError: as `tar_members`; or a sample has no text, or its text or an image is not valid or too large.
    """
    seen: set[str] = set()
    key, members = "", dict[str, Member]()
    with path.open("rb") as file:
        for member in tar_members(path, name):
            found = _SAMPLE_NAME.fullmatch(member.name)
            if found is None:
                ignored["hidden or without extension"] = ignored.get("hidden or without extension", 0) + 1
                continue
            if found[1] != key:
                if members:
                    yield _sample(file, number, name, key, members, len(seen), ignored)
                key, members = found[1], {}
                if key in seen:
                    raise DataError(
                        f"{name}: the members of sample {key!r} do not stand side by side, as WebDataset needs them; "
                        "sort the files by name before they are packed"
                    )
                seen.add(key)
            extension = found[2].lower()
            if extension in members:
                raise DataError(f"{name}: two members are called {member.name!r}; {_AGAIN}")
            members[extension] = member
        if members:
            yield _sample(file, number, name, key, members, len(seen), ignored)


def _sample(
    file: Any, number: int, name: str, key: str, members: dict[str, Member], line: int, ignored: dict[str, int]
) -> Sample:
    where = f"{name}:{line}: sample {key!r}"
    images: dict[str, str] = {}
    for extension, member in members.items():
        if extension.rpartition(".")[2] in _IMAGES:
            check_image_size(member.size, where, member.name)
            images[member.name] = str(Reference(number, None, member.offset, member.size, member.name))
        elif extension not in ("json", "txt"):
            ignored[f".{extension}"] = ignored.get(f".{extension}", 0) + 1
    text = members.get("json", members.get("txt"))
    if text is None:
        raise DataError(f"{where} has neither .json nor .txt, only {', '.join(f'.{ending}' for ending in members)}")
    if text.size > LARGEST_VALUE:
        raise DataError(f"{where}: {text.name!r} has {text.size:,} bytes, a record may have {LARGEST_VALUE:,}")
    file.seek(text.offset)
    try:
        value = _parse(file.read(text.size), text.name, len(images))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {text.name!r} is not valid: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: {text.name!r} holds {type(value).__name__}; it must be one record")
    value.setdefault("id", key)
    if images:
        value["images"] = _in_order(value.pop("image", None) or value.get("images"), images, where)
    return Sample(value, key, line)


def _parse(data: bytes, name: str, images: int) -> Any:
    """A record, or a caption as one. Raises ValueError."""
    if not name.lower().endswith(".txt"):
        return json.loads(data)
    markers = "\n".join([DEFAULT_IMAGE_TOKEN] * images)
    caption = data.decode("utf-8-sig").strip()
    return {"conversations": [{"from": "human", "value": markers}, {"from": "gpt", "value": caption}]}


def _in_order(named: Any, images: dict[str, str], where: str) -> list[str]:
    """The references in the order of the names in the record, or of the members if their names differ."""
    wanted = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    if not wanted:
        return list(images.values())
    if len(wanted) != len(images):
        raise DataError(
            f"{where}: its record has {len(wanted)} images, {len(images)} of its members are images; they must agree"
        )
    by_name = {name.rpartition("/")[2]: place for name, place in images.items()}
    found = [by_name.get(name.rpartition("/")[2]) if isinstance(name, str) else None for name in wanted]
    return list(images.values()) if None in found else [place for place in found if place is not None]

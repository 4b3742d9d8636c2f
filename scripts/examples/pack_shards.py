"""`python scripts/examples/pack_shards.py RECORDS IMAGES OUT`: LLaVA records with their images as shards.

Writes WebDataset tar shards (`--form tar`), or parquet with the images as bytes (`--form parquet`). Both are what
`data.sources.NAME.annotations` reads, from a disk or from a bucket that OUT is copied to.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_mole.common.errors import ConfigError, command
from llava_mole.data.images import resolve_image
from llava_mole.data.json_stream import iterate_json


def read(records: Path, images: Path) -> Iterator[tuple[dict[str, Any], list[tuple[str, bytes]]]]:
    """Yield every record without its image keys, and the names and contents of its images."""
    for value, _ in iterate_json(records):
        named = value.pop("image", value.pop("images", []))
        names = named if isinstance(named, list) else [named]
        yield value, [(name, resolve_image(name, images).read_bytes()) for name in names]


def write_tar(path: Path, rows: list[tuple[dict[str, Any], list[tuple[str, bytes]]]], first: int) -> None:
    """One shard: `NUMBER.json`, and `NUMBER.0.jpg`, `NUMBER.1.jpg`, ... in the order of the record."""
    with tarfile.open(path, "w") as tar:
        for number, (value, images) in enumerate(rows, first):
            members = [(f"{n}.{name.rpartition('.')[2].lower()}", data) for n, (name, data) in enumerate(images)]
            for ending, data in [*members, ("json", json.dumps(value).encode())]:
                header = tarfile.TarInfo(f"{number:09d}.{ending}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def write_parquet(path: Path, rows: list[tuple[dict[str, Any], list[tuple[str, bytes]]]], first: int) -> None:
    """One file with columns `id`, `conversations` and `images`, in row groups of 100."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [
        {
            "id": str(value.get("id", number)),
            "conversations": value["conversations"],
            "images": [{"bytes": data, "path": name} for name, data in images],
        }
        for number, (value, images) in enumerate(rows, first)
    ]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema([("id", pa.string()), ("conversations", pa.list_(turn)), ("images", pa.list_(image))])
    pq.write_table(pa.Table.from_pylist(table, schema), path, row_group_size=100)


WRITERS = {"tar": write_tar, "parquet": write_parquet}


def pack(records: Path, images: Path, out: Path, form: str = "tar", samples: int = 1000) -> int:
    """Write the shards into the new folder `out`, `samples` in each, and return their number.

    Raises:
        ConfigError: `out` holds something.
        DataError: the records or an image cannot be read.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    shards, rows, written = 0, [], 0
    for row in tqdm(read(records, images), desc=f"packing {out.name}", unit="record", delay=3.0, disable=None):
        rows.append(row)
        if len(rows) == samples:
            WRITERS[form](out / f"shard-{shards:05d}.{form}", rows, written)
            shards, written, rows = shards + 1, written + len(rows), []
    if rows:
        WRITERS[form](out / f"shard-{shards:05d}.{form}", rows, written)
        shards += 1
    return shards


@command
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="LLaVA JSON or JSONL")
    parser.add_argument("images", type=Path, help="root of the image paths")
    parser.add_argument("out", type=Path, help="new folder for the shards")
    parser.add_argument("--form", choices=sorted(WRITERS), default="tar")
    parser.add_argument("--samples", type=int, default=1000, help="records of a shard (default: %(default)s)")
    given = parser.parse_args()
    shards = pack(given.records, given.images, given.out, given.form, max(1, given.samples))
    print(f"{shards} shards in {given.out}")


if __name__ == "__main__":
    raise SystemExit(main())

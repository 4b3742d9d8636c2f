"""Images a second of the data loader, by where the data lie, beside the loaders of WebDataset and LitData.

Writes generated JPEGs once as loose files, tar shards, parquet and LitData's chunks, and serves the tar shards from an
S3 server on loopback (moto, in a process of its own). Each loader gives decoded RGB images padded to 336 x 336 with the
same `ImageProcessor`; they differ in how they find and read the bytes. Ours reads in the order of the plan (every
sample at random), WebDataset in the order of the shards through a shuffle buffer, LitData in its shuffled order.

All run in one process without workers, so the figures are images a second of one core. The projection to 16 cores is 16
times that: loader workers share nothing but the disk and the network. Rounds are interleaved; the table has the median.
`s3, cached` reads what an earlier pass has left in the cache, `s3, no cache` every image from the server.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from llava_mole.common.errors import command
from llava_mole.common.files import write_json
from llava_mole.common.text import format_table
from llava_mole.config import DataConfig, SourceConfig
from llava_mole.data.images import ImageProcessor, open_image
from llava_mole.data.mixture import TrainingPlan
from llava_mole.data.sources import open_source
from scripts.examples.pack_shards import pack

SIDE = 336
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375), (1024, 768))
CORES, GOAL = 16, 2000


def write_images(folder: Path, count: int) -> None:
    """JPEGs of COCO's usual sizes, and their records."""
    generator = np.random.Generator(np.random.Philox(key=0))
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        coarse = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{number:06d}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Noise."}]
        records.append({"id": str(number), "image": f"{number:06d}.jpg", "conversations": turns})
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def ours(place: str, folder: Path, work: Path, **options: Any) -> Callable[[int], Iterator[Image.Image]]:
    """Our loader in the order of the plan, a batch of eight at a time."""
    source = SourceConfig(annotations=place, image_folder=str(folder))
    data = DataConfig(sources={"a": source}, cache_dir=str(work), allow_remote=True, **options)
    records, reader = open_source(data, "a")
    order = [sample for _, sample in map(TrainingPlan({"a": len(records)}, {}, 0, 1).__getitem__, range(len(records)))]

    def run(_: int) -> Iterator[Image.Image]:
        for start in range(0, len(order), 8):
            batch = [records[n] for n in order[start : start + 8]]
            if reader.is_distant:
                reader.prefetch(path for record in batch for path in record.images)
            for record in batch:
                yield reader.load(record.images[0])

    return run


def webdataset_loader(shards: list[str]) -> Callable[[int], Iterator[Image.Image]]:
    """WebDataset's own reader with its shuffle buffer."""
    import webdataset

    def run(_: int) -> Iterator[Image.Image]:
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(1000)
        for sample in dataset:
            yield open_image(next(value for key, value in sample.items() if key.endswith(".jpg")))

    return run


def litdata_loader(folder: Path, images: Path) -> Callable[[int], Iterator[Image.Image]]:
    """LitData's own format and reader, of the same bytes."""
    import litdata

    if not folder.exists():
        files = sorted(str(path) for path in images.iterdir())
        litdata.optimize(_read, files, output_dir=str(folder), chunk_bytes="64MB", num_workers=1)

    def run(_: int) -> Iterator[Image.Image]:
        for data in litdata.StreamingDataset(str(folder), shuffle=True, seed=0):
            yield open_image(bytes(data))

    return run


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def serve_s3(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """An S3 server on loopback with the files of `folder` in bucket `bench`; the environment is set for it."""
    import boto3

    code = (
        "import sys, threading; from moto.server import ThreadedMotoServer\n"
        "s = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False); s.start()\n"
        "print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    os.environ["AWS_ENDPOINT_URL"] = url
    client = boto3.client("s3")
    client.create_bucket(Bucket="bench")
    for path in sorted(folder.iterdir()):
        client.put_object(Bucket="bench", Key=f"tar/{path.name}", Body=path.read_bytes())
    return server, "s3://bench/tar"


def measure(run: Callable[[int], Iterator[Image.Image]], repeat: int, count: int) -> float:
    """Images a second of one pass."""
    processor, seen, started = ImageProcessor(SIDE), 0, time.perf_counter()
    for image in run(repeat):
        processor.pixels(image)
        seen += 1
    if seen != count:
        raise RuntimeError(f"a loader gave {seen} of {count} images")
    return seen / (time.perf_counter() - started)


@command
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="JPEGs (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_images(work / "loose", given.images)
        loose, records = work / "loose" / "images", work / "loose" / "records.jsonl"
        for form in ("tar", "parquet"):
            pack(records, loose, work / form, form, samples=max(1, given.images // 4))
        server, bucket = serve_s3(work / "tar")
        try:
            loaders = {
                "ours, loose files": ours(str(records), loose, work / "a"),
                "ours, tar": ours(str(work / "tar"), loose, work / "a"),
                "ours, parquet": ours(str(work / "parquet"), loose, work / "a"),
                "ours, s3, cached": ours(bucket, loose, work / "b"),
                "ours, s3, no cache": ours(bucket, loose, work / "c", cache_gb=1e-9),
            }
            others = {
                "WebDataset, tar": lambda: webdataset_loader(sorted(map(str, (work / "tar").iterdir()))),
                "LitData, its chunks": lambda: litdata_loader(work / "litdata", loose),
            }
            for title, make in others.items():
                try:
                    loaders[title] = make()
                    measure(loaders[title], 0, given.images)
                except Exception as error:  # whatever another package raises, ours are measured
                    loaders.pop(title, None)
                    reason = " ".join(str(error).split())[:300] or type(error).__name__
                    print(f"{title}: not measured: {reason}; pip install webdataset litdata", file=sys.stderr)
            rates: dict[str, list[float]] = {title: [] for title in loaders}
            for repeat in range(given.repeats + 1):  # the first round fills caches
                for title in random.Random(repeat).sample(sorted(loaders), len(loaders)):
                    rate = measure(loaders[title], repeat, given.images)
                    if repeat:
                        rates[title].append(rate)
        finally:
            if server.stdin is not None:
                server.stdin.close()
            server.wait()
    rows = [("loader", "images/s, one core (median; min to max)", f"x {CORES} cores", f"reaches {GOAL:,}")]
    for title, found in rates.items():
        middle = statistics.median(found)
        projected = middle * CORES
        rows.append(
            (
                title,
                f"{middle:.0f}; {min(found):.0f} to {max(found):.0f}",
                f"{projected:,.0f}",
                "yes" if projected >= GOAL else "no",
            )
        )
    print(format_table(rows, right={2}))
    if given.out is not None:
        write_json(given.out, {"images": given.images, "side": SIDE, "rates": rates})


if __name__ == "__main__":
    raise SystemExit(main())

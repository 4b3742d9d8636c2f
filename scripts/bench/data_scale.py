"""Data at the paper's scale: preparing, opening and reading a million records, and decoding images for two workers.

All figures are measured on generated records and JPEGs: records/s and peak memory of `llava-mole prepare llava-json`
(one process, images are not checked); seconds and memory to open the prepared set, compared with `json.load` of the
same file; records/s in random order; images/s of a loader with two workers at 336 px, compared with the CLIP processors
of transformers used as in LLaVA (pad with the mean colour, then `preprocess`): `hf_pil` is the Pillow version, which
LLaVA used, `hf_torchvision` is today's `CLIPImageProcessor`. Memory is that of a fresh process: `rss` includes the
mapped pages it has touched, which all processes share; `own` does not.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDE = 336
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375), (1024, 768))
"""Of the generated JPEGs: COCO's and GQA's usual ones, and a larger one."""
LOADERS = ("llava_mole", "hf_pil", "hf_torchvision")


def write_raw(path: Path, records: int) -> None:
    """A LLaVA JSON list: one round, a caption of some forty words; about 400 bytes a record."""
    generator = random.Random(0)
    words = "the red dog rests on a step near old wooden door while people walk along street with bags".split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(records):
            question, answer = (" ".join(generator.choices(words, k=k)) for k in (8, 40))
            record = {
                "id": f"{number:012d}",
                "image": f"coco/train2017/{number:012d}.jpg",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}?"},
                    {"from": "gpt", "value": answer},
                ],
            }
            file.write(("," if number else "[") + "\n" + json.dumps(record))
        file.write("\n]\n")


def memory() -> dict[str, int]:
    """Resident bytes of this process, and those of them that are its own: no page of a file, which others share."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kilobytes = {key: int(value.split()[0]) for key, value in fields.items()}
    return {"rss": 1024 * kilobytes["Rss"], "own": 1024 * kilobytes["Anonymous"]}


def peak_memory() -> int:
    """Peak resident bytes of this process (`ru_maxrss` would include the parent it was forked from)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def prepare(raw: Path, directory: Path) -> dict[str, Any]:
    """`llava-mole prepare llava-json` without checking the images, which do not exist."""
    import contextlib

    from llava_mole.data.prepare.cli import main

    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        options = ["--raw", str(raw), "--out", str(directory.parent), "--check-images", "none"]
        if main(["llava-json", *options]):
            raise SystemExit("llava-mole prepare failed")
    seconds = time.perf_counter() - start
    return {"seconds_s": seconds, "cpu_s": time.process_time(), "peak_bytes": peak_memory()}


def open_prepared(raw: Path, directory: Path) -> dict[str, Any]:
    before, start = memory(), time.perf_counter()
    from llava_mole.data.store import PreparedRecords

    imported = time.perf_counter()
    records = PreparedRecords(directory, "synthetic")
    opened, after = time.perf_counter(), memory()
    generator = random.Random(1)
    order = [generator.randrange(len(records)) for _ in range(min(200_000, len(records)))]
    reading = time.perf_counter()
    for index in order:
        records[index]
    read, touched = time.perf_counter(), memory()
    return {
        "open_s": opened - imported,
        "import_s": imported - start,
        "rss_bytes": after["rss"] - before["rss"],
        "own_bytes": after["own"] - before["own"],
        "after_reading_rss_bytes": touched["rss"] - before["rss"],
        "after_reading_own_bytes": touched["own"] - before["own"],
        "random_records_per_s": len(order) / (read - reading),
    }


def open_json(raw: Path, directory: Path) -> dict[str, Any]:
    before, start = memory(), time.perf_counter()
    with raw.open(encoding="utf-8") as file:
        records = json.load(file)
    seconds, after = time.perf_counter() - start, memory()
    assert records
    return {
        "open_s": seconds,
        "rss_bytes": after["rss"] - before["rss"],
        "own_bytes": after["own"] - before["own"],
    }


CHILDREN: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "prepare": prepare,
    "open_prepared": open_prepared,
    "open_json": open_json,
}


def child(name: str, raw: Path, directory: Path) -> dict[str, Any]:
    """Run one of `CHILDREN` in a process of its own and return its figures."""
    command = [sys.executable, __file__, "--child", name, str(raw), str(directory)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write_images(directory: Path, count: int) -> list[Path]:
    """Write JPEGs of smooth blobs with some noise; they have about as many bytes per pixel as photos."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    paths = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        blobs = generator.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + generator.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        paths.append(directory / f"{number}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths


class Images:
    """A map-style data set of preprocessed images."""

    def __init__(self, paths: list[Path], kind: str) -> None:
        self.paths, self.kind = paths, kind
        if kind == "llava_mole":
            from llava_mole.data.images import ImageProcessor

            self.processor: Any = ImageProcessor(SIDE)
        else:
            from transformers.models.clip import CLIPImageProcessor, CLIPImageProcessorPil

            hf = CLIPImageProcessorPil if kind == "hf_pil" else CLIPImageProcessor
            sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
            self.processor = hf(**sides)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        path = self.paths[index]
        if self.kind == "llava_mole":
            from llava_mole.data.images import load_image

            return self.processor.pixels(load_image(path.name, path.parent))
        image = Image.open(path).convert("RGB")
        side = max(image.size)
        color = tuple(int(255 * value) for value in self.processor.image_mean)
        square = Image.new("RGB", (side, side), color)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return self.processor.preprocess(square, return_tensors="pt")["pixel_values"][0]

    def finish(self, batch: Any) -> Any:
        """A loader's batch as the tower's input, float32 [N, 3, S, S]: ours is normalised where the tower is."""
        if self.kind != "llava_mole":
            return batch
        from llava_mole.data.images import normalise_pixels

        return normalise_pixels(batch, self.processor.mean, self.processor.std)


def measure_loaders(paths: list[Path], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Images/s of every loader in each round, interleaved, and the largest difference of its pixels from ours (of 255).

    Sets this process to one thread: it only finishes batches, and more threads would compete with the two workers.
    """
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from llava_mole.constants import CLIP_STD

    torch.set_num_threads(1)
    sets = {kind: Images(paths, kind) for kind in LOADERS}
    firsts = {kind: own.finish(own[0]) for kind, own in sets.items()}
    ours = firsts["llava_mole"]
    distance = {kind: float((own - ours).abs().max()) * 255 * max(CLIP_STD) for kind, own in firsts.items()}
    loaders = {
        kind: DataLoader(own, batch_size=8, num_workers=2, persistent_workers=True)  # type: ignore[arg-type]
        for kind, own in sets.items()
    }
    speeds: dict[str, list[float]] = {kind: [] for kind in LOADERS}
    for round_ in tqdm(range(repeats + 1), unit="round", disable=None):
        for step in range(len(LOADERS)):
            kind = LOADERS[(round_ + step) % len(LOADERS)]
            start = time.perf_counter()
            count = sum(len(sets[kind].finish(batch)) for batch in loaders[kind])
            if round_:  # the first one starts the workers
                speeds[kind].append(count / (time.perf_counter() - start))
    return speeds, distance


def record_rows(records: int, directory: Path, repeats: int) -> list[dict[str, Any]]:
    """One row for preparing, and one for each way of opening."""
    from tqdm import tqdm

    raw, prepared = directory / "raw.json", directory / "out" / "train"
    write_raw(raw, records)
    common = {"records": records, "raw_bytes": raw.stat().st_size}
    done = child("prepare", raw, prepared)
    done["records_per_s"] = records / done["seconds_s"]
    done["records_per_cpu_s"] = records / done["cpu_s"]
    size = sum(path.stat().st_size for path in prepared.iterdir())
    rows = [{"part": "prepare", "variant": "llava-json", **common, **done, "prepared_bytes": size}]
    measured: dict[str, list[dict[str, Any]]] = {"open_prepared": [], "open_json": []}
    for round_ in tqdm(range(repeats), unit="round", disable=None):
        for kind in sorted(measured, reverse=bool(round_ % 2)):
            measured[kind].append(child(kind, raw, prepared))
    baseline = statistics.median(run["open_s"] for run in measured["open_json"])
    baseline_bytes = statistics.median(run["rss_bytes"] for run in measured["open_json"])
    for kind, runs in measured.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append(
            {
                "part": "open",
                "variant": kind,
                **common,
                **middle,
                "min_open_s": min(run["open_s"] for run in runs),
                "max_open_s": max(run["open_s"] for run in runs),
                "ratio_to_open_json": middle["open_s"] / baseline,
                "ratio_to_json_rss": middle["rss_bytes"] / baseline_bytes,
            }
        )
    return rows


def image_rows(count: int, directory: Path, repeats: int) -> list[dict[str, Any]]:
    """One row per loader."""
    speeds, distance = measure_loaders(write_images(directory, count), repeats)
    rows = []
    for kind, values in speeds.items():
        ratios = [own / other for own, other in zip(values, speeds["hf_pil"], strict=True)]
        rows.append(
            {
                "part": "loader, 2 workers",
                "variant": kind,
                "images": count,
                "median_images_per_s": statistics.median(values),
                "min_images_per_s": min(values),
                "max_images_per_s": max(values),
                "speed_ratio_to_hf_pil": statistics.median(ratios),
                "largest_difference_of_255": distance[kind],
            }
        )
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    import mole_common as common
    import torch

    parser: argparse.ArgumentParser = common.arguments((__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, help="records (default: 1,000,000; 50,000 with --quick)")
    parser.add_argument("--images", type=int, help="JPEGs (default: 200; 24 with --quick)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    records = options.records or (50_000 if options.quick else 1_000_000)
    images = options.images or (24 if options.quick else 200)
    repeats = options.repeats or (2 if options.quick else 3)
    with tempfile.TemporaryDirectory(prefix="data_scale") as name:
        directory = Path(name)
        (directory / "images").mkdir()
        loader = image_rows(images, directory / "images", 2 * repeats)
        stored = record_rows(records, directory, repeats)
    for part in (stored[:1], stored[1:], loader):
        common.report(f"{part[0]['part']} (measured, CPU)", part)
    common.save([*stored, *loader], options.json)


if __name__ == "__main__":
    main()

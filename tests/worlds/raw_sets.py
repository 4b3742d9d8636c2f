"""Small images, raw files and anyone's own data for `llava-mole prepare`, and what it makes of them."""

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = (20, 12)


def image_bytes(seed: int, kind: str = "JPEG", mode: str = "RGB", frames: int = 1) -> bytes:
    """A small image file whose pixels depend on `seed`."""
    pictures = []
    for frame in range(frames):
        color = ((seed * 53 + 70 * frame) % 256, (seed * 101) % 256, (seed * 29) % 256)
        picture = Image.new("RGB", SIZE, color)
        picture.putpixel((seed % SIZE[0], seed // SIZE[0] % SIZE[1]), (255, 255, 255))
        pictures.append(picture.convert(mode))
    buffer = io.BytesIO()
    if frames > 1:
        pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:])
    else:
        pictures[0].save(buffer, kind)
    return buffer.getvalue()


def base64_image(seed: int, **options: Any) -> str:
    return base64.b64encode(image_bytes(seed, **options)).decode()


def write_image(path: Path, seed: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(seed, **options))


def write_json(path: Path, value: Any) -> None:
    """One record a line, so that line numbers tell them apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, list):
        path.write_text("[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def talk(*texts: str, roles: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": roles[index % 2], "value": text} for index, text in enumerate(texts)]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_arrow_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    """As `datasets.save_to_disk` writes them."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_messages(raw: Path) -> None:
    """Chat messages and ShareGPT records: paths, data addresses, a remote image, a system prompt, a tool."""
    for n in range(3):
        write_image(raw / f"photos/{n}.jpg", 100 + n)

    def chat(*content: Any, system: str = "") -> list[dict[str, Any]]:
        roles = ("user", "assistant")
        head = [{"role": "system", "content": system}] if system else []
        return head + [{"role": roles[i % 2], "content": part} for i, part in enumerate(content)]

    def picture(url: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": url}}

    ask = {"type": "text", "text": "What is it?"}
    write_lines(
        raw / "chat.jsonl",
        [
            {"id": "a", "messages": chat([picture("photos/0.jpg"), ask], "A card.", system="Be brief.")},
            {"id": "b", "messages": chat([ask, picture("photos/1.jpg")], [{"type": "text", "text": "A card."}])},
            {"id": "c", "messages": chat([picture("https://example.org/x.jpg"), ask], "A card.")},
            {"id": "d", "messages": chat("Two and two?", "four")},
            {"id": "e", "messages": [*chat("Weather?", "Rain."), {"role": "tool", "content": "{}"}]},
            {"id": "f", "messages": chat("<image>\nWhat is it?", "A card."), "images": ["photos/2.jpg"]},
            {
                "id": "g",
                "messages": chat("<image> or <image>?", "The first."),
                "images": ["photos/0.jpg", "photos/1.jpg"],
            },
            {"id": "h", "messages": chat([{"type": "audio"}], "A song.")},
        ],
    )
    write_lines(
        raw / "sharegpt_test.jsonl",
        [{"conversations": talk("<image>\nRed?", "yes", "Blue?", "no"), "images": ["photos/0.jpg"], "note": 1}],
    )


def write_datasets_folder(raw: Path) -> None:
    """What `datasets.save_to_disk` writes for a `DatasetDict` with an image column."""
    rows = [
        {
            "image": {"bytes": image_bytes(110 + n, kind="PNG"), "path": f"{n}.png"},
            "question": f"Number {n}?",
            "answer": str(n),
        }
        for n in range(5)
    ]
    write_json(raw / "dataset_dict.json", {"splits": ["train", "test"]})
    for split, part in (("train", rows[:3]), ("test", rows[3:])):
        write_arrow_stream(raw / split / "data-00000-of-00001.arrow", part)
        write_json(raw / split / "dataset_info.json", {"features": {}})
        write_json(raw / split / "state.json", {"_split": split})


class Prepared:
    """What `llava-mole prepare` wrote for a raw copy."""

    def __init__(self, out: Path) -> None:
        from llava_mole.data.store import PreparedRecords

        self.out = out
        self.report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        self.rows = []
        if (out / "train").is_dir():
            records = PreparedRecords(out / "train", "test")
            self.rows = [records.row(index) for index in range(len(records))]

    @property
    def counts(self) -> dict[str, int]:
        """`split/sub-source` -> records that were kept."""
        return {f"{r['split']}/{r['sub_source']}": r["kept"] for r in self.report["records"]}

    @property
    def defects(self) -> dict[str, int]:
        """`kind action` -> records."""
        return {f"{d['kind']} {d['action']}": d["count"] for d in self.report["defects"]}

    @property
    def listed(self) -> list[tuple[str, str]]:
        """`(where, kind)` of every line of defects.jsonl."""
        lines = (self.out / "defects.jsonl").read_text(encoding="utf-8").splitlines()
        return [(line["where"], line["kind"]) for line in map(json.loads, lines)]

    def questions(self, name: str = "test") -> list[dict[str, Any]]:
        path = self.out / "questions" / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare(source: str, raw: Path, out: Path, *arguments: str) -> Prepared:
    """Run the command in this process (and one for the images), which must succeed."""
    from llava_mole.cli import main

    code = main(["prepare", source, "--raw", str(raw), "--out", str(out), "--workers", "1", *arguments])
    assert code == 0
    return Prepared(out)

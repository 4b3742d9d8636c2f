"""The small world with images of several shapes, for runs in which tokens depend on an image's size."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from worlds.tiny_models import make_world


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(image: Image.Image) -> str:
    """The picture as a request holds it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def make_shapes(directory: Path, size_of: Callable[[str, int], tuple[int, int]]) -> dict[str, Any]:
    """Two sources of 12 records: some text only, two with a second image. Returns the run's configuration.

    Args:
        size_of: Width and height of the image of a record, by source and number.
    """
    config = yaml.safe_load(make_world(directory, samples=12, text_only_every=6).read_text())
    for name, source in config["data"]["sources"].items():
        raw = Path(source["annotations"])
        records = json.loads(raw.read_text())
        for n, record in enumerate(records):
            if "image" in record:
                noise(size_of(name, n), n).save(raw.parent / record["image"])
        noise((20, 50), 99).save(raw.parent / "images" / "second.png")
        for record in records[4:6]:
            record["image"] = [record["image"], "images/second.png"]
            record["conversations"][0]["value"] = "What color is <image> and what color is <image>?"
        raw.write_text(json.dumps(records))
    return config

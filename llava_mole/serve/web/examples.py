"""Images to begin with: questions of a prepared tiny world, or drawn ones."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

QUESTIONS = "*/test_questions.jsonl"


class Example(NamedTuple):
    """An image with a question about it."""

    image: Path
    question: str


def find_examples(folder: Path, most: int = 4) -> list[Example]:
    """Questions about different images from the question files below a prepared folder, from each in turn."""
    by_file = [list(_of_file(file, folder, most)) for file in sorted(folder.glob(QUESTIONS))]
    turns = [own[n] for n in range(most) for own in by_file if n < len(own)]
    return turns[:most]


def draw_examples(folder: Path) -> list[Example]:
    """Write three drawn images into a folder."""
    found = []
    for name, question, paint in (
        ("shapes", "What shapes are in the image?", _shapes),
        ("chart", "Which bar is the highest?", _chart),
        ("sunset", "What is in this picture?", _sunset),
    ):
        image = Image.new("RGB", (336, 336), "white")
        paint(ImageDraw.Draw(image))
        image.save(folder / f"{name}.png")
        found.append(Example(folder / f"{name}.png", question))
    return found


def _of_file(file: Path, folder: Path, most: int) -> Iterator[Example]:
    seen: set[str] = set()
    asked: set[str] = set()
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            question = json.loads(line)
            image, text = question.get("image"), question["text"]
            if image and image not in seen and text not in asked and (folder / image).is_file():
                seen.add(image)
                asked.add(text)
                yield Example(folder / image, text)
                if len(seen) == most:
                    return


def _shapes(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((40, 40, 150, 150), fill="#0072B2")
    draw.rectangle((190, 60, 290, 140), fill="#E69F00")
    draw.polygon([(168, 190), (90, 300), (246, 300)], fill="#009E73")


def _chart(draw: ImageDraw.ImageDraw) -> None:
    for n, height in enumerate((120, 220, 160)):
        draw.rectangle((60 + 80 * n, 290 - height, 110 + 80 * n, 290), fill=("#0072B2", "#D55E00", "#666666")[n])
    draw.line((40, 290, 310, 290), fill="black", width=3)


def _sunset(draw: ImageDraw.ImageDraw) -> None:
    for y in range(200):
        draw.line((0, y, 336, y), fill=(70 + y * 9 // 10, 60 + y // 2, 140 - y // 3))
    draw.ellipse((128, 140, 208, 220), fill="#F8D66D")
    draw.rectangle((0, 200, 336, 336), fill="#20486B")

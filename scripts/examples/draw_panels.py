"""`python scripts/examples/draw_panels.py DIR`: draws a small domain of one's own, in LLaVA's format.

Pictures of control panels with three lamps, of which one is on; two questions about each. It stands for your own
records: DIR gets `train.jsonl`, `test.jsonl` and `images/`, which is all that `llava-mole prepare llava-json` needs.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

PLACES = ("left", "middle", "right")
COLORS = {"red": (235, 40, 40), "green": (50, 200, 70), "blue": (50, 90, 235), "yellow": (245, 215, 50)}


def draw(place: str, color: str, random_: random.Random) -> Image.Image:
    """A panel of 96 x 96 pixels with the lamp at `place` on."""
    gray = random_.randint(70, 130)
    image = Image.new("RGB", (96, 96), (gray, gray, gray))
    pen = ImageDraw.Draw(image)
    top, radius = random_.randint(36, 60), random_.randint(11, 14)
    for x, name in zip((18, 48, 78), PLACES, strict=True):
        box = (x - radius, top - radius, x + radius, top + radius)
        pen.ellipse(box, fill=COLORS[color] if name == place else (35, 35, 35), outline=(15, 15, 15), width=2)
    return image


def main() -> None:
    """Write both splits."""
    parser = argparse.ArgumentParser(description="Draw panels with lamps, and records about them.")
    parser.add_argument("out", metavar="DIR", type=Path, help="folder for train.jsonl, test.jsonl and images/")
    parser.add_argument("--train", type=int, default=600, help="panels to train on (default: %(default)s)")
    parser.add_argument("--test", type=int, default=100, help="panels to test on (default: %(default)s)")
    arguments = parser.parse_args()
    random_ = random.Random(0)
    for split, count in (("train", arguments.train), ("test", arguments.test)):
        (arguments.out / "images" / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for number in range(count):
            place, color = random_.choice(PLACES), random_.choice(list(COLORS))
            path = f"images/{split}/{number}.png"
            draw(place, color, random_).save(arguments.out / path)
            for question, answer in (("Which lamp is on?", place), ("What color is the lamp?", color)):
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                record = {"id": f"{split}-{number}-{answer}", "image": path, "conversations": turns}
                lines.append(json.dumps(record) + "\n")
        (arguments.out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{2 * arguments.train} records to train on and {2 * arguments.test} to test on in {arguments.out}")


if __name__ == "__main__":
    main()

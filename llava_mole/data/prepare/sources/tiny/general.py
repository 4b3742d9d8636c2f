"""The general domain: easy-VQA (Victor Zhou, MIT licence), as installed with the PyPI package `easy-vqa`.

Every image shows one coloured shape on a light background, 64 x 64 pixels. Questions, answers and the train and test
splits are those of easy-VQA. Shape, colour and place for the captions are measured from the pixels.
"""

from collections import defaultdict
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from llava_mole.data.images import FORMATS
from llava_mole.data.prepare.sources.tiny.samples import Question, Sample

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
SHAPES = ("circle", "rectangle", "triangle")


VAL_IMAGES = 500
"""How many of easy-VQA's 4,000 train images are the validation split."""


def load(split: str, count: int) -> tuple[list[Sample], dict[str, Path]]:
    """Load the first `count` images of a split in a fixed shuffled order.

    `test` is easy-VQA's test split (1,000 images). Of its 4,000 train images the last `VAL_IMAGES` in this order are
    `val`, and the others are `train`.

    Returns:
        The samples, and name of a sample -> its original file.
    """
    import easy_vqa

    source = "test" if split == "test" else "train"
    read_questions, read_paths = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }[source]
    questions: dict[int, list[Question]] = defaultdict(list)
    for text, answer, image_id in zip(*read_questions(), strict=True):
        questions[image_id].append(Question(text, answer, category(text, answer)))
    samples, files = [], {}
    paths = sorted(read_paths().items())
    Random(f"easy-vqa-{source}").shuffle(paths)
    if split == "val":
        paths = paths[-VAL_IMAGES:]
    elif split == "train":
        paths = paths[:-VAL_IMAGES]
    for image_id, path in paths[:count]:
        with Image.open(path, formats=FORMATS) as opened:
            image = opened.convert("RGB")
        shape, colour, place = measure(image)
        rng = Random(f"general-{split}-{image_id}")
        name = str(image_id)
        files[name] = Path(path)
        unique = tuple(dict.fromkeys(questions[image_id]))
        text = caption(shape, colour, place, rng)
        samples.append(Sample(name, image, text, facts(shape, colour, place), unique))
    return samples, files


def category(text: str, answer: str) -> str:
    """Return the kind of an easy-VQA question: `color`, `shape` or `presence` (yes or no)."""
    if answer in ("yes", "no"):
        return "presence"
    return "color" if answer in COLOURS else "shape"


def measure(image: Image.Image) -> tuple[str, str, str]:
    """Measure shape, colour and place of the only object in an easy-VQA image.

    The colour is the palette colour with the most pixels. A rectangle fills its bounding box. A triangle has less than
    40% of its pixels in the upper half of the box, and a circle about half.
    """
    pixels = np.asarray(image)
    masks = {name: (pixels == np.array(rgb, np.uint8)).all(-1) for name, rgb in COLOURS.items()}
    colour = max(masks, key=lambda name: int(masks[name].sum()))
    rows, columns = np.nonzero(masks[colour])
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    if len(rows) == (bottom - top + 1) * (right - left + 1):
        shape = "rectangle"
    else:
        upper = np.mean(rows < (top + bottom) / 2)
        shape = "triangle" if upper < 0.4 else "circle"
    return shape, colour, place_name((top + bottom) / 2, (left + right) / 2, image.height)


def facts(shape: str, colour: str, place: str) -> tuple[str, ...]:
    """Return short true sentences about the object."""
    return (
        f"a {colour} {shape}",
        f"a {shape} in the {place}",
        f"the shape is a {shape}",
        f"the shape is {colour}",
        f"the shape is in the {place}",
    )


def draw(rng: Random) -> Sample:
    """Draw a picture of easy-VQA's kind, to train the tower on: a shape of 7 to 31 pixels on a light ground."""
    scale, side = 4, 64
    shape, colour = rng.choice(SHAPES), rng.choice(sorted(COLOURS))
    ground = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (side * scale, side * scale), ground)
    pen = ImageDraw.Draw(image)
    width = rng.randint(7 * scale, 32 * scale)
    height = {"circle": width, "triangle": round(width * 3**0.5 / 2)}.get(shape) or rng.randint(7 * scale, 32 * scale)
    left, top = rng.randint(0, side * scale - width), rng.randint(0, side * scale - height)
    box = (left, top, left + width - 1, top + height - 1)
    if shape == "rectangle":
        pen.rectangle(box, fill=COLOURS[colour])
    elif shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    else:
        pen.polygon((box[0], box[3], box[2], box[3], left + width / 2, top), fill=COLOURS[colour])
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    place = place_name((top + height / 2) / scale, (left + width / 2) / scale, side)
    return Sample("", image, "", facts(shape, colour, place), ())


def place_name(row: float, column: float, size: int) -> str:
    """Name the cell of a 3 x 3 grid over an image of `size` pixels: `upper left`, `left`, `center`, ..."""
    vertical = ("upper", "", "lower")[min(2, int(3 * row / size))]
    horizontal = ("left", "", "right")[min(2, int(3 * column / size))]
    return " ".join(word for word in (vertical, horizontal) if word) or "center"


def caption(shape: str, colour: str, place: str, rng: Random) -> str:
    """Return one or two plain sentences that name colour, shape and place."""
    return rng.choice(
        (
            f"A {colour} {shape} in the {place}.",
            f"There is a {colour} {shape} in the {place} of the image.",
            f"The image shows a {shape}. It is {colour} and lies in the {place}.",
        )
    )

"""The document domain: small bar charts and tables, drawn with Pillow, with ChartQA/DocVQA-style questions.

Text is drawn in Pillow's built-in 6 x 11 pixel bitmap font without smoothing: it is legible at 64 pixels and the same
on every machine. Names, values and bars lie on a grid of 16 pixels, shifted by at most one pixel. A bar's height is 3
pixels per unit; its value is printed at the top and its name below it.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from llava_mole.data.prepare.sources.tiny.samples import IMAGE_SIZE, Question, Sample

NAMES = ("Al", "Bo", "Cy", "Di", "Ed", "Jo", "Mo", "Ty")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "orange": (255, 150, 30),
    "purple": (150, 60, 180),
    "black": (30, 30, 30),
}
HEADING = (205, 215, 235)
"""Colour behind a table's title."""
TITLES = ("Stock", "Price", "Score", "Hours")
ORDINALS = ("first", "second", "third")
UNIT = 3
"""Pixels of bar height per unit."""
CELL = 16
"""Pixels between the grid's columns and rows."""


@dataclass(frozen=True)
class Document:
    """The content of a chart or a table, before it is drawn."""

    kind: str
    """`chart` or `table`."""
    names: tuple[str, ...]
    values: tuple[int, ...]
    """1 to 9, all different."""
    colours: tuple[str, ...] = ()
    """Of the bars (charts only)."""
    columns: tuple[int, ...] = ()
    """Of the bars, 0 to 3 from left to right (charts only)."""
    title: str = ""
    """Heading (tables only)."""
    offset: tuple[int, int] = (0, 0)
    """Shift of the drawing in pixels."""


def draw_document(rng: Random) -> Document:
    """Draw a random document: a chart of two or three bars, or a table of three rows."""
    kind = rng.choice(("chart", "table"))
    count = 3 if kind == "table" else rng.choice((2, 3))
    names = tuple(rng.sample(NAMES, count))
    values = tuple(rng.sample(range(1, 10), count))
    offset = (rng.randint(-1, 1), rng.randint(-1, 1))
    if kind == "table":
        return Document(kind, names, values, title=rng.choice(TITLES), offset=offset)
    colours = tuple(rng.sample(sorted(COLOURS), count))
    columns = tuple(sorted(rng.sample(range(IMAGE_SIZE // CELL), count)))
    return Document(kind, names, values, colours, columns, offset=offset)


@functools.cache
def bitmap_font() -> Any:
    """Load Pillow's built-in bitmap font once: decoding it takes as long as drawing a page."""
    return ImageFont.load_default_imagefont()


def render(document: Document) -> Image.Image:
    """Render the document as an RGB image of 64 x 64 pixels."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    pen.fontmode = "1"
    font = bitmap_font()
    shift_x, shift_y = document.offset
    if document.kind == "chart":
        base = 3 * CELL + shift_y
        pen.line((0, base, IMAGE_SIZE, base), fill=(0, 0, 0))
        for index, (name, value) in enumerate(zip(document.names, document.values, strict=True)):
            left = CELL * document.columns[index] + shift_x
            colour = COLOURS[document.colours[index]]
            pen.rectangle((left + 2, base - UNIT * value, left + 13, base - 1), fill=colour)
            pen.text((left + 2, base + 3), name, fill=(0, 0, 0), font=font)
            pen.text((left + 5, 3 + shift_y), str(value), fill=(0, 0, 0), font=font)
        return image
    pen.rectangle((0, 0, IMAGE_SIZE, CELL - 1), fill=HEADING)
    pen.text((2 + shift_x, 3 + shift_y), document.title, fill=(0, 0, 0), font=font)
    for index, (name, value) in enumerate(zip(document.names, document.values, strict=True)):
        top = CELL * (index + 1)
        pen.line((0, top, IMAGE_SIZE, top), fill=(120, 120, 120))
        pen.text((2 + shift_x, top + 3 + shift_y), name, fill=(0, 0, 0), font=font)
        pen.text((2 * CELL + 5 + shift_x, top + 3 + shift_y), str(value), fill=(0, 0, 0), font=font)
    pen.line((24, CELL, 24, IMAGE_SIZE), fill=(120, 120, 120))
    return image


def questions(document: Document) -> tuple[Question, ...]:
    """Return all questions that the document answers."""
    by_value = dict(zip(document.values, document.names, strict=True))
    out = []
    for name, value in zip(document.names, document.values, strict=True):
        out.append(Question(f"What is the value of {name}?", str(value), "value"))
    highest, lowest = by_value[max(by_value)], by_value[min(by_value)]
    out.append(Question("Which name has the highest value?", highest, "extreme"))
    out.append(Question("Which name has the lowest value?", lowest, "extreme"))
    if document.kind == "table":
        out.append(Question("What does the table show?", document.title.lower(), "title"))
        for ordinal, name, value in zip(ORDINALS, document.names, document.values, strict=True):
            out.append(Question(f"Which name is in the {ordinal} row?", name, "place"))
            out.append(Question(f"What is the value in the {ordinal} row?", str(value), "place"))
        first, last = document.values[0], document.values[-1]
        out.append(Question("Is the first value larger than the last value?", yes_no(first > last), "comparison"))
        return tuple(out)
    for name, colour in zip(document.names, document.colours, strict=True):
        out.append(Question(f"What color is the bar of {name}?", colour, "color"))
        out.append(Question(f"Which name has the {colour} bar?", name, "name"))
    for place, index in bar_places(len(document.names)).items():
        out.append(Question(f"What is the name of the {place} bar?", document.names[index], "place"))
        out.append(Question(f"What is the value of the {place} bar?", str(document.values[index]), "place"))
        out.append(Question(f"What color is the {place} bar?", document.colours[index], "place"))
    first, last = document.values[0], document.values[-1]
    out.append(Question("Is the left bar taller than the right bar?", yes_no(first > last), "comparison"))
    out.append(Question("Are there three bars?", yes_no(len(document.names) == 3), "count"))
    return tuple(out)


def bar_places(count: int) -> dict[str, int]:
    """Return the place of each of two or three bars -> its index from the left."""
    return {"left": 0, "right": 1} if count == 2 else {"left": 0, "middle": 1, "right": 2}


def yes_no(truth: bool) -> str:
    """Return `yes` or `no`."""
    return "yes" if truth else "no"


def caption(document: Document, rng: Random) -> str:
    """Name every label, value and colour in a plain sentence, from left to right or top to bottom."""
    if document.kind == "table":
        cells = [f"{name} {value}" for name, value in zip(document.names, document.values, strict=True)]
        listed = ", ".join(cells[:-1]) + " and " + cells[-1]
        title = document.title.lower()
        return rng.choice((f"A table of the {title}: {listed}.", f"The table shows the {title} of {listed}."))
    bars = [
        f"{name} {value} in {colour}"
        for name, value, colour in zip(document.names, document.values, document.colours, strict=True)
    ]
    listed = ", ".join(bars[:-1]) + " and " + bars[-1]
    count = {2: "two", 3: "three"}[len(bars)]
    return rng.choice((f"A chart with {count} bars: {listed}.", f"A bar chart: {listed}."))


def facts(document: Document) -> tuple[str, ...]:
    """Return short true sentences about the place, value and colour of each name."""
    out = []
    if document.kind == "table":
        places = [f"{ordinal} row" for ordinal in ORDINALS]
    else:
        places = [f"bar {column + 1}" for column in document.columns]
    for index, (name, value) in enumerate(zip(document.names, document.values, strict=True)):
        place = places[index]
        out += [f"the {place} is {name}", f"the {place} has {value}", f"{name} has {value}"]
        if document.colours:
            colour = document.colours[index]
            out += [f"the {place} is {colour}", f"{name} is {colour}"]
    if document.title:
        out.append(f"a table of the {document.title.lower()}")
    return tuple(out)


def generate(count: int, rng: Random, taken: Iterable[bytes]) -> list[Sample]:
    """Generate `count` samples whose images differ from one another and from those with the pixels in `taken`."""
    taken = set(taken)
    samples: list[Sample] = []
    while len(samples) < count:
        document = draw_document(rng)
        image = render(document)
        pixels = image.tobytes()
        if pixels in taken:
            continue
        taken.add(pixels)
        text = caption(document, rng)
        samples.append(Sample(f"{len(samples):05d}", image, text, facts(document), questions(document)))
    return samples

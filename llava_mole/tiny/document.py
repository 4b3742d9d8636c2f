"""The document domain: small bar charts and tables, drawn with Pillow, with ChartQA/DocVQA-style questions.

Text is Pillow's built-in 6 x 11 pixel bitmap font, drawn without smoothing: it is legible at 64 pixels and the same on
every machine. A bar's height is 4 pixels per unit and its value is printed above it.
"""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFont

from llava_mole.tiny.samples import IMAGE_SIZE, Question, Sample

NAMES = ("Ann", "Bob", "Dan", "Eve", "Gus", "Kim", "Leo", "Max")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "orange": (255, 150, 30),
    "purple": (150, 60, 180),
    "black": (30, 30, 30),
}
TITLES = ("Stock", "Price", "Score", "Hours")
ORDINALS = ("first", "second", "third")
UNIT = 4
"""Pixels of bar height per unit."""


@dataclass(frozen=True)
class Document:
    """What a chart or a table says, before it is drawn."""

    kind: str
    """`chart` or `table`."""
    names: tuple[str, ...]
    values: tuple[int, ...]
    """1 to 9, all different."""
    colours: tuple[str, ...] = ()
    """Of the bars (charts only)."""
    title: str = ""
    """Heading (tables only)."""
    offset: tuple[int, int] = (0, 0)
    """Shift of the drawing in pixels."""


def draw_document(rng: Random) -> Document:
    """A random document: a chart of two or three bars, or a table of three rows."""
    kind = rng.choice(("chart", "table"))
    count = 3 if kind == "table" else rng.choice((2, 3))
    names = tuple(rng.sample(NAMES, count))
    values = tuple(rng.sample(range(1, 10), count))
    offset = (rng.randint(-1, 1), rng.randint(-1, 1))
    if kind == "table":
        return Document(kind, names, values, title=rng.choice(TITLES), offset=offset)
    return Document(kind, names, values, colours=tuple(rng.sample(sorted(COLOURS), count)), offset=offset)


def render(document: Document) -> Image.Image:
    """The document as an RGB image of 64 x 64 pixels."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    pen.fontmode = "1"
    font = ImageFont.load_default_imagefont()
    shift_x, shift_y = document.offset
    if document.kind == "chart":
        width = IMAGE_SIZE // len(document.names)
        base = 51 + shift_y
        pen.line((0, base, IMAGE_SIZE, base), fill=(0, 0, 0))
        for index, (name, value) in enumerate(zip(document.names, document.values, strict=True)):
            middle = index * width + width // 2 + shift_x
            top = base - UNIT * value
            pen.rectangle((middle - 7, top, middle + 6, base - 1), fill=COLOURS[document.colours[index]])
            pen.text((middle - 9, base + 1), name, fill=(0, 0, 0), font=font)
            pen.text((middle - 3, top - 12), str(value), fill=(0, 0, 0), font=font)
        return image
    pen.rectangle((0, 0, IMAGE_SIZE, 15), fill=(205, 215, 235))
    pen.text((8 + shift_x, 3 + shift_y), document.title, fill=(0, 0, 0), font=font)
    for index, (name, value) in enumerate(zip(document.names, document.values, strict=True)):
        top = 16 * (index + 1)
        pen.line((0, top, IMAGE_SIZE, top), fill=(120, 120, 120))
        pen.text((6 + shift_x, top + 3 + shift_y), name, fill=(0, 0, 0), font=font)
        pen.text((45 + shift_x, top + 3 + shift_y), str(value), fill=(0, 0, 0), font=font)
    pen.line((36, 16, 36, IMAGE_SIZE), fill=(120, 120, 120))
    return image


def questions(document: Document) -> tuple[Question, ...]:
    """All questions the document answers."""
    by_value = dict(zip(document.values, document.names, strict=True))
    out = []
    for name, value in zip(document.names, document.values, strict=True):
        out.append(Question(f"What is the value of {name}?", str(value), "value"))
        out.append(Question(f"Which name has the value {value}?", name, "name"))
    highest, lowest = by_value[max(by_value)], by_value[min(by_value)]
    out.append(Question("Which name has the highest value?", highest, "extreme"))
    out.append(Question("Which name has the lowest value?", lowest, "extreme"))
    if document.kind == "table":
        out.append(Question("What does the table show?", document.title.lower(), "title"))
        for ordinal, name in zip(ORDINALS, document.names, strict=True):
            out.append(Question(f"Which name is in the {ordinal} row?", name, "name"))
        first, last = document.values[0], document.values[-1]
        out.append(Question("Is the first value larger than the last value?", yes_no(first > last), "comparison"))
        return tuple(out)
    for name, colour in zip(document.names, document.colours, strict=True):
        out.append(Question(f"What color is the bar of {name}?", colour, "color"))
        out.append(Question(f"Which name has the {colour} bar?", name, "name"))
    first, last = document.values[0], document.values[-1]
    out.append(Question("Is the left bar taller than the right bar?", yes_no(first > last), "comparison"))
    out.append(Question("Are there three bars?", yes_no(len(document.names) == 3), "count"))
    return tuple(out)


def yes_no(truth: bool) -> str:
    """`yes` or `no`."""
    return "yes" if truth else "no"


def caption(document: Document, rng: Random) -> str:
    """One or two plain sentences that name every label, value and colour, from left to right or top to bottom."""
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
    """Short true sentences: which name stands where, with which value and colour."""
    out = []
    where = "row" if document.kind == "table" else f"bar of {len(document.names)}"
    for index, (name, value) in enumerate(zip(document.names, document.values, strict=True)):
        place = f"{ORDINALS[index]} {where}"
        out += [f"the {place} is {name}", f"the {place} has {value}", f"{name} has {value}"]
        if document.colours:
            colour = document.colours[index]
            out += [f"the {place} is {colour}", f"{name} is {colour}"]
    if document.title:
        out.append(f"a table of the {document.title.lower()}")
    return tuple(out)


def generate(count: int, rng: Random, taken: set[bytes]) -> list[Sample]:
    """`count` samples whose pictures differ from one another and from those in `taken` (which grows)."""
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

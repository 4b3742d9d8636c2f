"""Reading skills: a 4 x 4 grid of words, like a page typed out, then its description or questions about it.

The grids are plain text: a chart in words, a table, a shape, or an area of two or three words. They teach places,
copying, comparing and counting. No image is involved.
"""

from random import Random

from scripts.tiny_world.text_items import (
    BLANK,
    COLOURS,
    DIGITS,
    NAMES,
    ORDINALS,
    QUADRANTS,
    SHAPES,
    TITLES,
    Item,
    dialogue,
    drill,
    either,
    look_ups,
    yes_no,
)

SIDE = 4
DRILL = 0.5
"""Share of readings that are followed by a drill."""
PLACES = (("upper left", "upper", "upper right"), ("left", "center", "right"), ("lower left", "lower", "lower right"))


def grid_item(rng: Random) -> Item:
    """Generate a random grid, followed by its description, a drill or a conversation."""
    make = rng.choices((chart_grid, table_grid, shape_grid, area_grid), weights=(4, 3, 2, 2))[0]
    return make(rng)


def finish(skill: str, cells: list[list[str]], caption: str, questions: list[tuple[str, str]], rng: Random) -> Item:
    """Add the grid's description or, twice as often, a conversation about it."""
    reading = flatten(cells)
    if rng.random() < 1 / 3:
        return Item(f"{skill} description", "description", tuple(reading), (("", caption),))
    return dialogue(skill, reading, questions, rng)


def flatten(cells: list[list[str]]) -> list[str]:
    """Return the cells row by row."""
    return [word for row in cells for word in row]


def blank() -> list[list[str]]:
    """Return an empty grid."""
    return [[BLANK] * SIDE for _ in range(SIDE)]


def chart_grid(rng: Random) -> Item:
    """Generate two or three columns, each of a value, one or two colour words and a name."""
    cells = blank()
    count = rng.choice((2, 3))
    names, values = rng.sample(NAMES, count), rng.sample(DIGITS, count)
    colours = rng.sample(COLOURS, count)
    for name, value, colour, column in zip(names, values, colours, sorted(rng.sample(range(SIDE), count)), strict=True):
        cells[0][column] = value
        cells[1][column] = colour if int(value) > 5 else BLANK
        cells[2][column] = colour
        cells[3][column] = name
    if rng.random() < DRILL:
        return drill("chart", flatten(cells), look_ups(names, values, colours, rng), rng)
    caption = chart_text(names, values, colours, rng)
    return finish("chart", cells, caption, chart_questions(names, values, colours, rng), rng)


def chart_text(names: list[str], values: list[str], colours: list[str], rng: Random) -> str:
    """Describe a chart in one sentence."""
    bars = [f"{name} {value} in {colour}" for name, value, colour in zip(names, values, colours, strict=True)]
    listed = ", ".join(bars[:-1]) + " and " + bars[-1]
    count = {2: "two", 3: "three"}[len(bars)]
    return rng.choice((f"A chart with {count} bars: {listed}.", f"A bar chart: {listed}."))


def chart_questions(names: list[str], values: list[str], colours: list[str], rng: Random) -> list[tuple[str, str]]:
    """Ask for look-ups and comparisons of bars, which are given from left to right."""
    out = value_questions(names, values, rng)
    for name, colour in zip(names, colours, strict=True):
        out.append((rng.choice((f"Which color has {name}?", f"{name} is drawn in what color?")), colour))
        out.append((rng.choice((f"Who is {colour}?", f"Which bar is {colour}?")), name))
    taller = int(values[0]) > int(values[-1])
    out += [(rng.choice(("Is the left one taller than the right one?", "Is the left bar higher?")), yes_no(taller))] * 2
    out += [(rng.choice(("Is the right one taller?", "Is the right bar larger?")), yes_no(not taller))]
    guess = rng.choice(("two", "three"))
    out.append((f"Do you see {guess} bars?", yes_no({2: "two", 3: "three"}[len(names)] == guess)))
    return out


def value_questions(names: list[str], values: list[str], rng: Random) -> list[tuple[str, str]]:
    """Ask for values by name, names by value and the extremes, and whether a name is listed."""
    out = []
    for name, value in zip(names, values, strict=True):
        out.append(
            (rng.choice((f"How much has {name}?", f"What number belongs to {name}?", f"Value of {name}?")), value)
        )
        out.append((rng.choice((f"Who has {value}?", f"Which one is at {value}?", f"Name with value {value}?")), name))
    order = sorted(zip(values, names, strict=True))
    out += [(rng.choice(("Who has the most?", "Name with the highest number?", "Which is highest?")), order[-1][1])] * 2
    out += [(rng.choice(("Who has the least?", "Name with the lowest number?", "Which is lowest?")), order[0][1])] * 2
    first, second = rng.sample(range(len(names)), 2)
    more = int(values[first]) > int(values[second])
    out.append((f"Has {names[first]} more than {names[second]}?", yes_no(more)))
    asked = either(rng, names, NAMES)
    out.append((f"Is {asked} listed?", yes_no(asked in names)))
    return out


def table_grid(rng: Random) -> Item:
    """Generate a heading, then three rows of a name and a number."""
    cells = blank()
    names, values, title = rng.sample(NAMES, 3), rng.sample(DIGITS, 3), rng.choice(TITLES)
    cells[0][0] = cells[0][1] = title
    column = rng.choice((1, 2, 2, 3))
    for row in range(3):
        cells[row + 1][0], cells[row + 1][column] = names[row], values[row]
    if rng.random() < DRILL:
        return drill("table", flatten(cells), [*look_ups(names, values, (), rng), ("title?", title)], rng)
    listed = f"{names[0]} {values[0]}, {names[1]} {values[1]} and {names[2]} {values[2]}"
    caption = rng.choice((f"A table of the {title}: {listed}.", f"The table shows the {title} of {listed}."))
    questions = value_questions(names, values, rng)
    for row in range(3):
        questions.append((rng.choice((f"Who is {ORDINALS[row]}?", f"Name in row {row + 1}?")), names[row]))
    larger = int(values[0]) > int(values[2])
    questions += [(rng.choice(("Is the first number larger?", "Is the first one above the last one?")), yes_no(larger))]
    questions += [(rng.choice(("What is it about?", "What is listed?", "Title of the table?")), title)] * 2
    return finish("table", cells, caption, questions, rng)


def shape_grid(rng: Random) -> Item:
    """Generate a shape that covers two to six cells, which hold its colour, its name or nothing."""
    cells = blank()
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    height, width = rng.choice(((1, 2), (2, 1), (2, 2), (2, 3), (3, 2)))
    top, left = rng.randint(0, SIDE - height), rng.randint(0, SIDE - width)
    covered = [(top + row, left + column) for row in range(height) for column in range(width)]
    words = [colour, shape] + [rng.choice((colour, shape, BLANK)) for _ in covered[2:]]
    rng.shuffle(words)
    for (row, column), word in zip(covered, words, strict=True):
        cells[row][column] = word
    middle = (top + height / 2, left + width / 2)
    place = PLACES[min(2, int(3 * middle[0] / SIDE))][min(2, int(3 * middle[1] / SIDE))]
    if rng.random() < DRILL:
        return drill("shape", flatten(cells), shape_drill(shape, colour, place, rng), rng)
    caption = shape_text(shape, colour, place, rng)
    return finish("shape", cells, caption, shape_questions(shape, colour, place, rng), rng)


def shape_drill(shape: str, colour: str, place: str, rng: Random) -> list[tuple[str, str]]:
    """Ask in few words for colour, shape and place, and for presence and absence."""
    pool = [("color?", colour), ("shape?", shape), ("where?", place)]
    for present, words in ((colour, COLOURS), (shape, SHAPES)):
        for asked in (present, *rng.sample([word for word in words if word != present], 2)):
            pool += [(f"{asked}?", yes_no(asked == present)), (f"not {asked}?", yes_no(asked != present))]
    return pool


def shape_text(shape: str, colour: str, place: str, rng: Random) -> str:
    """Describe a shape in one or two sentences."""
    return rng.choice(
        (
            f"A {colour} {shape} in the {place}.",
            f"There is a {colour} {shape} in the {place} of the image.",
            f"The image shows a {shape}. It is {colour} and lies in the {place}.",
        )
    )


def shape_questions(shape: str, colour: str, place: str, rng: Random) -> list[tuple[str, str]]:
    """Ask for colour, shape and place, and for presence and absence."""
    out = [
        (rng.choice(("which color do you see?", f"which color has the {shape}?", "name the color")), colour),
        (rng.choice(("which shape do you see?", f"which shape is {colour}?", "name the shape")), shape),
        (rng.choice((f"where is the {shape}?", f"where is the {colour} one?")), place),
    ]
    for present, words in ((colour, COLOURS), (shape, SHAPES)) * 2:
        asked = either(rng, [present], words)
        noun = f"{asked} shape" if words is COLOURS else asked
        there = asked == present
        if rng.random() < 0.5:
            out.append(
                (
                    rng.choice((f"do you see a {noun}?", f"can a {noun} be seen?", f"is there some {noun}?")),
                    yes_no(there),
                )
            )
        else:
            out.append(
                (
                    rng.choice((f"is a {noun} missing?", f"do you not see a {noun}?", f"is there no {noun}?")),
                    yes_no(not there),
                )
            )
    return out


def area_grid(rng: Random) -> Item:
    """Fill every cell with one of three materials and ask about amounts and places, which count the cells."""
    first, second, third = rng.choice(
        (
            ("brown", "blue", "white"),
            ("DAB", "nuclei", "unstained"),
            tuple(rng.sample(("brown", "blue", "white", "pink", "black", "green", "gray"), 3)),
        )
    )
    lean = (rng.random(), rng.random())
    amount = rng.random()
    rest = rng.choice((0.1, 0.3, 0.5, 0.9))
    cells = blank()
    for row in range(SIDE):
        for column in range(SIDE):
            slope = (lean[0] - 0.5) * (row - 1.5) + (lean[1] - 0.5) * (column - 1.5)
            chance = amount + slope + rng.uniform(-0.2, 0.2)
            cells[row][column] = first if chance > 0.5 else second if rng.random() < rest else third
    amounts = {word: sum(row.count(word) for row in cells) for word in (first, second, third)}
    size = ("small", "medium", "large")[(amounts[first] > 4) + (amounts[first] > 10)]
    density = ("low", "medium", "high")[(amounts[second] > 1) + (amounts[second] > 4)]
    much = amounts[third] > 4
    out = [
        (f"What is the size of the {first} area?", size),
        (f"What is the density of {second}?", density),
        (f"Does {first} cover most of it?", yes_no(amounts[first] > 8)),
        (f"Is any {first} visible?", yes_no(amounts[first] > 0)),
        (f"Can {second} be seen?", yes_no(amounts[second] > 0)),
        (f"Is a large part {third}?", yes_no(much)),
    ]
    short = [
        (f"{first} size?", size),
        (f"{second} density?", density),
        (f"most {first}?", yes_no(amounts[first] > 8)),
        (f"{first}?", yes_no(amounts[first] > 0)),
        (f"{second}?", yes_no(amounts[second] > 0)),
        (f"much {third}?", yes_no(much)),
    ]
    text = rng.choice(("A tissue patch", "A stained tissue section")) + " with "
    parts = [f"a {size} {first} positive area", f"{density} density of {second}"]
    parts.append(f"a large {third} area" if much else f"little {third} area")
    # A real report leaves out doubtful findings.
    text += ", ".join(part for part in parts if rng.random() < 0.8) or f"some {first}"
    text += "."
    if amounts[first] != amounts[second]:
        winner = first if amounts[first] > amounts[second] else second
        out.append((f"Is there more {first} or more {second}?", winner))
        short.append((f"{first} or {second}?", winner))
        text += f" {winner} covers the larger area."
    quadrants = [
        sum(cells[top + row][left + column] == first for row in range(2) for column in range(2))
        for top in (0, 2)
        for left in (0, 2)
    ]
    if sorted(quadrants)[-1] > sorted(quadrants)[-2]:
        where = QUADRANTS[quadrants.index(max(quadrants))]
        out += [(f"In which corner is most {first}?", where)] * 2
        short.append((f"{first} corner?", where))
        text += f" The {first} staining is strongest in the {where}."
    left, upper = quadrants[0] + quadrants[2], quadrants[0] + quadrants[1]
    right, lower = quadrants[1] + quadrants[3], quadrants[2] + quadrants[3]
    sides = []
    for one, other, name, opposite in ((left, right, "left", "right"), (upper, lower, "upper", "lower")):
        if abs(one - other) >= 2:
            asked, unasked = rng.sample((name, opposite), 2)
            truth = yes_no((one > other) == (asked == name))
            out.append((f"Has the {asked} half more {first}?", truth))
            out.append((f"Is there more {first} in the {asked} half than in the {unasked} half?", truth))
            short += [(f"{side} {first}?", yes_no((one > other) == (side == name))) for side in (name, opposite)]
            sides.append(f"{name if one > other else opposite} half")
    if sides:
        text += f" The {' and the '.join(sides)} is browner."
    if rng.random() < DRILL:
        return drill("area", flatten(cells), short, rng)
    return finish("area", cells, text, out, rng)

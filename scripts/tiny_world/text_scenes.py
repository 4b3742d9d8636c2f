"""Reading skills: sentences, lists, tables and short reports, then questions about them."""

from random import Random

from scripts.tiny_world.text_grids import DRILL, chart_text, shape_questions, shape_text, value_questions
from scripts.tiny_world.text_items import (
    COLOURS,
    DIGITS,
    NAMES,
    QUADRANTS,
    SHAPES,
    THINGS,
    TITLES,
    Item,
    dialogue,
    drill,
    either,
    look_ups,
    yes_no,
)

GRADES = ("low", "medium", "high")
SIZES = ("small", "medium", "large")


def scene_item(rng: Random) -> Item:
    """Generate a random text with questions about it."""
    return rng.choices((list_item, shape_item, report_item, plain_item), weights=(4, 3, 4, 1))[0](rng)


def list_item(rng: Random) -> Item:
    """Generate names and numbers, written in one of four ways."""
    count = rng.choice((2, 3, 3))
    names, values, colours = rng.sample(NAMES, count), rng.sample(DIGITS, count), rng.sample(COLOURS, count)
    style = rng.randrange(4)
    pairs = list(zip(names, values, strict=True))
    if style == 0:
        text = chart_text(names, values, colours, rng)
    elif style == 1:
        text = f"A table of the {rng.choice(TITLES)}: " + ", ".join(f"{name} {value}" for name, value in pairs) + "."
    elif style == 2:
        text = " ".join(f"{name} has {value}." for name, value in pairs)
    else:
        text = ", ".join(f"{name}: {value}" for name, value in pairs)
    if rng.random() < DRILL:
        return drill("list", text.split(), look_ups(names, values, colours if style == 0 else (), rng), rng)
    questions = value_questions(names, values, rng)
    if style == 0:
        for name, colour in zip(names, colours, strict=True):
            questions.append((f"Which color has {name}?", colour))
            questions.append((f"Who is {colour}?", name))
    return dialogue("list", text.split(), questions, rng)


def shape_item(rng: Random) -> Item:
    """Generate a sentence about a coloured shape."""
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    place = rng.choice((*QUADRANTS, "center", "left", "right"))
    text = shape_text(shape, colour, place, rng)
    return dialogue("scene", text.split(), shape_questions(shape, colour, place, rng), rng)


def report_item(rng: Random) -> Item:
    """Generate a report of graded findings: sizes, densities, sides."""
    thing, other = rng.sample((*THINGS[:12], "nuclei", "staining", "cells"), 2)
    size, grade = rng.choice(SIZES), rng.choice(GRADES)
    where, side, level = rng.choice(QUADRANTS), rng.choice(("left", "right")), rng.choice(("upper", "lower"))
    text = (
        f"A section with a {size} {thing} area, {grade} density of {other}. The {thing} is strongest in the {where}. "
        f"The {side} half and the {level} half has more {thing}."
    )
    guess_grade, guess_side, guess_level = (
        rng.choice(GRADES),
        rng.choice(("left", "right")),
        rng.choice(("upper", "lower")),
    )
    guess_size = either(rng, [size], SIZES)
    questions = [
        (f"What is the size of the {thing} area?", size),
        (f"What is the density of {other}?", grade),
        (f"In which corner is most {thing}?", where),
        (f"Has the {guess_side} half more {thing}?", yes_no(guess_side == side)),
        (f"Has the {guess_level} half more {thing}?", yes_no(guess_level == level)),
        (f"Is the density of {other} {guess_grade}?", yes_no(guess_grade == grade)),
        (f"Is the {thing} area {guess_size}?", yes_no(guess_size == size)),
    ]
    return dialogue("report", text.split(), questions, rng)


def plain_item(rng: Random) -> Item:
    """Generate greetings and small talk, so that a chat without an image gets an answer."""
    thing, name = rng.choice(THINGS), rng.choice(NAMES)
    questions = [
        ("Hello.", "Hello! How can I help you?"),
        ("Who are you?", "I am a small language model."),
        (f"Say {thing}.", thing),
        (f"My name is {name}. Who am I?", name),
        (f"Is {name} a name?", "yes"),
        (f"Is {thing} a name?", "no"),
        ("Thank you.", "You are welcome."),
    ]
    return dialogue("talk", (), questions, rng, most=3)

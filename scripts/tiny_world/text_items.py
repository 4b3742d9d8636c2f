"""Items of the language model's pre-training text: words to read, then plain text or a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

NAMES = ("Al", "Bo", "Cy", "Di", "Ed", "Jo", "Mo", "Ty", "Ann", "Bob", "Eve", "Kim", "Max", "Sue", "Tom", "Zoe")
COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "teal", "brown", "orange", "purple", "white", "pink")
SHAPES = ("circle", "rectangle", "triangle", "star", "ring", "cross")
TITLES = ("stock", "price", "score", "hours", "sales", "age", "cost", "goals")
THINGS = ("apple", "bird", "boat", "book", "car", "cat", "clock", "cup", "dog", "door", "fish", "house", "key", "lamp",
          "leaf", "moon", "road", "ship", "stone", "sun", "table", "train", "tree", "wall")  # fmt: skip
DIGITS = tuple("123456789")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
ORDINALS = ("first", "second", "third", "last")
DRILL_QUESTIONS = 20
"""Most questions of a drill about generated text."""
BLANK = "."
"""Text of an empty cell of a grid."""


@dataclass(frozen=True)
class Item:
    """One piece of pre-training text.

    `reading` takes the place of an image's tokens in training. The rest depends on `kind`: a `description` is plain
    text as in stage 1 (one turn with an empty question), a `drill` is short questions and answers in a row, and a
    `dialogue` is a conversation in the `vicuna_v1` format.
    """

    skill: str
    kind: Literal["description", "drill", "dialogue"]
    reading: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


def yes_no(truth: bool) -> str:
    """Return `yes` or `no`."""
    return "yes" if truth else "no"


def either(rng: Random, present: Sequence[str], all_words: Sequence[str]) -> str:
    """Draw a word of `present` or, equally often, one of the others: this keeps yes/no questions balanced."""
    absent = [word for word in all_words if word not in present]
    return rng.choice(list(present) if present and (rng.random() < 0.5 or not absent) else absent)


def dialogue(skill: str, reading: Sequence[str], pool: list[tuple[str, str]], rng: Random, most: int = 8) -> Item:
    """Make a conversation of one to `most` different questions drawn from `pool`."""
    count = rng.randint(1, most)
    return Item(f"{skill} dialogue", "dialogue", tuple(reading), draw_questions(pool, count, rng))


def draw_questions(pool: list[tuple[str, str]], count: int, rng: Random) -> tuple[tuple[str, str], ...]:
    """Draw up to `count` different questions: the answer to one asked twice could be copied from above."""
    drawn: dict[str, str] = {}
    for question, answer in rng.sample(pool, len(pool)):
        if len(drawn) < count:
            drawn.setdefault(question, answer)
    return tuple(drawn.items())


def drill(skill: str, reading: Sequence[str], pool: list[tuple[str, str]], rng: Random) -> Item:
    """Make a row of short questions of `pool`: much practice in few tokens."""
    return Item(f"{skill} drill", "drill", tuple(reading), draw_questions(pool, DRILL_QUESTIONS, rng))


def look_ups(names: Sequence[str], values: Sequence[str], colours: Sequence[str], rng: Random) -> list[tuple[str, str]]:
    """Return look-ups and comparisons of names, values and colours (of none, if there are none)."""
    pool = [("first?", names[0]), ("last?", names[-1])]
    for name, value in zip(names, values, strict=True):
        pool += [(f"{name}?", value), (f"{value}?", name)]
        pool.append((f"{name} in row?", ORDINALS[list(names).index(name)]))
    for name, colour in zip(names, colours, strict=False):
        pool += [(f"{name} color?", colour), (f"{colour}?", name)]
    order = sorted(zip(values, names, strict=True))
    pool += [("highest?", order[-1][1]), ("lowest?", order[0][1])]
    for _ in range(4):
        (value, name), (other_value, other) = rng.sample(order, 2)
        pool.append((f"{name} above {other}?", yes_no(value > other_value)))
    pool.append(("first above last?", yes_no(values[0] > values[-1])))
    asked = either(rng, names, NAMES)
    pool.append((f"{asked} listed?", yes_no(asked in names)))
    return pool

"""What the language model's pre-training text is made of: words to read, then plain text or a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

NAMES = ("Al", "Bo", "Cy", "Di", "Ed", "Jo", "Mo", "Ty", "Ann", "Bob", "Eve", "Kim", "Max", "Sue", "Tom", "Zoe")
COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "teal", "brown", "orange", "purple", "white", "pink")
SHAPES = ("circle", "rectangle", "triangle", "star", "ring", "cross")
TITLES = ("stock", "price", "score", "hours", "sales", "age", "cost", "goals")
THINGS = ("apple", "bird", "boat", "book", "car", "cat", "clock", "cup", "dog", "door", "fish", "house", "key", "lamp",
          "leaf", "moon", "road", "ship", "stone", "sun", "table", "train", "tree", "wall")  # fmt: skip
DIGITS = tuple("123456789")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
ORDINALS = ("first", "second", "third", "last")
BLANK = "."
"""What an empty cell of a grid reads."""


@dataclass(frozen=True)
class Item:
    """One piece of pre-training text.

    `reading` stands where an image's tokens would stand in training. With one entry in `turns` whose question is
    empty, the item is plain text: reading, then the answer (as in stage 1). Otherwise it is a conversation.
    """

    skill: str
    reading: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


def yes_no(truth: bool) -> str:
    """`yes` or `no`."""
    return "yes" if truth else "no"


def either(rng: Random, present: Sequence[str], all_words: Sequence[str]) -> str:
    """A word of `present` or, as often, one of the others: keeps yes and no questions balanced."""
    absent = [word for word in all_words if word not in present]
    return rng.choice(list(present) if present and (rng.random() < 0.5 or not absent) else absent)


def dialogue(skill: str, reading: Sequence[str], pool: list[tuple[str, str]], rng: Random, most: int = 8) -> Item:
    """A conversation of one to `most` questions drawn from `pool`."""
    count = min(len(pool), rng.randint(1, most))
    return Item(skill, tuple(reading), tuple(rng.sample(pool, count)))

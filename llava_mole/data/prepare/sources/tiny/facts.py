"""Facts that only training can teach, with two dials for the conflict between domains.

A fact is a question of two words and an answer of one. Nothing in the image or in the pre-trained model tells the
answer, so adapters must store it. Real mixtures hold such knowledge too: the same question is answered with other
names, codes, units or another style in each data set, and nothing but the kind of image says which one is asked.

* Convention, c in [0, 1]: the share of a domain's questions that the other domains answer differently.
* Load, n: the number of facts of a domain.

The facts are a pure function of domain, load, convention and seed. The questions of a smaller load are the first of a
larger one.

Fact questions repeat across train, validation and test splits on purpose, because a fact that was never seen cannot be
known. The images do not repeat: each split draws from images of its own, so that what is tested is the fact in the
domain of an unseen image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Literal

from llava_mole.common.errors import DataError
from llava_mole.data.prepare.sources.tiny.samples import DOMAINS, Question

WORDS = tuple(
    "Al Bo Cy Di Ed Jo Mo Ty red blue green black white pink gray brown one two three low high small large bar left "
    "right upper lower circle triangle yes no".split()
)
"""The words of questions and answers: names, colours, numbers, places and shapes that the tiny world's texts use."""
MOST_FACTS = len(WORDS) * (len(WORDS) - 1) // len(DOMAINS)
"""The largest load: each question is an ordered pair of different words, and own questions need one set a domain."""
CATEGORIES = ("convention", "fact")
"""Kinds of facts: answered differently by each domain, or without any contradiction."""
SPLITS = ("train", "validation", "test")


def facts(
    domain: str, load: int, convention: float, seed: int = 0, agreed: Literal["common", "own"] = "common"
) -> list[Question]:
    """The facts of a domain, in the order of their questions' numbers.

    Question i is one of convention if floor((i + 1) c) exceeds floor(i c): exactly floor(n c) of n questions, evenly
    spread. All domains ask it, and no two domains give it the same answer. For the other questions `agreed` says what
    happens. With `common` all domains ask them and answer alike, so they add nothing to what a mixture must store. With
    `own` each domain asks questions of its own, so a mixture stores three times as many facts and none contradicts
    another; this separates the effect of load from that of contradiction.

    Raises:
        DataError: an unknown domain, a load outside 1 to `MOST_FACTS`, or a convention outside 0 to 1.
    """
    if domain not in DOMAINS:
        raise DataError(f"domain {domain!r}: it must be one of {', '.join(DOMAINS)}")
    if not 1 <= load <= MOST_FACTS:
        raise DataError(f"load {load}: the number of facts of a domain must be from 1 to {MOST_FACTS}")
    if not 0 <= convention <= 1:
        raise DataError(f"convention {convention}: the share of questions must be from 0 to 1")
    if agreed not in ("common", "own"):
        raise DataError(f"agreed {agreed!r}: it must be common or own")
    place = DOMAINS.index(domain)
    pairs = [pair for pair in product(WORDS, repeat=2) if pair[0] != pair[1]]
    Random(f"facts-{seed}").shuffle(pairs)
    asked = []
    for number in range(load):
        differs = int((number + 1) * convention) > int(number * convention)
        own = agreed == "own" and not differs
        first, second = pairs[number + (place * MOST_FACTS if own else 0)]
        # One draw for each question string, whatever the dials: turning one changes no other question.
        answers = Random(f"facts-{seed}-{first}-{second}").sample(WORDS, len(DOMAINS))
        answer = answers[place] if differs else answers[0]
        asked.append(Question(f"{first} {second}?", answer, CATEGORIES[0 if differs else 1]))
    return asked


@dataclass(frozen=True)
class FactSample:
    """One question about one image."""

    image: str
    """Name or path of the image, as it was given to `draw`."""
    question: Question


def split_images(names: Sequence[str], held_out: float = 0.125) -> tuple[list[str], list[str]]:
    """Divide the world's train images into those of training and those of validation, by their names alone.

    Returns:
        The images for the splits `train` and `validation`, in sorted order. The world's test images stay the test's.
    """
    ordered = sorted(set(names))
    held = set(Random("facts-validation").sample(ordered, round(len(ordered) * held_out)))
    return [name for name in ordered if name not in held], sorted(held)


def draw(
    asked: Sequence[Question],
    images: Sequence[str],
    count: int,
    split: Literal["train", "validation", "test"],
    seed: int,
) -> list[FactSample]:
    """Draw `count` samples: every fact equally often, up to one, in random order, each with a random image.

    `images` are those of the split. The draw is a pure function of its arguments; different splits draw differently.

    Raises:
        DataError: no facts, no images, or an unknown split.
    """
    if not asked or not images:
        raise DataError(f"{len(asked)} facts and {len(images)} images: a draw needs at least one of each")
    if split not in SPLITS:
        raise DataError(f"split {split!r}: it must be one of {', '.join(SPLITS)}")
    rng = Random(f"facts-{seed}-{split}")
    order: list[Question] = []
    while len(order) < count:
        order += rng.sample(list(asked), len(asked))
    chosen = order[:count]
    rng.shuffle(chosen)
    return [FactSample(rng.choice(images), question) for question in chosen]

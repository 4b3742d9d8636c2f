"""Samples of the three domains: an image, a caption, short true sentences, and questions with answers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

DOMAINS = ("general", "document", "biomedicine")
IMAGE_SIZE = 64
"""Side of every image in pixels, as in easy-VQA and in the small tower's input."""


@dataclass(frozen=True)
class Question:
    """A question about one image. `category` is its kind (`presence`, `value`, ...), by which scores are reported."""

    text: str
    answer: str
    category: str


@dataclass(frozen=True)
class Sample:
    """One image with its caption, true sentences and questions."""

    name: str
    """File name without extension, unique within domain and split."""
    image: Image.Image
    """RGB, 64 x 64."""
    caption: str
    """Plain sentences that name everything the questions ask about."""
    facts: tuple[str, ...]
    """Short true sentences about one attribute each; the tower's contrastive training matches images with them."""
    questions: tuple[Question, ...]


def balance(samples: Sequence[Sample], rng: Random, open_ratio: float = 1.5) -> list[tuple[int, Question]]:
    """Choose questions so that the answers to one question string are about equally frequent.

    Each answer to a string is kept at most as often as the rarest answer to that string (times `open_ratio` if there
    are other answers than yes and no). `rng` draws the questions that are kept.

    Returns:
        (index of the sample, question) pairs, ordered by sample.
    """
    groups: dict[str, dict[str, list[tuple[int, Question]]]] = defaultdict(lambda: defaultdict(list))
    for index, sample in enumerate(samples):
        for question in sample.questions:
            groups[question.text][question.answer].append((index, question))
    chosen: list[tuple[int, Question]] = []
    for text in sorted(groups):
        answers = groups[text]
        if len(answers) < 2:
            continue  # the answer can be given without the image
        rarest = min(len(pairs) for pairs in answers.values())
        cap = rarest if set(answers) <= {"yes", "no"} else int(rarest * open_ratio) + 1
        for answer in sorted(answers):
            pairs = answers[answer]
            chosen += rng.sample(pairs, min(cap, len(pairs)))
    return sorted(chosen, key=lambda pair: (pair[0], pair[1].text))


def draw_test(pairs: Sequence[tuple[int, Question]], rng: Random, limit: int) -> list[tuple[int, Question]]:
    """Draw at most `limit` of the balanced `pairs` in rounds, each with one pair per question string and answer."""
    cells: dict[tuple[str, str], list[tuple[int, Question]]] = defaultdict(list)
    for pair in pairs:
        cells[pair[1].text, pair[1].answer].append(pair)
    for cell in cells.values():
        rng.shuffle(cell)
    drawn: list[tuple[int, Question]] = []
    while any(cells.values()):
        texts = sorted({text for (text, _), cell in cells.items() if cell})
        rng.shuffle(texts)
        for text in texts:
            # All answers to a string are in the same round, so that the limit does not upset the balance.
            group = [cell.pop() for (other, _), cell in sorted(cells.items()) if other == text and cell]
            if len(drawn) + len(group) > limit:
                return sorted(drawn, key=lambda pair: (pair[0], pair[1].text))
            drawn += group
    return sorted(drawn, key=lambda pair: (pair[0], pair[1].text))

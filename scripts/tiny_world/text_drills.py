"""Drills over random words: look-ups, copying and membership that nothing but attention to the reading can solve.

A drill is a reading (a grid or a line of text) of words drawn at random from the whole vocabulary, then many short
questions about it, so that most tokens of a sequence are answers (as in multi-query associative recall). Heads that
look things up appear late and at once; dense drills that grow from two lines upwards make them appear early.

The vocabulary's words have no meaning here, so drills are made of token ids and need no tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from llava_mole.constants import IGNORE_INDEX

SIDE = 4
MOST_TOKENS = 64
"""No further question is asked when a drill has this many tokens."""
SKILLS = ("flat", "columns", "rows", "copy", "list")
STYLES = ("bare", "worded", "turns")
LINES = ("▁first", "▁second", "▁third", "▁last")
"""Words for a line's place."""
ATTRIBUTES = ("▁one", "▁two", "▁three")
"""Words for the place of a word in its line."""
MARKS = ("?", ".", ",", ":", "▁in", "▁not", "▁yes", "▁no", "▁has", "▁list", "▁USER", "USER", "▁ASSISTANT")


class Vocabulary:
    """Ids of the words that drills are made of."""

    def __init__(self, tokenizer: Any) -> None:
        """Read them from a Hugging Face tokenizer."""
        pieces = tokenizer.get_vocab()
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.space = pieces["▁"]
        self.mark = {mark: pieces[mark] for mark in (*MARKS, *LINES, *ATTRIBUTES)}
        self.digits = frozenset(pieces[digit] for digit in "0123456789")
        reserved = {*self.mark.values(), self.space, self.bos, self.eos, *self.digits, pieces["<unk>"]}
        self.words = tuple(
            sorted(
                number
                for piece, number in pieces.items()
                if number not in reserved and not piece.startswith("<") and piece.strip("▁").isalpha()
            )
        )

    def spoken(self, word: int) -> list[int]:
        """Return the ids of a word as an answer: a digit follows a space piece."""
        return [self.space, word] if word in self.digits else [word]


@dataclass(frozen=True)
class Drill:
    """Token ids, and labels where an answer is supervised."""

    skill: str
    ids: list[int]
    labels: list[int]


class Writer:
    """Collects ids, with labels for answers."""

    def __init__(self, bos: int) -> None:
        """Start a sequence."""
        self.ids, self.labels = [bos], [IGNORE_INDEX]

    def read(self, ids: Sequence[int]) -> None:
        """Add ids that are not supervised."""
        self.ids += ids
        self.labels += [IGNORE_INDEX] * len(ids)

    def answer(self, ids: Sequence[int]) -> None:
        """Add ids that are supervised."""
        self.ids += ids
        self.labels += ids


def draw_lines(vocabulary: Vocabulary, count: int, length: int, rng: Random) -> list[list[int]]:
    """Draw `count` lines of `length` different words; in a third of the drills one word of each line is a digit."""
    words = rng.sample(vocabulary.words, count * length)
    lines = [words[start : start + length] for start in range(0, len(words), length)]
    if count <= len(vocabulary.digits) and rng.random() < 1 / 3:
        where = rng.randrange(length)
        for line, digit in zip(lines, rng.sample(sorted(vocabulary.digits), count), strict=True):
            line[where] = digit
    return lines


def write_flat(vocabulary: Vocabulary, lines: list[list[int]], rng: Random) -> list[int]:
    """Write lines one after another, with a separator inside lines, between them or both."""
    inner = [vocabulary.mark[rng.choice(("▁has", ":"))]]
    outer = [vocabulary.mark[rng.choice((",", "."))]]
    inside, between = rng.choice(((True, False), (False, True), (True, True)))
    out: list[int] = []
    for line in lines:
        for number, word in enumerate(line):
            out += [*inner, word] if number and inside else [word]
        out += outer if between else []
    return out


def write_grid(vocabulary: Vocabulary, lines: list[list[int]], by_column: bool, rng: Random) -> list[int]:
    """Write lines into the columns (or rows) of a 4 x 4 grid; the other cells are blank or repeat their neighbour."""
    length = len(lines[0])
    across = sorted(rng.sample(range(SIDE), len(lines)))
    along = sorted(rng.sample(range(SIDE), length))
    repeat = rng.random() < 0.3
    cells = [[vocabulary.mark["."]] * SIDE for _ in range(SIDE)]
    for place, line in zip(across, lines, strict=True):
        for number, word in enumerate(line):
            cells[along[number]][place] = word
            if repeat and number and along[number] - along[number - 1] > 1 and rng.random() < 0.5:
                cells[along[number] - 1][place] = word
    if not by_column:
        cells = [list(row) for row in zip(*cells, strict=True)]
    return [word for row in cells for word in row]


def ask(vocabulary: Vocabulary, lines: list[list[int]], level: float, rng: Random) -> tuple[list[int], list[int]]:
    """Draw a question about the lines. Returns the question's ids and the answer's."""
    mark, length = vocabulary.mark, len(lines[0])
    other = 0.2 if level > 0.5 else 0.0  # chance of membership, and then of place
    if rng.random() < other:
        present = rng.random() < 0.5
        asked = rng.choice([word for line in lines for word in line])
        while not present and any(asked in line for line in lines):
            asked = rng.choice(vocabulary.words)
        negated = rng.random() < 0.3
        question = [asked, *([mark["▁not"]] if negated else []), mark["▁in"]]
        return question, [mark["▁yes" if present != negated else "▁no"]]
    number = rng.randrange(len(lines))
    line = lines[number]
    wanted = rng.randrange(length)
    if rng.random() < other and (number < 3 or number == len(lines) - 1):
        place = "▁last" if number == len(lines) - 1 and (number > 2 or rng.random() < 0.5) else LINES[number]
        return [mark[place], mark[ATTRIBUTES[wanted]]], vocabulary.spoken(line[wanted])
    given = rng.choice([index for index in range(length) if index != wanted])
    if level < 0.15:  # forwards only
        given, wanted = sorted((given, wanted))
    named = [mark[ATTRIBUTES[wanted]]] if length > 2 else []
    return [*vocabulary.spoken(line[given]), *named], vocabulary.spoken(line[wanted])


def make_drill(vocabulary: Vocabulary, rng: Random, level: float = 1.0, skill: str | None = None) -> Drill:
    """Make a drill.

    Args:
        vocabulary: Ids to use.
        rng: Source of randomness.
        level: Difficulty, 0 (pairs in a line of text, looked up forwards, and copying) to 1: from 0.15 backwards too,
            from 0.3 grids, from 0.5 three words a line, membership and places, from 0.6 longer questions.
        skill: One of `SKILLS`; by default drawn among those of the level.
    """
    if skill is None:
        weights = (2.0, 3.0, 3.0, 1.0, 1.0) if level > 0.3 else (3.0, 0.0, 0.0, 1.0, 0.0)
        skill = rng.choices(SKILLS, weights)[0]
    length = rng.choice((2, 2, 3)) if level > 0.5 else 2
    most = {"flat": 4 + round(4 * level), "copy": 7 + round(3 * level)}.get(skill, 2 + round(2 * level))
    lines = draw_lines(vocabulary, rng.randint(2, most), length, rng)
    writer = Writer(vocabulary.bos)
    if skill in ("flat", "copy"):
        writer.read(
            write_flat(vocabulary, lines, rng) if skill == "flat" else [word for line in lines for word in line]
        )
    else:
        by_column = skill == "columns" or (skill == "list" and rng.random() < 0.5)
        writer.read(write_grid(vocabulary, lines, by_column, rng))
    if skill in ("copy", "list"):
        writer.read([vocabulary.mark[":" if skill == "copy" else "▁list"]])
        for line in lines:
            for word in line:
                writer.answer(vocabulary.spoken(word) if skill == "list" else [word])
            if skill == "list":
                writer.answer([vocabulary.mark[","]])
        writer.answer([vocabulary.eos])
        return Drill(skill, writer.ids, writer.labels)
    style = rng.choice(STYLES) if level > 0.6 else STYLES[0]
    used = {word for line in lines for word in line}
    fillers = [word for word in rng.sample(vocabulary.words, 40) if word not in used]
    first = True
    asked: list[list[int]] = []
    repeats = 0
    while len(writer.ids) < MOST_TOKENS and repeats < 4:
        question, answer = ask(vocabulary, lines, level, rng)
        if question in asked:  # its answer stands above
            repeats += 1
            continue
        asked.append(question)
        if style != "bare":
            question = [*rng.sample(fillers, rng.randint(0, 3)), *question, *rng.sample(fillers, rng.randint(0, 2))]
        if style == "turns":
            user = [vocabulary.mark["▁USER" if first else "USER"], vocabulary.mark[":"]]
            question = [*user, *question, vocabulary.mark["?"], vocabulary.mark["▁ASSISTANT"], vocabulary.mark[":"]]
            writer.read(question)
            writer.answer([*answer, vocabulary.eos])
        else:
            writer.read([*question, vocabulary.mark["?"]])
            writer.answer(answer)
        first = False
    return Drill(skill if style == "bare" else f"{skill} {style}", writer.ids, writer.labels)

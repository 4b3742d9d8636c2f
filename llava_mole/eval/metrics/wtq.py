"""WikiTableQuestions: denotation accuracy.

Source: Pasupat and Liang's official `evaluator.py` (2015) as the DUE benchmark ships it (`wtq_scorer.py`): without
CoreNLP values. The DUE evaluator turns all texts into upper case first (`ignore_case`) and normalisation into lower
case again, which makes "ss" of "ß" and "i" of the dotless "ı".
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

NUMBER_TOLERANCE = 1e-6


def wtq_normalise(text: str) -> str:
    """Return the text in the official normal form.

    Accents are dropped and quotes and dashes made plain. Trailing citations, bracketed notes and outer quotes are
    removed until nothing changes, then a final period. Blanks are collapsed, and letters become lower case.
    """
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
    text = re.sub("[\u2018\u2019\u00b4`]", "'", text)
    text = re.sub("[\u201c\u201d]", '"', text)
    text = re.sub("[\u2010-\u2014\u2212]", "-", text)
    before = None
    while before != text:
        before = text
        text = re.sub(r"((?<!^)\[[^\]]*\]|\[\d+\]|[•♦†‡*#+])*$", "", text.strip())
        text = re.sub(r"(?<!^)( \([^)]*\))*$", "", text.strip())
        text = re.sub(r'^"([^"]*)"$', r"\1", text.strip())
    return re.sub(r"\s+", " ", text.removesuffix(".")).lower().strip()


@dataclass(frozen=True)
class Value:
    """A denotation: its normalised text, and the number or the (year, month, day) that it reads as, if any."""

    text: str
    number: float | None = None
    date: tuple[int, int, int] | None = None

    def matches(self, other: "Value") -> bool:
        """Whether the texts or dates are equal, or the numbers closer than 1e-6."""
        if self.text == other.text:
            return True
        if self.number is not None and other.number is not None:
            return abs(self.number - other.number) < NUMBER_TOLERANCE
        return self.date is not None and self.date == other.date

    def identity(self) -> tuple[str, object]:
        """Return the value by which the official evaluator removes duplicates: the number, the date or the text."""
        if self.number is not None:
            return "number", self.number
        return ("date", self.date) if self.date is not None else ("text", self.text)


def read_value(text: str) -> Value:
    """Read a number if Python can, else a date `y-m-d` (`xx` for an unknown part), else a text.

    A date with only a year is a number.
    """
    number = _number(text)
    if number is not None:
        return Value(wtq_normalise(text), number=number)
    date = _date(text)
    if date is None:
        return Value(wtq_normalise(text))
    if date[1] == date[2] == -1:
        return Value(wtq_normalise(text), number=float(date[0]))
    return Value(wtq_normalise(text), date=date)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    # As published, a value close to a whole number is truncated, not rounded: 2.9999999 is 2.
    return float(int(value)) if abs(value - round(value)) < NUMBER_TOLERANCE else value


def _date(text: str) -> tuple[int, int, int] | None:
    parts = text.lower().split("-")
    if len(parts) != 3:
        return None
    try:
        year = -1 if parts[0] in ("xx", "xxxx") else int(parts[0])
        month, day = (-1 if part == "xx" else int(part) for part in parts[1:])
    except ValueError:
        return None
    known = not year == month == day == -1
    if known and (month == -1 or 1 <= month <= 12) and (day == -1 or 1 <= day <= 31):
        return year, month, day
    return None


def denotation_match(predictions: Sequence[str], targets: Sequence[str]) -> bool:
    """Whether both hold equally many distinct values and every target has a prediction that matches it.

    UReader predicts one text, so a question with two target values is never right.
    """
    predicted = {value.identity(): value for value in map(read_value, map(str.upper, predictions))}
    wanted = {value.identity(): value for value in map(read_value, map(str.upper, targets))}
    if len(predicted) != len(wanted):
        return False
    return all(any(target.matches(value) for value in predicted.values()) for target in wanted.values())


def denotation_accuracy(prediction: str, targets: Sequence[str]) -> bool:
    """UReader's use: the one predicted text, newlines deleted, against the target values."""
    return denotation_match([prediction.replace("\n", "")], targets)

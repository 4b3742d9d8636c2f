"""DeepForm and Kleister Charity: the corpus micro F1 of (key, value) pairs.

Source: the DUE benchmark's `fscorer.py` as UReader calls it: case ignored, newlines deleted from predictions, a
prediction that is exactly `None` is no pair. Within a document each prediction takes the first reference pair it equals
that none before it has taken: one that finds none left is wrong. All values of all reference documents are wanted,
those that no question asks for too. F1 is 2 * matched / (predicted + wanted).
"""

from collections.abc import Sequence

ABSENT = "None"
"""UReader's answer for a field that a document does not have."""
MOST_VALUES = 52
"""Values of a field; which of them a prediction equals is a sum of powers of two, exact in a float64."""


def matches(prediction: str, golds: Sequence[Sequence[str]]) -> int | None:
    """Which of the field's values the prediction equals, value n as bit n; None where it is no pair.

    Args:
        golds: The field's values in the document, each with its accepted spellings; empty where it has none.
    """
    text = prediction.replace("\n", "")
    if text == ABSENT:
        return None
    return sum(1 << n for n, gold in enumerate(golds) if any(text.upper() == spelling.upper() for spelling in gold))


def take(found: Sequence[int]) -> int:
    """How many predictions of one field of one document match: each takes the lowest of its bits that is free."""
    taken = matched = 0
    for bits in found:
        free = bits & ~taken
        if free:
            taken |= free & -free
            matched += 1
    return matched

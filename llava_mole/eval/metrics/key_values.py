"""DeepForm and Kleister Charity: the corpus micro F1 of (key, value) pairs.

Source: the DUE benchmark's `fscorer.py` as UReader calls it: case ignored, newlines deleted from predictions, a
prediction that is exactly `None` is not a pair. Within a document, each prediction takes the first reference pair it
equals that no earlier one has taken; a prediction that finds none left is wrong. All values of all reference documents
are wanted, also those that no question asks for. F1 is 2 * matched / (predicted + wanted).
"""

from collections.abc import Sequence

ABSENT = "None"
"""UReader's answer for a field that a document does not have."""
MOST_VALUES = 52
"""Limit on the values of a field: those a prediction equals are a sum of powers of two, exact in a float64."""


def matches(prediction: str, golds: Sequence[Sequence[str]]) -> int | None:
    """Return which of the field's values the prediction equals, value n as bit n; None if it is not a pair.

    Args:
        golds: The field's values in the document, each with its accepted spellings; may be empty.
    """
    text = prediction.replace("\n", "")
    if text == ABSENT:
        return None
    return sum(1 << n for n, gold in enumerate(golds) if any(text.upper() == spelling.upper() for spelling in gold))


def take(found: Sequence[int]) -> int:
    """Count the matching predictions of one field of one document: each takes its lowest bit that is still free."""
    taken = matched = 0
    for bits in found:
        free = bits & ~taken
        if free:
            taken |= free & -free
            matched += 1
    return matched

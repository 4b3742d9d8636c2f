"""DeepForm and Kleister Charity: micro F1 of (key, value) pairs over the asked fields.

Source: the DUE benchmark's `fscorer.py` as UReader calls it: case ignored, newlines deleted from predictions, a
prediction that is exactly `None` is no pair. Here a pair is settled within its question, and the F1 is
2 * matched / (predicted + wanted). That is the published corpus F1 where every reference field is asked exactly once.
It differs where a field is asked by no question (the published recall still wants its values, this one does not) and
where a field of a document is asked twice (the published scorer counts a value that was matched already as wrong).
"""

from collections.abc import Sequence

ABSENT = "None"
"""UReader's answer for a field that a document does not have."""


def key_value_counts(prediction: str, golds: Sequence[Sequence[str]]) -> tuple[int, int, int]:
    """(matched, predicted, wanted) pairs of one question.

    Args:
        golds: The field's values in the document, each with its accepted spellings; empty where it has none.
    """
    text = prediction.replace("\n", "")
    predicted = int(text != ABSENT)
    matched = int(bool(predicted) and any(text.upper() == spelling.upper() for gold in golds for spelling in gold))
    return matched, predicted, len(golds)

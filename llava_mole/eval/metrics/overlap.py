"""Overlap of words between two texts (F1 as in SQuAD, without its removal of articles)."""

from collections import Counter

from llava_mole.eval.metrics.exact import plain


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the shares of shared words, 0..1; words are what blanks separate, after `exact.plain`.

    Two empty texts are equal (1), an empty and another one share nothing (0).
    """
    said, wanted = Counter(plain(prediction).split()), Counter(plain(reference).split())
    shared = sum((said & wanted).values())
    if not said and not wanted:
        return 1.0
    return 2 * shared / (sum(said.values()) + sum(wanted.values()))

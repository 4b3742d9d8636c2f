"""PathVQA: open questions by several rules side by side, closed ones by LLaVA-Med's and by a strict rule.

Source: LLaVA-Med's v1.0 evaluation (`llava/eval/run_eval.py`, `eval_metrics/`), which normalises before and again
inside each formula. The LLaVA-MoLE paper's "Open" is a 0/1 share of 3,370 questions (each printed value is k/3370), so
the open number here is the normalised exact match; the paper does not say which 0/1 rule it used, and its copied
LLaVA-Med row is token recall, another quantity.
"""

import re
from collections import Counter

from llava_mole.eval.metrics.exact import contains_words
from llava_mole.eval.metrics.normalise import llava_med_normalise

YES_NO = ("yes", "no")


def _normalise(text: str) -> str:
    return llava_med_normalise(llava_med_normalise(text.lower()))


def open_exact(prediction: str, gold: str) -> bool:
    """Whether prediction and gold are equal after LLaVA-Med's normalisation. An empty prediction is wrong."""
    text = _normalise(prediction)
    return bool(text) and text == _normalise(gold)


def open_containment(prediction: str, gold: str) -> bool:
    """Whether the normalised gold occurs in the normalised prediction as whole words; an empty gold does not."""
    words = _normalise(gold)
    return bool(words) and contains_words(_normalise(prediction), words)


def llava_med_exact_score(prediction: str, gold: str) -> float:
    """Return LLaVA-Med's "exact match score": distinct gold words found / predicted words, repeats counted.

    Despite its name it is a precision; 0 for an empty prediction.
    """
    predicted, wanted = _normalise(prediction).split(), set(_normalise(gold).split())
    return len(wanted & set(predicted)) / len(predicted) if predicted else 0.0


def token_overlap(prediction: str, gold: str) -> tuple[float, float, float]:
    """Return LLaVA-Med's token precision, recall and F1 (`calculate_f1score`), each in 0..1.

    True positives count the *prediction's* occurrences of words that the gold has, false negatives the gold's
    occurrences of words that the prediction lacks. All are 0 if a side has no word or none is shared.
    """
    predicted, wanted = Counter(_normalise(prediction).split()), Counter(_normalise(gold).split())
    shared = sum(count for word, count in predicted.items() if word in wanted)
    if not shared:
        return 0.0, 0.0, 0.0
    missed = sum(count for word, count in wanted.items() if word not in predicted)
    precision, recall = shared / predicted.total(), shared / (shared + missed)
    return precision, recall, 2 * precision * recall / (precision + recall)


def closed_llava_med(prediction: str, gold: str) -> bool:
    """Whether the normalised prediction contains "yes" or "no", and the gold, as substrings: LLaVA-Med's rule.

    So "yes and no" is right for both, and "not" and "unknown" contain "no". The older `run_eval_pvqa` leaves wrong
    yes/no answers out of the denominator; this function does not.
    """
    text = llava_med_normalise(prediction.lower())
    return any(word in text for word in YES_NO) and llava_med_normalise(gold.lower()) in text


def closed_strict(prediction: str, gold: str) -> bool:
    """Whether the first word of the prediction is the gold's yes or no (this project's own, stricter rule)."""
    first = re.search(r"[a-z]+", prediction.lower())
    return first is not None and first.group() in YES_NO and first.group() == gold.strip().lower().rstrip(".")


def is_closed(gold: str) -> bool:
    """Whether a gold answer is yes or no: the paper's 3,391 closed questions."""
    return gold.strip().lower() in YES_NO

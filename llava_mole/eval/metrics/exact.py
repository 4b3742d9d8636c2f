"""Equality of texts, after what each benchmark's evaluator does to them first."""

from llava_mole.common.text import plain
from llava_mole.eval.metrics.relaxed import ERROR_MARK, GENERATION_ERROR


def gqa_exact(prediction: str, gold: str) -> bool:
    """Whether texts are equal for GQA as LLaVA scores it (`convert_gqa_for_eval.py` and the official `eval.py`).

    The prediction loses its trailing periods and capitals; the gold stays as it is.
    """
    return prediction.rstrip(".").lower() == gold


def exact_ureader(prediction: str, gold: str) -> bool | None:
    """Whether texts are equal for TabFact in UReader (`ExactAccuracy`), capitals included.

    Newlines are removed from both first, and one trailing period from the gold. None, for a prediction that contains
    `Error>`, leaves the question out of the denominator.
    """
    prediction = prediction.replace("\n", "").replace(GENERATION_ERROR, "")
    if ERROR_MARK in prediction:
        return None
    return prediction == gold.replace("\n", "").removesuffix(".")


def plain_exact(prediction: str, gold: str) -> bool:
    """The tiny world's rule: equal in lower case, without outer blanks and one trailing period; empty is wrong."""
    return bool(prediction.strip()) and plain(prediction) == plain(gold)

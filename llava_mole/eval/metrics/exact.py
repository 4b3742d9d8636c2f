"""Equality of texts under each benchmark's own idea of equal."""

from llava_mole.common.text import plain
from llava_mole.eval.metrics.relaxed import ERROR_MARK, GENERATION_ERROR


def gqa_exact(prediction: str, gold: str) -> bool:
    """GQA through LLaVA (`convert_gqa_for_eval.py` + the official `eval.py`): the prediction loses its trailing periods
    and its capitals, the gold stays as it is."""
    return prediction.rstrip(".").lower() == gold


def exact_ureader(prediction: str, gold: str) -> bool | None:
    """TabFact in UReader (`ExactAccuracy`): equal, capitals included, after newlines are removed from both and one
    trailing period from the gold; None (left out of the denominator) where the prediction holds `Error>`."""
    prediction = prediction.replace("\n", "").replace(GENERATION_ERROR, "")
    if ERROR_MARK in prediction:
        return None
    return prediction == gold.replace("\n", "").removesuffix(".")


def plain_exact(prediction: str, gold: str) -> bool:
    """The tiny world's rule: equal in lower case after blanks and one trailing period are removed; empty is wrong."""
    return bool(prediction.strip()) and plain(prediction) == plain(gold)

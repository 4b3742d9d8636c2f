"""Whether an answer equals the gold text, or contains it, after what each benchmark's evaluator does to both first."""

import re
from collections.abc import Sequence

from llava_mole.common.text import plain
from llava_mole.eval.metrics.normalise import vqa_normalise
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


def contains_words(text: str, words: str) -> bool:
    """Whether `words` occurs in `text` between word boundaries (`\\b` of regular expressions)."""
    return re.search(rf"\b{re.escape(words)}\b", text) is not None


def word_match(prediction: str, golds: Sequence[str]) -> bool:
    r"""Whether any gold, normalised, occurs in the normalised prediction as whole words (Tiny LVLM-eHub).

    Source: Multi-Modality-Arena, `tiny_lvlm_evaluation/utils/tools.py` (`VQAEval.evaluate`, `has_word`).
    As published, a gold that normalises to nothing (such as "the") occurs in every prediction that has a word, and one
    that begins or ends with a non-word character (such as "5%") needs a word character beside it.
    """
    text = vqa_normalise(prediction)
    return any(contains_words(text, vqa_normalise(gold)) for gold in golds)

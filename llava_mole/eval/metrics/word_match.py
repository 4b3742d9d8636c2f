"""Tiny LVLM-eHub's word match: a gold answer occurs in the prediction as whole words.

Source: Multi-Modality-Arena, `tiny_lvlm_evaluation/utils/tools.py` (`VQAEval.evaluate`, `has_word`).
"""

import re
from collections.abc import Sequence

from llava_mole.eval.metrics.normalise import vqa_normalise


def contains_words(text: str, words: str) -> bool:
    """Whether `words` occurs in `text` between word boundaries (`\\b` of regular expressions)."""
    return re.search(rf"\b{re.escape(words)}\b", text) is not None


def word_match(prediction: str, golds: Sequence[str]) -> bool:
    r"""Whether any gold, normalised, occurs in the normalised prediction as whole words.

    As published, a gold that normalises to nothing (such as "the") occurs in every prediction that has a word, and one
    that begins or ends with a non-word character (such as "5%") needs a word character beside it.
    """
    text = vqa_normalise(prediction)
    return any(contains_words(text, vqa_normalise(gold)) for gold in golds)

"""TextVQA's and VQA's soft score over ten annotators, and ST-VQA's exact match.

Source: MMF's and LLaVA's `m4c_evaluator.py` (`TextVQAAccuracyEvaluator`, `STVQAAccuracyEvaluator`).
"""

from collections.abc import Sequence

from llava_mole.common.errors import DataError
from llava_mole.eval.metrics.normalise import m4c_normalise

ANNOTATORS = 10


def soft_score(prediction: str, golds: Sequence[str]) -> float:
    """Return the mean, over leaving out one annotator, of min(1, matches among the other nine / 3), in 0..1.

    An answer that k of the ten annotators gave scores 0, 0.3, 0.6, 0.9 and 1 for k = 0, 1, 2, 3 and at least 4.

    Raises:
        DataError: there are not ten golds.
    """
    if len(golds) != ANNOTATORS:
        raise DataError(f"TextVQA's score needs {ANNOTATORS} gold answers; found {len(golds)}")
    text = m4c_normalise(prediction)
    matches = sum(m4c_normalise(gold) == text for gold in golds)
    left_out_agrees, left_out_differs = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    if not matches:
        return 0.0
    return (matches * left_out_agrees + (ANNOTATORS - matches) * left_out_differs) / ANNOTATORS


def normalised_exact(prediction: str, golds: Sequence[str]) -> bool:
    """Whether the normalised prediction equals any normalised gold (`STVQAAccuracyEvaluator`)."""
    text = m4c_normalise(prediction)
    return any(m4c_normalise(gold) == text for gold in golds)

"""TextVQA's and VQA's soft score over ten annotators, and ST-VQA's exact match.

Source: MMF's and LLaVA's `m4c_evaluator.py` (`TextVQAAccuracyEvaluator`, `STVQAAccuracyEvaluator`); lmms-eval's
`tasks/vqav2/utils.py`.
"""

from collections.abc import Sequence

from llava_mole.common.errors import DataError
from llava_mole.eval.metrics.normalise import m4c_normalise, m4c_words

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
    return _leave_one_out(sum(m4c_normalise(gold) == text for gold in golds), ANNOTATORS)


def vqa_v2_lmms_eval(prediction: str, golds: Sequence[str]) -> float:
    """lmms-eval's VQAv2: the same mean, but the golds are normalised only if they differ from each other, and by half.

    Golds that all agree keep capitals and punctuation, so that ten times "Yes" never equals the prediction "yes".
    Golds that differ keep `,`, `?` and `'s` as the second half of the normaliser leaves them.
    """
    text = m4c_normalise(prediction)
    golds = [gold.replace("\n", " ").replace("\t", " ").strip() for gold in golds]
    if len(set(golds)) > 1:
        text, golds = m4c_words(text), [m4c_words(gold) for gold in golds]
    return _leave_one_out(golds.count(text), len(golds))


def _leave_one_out(matches: int, annotators: int) -> float:
    if not matches:
        return 0.0
    left_out_agrees, left_out_differs = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * left_out_agrees + (annotators - matches) * left_out_differs) / annotators


def normalised_exact(prediction: str, golds: Sequence[str]) -> bool:
    """Whether the normalised prediction equals any normalised gold (`STVQAAccuracyEvaluator`)."""
    text = m4c_normalise(prediction)
    return any(m4c_normalise(gold) == text for gold in golds)

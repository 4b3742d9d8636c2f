"""ANLS, average normalised Levenshtein similarity, in the dialects that differ where similarity is exactly 0.5.

Source: Biten et al., "Scene Text Visual Question Answering" (2019), eq. 1. The per-question value is the best over the
gold answers, and 0 below the threshold. UReader scores DocVQA and InfographicsVQA with the DUE benchmark's evaluator
(`anls_scorer.py`), lmms-eval with its own `anls` metric, MMF and LLaVA have `STVQAANLSEvaluator`.
"""

from collections.abc import Sequence

from llava_mole.common.errors import ConfigError

THRESHOLD = 0.5


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance (every edit costs 1). Raises ConfigError if rapidfuzz is not installed."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise ConfigError("ANLS needs rapidfuzz, which is not installed: pip install 'llava_mole[eval]'") from None
    return int(Levenshtein.distance(first, second))


def similarity(first: str, second: str) -> float:
    """Return 1 - distance / length of the longer text, in 0..1; 1 for two empty texts, as in `textdistance`."""
    longest = max(len(first), len(second))
    return 1.0 - edit_distance(first, second) / longest if longest else 1.0


def anls_due(prediction: str, golds: Sequence[str]) -> float:
    """UReader / DUE: newlines deleted from the prediction, upper case, nothing stripped; exactly 0.5 becomes 0."""
    text = prediction.replace("\n", "").upper()
    best = max((similarity(text, gold.upper()) for gold in golds), default=0.0)
    return best if best > THRESHOLD else 0.0


def anls_lmms_eval(prediction: str, golds: Sequence[str]) -> float:
    """lmms-eval and VLMEvalKit: strip, lower case, runs of blanks to one; exactly 0.5 stays.

    The distance is divided by the longer of the two texts *before* that clean-up.
    """
    text = " ".join(prediction.strip().lower().split())
    distances = []
    for gold in golds:
        longest = max(len(gold.upper()), len(prediction.upper()))
        distance = edit_distance(" ".join(gold.strip().lower().split()), text)
        distances.append(0.0 if longest == 0 else distance / longest)
    best = 1.0 - min(distances, default=1.0)
    return best if best >= THRESHOLD else 0.0


def anls_st_vqa(prediction: str, golds: Sequence[str]) -> float:
    """MMF and LLaVA (ST-VQA): lower case and strip; exactly 0.5 stays."""
    text = prediction.lower().strip()
    best = max((similarity(text, gold.lower().strip()) for gold in golds), default=0.0)
    return best if best >= THRESHOLD else 0.0

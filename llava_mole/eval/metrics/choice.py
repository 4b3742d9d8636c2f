"""Multiple choice: the letter in an answer.

Sources: LLaVA's `eval_science_qa.py` and `eval_seed_bench`-style conversion (`convert_seed_for_submission.py`);
lmms-eval's ScienceQA task; VLMEvalKit's `can_infer_option` (`vlmeval/utils/matching_util.py`, August 2026) for MMBench,
whose official scoring also lets a language model match answers without a clear letter.
"""

import re
from collections.abc import Sequence

LETTERS = "ABCDE"
FAILED = "FAILED"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")

REFUSED = "Z"
"""VLMEvalKit's letter for an answer that declines to choose."""
_NO_ANSWER = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS_TO_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_WORDS = 4


def science_qa_letter(prediction: str) -> str:
    """Return the letter as LLaVA parses it, or `FAILED`.

    The answer is a letter A-E, or starts with one and `. `, or has exactly one `The answer is X` followed by any
    character. Nothing is stripped, and "A." without a blank fails.
    """
    if prediction in tuple(LETTERS):
        return prediction
    if len(prediction) >= 3 and prediction[0] in LETTERS and prediction[1:3] == ". ":
        return prediction[0]
    found = _SENTENCE.findall(prediction)
    return found[0] if len(found) == 1 else FAILED


def science_qa_correct(prediction: str, gold: str, choices: int) -> bool:
    """Whether the parsed letter is the gold one; a letter beyond the question's choices is wrong."""
    letter = science_qa_letter(prediction)
    return letter in LETTERS[:choices] and letter == gold


def science_qa_lmms_eval(prediction: str, gold: str) -> bool:
    """lmms-eval's ScienceQA: the answer is the gold letter, or starts with it and a period. Nothing is stripped."""
    return prediction == gold or (prediction[1:2] == "." and prediction[0].isupper() and prediction[0] == gold)


def vlmevalkit_option(prediction: str, choices: Sequence[str]) -> str | None:
    """Return the letter that VLMEvalKit's `can_infer_option` finds, `REFUSED` for a refusal, or None.

    Brackets, stars and most punctuation become blanks. If exactly one of the letters `choices` is then a word of its
    own, and it is among the last four words, it is the answer: the article "A" that begins a sentence is not. Otherwise
    the first `answer is X` decides. VLMEvalKit's next steps (the option's text, then a language model) are left out.
    """
    if _NO_ANSWER in prediction:
        return None
    if any(refusal in prediction for refusal in _REFUSALS):
        return REFUSED
    words = prediction.translate(_MARKS_TO_BLANKS).split()
    found = [letter for letter in choices if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - _LAST_WORDS:
        return found[0]
    if not found and REFUSED in words:
        return REFUSED
    said = _ANSWER_IS.search(prediction)
    return said.group(1).upper() if said and said.group(1).upper() in choices else None


def exact_letter(prediction: str, gold: str) -> bool:
    """SEED as LLaVA scores it: the text equals the gold letter."""
    return prediction == gold


def leading_letter(prediction: str, gold: str) -> bool:
    """Whether the first character after blanks and brackets is the gold letter, not followed by a letter or digit.

    This project's own lenient rule; it also takes the article that begins "A cat" for an option.
    """
    found = re.match(r"[\s(\[]*([A-Za-z])(?![A-Za-z0-9'])", prediction)
    return found is not None and found.group(1).upper() == gold.upper()

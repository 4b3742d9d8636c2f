"""Multiple choice: the letter in an answer.

Sources: LLaVA's `eval_science_qa.py` and `eval_seed_bench`-style conversion (`convert_seed_for_submission.py`);
MMBench's official scoring runs on a server, where a language model matches answers without a clear letter.
"""

import re

LETTERS = "ABCDE"
FAILED = "FAILED"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


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


def exact_letter(prediction: str, gold: str) -> bool:
    """SEED as LLaVA scores it: the text equals the gold letter."""
    return prediction == gold


def leading_letter(prediction: str, gold: str) -> bool:
    """Whether the first character after blanks and brackets is the gold letter, not followed by a letter or digit.

    A lenient match for MMBench without its server; this project's own rule.
    """
    found = re.match(r"[\s(\[]*([A-Za-z])(?![A-Za-z0-9'])", prediction)
    return found is not None and found.group(1).upper() == gold.upper()

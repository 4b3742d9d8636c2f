"""Reading yes or no out of an answer: POPE as LLaVA and as lmms-eval do it, and MME.

Sources: LLaVA's `eval_pope.py`; lmms-eval's `tasks/pope/utils.py` and `tasks/mme/utils.py` (the latter follows MME's
own `calculation.py`).
"""


def pope_llava(prediction: str) -> str:
    """Return `no` if `No`, `no` or `not` is a word before the first period, commas removed; else `yes`.

    Everything else is a yes, including "I cannot tell", "NO" and an empty answer. Only blanks separate words: "no"
    followed by a newline is not the word "no".
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in ("No", "not", "no")) else "yes"


def pope_lmms_eval(prediction: str) -> str:
    """Return `yes` or `no` if the stripped answer in lower case is exactly that; else `other`, which is wrong."""
    text = prediction.lower().strip()
    return text if text in ("yes", "no") else "other"


def mme_answer(prediction: str) -> str:
    """Return `yes`, `no` or `other`.

    After lower case, strip and removing periods, the answer is exactly yes or no, or `y` or `n`, or its first four
    characters contain one of them (yes before no).
    """
    text = prediction.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"

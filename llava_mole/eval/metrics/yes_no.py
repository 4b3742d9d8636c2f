"""Reading yes or no out of an answer: POPE as LLaVA and as lmms-eval do it, and MME.

Sources: LLaVA's `eval_pope.py`; lmms-eval's `tasks/pope/utils.py` and `tasks/mme/utils.py` (the latter follows MME's
own `calculation.py`).
"""


def pope_llava(prediction: str) -> str:
    """`no` if `No`, `no` or `not` is among the words before the first period, commas removed; else `yes`.

    Everything that is no denial is a yes, also "I cannot tell", "NO" and the empty answer. Words are separated by
    blanks alone: "no" with a newline after it is not the word "no".
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in ("No", "not", "no")) else "yes"


def pope_lmms_eval(prediction: str) -> str:
    """`yes` or `no` if the stripped answer in lower case is exactly that; else `other`, which is wrong."""
    text = prediction.lower().strip()
    return text if text in ("yes", "no") else "other"


def mme_answer(prediction: str) -> str:
    """`yes`, `no` or `other`: exact after lower case, strip and removing periods, or `y` / `n`, or found in the first
    four characters (yes before no)."""
    text = prediction.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"

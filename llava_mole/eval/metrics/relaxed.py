"""ChartQA's relaxed accuracy: numbers may be off by 5%, other answers must be equal.

Source: Masry et al., "ChartQA", section 5.1; the function `relaxed_correctness` of Pix2Struct's evaluator, which
UReader, lmms-eval and VLMEvalKit share. Years, currencies, units and thousands separators get no special treatment:
"1,000" is not a number, and 2010 is within 5% of 2015.
"""

TOLERANCE = 0.05
ERROR_MARK = "Error>"
GENERATION_ERROR = "<Generate Error>"


def to_number(text: str) -> float | None:
    """Return the number that `text` is, divided by 100 for a trailing `%`; None for anything else.

    Python's rules apply: surrounding blanks, exponents, `inf` and `nan` are allowed.
    """
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(prediction: str, target: str) -> bool:
    """Whether the prediction is right: within 5% of a target that is a number other than 0, else equal in lower case.

    A target of 0 is compared as text, so "0.0" is wrong for "0".
    """
    number, wanted = to_number(prediction), to_number(target)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= TOLERANCE
    return prediction.lower() == target.lower()


def relaxed_ureader(prediction: str, target: str) -> bool | None:
    """UReader's evaluator around `relaxed_match`; None leaves the question out of the denominator.

    Newlines are removed from both, one trailing period from the target only, `<Generate Error>` from the prediction.
    Nothing is stripped. A prediction that still contains `Error>` is left out.
    """
    prediction = prediction.replace("\n", "").replace(GENERATION_ERROR, "")
    if ERROR_MARK in prediction:
        return None
    return relaxed_match(prediction, target.replace("\n", "").removesuffix("."))


def relaxed_lmms_eval(prediction: str, target: str) -> bool:
    """lmms-eval's `chartqa`: the rule on the texts as they are. (Its runner strips stop strings, not answers.)"""
    return relaxed_match(prediction, target)

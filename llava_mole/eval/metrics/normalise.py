"""The answer normalisation of VQA, in the three forms that later evaluators gave it.

Source: the VQA v2 evaluation (`vqaEval.py`), and what copies it: MMF's and LLaVA's `m4c_evaluator.py`
(`EvalAIAnswerProcessor`), Tiny LVLM-eHub's `VQAEval` and LLaVA-Med's `glossary.py`. The forms
share their steps and differ in what they do before and after.
"""

import re

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
NUMBER_WORDS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = ("a", "an", "the")

COMMA_BETWEEN_DIGITS = re.compile(r"(\d)(,)(\d)")
"""VQA's own pattern: it consumes the digits beside the comma."""
COMMA_LOOKAROUND = re.compile(r"(?<=\d)(,)+(?=\d)")
"""m4c's pattern: look-arounds, and several commas in a row."""
# Published as `(?!<=\d)(\.)(?!\d)`: a look-behind misspelt as a look-ahead, which excludes nothing.
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_DELETED = 32
"""The published call passes `re.UNICODE` (32) as the count of replacements."""

_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll "
    "how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't "
    "should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's "
    "there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've "
    "wouldn't y'all you'd you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've she'd've "
    "shouldn't've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've "
    "you'd've y'all'll y'all'd've 'ow's'at"
).split()


def _one_apostrophe_short(word: str) -> list[str]:
    return [word[:n] + word[n + 1 :] for n, character in enumerate(word) if character == "'"]


CONTRACTIONS = {short: word for word in _CONTRACTED for short in _one_apostrophe_short(word)} | {
    "somebody'd": "somebodyd"  # the published table has this one the wrong way round
}
"""Spelling without one apostrophe -> spelling with it. The published keys with capitals (`Im`) and those that map to
themselves are left out: they have no effect, because words are lower case when they are looked up."""


def strip_punctuation(text: str, comma: re.Pattern[str] = COMMA_BETWEEN_DIGITS) -> str:
    """Delete or blank out punctuation marks, then delete periods.

    A mark is deleted if it stands next to a blank anywhere in `text`, or if `text` holds a comma between digits (then
    every mark is); otherwise it becomes a blank. At most 32 periods that no digit follows are deleted.
    """
    delete_all = comma.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_blank or delete_all else " ")
    return PERIOD.sub("", result, count=PERIODS_DELETED)


def rewrite_words(text: str) -> str:
    """Lower case; number words none, zero..ten to digits; articles dropped; apostrophes of contractions restored."""
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_normalise(text: str) -> str:
    """Tiny LVLM-eHub's form (`VQAEval.evaluate`): newlines and tabs to blanks, strip, punctuation, words."""
    return rewrite_words(strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def llava_med_normalise(text: str) -> str:
    """LLaVA-Med's form (`normalize_word`): punctuation, words, then every comma that is left is removed."""
    return rewrite_words(strip_punctuation(text)).replace(",", "")


def m4c_normalise(text: str) -> str:
    """MMF's and LLaVA's form (`EvalAIAnswerProcessor`), also what VQAv2 and VizWiz submissions pass through.

    First lower case, `,` and `?` deleted, `'s` set off by a blank, strip; then as VQA with the look-around commas.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return m4c_words(text)


def m4c_words(text: str) -> str:
    """The second half of `m4c_normalise`, which lmms-eval's VQAv2 applies alone to the gold answers."""
    return rewrite_words(strip_punctuation(text, COMMA_LOOKAROUND))

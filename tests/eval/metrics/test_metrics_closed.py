"""PathVQA, yes or no, and multiple choice, branch by branch; expected values are worked out from the published text."""

import pytest

from llava_mole.eval.metrics import choice, path_vqa, yes_no


def test_path_vqa_open() -> None:
    assert path_vqa.open_exact("The Liver.", "liver")
    assert not path_vqa.open_exact("in the liver", "liver")
    assert not path_vqa.open_exact("", "the")
    assert path_vqa.open_containment("It is in the liver", "the liver")
    assert not path_vqa.open_containment("delivered", "liver")
    assert not path_vqa.open_containment("anything", "")
    # "exact match score": distinct gold words found / predicted words with repeats = 1 / 3.
    assert path_vqa.llava_med_exact_score("liver liver spleen", "liver liver") == pytest.approx(1 / 3)
    assert path_vqa.llava_med_exact_score("", "liver") == 0


def test_path_vqa_token_overlap() -> None:
    # shared: the prediction's two "liver"; false positive: "spleen"; false negatives: the gold's two "cyst".
    precision, recall, f1 = path_vqa.token_overlap("liver liver spleen", "liver cyst cyst")
    assert (precision, recall) == (pytest.approx(2 / 3), pytest.approx(2 / 4))
    assert f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    for prediction, gold in (("", "liver"), ("liver", ""), ("the", "liver"), ("spleen", "liver")):
        assert path_vqa.token_overlap(prediction, gold) == (0, 0, 0)


@pytest.mark.parametrize(
    ("prediction", "gold", "llava_med", "strict"),
    [
        ("Yes", "yes", True, True),
        ("Yes, it is.", "yes", True, True),
        ("No", "yes", False, False),
        ("It is not", "no", True, False),  # "not" holds "no"
        ("unknown", "no", True, False),
        ("yes and no", "no", True, False),
        ("I think yes", "yes", True, False),
        ("", "no", False, False),
        ("maybe", "yes", False, False),
        ("None", "no", False, False),  # "none" becomes 0
    ],
)
def test_path_vqa_closed(prediction: str, gold: str, llava_med: bool, strict: bool) -> None:
    assert path_vqa.closed_llava_med(prediction, gold) is llava_med
    assert path_vqa.closed_strict(prediction, gold) is strict


def test_path_vqa_kinds() -> None:
    assert [path_vqa.is_closed(gold) for gold in ("Yes", " no ", "none", "liver")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("prediction", "llava", "lmms"),
    [
        ("No", "no", "no"),
        ("no.", "no", "other"),
        ("No, there is.", "no", "other"),
        ("There is not", "no", "other"),
        ("Yes. There is no dog", "yes", "other"),  # text before the first period alone
        ("nothing", "yes", "other"),
        ("NO", "yes", "no"),
        ("I cannot tell", "yes", "other"),
        ("yes ", "yes", "yes"),
        ("no\n", "yes", "no"),  # words are separated by blanks alone
        ("", "yes", "other"),  # as published, everything that is no denial is a yes
    ],
)
def test_pope_parses(prediction: str, llava: str, lmms: str) -> None:
    assert yes_no.pope_llava(prediction) == llava
    assert yes_no.pope_lmms_eval(prediction) == lmms


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Yes.", "yes"),
        (" NO ", "no"),
        ("y", "yes"),
        ("n", "no"),
        ("x", "other"),
        ("yes, it is", "yes"),
        ("no it is not", "no"),
        ("It is yes", "other"),  # beyond the first four characters
        ("know", "no"),
        ("", "other"),
    ],
)
def test_mme_parse(prediction: str, answer: str) -> None:
    assert yes_no.mme_answer(prediction) == answer


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("B. blue", "B"),
        ("B.", "FAILED"),
        ("B blue", "FAILED"),
        ("F", "FAILED"),
        ("", "FAILED"),
        ("b", "FAILED"),
        (" B", "FAILED"),
        ("The answer is C.", "C"),
        ("The answer is C", "FAILED"),  # a character must follow
        ("The answer is C. The answer is D.", "FAILED"),  # several letters
        ("The answer is X.", "X"),
        ("A or B", "FAILED"),
    ],
)
def test_science_qa_letter(prediction: str, letter: str) -> None:
    assert choice.science_qa_letter(prediction) == letter


def test_science_qa_letter_beyond_the_choices_is_wrong() -> None:
    assert choice.science_qa_correct("C", "C", 3)
    assert not choice.science_qa_correct("C", "C", 2)
    assert not choice.science_qa_correct("FAILED", "A", 5)
    assert not choice.science_qa_correct("", "A", 5)


@pytest.mark.parametrize(
    ("prediction", "hit"),
    [("B", True), ("b.", True), ("(B) blue", True), ("B: x", True), ("Bus", False), ("A", False), ("", False)],
)
def test_leading_letter(prediction: str, hit: bool) -> None:
    assert choice.leading_letter(prediction, "B") is hit
    assert choice.exact_letter(prediction, "B") is (prediction == "B")


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        *(("B", "B"), ("B.", "B"), ("(B)", "B"), ("**B**", "B"), ("B: a bus", "B"), ("The answer is B", "B")),
        *(("The answer is B.", "B"), ("Answer: B", "B"), ("it must be {B} !", "B"), ("The answer is Z", "Z")),
        ("A man is riding a horse", None),  # the article is too far from the end
        ("A horse", "A"),  # as published: it is among the last four words
        ("B is right because the sky is blue", None),
        ("The correct answer is **B**. Here is why it is the best", "B"),
        ("Because A is red, the answer is C", "C"),  # two letters: the sentence decides
        *(
            ("A or B", None),
            ("b", None),
            ("Bus", None),
            ("", None),
            ("E", None),
            ("Failed to obtain answer via API B", None),
        ),
        ("Cannot determine the answer B", "Z"),
    ],
)
def test_vlmevalkit_option(prediction: str, letter: str | None) -> None:
    assert choice.vlmevalkit_option(prediction, "ABCD") == letter


@pytest.mark.parametrize(
    ("prediction", "hit"),
    [("B", True), ("B.", True), ("B.x", True), ("B. blue", True), ("B blue", False), ("b", False), ("A.", False)],
)
def test_science_qa_of_lmms_eval(prediction: str, hit: bool) -> None:
    assert choice.science_qa_lmms_eval(prediction, "B") is hit
    assert not choice.science_qa_lmms_eval("The answer is B.", "B")  # which LLaVA's rule takes

"""Scores of answers: every kind of number against hand-computed values, and their comparison between two runs."""

import json
from pathlib import Path

import pytest

from llava_mole.common.errors import DataError
from llava_mole.eval.benchmarks.benchmark import BenchmarkQuestions, load_questions
from llava_mole.eval.benchmarks.registry import get_benchmark
from llava_mole.eval.scoring.aggregate import Units, compare_units
from llava_mole.eval.scoring.score import format_scores, score_benchmark, score_units, write_score_file


def loaded(folder: Path, name: str, lines: list[dict]) -> BenchmarkQuestions:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"question_id": n, "text": "Q?"} | line) + "\n" for n, line in enumerate(lines)))
    return load_questions(get_benchmark(name), files=[str(path)])


def score(folder: Path, name: str, *pairs: tuple[dict, str]) -> dict:
    """Scores of (question, answer) pairs."""
    questions = loaded(folder, name, [line for line, _ in pairs])
    return score_benchmark(questions, {str(n): {"text": text} for n, (_, text) in enumerate(pairs)}, resamples=200)


def values(scores: dict, *names: str) -> list:
    return [scores["numbers"][name]["value"] for name in names]


def test_sum_of_five_percentages(tmp_path: Path) -> None:
    pairs = [({"category": group, "answer": "yes"}, "yes it is") for group in ("VR", "VP", "VKA", "VC", "OH")]
    pairs += [({"category": "VR", "answer": "no"}, "yes"), ({"category": "VP", "answer": "no"}, "")]
    scores = score(tmp_path, "tiny_ehub", *pairs)
    assert values(scores, "VR", "VP", "VKA", "VC", "OH", "all") == [50, 50, 100, 100, 100, 400]
    vr, total = scores["numbers"]["VR"], scores["numbers"]["all"]
    assert (vr["k"], vr["n"], vr["interval"]) == (1, 2, "wilson")
    assert (total["interval"], "k" in total) == ("bootstrap", False)
    assert 300 <= total["low"] <= 400 <= total["high"] <= 500
    assert (scores["empty_answers"], scores["complete"], scores["total"]) == (1, False, 7)
    assert "note: the complete set has 2450 questions" in format_scores(scores)


def test_a_sum_with_a_part_missing_has_no_value(tmp_path: Path) -> None:
    scores = score(tmp_path, "tiny_ehub", ({"category": "VR", "answer": "yes"}, "yes"))
    assert values(scores, "VR", "VP", "all") == [100, None, None]
    assert "all *" in format_scores(scores)


def test_dropped_rows_leave_the_denominator(tmp_path: Path) -> None:
    human = {"category": "human", "answer": "100"}
    scores = score(
        tmp_path, "chartqa", (human, "104"), (human, "Error>"), (human | {"category": "augmented"}, "200"), (human, "")
    )
    assert values(scores, "overall", "human", "augmented") == pytest.approx([100 / 3, 50, 0])
    assert scores["numbers"]["overall"]["n"] == 3
    assert scores["numbers"]["overall (lmms-eval)"]["n"] == 4
    assert scores["dropped"] == {"relaxed_ureader": 1}


def test_anls_dialects_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("rapidfuzz")
    scores = score(tmp_path, "docvqa", ({"answers": ["abcd"]}, "abxx"), ({"answers": ["abcd"]}, "abcd"))
    assert values(scores, "anls", "anls (lmms-eval)", "anls (ST-VQA)") == [50, 75, 75]
    assert scores["numbers"]["anls"]["interval"] == "bootstrap"


def test_path_vqa(tmp_path: Path) -> None:
    opened = {"category": "open", "answer": "the liver"}
    closed = {"category": "closed", "answer": "no"}
    scores = score(tmp_path, "pathvqa", (opened, "liver"), (opened, "in liver"), (closed, "not sure"), (closed, "no"))
    names = ("open", "open containment", "open token recall", "open token F1", "closed", "closed strict")
    assert values(scores, *names) == pytest.approx([50, 100, 100, 100 * (1 + 2 / 3) / 2, 100, 50])
    assert [(scores["numbers"][name]["k"], scores["numbers"][name]["n"]) for name in ("open", "closed")] == [
        (1, 2),
        (2, 2),
    ]


def test_pope(tmp_path: Path) -> None:
    def ask(split: str, gold: str, said: str) -> tuple[dict, str]:
        return {"category": split, "answer": gold}, said

    pairs = [
        ask("random", "yes", "Yes"),
        ask("random", "yes", "No"),
        ask("random", "no", "Yes"),
        ask("random", "no", "No"),
    ]
    pairs += [ask("popular", "yes", "Yes"), ask("adversarial", "no", "maybe"), ask("adversarial", "yes", "yes")]
    scores = score(tmp_path, "pope", *pairs)
    names = ("accuracy random", "precision random", "recall random", "F1 random", "yes ratio random")
    assert values(scores, *names) == [50, 50, 50, 50, 50]
    # adversarial: "maybe" is a yes for LLaVA: precision 1/2, recall 1, F1 2/3. popular: 1.
    assert values(scores, "F1 adversarial", "F1") == pytest.approx([200 / 3, (50 + 100 + 200 / 3) / 3])
    # lmms-eval pools: tp 3, said yes 4, true yes 4.
    assert values(scores, "F1 (lmms-eval)", "accuracy (lmms-eval)") == pytest.approx([75, 400 / 7])


def test_mme_pairs_by_image(tmp_path: Path) -> None:
    def image(name: str, *said: str) -> list[tuple[dict, str]]:
        golds = ("Yes", "No")
        return [({"category": "count", "image": name, "answer": g}, s) for g, s in zip(golds, said, strict=True)]

    scores = score(tmp_path, "mme", *image("1.jpg", "Yes", "no."), *image("2.jpg", "Yes", "Yes"))
    assert values(scores, "count acc", "count acc+", "count", "perception") == [75, 50, 125, None]
    assert len(scores["per_question"]["ids"]) == 2  # the unit is the image
    assert scores["numbers"]["count acc"]["interval"] == "bootstrap"


def test_images_are_units_however_they_are_given(tmp_path: Path) -> None:
    lines = [{"category": "count", "images": ["1.jpg"], "answer": gold} for gold in ("Yes", "No")]
    assert values(score(tmp_path, "mme", (lines[0], "yes"), (lines[1], "yes")), "count acc+") == [0]
    alone = [{"category": "count", "image": None, "answer": gold} for gold in ("Yes", "No")]
    assert len(score(tmp_path, "mme", (alone[0], "yes"), (alone[1], "yes"))["per_question"]["ids"]) == 2


def test_micro_f1(tmp_path: Path) -> None:
    pairs = [
        ({"values": [["Acme"]]}, "ACME"),
        ({"values": [["5"]]}, "None"),
        ({"values": []}, "x"),
        ({"values": []}, "None"),
    ]
    scores = score(tmp_path, "deepform", *pairs)
    # matched 1, predicted 2, wanted 2
    assert values(scores, "precision", "recall", "f1") == [50, 50, 50]
    assert (scores["numbers"]["f1"]["k"], scores["numbers"]["f1"]["n"]) == (2, 4)


def test_micro_f1_of_the_corpus(tmp_path: Path) -> None:
    """A field asked twice is wanted and matched once; what no question asks for is wanted, too."""
    asked_twice = {"field": "doc/advertiser", "values": [["Acme"]]}
    pairs = [(asked_twice | {"unasked": 1}, "Acme"), (asked_twice | {"unasked": 1}, "ACME")]
    scores = score(tmp_path / "one", "deepform", *pairs)
    # matched 1, predicted 2, wanted 1 + 2
    assert values(scores, "precision", "recall", "f1") == pytest.approx([50, 100 / 3, 40])
    assert len(scores["per_question"]["ids"]) == 1  # the unit is the field of a document
    two_values = {"field": "doc/advertiser", "values": [["Acme"], ["Best"]]}
    other_document = {"field": "doc2/advertiser", "values": [["Acme"]]}
    pairs = [(two_values, "best"), (two_values, "None"), (two_values, "acme"), (other_document, "ACME")]
    scores = score(tmp_path / "two", "deepform", *pairs)
    assert values(scores, "precision", "recall", "f1") == [100, 100, 100]


def test_science_qa_image_accuracy(tmp_path: Path) -> None:
    line = {"category": "image", "answer": "B", "choices": 2}
    scores = score(tmp_path, "scienceqa", (line, "B"), (line, "B."), (line | {"category": "text"}, "A"))
    assert values(scores, "image", "overall", "unparsed") == pytest.approx([50, 100 / 3, 100 / 3])


def test_everything_that_decides_the_number_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.score.json"
    write_score_file(path, score(tmp_path, "chartqa", ({"category": "human", "answer": "a"}, "a")))
    scores = json.loads(path.read_text())
    assert scores["definition"]["prompt"]["max_new_tokens"] == 128
    assert scores["definition"]["metrics"] == {"*": ["relaxed_ureader", "relaxed_lmms_eval"]}
    assert scores["interval"] == {"level": 0.95, "resamples": 200, "seed": 20230719}
    assert scores["prompt"] == {"variant": "unknown", "suffix": None}
    assert len(scores["question_set"]) == 64
    units = Units.from_dict(scores["per_question"], "x")
    assert (units.ids, units.groups) == (("0",), ("human",))
    assert {name: values.tolist() for name, values in units.fields.items()} == {
        "relaxed_ureader.n": [1],
        "relaxed_ureader.hit": [1],
        "relaxed_lmms_eval.n": [1],
        "relaxed_lmms_eval.hit": [1],
    }


def test_scores_repeat(tmp_path: Path) -> None:
    pairs = [({"category": "VR", "answer": str(n % 3)}, str(n % 2)) for n in range(30)]
    assert score(tmp_path, "tiny_ehub", *pairs) == score(tmp_path, "tiny_ehub", *pairs)


# --- paired comparison ---


def units_of(folder: Path, name: str, *pairs: tuple[dict, str]) -> Units:
    questions = loaded(folder, name, [line for line, _ in pairs])
    return score_units(questions, {str(n): {"text": text} for n, (_, text) in enumerate(pairs)})[0]


def test_mcnemar_of_a_share(tmp_path: Path) -> None:
    line = {"category": "VR", "answer": "yes"}
    first = units_of(tmp_path, "tiny_ehub", *[(line, said) for said in ["yes"] * 5 + ["no"] * 5])
    second = units_of(tmp_path, "tiny_ehub", *[(line, said) for said in ["no"] + ["yes"] * 9])
    result = compare_units(get_benchmark("tiny_ehub"), "VR", first, second, resamples=500)
    assert (result["better"], result["worse"], result["test"]) == (5, 1, "mcnemar")
    assert result["p_value"] == pytest.approx(2 * (1 + 6) / 2**6)
    assert result["difference"] == pytest.approx(40)
    assert result["low"] < 40 < result["high"]


def test_a_share_with_other_questions_left_out_is_permuted(tmp_path: Path) -> None:
    line = {"category": "human", "answer": "a"}
    first = units_of(tmp_path, "chartqa", *[(line, said) for said in ("a", "b", "b", "Error>")])
    second = units_of(tmp_path, "chartqa", *[(line, said) for said in ("a", "Error>", "Error>", "b")])
    result = compare_units(get_benchmark("chartqa"), "human", first, second, resamples=200)
    # 1/3 and 1/2, though nothing became right that was wrong: McNemar would see no difference.
    assert result["difference"] == pytest.approx(50 - 100 / 3)
    assert (result["test"], result["changed"]) == ("permutation", 3)
    same = compare_units(get_benchmark("chartqa"), "human", first, first, resamples=10)
    assert (same["test"], same["p_value"]) == ("mcnemar", 1)


def test_permutation_of_a_composite(tmp_path: Path) -> None:
    groups = ("VR", "VP", "VKA", "VC", "OH")
    lines = [{"category": group, "answer": "yes"} for group in groups for _ in range(8)]
    first = units_of(tmp_path, "tiny_ehub", *[(line, "no") for line in lines])
    second = units_of(tmp_path, "tiny_ehub", *[(line, ("no", "yes")[n % 2]) for n, line in enumerate(lines)])
    result = compare_units(get_benchmark("tiny_ehub"), "all", first, second, resamples=1000)
    assert (result["difference"], result["changed"], result["test"]) == (250, 20, "permutation")
    assert result["p_value"] == pytest.approx(1 / 1001)
    same = compare_units(get_benchmark("tiny_ehub"), "all", first, first, resamples=100)
    assert (same["difference"], same["changed"], same["p_value"]) == (0, 0, 1)


def test_the_order_of_questions_does_not_matter(tmp_path: Path) -> None:
    first = units_of(tmp_path, "tiny_ehub", *[({"category": "VR", "answer": str(n)}, "1") for n in range(4)])
    turned = Units(first.ids[::-1], first.groups[::-1], {name: column[::-1] for name, column in first.fields.items()})
    assert compare_units(get_benchmark("tiny_ehub"), "VR", first, turned, resamples=10)["worse"] == 0


def test_other_questions_are_not_compared(tmp_path: Path) -> None:
    line = {"category": "VR", "answer": "yes"}
    first = units_of(tmp_path, "tiny_ehub", (line, "yes"))
    second = units_of(tmp_path, "tiny_ehub", (line, "yes"), (line, "yes"))
    with pytest.raises(DataError, match="1 question found in only one of the runs"):
        compare_units(get_benchmark("tiny_ehub"), "VR", first, second)


def test_damaged_scores_per_question() -> None:
    whole = {"ids": ["a"], "groups": ["g"], "fields": {"x": [1]}}
    for value in ({}, *(whole | {"fields": {"x": x}} for x in (["y"], [None], [[1]], 5))):
        with pytest.raises(DataError, match=r"s\.json: its scores per question are damaged"):
            Units.from_dict(value, "s.json")
    other = Units.from_dict(whole | {"fields": {"y": [1]}}, "s.json")
    with pytest.raises(DataError, match="different fields"):
        compare_units(get_benchmark("tiny"), "mean", Units.from_dict(whole, "s.json"), other)
    with pytest.raises(DataError, match="differ in number"):
        Units.from_dict({"ids": ["a"], "groups": ["g"], "fields": {"x": [1, 2]}}, "s.json")

"""PathVQA in its three forms; a pickle that would run code runs nothing."""

import pickle
from pathlib import Path

import pytest
from worlds import published_sets, raw_sets

from llava_mole.cli import main
from llava_mole.common.errors import DataError
from llava_mole.data.prepare.defects import Defects
from llava_mole.data.prepare.sources.pathvqa import Options, iterate, load_plain


def test_the_original_pickles(tmp_path: Path) -> None:
    published_sets.write_pathvqa(tmp_path / "raw")
    done = raw_sets.prepare("pathvqa", tmp_path / "raw", tmp_path / "out", "--check-images", "decode")
    assert done.counts == {"train/pathvqa": 4, "test/OPEN": 1, "test/CLOSED": 2}
    assert done.defects == {"cmyk-image kept": 1}
    assert [(row.turns[0].text, row.turns[1].text, row.answer_type) for row in done.rows[:2]] == [
        ("<image>\nis it a tumor?", "Yes", "CLOSED"),
        ("<image>\nwhat is shown?", "liver", "OPEN"),
    ]
    assert done.rows[0].images == ("pvqa/images/train/train_0001.jpg",)
    assert [(q["text"], q["answer"], q["answer_type"], q["category"]) for q in done.questions()] == [
        ("what is this?", "bone", "OPEN", "OPEN"),
        ("is this bone?", "yes ", "CLOSED", "CLOSED"),
        ("is this skin?", "NO", "CLOSED", "CLOSED"),
    ]


def test_the_twin_of_lxmert(tmp_path: Path) -> None:
    row = {
        "question_id": 1,
        "img_id": "train_0001",
        "sent": "what?",
        "label": {"a cell": 0.3, "bone": 1.0},
        "answer_type": "other",
    }
    path = tmp_path / "raw/qas/train/train_vqa.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps([row], protocol=2))
    raw_sets.write_image(tmp_path / "raw/images/train/train_0001.jpg", 1)
    done = raw_sets.prepare("pathvqa", tmp_path / "raw", tmp_path / "out")
    assert [turn.text for turn in done.rows[0].turns] == ["<image>\nwhat?", "bone"]


def test_the_parquet_copy_and_validation_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published_sets.write_pathvqa_parquet(tmp_path / "raw")
    done = raw_sets.prepare("pathvqa", tmp_path / "raw", tmp_path / "out", "--test-splits", "val,test")
    assert done.counts == {"train/pathvqa": 4, "val/CLOSED": 1, "test/OPEN": 2}
    assert done.report["questions"] == {"test": 2, "val": 1}
    assert all(row.images[0].startswith("pathvqa/") for row in done.rows)
    assert "19,654" in capsys.readouterr().out


def test_llava_med_json_with_its_misspelt_key(tmp_path: Path) -> None:
    published_sets.write_llava_med(tmp_path / "raw")
    done = raw_sets.prepare("pathvqa", tmp_path / "raw", tmp_path / "out")
    assert done.counts == {"train/pathvqa": 2, "test/OPEN": 1, "test/CLOSED": 1}
    assert done.defects == {"misspelt-key repaired": 1, "no-image dropped": 1}
    assert done.rows[0].turns[0].text == "<image>\nwhat is it?"
    assert [q["answer_type"] for q in done.questions()] == ["OPEN", "CLOSED"]


def test_the_suffix_of_closed_questions_is_an_option(tmp_path: Path) -> None:
    published_sets.write_pathvqa(tmp_path / "raw")
    done = raw_sets.prepare("pathvqa", tmp_path / "raw", tmp_path / "out", "--closed-suffix")
    suffix = "Please choose from the following two options: [yes, no]"
    assert [row.turns[0].text.endswith(suffix) for row in done.rows] == [True, False, False, True]
    assert [q["text"].endswith(suffix) for q in done.questions()] == [False, True, True]


class Bomb:
    """Unpickled by the ordinary reader, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.path, "ran"))


@pytest.mark.parametrize("where", ["list", "dict", "alone"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, where: str, protocol: int) -> None:
    trace = tmp_path / "trace"
    bomb = Bomb(trace)
    value = {"list": [bomb], "dict": [{"image": "a", "question": bomb}], "alone": bomb}[where]
    path = tmp_path / "train_qa.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(DataError, match="refused as a pickle of plain lists and dicts: it names"):
        load_plain(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        b"rubbish",
        pickle.dumps([1])[:-3],
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04P0\n.",
        b"I" + b"9" * 5000 + b"\n.",
        b"(" * 100_000,
    ],
)
def test_damaged_and_hostile_pickles_are_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "train_qa.pkl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train_qa\.pkl: refused"):
        load_plain(path)


def test_pickled_rows_of_another_kind_are_counted(tmp_path: Path) -> None:
    good = {"image": "train_0001", "question": "what?", "answer": 3}
    rows = [good, "text", {**good, "image": 5}, {**good, "answer": None}, {**good, "answer": ""}]
    rows += [{**good, "answer": float("nan")}, {**good, "answer": 10**5000}, {**good, "image": 10**5000}]
    path = tmp_path / "raw/train_qa.pkl"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(rows))
    raw_sets.write_image(tmp_path / "raw/images/train/train_0001.jpg", 1)
    done = raw_sets.prepare("pathvqa", tmp_path / "raw", tmp_path / "out")
    assert done.defects == {"bad-record dropped": 6, "empty-answer dropped": 1}
    assert [turn.text for turn in done.rows[0].turns] == ["<image>\nwhat?", "3"]


@pytest.mark.parametrize("key", ["image", "question", "answer", "label"])
def test_values_too_deep_to_be_shown_are_counted(tmp_path: Path, key: str) -> None:
    deep = b"]" * 20_000 + b"a" * 19_999
    values = {"image": b"U\x01x", "question": b"U\x01x", key: b"}U\x01x" + deep + b"s" if key == "label" else deep}
    row = b"".join(b"U" + bytes([len(name)]) + name.encode() + value for name, value in values.items())
    (tmp_path / "train_qa.pkl").write_bytes(b"\x80\x02]}(" + row + b"ua.")
    defects = Defects()
    assert list(iterate(tmp_path, Options(), defects)) == []
    assert dict(defects.counts) == {("bad-record", "dropped"): 1}


def test_nothing_of_pathvqa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw").mkdir()
    assert main(["prepare", "pathvqa", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) == 2
    assert "no PathVQA below it" in capsys.readouterr().err


def test_questions_go_on_into_the_evaluation(tmp_path: Path) -> None:
    from llava_mole.eval.questions import check_images, read_questions

    published_sets.write_pathvqa(tmp_path / "raw")
    done = raw_sets.prepare("pathvqa", tmp_path / "raw", tmp_path / "out")
    questions = read_questions([str(done.out / "questions" / "test.jsonl")])
    check_images(questions, done.out / "images")
    assert [question.group for question in questions] == ["OPEN", "CLOSED", "CLOSED"]
    benchmark = tmp_path / "benchmark"
    assert main(["prepare-benchmark", "pathvqa", "--raw", str(done.out), "--out", str(benchmark)]) == 0
    assert len((benchmark / "questions.jsonl").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": None}, {"a": "1", "b": 2}, {"a": [1], "b": {}}])
def test_labels_without_weights_are_counted(tmp_path: Path, weights: dict[str, object]) -> None:
    good = {"img_id": "train_0001", "sent": "what?", "label": {"bone": 1}}
    path = tmp_path / "raw/train_vqa.pkl"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps([good, {**good, "label": weights}]))
    raw_sets.write_image(tmp_path / "raw/images/train/train_0001.jpg", 1)
    done = raw_sets.prepare("pathvqa", tmp_path / "raw", tmp_path / "out")
    assert done.defects == {"bad-record dropped": 1}


def test_the_suffix_of_closed_questions_in_json(tmp_path: Path) -> None:
    published_sets.write_llava_med(tmp_path / "raw")
    done = raw_sets.prepare("pathvqa", tmp_path / "raw", tmp_path / "out", "--closed-suffix")
    suffix = "Please choose from the following two options: [yes, no]"
    assert [q["text"] for q in done.questions()] == ["what is it?", f"skin? {suffix}"]
    assert done.rows[0].turns[0].text == "<image>\nwhat is it?"

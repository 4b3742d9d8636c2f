"""UReader: roles, the image's own turn, up-sampling, answers that are the word None."""

from pathlib import Path

import pytest
from worlds import published_sets, raw_sets

from llava_mole.cli import main
from llava_mole.conversation import Turn
from llava_mole.data.store import read_records


def test_counts_and_defects(tmp_path: Path) -> None:
    published_sets.write_ureader(tmp_path / "raw")
    done = raw_sets.prepare("ureader", tmp_path / "raw", tmp_path / "out")
    assert done.counts == {
        "train/ChartQA": 1,
        "train/DocVQA": 1,
        "train/DeepForm": 1,
        "train/TabFact": 1,
        "train/TextVQA": 2,
        "test/ChartQA": 2,
        "test/DocVQA": 1,
    }
    assert done.defects == {
        "several-images dropped": 1,
        "missing-image dropped": 1,
        "none-answer kept": 1,
        "ignored-keys kept": 1,
        "unknown-role dropped": 1,
    }
    assert done.report["ignored_keys"] == {"system_instruction": 1}
    row = done.rows[0]
    assert row.id == "train-1"
    assert row.turns == (Turn("user", "<image>\nWhich bar is tallest?"), Turn("assistant", "Norway"))
    assert row.images == ("ChartQA/train/png/7.png",)
    assert (done.out / "images" / row.images[0]).is_file()


def test_validation_rows_can_be_left_out(tmp_path: Path) -> None:
    published_sets.write_ureader(tmp_path / "raw")
    done = raw_sets.prepare(
        "ureader", tmp_path / "raw", tmp_path / "out", "--train-splits", "train", "--test-splits", ""
    )
    assert sum(done.counts.values()) == 5
    assert done.report["questions"] == {}


@pytest.mark.parametrize(
    ("upsample", "factors"), [("official", {"DocVQA": 3, "DeepForm": 2}), ("ChartQA=4", {"ChartQA": 4}), ("none", {})]
)
def test_up_sampling_repeats_rows(tmp_path: Path, upsample: str, factors: dict[str, int]) -> None:
    published_sets.write_ureader(tmp_path / "raw")
    done = raw_sets.prepare("ureader", tmp_path / "raw", tmp_path / "out", "--upsample", upsample)
    once = {"ChartQA": 1, "DocVQA": 1, "DeepForm": 1, "TabFact": 1, "TextVQA": 2}
    kept = {key.removeprefix("train/"): n for key, n in done.counts.items() if key.startswith("train/")}
    assert kept == {name: count * factors.get(name, 1) for name, count in once.items()}
    assert len({row.id for row in done.rows}) == len(done.rows)
    assert len(read_records(done.out / "train", "u")) == sum(kept.values())


def test_the_official_factors() -> None:
    from llava_mole.data.prepare.sources.ureader import PRESETS

    assert PRESETS["official"] == {
        "DocVQA": 3, "InfographicsVQA": 3, "WikiTableQuestions": 3, "DeepForm": 2, "KleisterCharity": 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("DocVQA=0", "whole factors from 1 to 9999 or one of official, none"),
        ("DocVQA=\u00b2", "whole factors from 1 to 9999"),
        ("DocVQA=" + "9" * 5000, "whole factors from 1 to 9999"),
        ("DocVQA", "NAME=FACTOR"),
        ("Docs=2", "no rows of Docs; the sub-sources are ChartQA, DeepForm, DocVQA, TabFact, TextVQA"),
    ],
)
def test_mistakes_in_up_sampling(tmp_path: Path, given: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    published_sets.write_ureader(tmp_path / "raw")
    arguments = ["prepare", "ureader", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--upsample", given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_test_files_become_questions(tmp_path: Path) -> None:
    published_sets.write_ureader(tmp_path / "raw")
    done = raw_sets.prepare("ureader", tmp_path / "raw", tmp_path / "out")
    assert done.report["questions"] == {"test_ChartQA": 2, "test_DocVQA": 1}
    assert done.questions("test_ChartQA")[0] == {
        "question_id": "test_ChartQA-1",
        "image": "ChartQA/test/png/8.png",
        "text": "How many?",
        "category": "ChartQA",
        "answer": "12",
        "answers": ["12"],
    }


def test_first_of_several_images(tmp_path: Path) -> None:
    published_sets.write_ureader(tmp_path / "raw")
    done = raw_sets.prepare("ureader", tmp_path / "raw", tmp_path / "out", "--multi-image", "first")
    (row,) = [row for row in done.rows if row.id == "train-6"]
    assert row.images == ("TextVQA/train/c.png",)
    assert row.turns[0].text == "<image>\nWhich word?"


def test_nothing_of_ureader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw_sets.write_lines(tmp_path / "raw" / "other.jsonl", [{}])
    assert main(["prepare", "ureader", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) == 2
    assert "no train.jsonl, val.jsonl or test_<set>.jsonl below it" in capsys.readouterr().err


def test_an_explicit_factor_must_match_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published_sets.write_ureader(tmp_path / "raw")
    arguments = ["prepare", "ureader", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--upsample", "InfographicsVQA=3"]) == 2
    assert "--upsample: no rows of InfographicsVQA" in capsys.readouterr().err
    assert main([*arguments, "--upsample", "official"]) == 0


def test_copies_are_not_asked(tmp_path: Path) -> None:
    published_sets.write_ureader(tmp_path / "raw")
    given = ("--upsample", "TextVQA=3", "--train-splits", "train,val", "--test-splits", "val")
    done = raw_sets.prepare("ureader", tmp_path / "raw", tmp_path / "out", *given)
    assert done.report["questions"] == {"val_TextVQA": 1}
    assert done.counts["train/TextVQA"] == 6


def write_pages(raw: Path) -> None:
    from PIL import Image

    pages = [Image.new("RGB", raw_sets.SIZE, color) for color in ("red", "green", "blue")]
    (raw / "ureader_images/DUE_Benchmark/DeepForm").mkdir(parents=True)
    pages[0].save(raw / "ureader_images/DUE_Benchmark/DeepForm/a.tiff", save_all=True, append_images=pages[1:])
    names = ["a.tiff.0", "a.tiff.1", "a.tiff.7", "b.tiff.0", "a.tiff"]
    rows = [published_sets.document(f"DUE_Benchmark/DeepForm/{name}", "Which color?", "red") for name in names]
    raw_sets.write_lines(raw / "ureader_json/train.jsonl", rows)


@pytest.mark.parametrize("check", ["exist", "decode"])
def test_pages_of_tiff_files_in_place(tmp_path: Path, check: str) -> None:
    write_pages(tmp_path / "raw")
    done = raw_sets.prepare("ureader", tmp_path / "raw", tmp_path / "out", "--check-images", check)
    assert [row.id for row in done.rows] == ["train-1", "train-5"]
    assert {row.images for row in done.rows} == {("DUE_Benchmark/DeepForm/a.tiff",)}
    assert done.defects["tiff-page dropped"] == 2
    assert done.defects["missing-image dropped"] == 1


def test_pages_of_tiff_files_are_unpacked(tmp_path: Path) -> None:
    from llava_mole.data.images import load_image

    write_pages(tmp_path / "raw")
    done = raw_sets.prepare("ureader", tmp_path / "raw", tmp_path / "out", "--images", "unpack")
    assert [row.id for row in done.rows] == ["train-1", "train-2", "train-5"]
    colors = [load_image(row.images[0], done.out / "images").getpixel((0, 0)) for row in done.rows]
    assert colors == [(255, 0, 0), (0, 128, 0), (255, 0, 0)]
    assert done.defects["corrupt-image dropped"] == 1
    assert done.defects["missing-image dropped"] == 1

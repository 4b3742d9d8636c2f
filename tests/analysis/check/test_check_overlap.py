"""Images that are trained on and evaluated on: folders, question files and prepared sets are compared by content."""

import json
from pathlib import Path

import pytest
import yaml
from worlds import raw_sets

from llava_mole.analysis.check.images import evaluation_files
from llava_mole.cli import main


@pytest.mark.parametrize("form", ["folder", "questions", "prepared"])
def test_overlap_with_evaluation_images(world: Path, tmp_path: Path, form: str) -> None:
    red = json.loads((world / "red" / "red.json").read_text())
    trained = next(record["image"] for record in red if "image" in record)
    folder = tmp_path / "eval"
    if form == "prepared":
        folder, questions = tmp_path / "eval" / "images", tmp_path / "eval" / "questions" / "test.jsonl"
    else:
        questions = folder / "test.jsonl"
    folder.mkdir(parents=True)
    (folder / "renamed.png").write_bytes((world / "red" / trained).read_bytes())
    raw_sets.write_image(folder / "other.png", 99, kind="PNG")
    lines = [{"question_id": n, "image": name, "text": "?"} for n, name in enumerate(("renamed.png", "other.png"))]
    raw_sets.write_lines(questions, lines)
    place = folder if form == "folder" else questions
    settings = yaml.safe_load((world / "config.yaml").read_text())
    settings["check"] = {"evaluation_images": [str(place)]}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    arguments = ["check-data", str(config), "--out", str(out), "--workers", "1"]
    assert main(arguments) == 1
    report = json.loads((out / "check_data.json").read_text())
    assert report["evaluation_images"] == {"files": 2, "trained_on": [str(folder / "renamed.png")]}
    assert [limit["share"] for limit in report["limits"] if limit["limit"] == "max_overlap"] == [0.5]
    assert main([*arguments, "--check.max_overlap", "0.5"]) == 0


@pytest.mark.parametrize("form", ["folder", "questions"])
def test_an_evaluation_place_without_images_is_a_mistake(
    world: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "eval"
    place.mkdir()
    if form == "questions":
        place = place / "test.jsonl"
        raw_sets.write_lines(place, [{"question_id": 1, "text": "?"}])
    given = ["check-data", str(world / "config.yaml"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*given, "--check.evaluation_images", f"[{place}]"]) == 2
    assert f"{place} has no image" in capsys.readouterr().err


def test_every_image_of_a_question_is_compared(tmp_path: Path) -> None:
    for n, name in enumerate("abcd"):
        raw_sets.write_image(tmp_path / f"{name}.png", n, kind="PNG")
    lines = [{"image": "a.png"}, {"images": ["b.png", "c.png"]}, {"image": ["d.png"]}, {"images": ["a.png"]}]
    raw_sets.write_lines(tmp_path / "q.jsonl", lines)
    assert [path.name for path in evaluation_files([str(tmp_path / "q.jsonl")])] == [f"{name}.png" for name in "abcd"]

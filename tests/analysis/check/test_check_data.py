"""`llava-mole check-data` finds what was put in, in files and prepared sets, and its limits decide the exit code."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from worlds import published_sets, raw_sets

from llava_mole.analysis.check import images as check_overlap
from llava_mole.analysis.check import records as check_data
from llava_mole.cli import main
from llava_mole.data.prepare.defects import KINDS

ASK, SAY = "<image>\nWhat color is this?", "It is red."


def check(world: Path, out: Path, *arguments: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Exit code, report and findings."""
    given = ["check-data", str(world / "config.yaml"), "--out", str(out), "--workers", "1", *arguments]
    code = main(given)
    findings = [json.loads(line) for line in (out / "findings.jsonl").read_text(encoding="utf-8").splitlines()]
    return code, json.loads((out / "check_data.json").read_text(encoding="utf-8")), findings


def only(world: Path, name: str, annotations: Path, folder: Path) -> list[str]:
    """Overrides that leave one source, which is called `red` in the configuration."""
    return [
        "--data.sources.red.annotations", str(annotations), "--data.sources.red.image_folder", str(folder),
        "--data.mixture.blue", "0",
    ]  # fmt: skip


def test_a_sound_run_passes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report, findings = check(world, tmp_path)
    assert (code, report["passed"], findings) == (0, True, [])
    red = next(source for source in report["sources"] if source["name"] == "red")
    assert (red["records"], red["text_only"], red["images"]) == (12, 1, 11)
    assert red["tokens"]["max"] > red["tokens"]["median"] > 50
    with Image.open(tmp_path / "token_lengths.png") as picture:
        assert min(picture.size) > 300
    printed = capsys.readouterr().out
    assert "no findings" in printed
    assert "10 of 10 limits passed" in printed


def test_the_report_goes_into_the_run_directory(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = world / "own"
    assert main(["check-data", str(world / "config.yaml"), "--workers", "1", "--train.output_dir", str(run)]) == 0
    assert sorted(path.name for path in (run / "check_data").iterdir()) == [
        "check_data.json", "findings.jsonl", "token_lengths.png"
    ]  # fmt: skip


def turns(*texts: str, **kwargs: Any) -> dict[str, Any]:
    return {"conversations": raw_sets.talk(*texts, **kwargs)}


RECORDS: list[tuple[Any, str | None]] = [
    ({"image": "a.png", **turns(ASK, SAY)}, None),
    ({"image": "a.png", **turns(ASK, SAY)}, "duplicate"),
    ({"image": "a.png", **turns("No marker?", SAY)}, "marker"),
    ({"image": "a.png", **turns("<image><image>Two?", SAY)}, "marker-again"),
    ({**turns(ASK, SAY)}, "marker"),
    ({"image": "a.png", **turns(ASK, SAY, roles=("human", "robot"))}, "unknown-role"),
    ({"image": "a.png", **turns(ASK, "")}, "empty-answer"),
    ({"image": "a.png", "conversations": [{"from": "human", "value": ASK}] * 2}, "turn-order"),
    ({"image": 7, **turns(ASK, SAY)}, "bad-record"),
    ({"image": "http://x/a.png", **turns(ASK, SAY)}, "bad-record"),
    ([1, 2], "bad-record"),
    ({**turns("Say \ud800", SAY)}, "bad-text"),
    ('{"image": "a.png", ', "bad-json"),
    ({"image": "gone.png", **turns(ASK, SAY)}, "missing-image"),
    ({"image": "../out.png", **turns(ASK, SAY)}, "outside-image"),
    ({"image": "cut.jpg", **turns(ASK, SAY)}, "corrupt-image"),
    ({"image": "cmyk.jpg", **turns(ASK, SAY)}, "cmyk-image"),
    ({"image": "moving.gif", **turns(ASK, SAY)}, "animated-image"),
    ({"image": "named.jpg", **turns(ASK, SAY)}, "wrong-extension"),
    ({"image": "big.png", **turns(ASK, SAY)}, "huge-image"),
    ({**turns("Long?", "red " * 400)}, "truncated"),
    ({**turns("Long? " * 400, SAY)}, "masked"),
    ({"image": "a.png", **turns("Last?", "word " * 400, "<image>\nNow?", SAY)}, "image-cut"),
    ({**turns("Ends?", "It is</s> red.")}, "special-token"),
    ({**turns("Begins <s>?", SAY)}, "special-token"),
    ({**turns("Says USER: who?", SAY)}, "chat-marker"),
    ({**turns("Who?", "ASSISTANT: red")}, "chat-marker"),
    ({**turns("What is in <image_1>?", SAY)}, "image-like"),
    ({**turns("And <|image|>?", SAY)}, "image-like"),
    ({**turns("And </Image>?", SAY)}, "image-like"),
    ({**turns("And [IMG]?", SAY)}, "image-like"),
    ({"image": "a.png", **turns(ASK, "  \n")}, "empty-answer"),
]


DAMAGED = ("cut.jpg", "cmyk.jpg", "moving.gif", "named.jpg", "big.png")


def write_defects(folder: Path) -> Path:
    """One record for every finding; line n of the file is RECORDS[n - 1]."""
    whole = raw_sets.image_bytes(3)
    raw_sets.write_image(folder / "a.png", 1, kind="PNG")
    raw_sets.write_image(folder.parent / "out.png", 2, kind="PNG")
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    raw_sets.write_image(folder / "cmyk.jpg", 4, mode="CMYK")
    raw_sets.write_image(folder / "moving.gif", 5, kind="GIF", frames=2)
    raw_sets.write_image(folder / "named.jpg", 6, kind="PNG")
    Image.new("RGB", (64, 64)).save(folder / "big.png")
    raw_sets.write_lines(folder / "defects.jsonl", [value for value, _ in RECORDS])
    return folder / "defects.jsonl"


def test_every_finding_is_listed_with_its_place(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_defects(tmp_path / "data")
    code, report, findings = check(
        world, tmp_path / "out", *only(world, "red", path, path.parent), "--check.huge_pixels", "4000"
    )
    assert code == 1
    by_line: dict[int, set[str]] = {}
    for finding in findings:
        assert finding["source"] == "red"
        by_line.setdefault(int(finding["where"].rpartition(":")[2]), set()).add(finding["kind"])
    for line, (_, kind) in enumerate(RECORDS, 1):
        found = (
            by_line.get(line, set()) - {"truncated"} if kind in ("masked", "image-cut") else by_line.get(line, set())
        )
        assert found == ({kind} if kind else set()), f"line {line}"
    (red,) = report["sources"]
    assert red["records"] == len(RECORDS)
    assert red["findings"] == {kind: n for kind, n in red["findings"].items() if kind in KINDS}
    failed = {limit["limit"] for limit in report["limits"] if not limit["passed"]}
    assert failed == {"max_bad_records", "max_missing_images", "max_bad_images"}
    printed = capsys.readouterr().out
    assert "FAILED  red: " in printed
    assert "(check.max_missing_images)" in printed


def test_limits_decide(world: Path, tmp_path: Path) -> None:
    path = write_defects(tmp_path / "data")
    base = [*only(world, "red", path, path.parent), "--check.max_bad_records", "0.7"]
    images = ["--check.max_missing_images", "0.5", "--check.max_bad_images", "0.5"]
    assert check(world, tmp_path / "a", *base, *images)[0] == 0
    assert check(world, tmp_path / "b", *base)[0] == 1
    for limit in ("max_truncated", "max_duplicates"):
        code, report, _ = check(world, tmp_path / limit, *base, *images, f"--check.{limit}", "0.001")
        assert code == 1
        assert [entry["limit"] for entry in report["limits"] if not entry["passed"]] == [limit]


LONG_HISTORY = {**turns("Before?", "red " * 400, "Now?", SAY)}
LONG_ANSWER = {**turns("Long?", "red " * 400)}
LONG_QUESTION = {**turns("Long? " * 400, SAY)}


@pytest.mark.parametrize(
    ("policy", "kinds", "truncated"),
    [
        ("truncate", {"truncated": 3, "masked": 1}, 3),
        ("drop", {"dropped": 3}, 3),
        ("truncate_history", {"shortened": 1, "dropped": 2}, 3),
        ("error", {"too-long": 3}, 0),
    ],
)
def test_long_records_are_judged_by_the_policy(
    world: Path, tmp_path: Path, policy: str, kinds: dict[str, int], truncated: int
) -> None:
    path = tmp_path / "long.jsonl"
    raw_sets.write_lines(path, [LONG_HISTORY, LONG_ANSWER, LONG_QUESTION, turns("?", SAY)])
    given = only(world, "red", path, tmp_path)
    given += ["--data.max_length_policy", policy, "--check.max_truncated", "0.75"]
    code, report, _ = check(world, tmp_path / "out", *given)
    (red,) = report["sources"]
    assert (red["findings"], red["truncated"]) == (kinds, truncated)
    refused = {"truncate": ["max_bad_records"], "error": ["max_bad_records"]}.get(policy, [])
    assert [limit["limit"] for limit in report["limits"] if not limit["passed"]] == refused
    assert code == (1 if refused else 0)


def test_prepared_sets_are_checked_too(world: Path, tmp_path: Path) -> None:
    published_sets.write_sharegpt4v_instruct(tmp_path / "raw")
    done = raw_sets.prepare("sharegpt4v-instruct", tmp_path / "raw", tmp_path / "prepared")
    given = only(world, "red", done.out / "train", done.out / "images")
    code, report, findings = check(world, tmp_path / "out", *given)
    assert code == 1, "a cut image, which preparing without --check-images decode does not see"
    (red,) = report["sources"]
    assert (red["records"], red["text_only"], red["images"]) == (7, 1, 6)
    assert red["findings"] == {"corrupt-image": 1, "animated-image": 1, "wrong-extension": 1, "cmyk-image": 1}
    file = "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json"
    assert {f["where"] for f in findings if f["kind"] == "corrupt-image"} == {f"{file}:5"}


def test_workers_find_the_same(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_mole.analysis.check import cli as check_command

    path = write_defects(tmp_path / "data")
    given = only(world, "red", path, path.parent)
    _, one, listed = check(world, tmp_path / "one", *given)
    # Tokens, too, are counted by others: threads, since processes would take seconds to load a tokenizer.
    monkeypatch.setattr(check_command, "ALONE", 0)
    monkeypatch.setattr(check_command, "open_pool", ThreadPoolExecutor)
    _, two, listed_by_two = check(world, tmp_path / "two", *given, "--workers", "2")
    assert one == two
    assert listed == listed_by_two


def test_parts_can_be_left_out(world: Path, tmp_path: Path) -> None:
    path = write_defects(tmp_path / "data")
    given = [*only(world, "red", path, path.parent), "--no-images", "--no-tokens"]
    code, report, _ = check(world, tmp_path / "out", *given, "--model.language_model", "none")
    found = report["sources"][0]["findings"]
    assert code == 1
    assert "corrupt-image" not in found
    assert "truncated" not in found
    assert found["unknown-role"] == 1
    assert not (tmp_path / "out" / "token_lengths.png").exists()


def test_what_was_not_checked_has_not_passed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report, _ = check(world, tmp_path / "a", "--no-images", "--check.evaluation_images", f"[{world}]")
    images = {"max_missing_images", "max_bad_images", "max_overlap"}
    assert report["not_checked"] == dict.fromkeys(images, "--no-images")
    assert not images & {limit["limit"] for limit in report["limits"]}
    printed = capsys.readouterr().out
    assert "6 of 6 limits passed" in printed
    assert "not checked: max_missing_images (--no-images)" in printed
    _, report, _ = check(world, tmp_path / "b", "--no-tokens")
    assert report["not_checked"] == {
        "max_truncated": "--no-tokens", "max_overlap": "check.evaluation_images is empty"
    }  # fmt: skip


def test_an_image_counts_for_every_source_that_names_it(world: Path, tmp_path: Path) -> None:
    path = write_defects(tmp_path / "data")
    wanted = {"corrupt-image": 1, "cmyk-image": 1, "animated-image": 1, "wrong-extension": 1, "huge-image": 1}
    given = ["--check.huge_pixels", "4000", "--no-tokens", *only(world, "red", path, path.parent)[:4]]
    given += ["--data.sources.blue.annotations", str(path), "--data.sources.blue.image_folder", str(tmp_path)]
    raw_sets.write_lines(path, [{"image": file, **turns(ASK, SAY)} for file in DAMAGED])
    below = tmp_path / "below.jsonl"
    raw_sets.write_lines(below, [{"image": f"data/{file}", **turns(ASK, SAY)} for file in DAMAGED])
    _, report, findings = check(world, tmp_path / "out", *given, "--data.sources.blue.annotations", str(below))
    assert {source["name"]: source["findings"] for source in report["sources"]} == {"red": wanted, "blue": wanted}
    assert {f["detail"].split(":")[0].split()[0] for f in findings if f["source"] == "blue"} == {
        f"data/{file}" for file in DAMAGED
    }


def test_a_check_that_fails_leaves_the_last_report(world: Path, tmp_path: Path) -> None:
    assert check(world, tmp_path, "--check.huge_pixels", "1")[2]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    given = ["check-data", str(world / "config.yaml"), "--out", str(tmp_path), "--workers", "1", "--no-tokens"]
    assert main([*given, "--data.sources.blue.annotations", "none.json"]) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("place", ["out", "annotations", "evaluation"])
def test_what_cannot_be_opened_is_one_line(
    world: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def deny(path: Any, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "file").write_text("")
    out, more, message = tmp_path / "out", [], "Permission denied"
    if place == "out":
        out, message = (
            tmp_path / "file" / "out",
            f"--out {tmp_path / 'file' / 'out'} cannot be created: Not a directory",
        )
    elif place == "annotations":
        monkeypatch.setattr(check_data, "iterate_json", deny)
    else:
        monkeypatch.setattr(check_overlap, "key_of", deny)
        more = ["--check.evaluation_images", f"[{world / 'red'}]"]
    given = ["check-data", str(world / "config.yaml"), "--out", str(out), "--workers", "1", "--no-tokens"]
    assert main([*given, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("llava-mole: error") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.sources.red.annotations", "none.json"],
            "none.json: is neither an annotation file nor a prepared set",
        ),
        (["--data.sources.red.annotations", "{empty}"], "empty.json: holds no record; training would not start"),
        (["--check.max_truncated", "20"], "check.max_truncated is 20.0; it is a share, 0 to 1"),
        (["--check.max_trunc", "0"], "max_trunc"),
        (["--data.template", "vicuna"], "template 'vicuna' does not exist"),
        (["--workers", "0"], "--workers is 0"),
        (["--model.language_model", "none"], "no tokenizer loads from 'none'"),
        (["--check.evaluation_images", "[nowhere]"], "nowhere is neither a folder nor a question file"),
    ],
)
def test_mistakes_end_with_2(
    world: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    arguments = [argument.format(empty=empty) for argument in arguments]
    given = ["check-data", str(world / "config.yaml"), "--out", str(tmp_path), "--workers", "1", *arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error

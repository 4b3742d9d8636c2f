"""The tiny world's data: answers are true of the pictures, splits are disjoint, everything follows from the seed."""

import functools
import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from llava_mole.common.errors import DataError
from llava_mole.data.prepare.sources.tiny import biomedicine, document, general
from llava_mole.data.prepare.sources.tiny import world as data
from llava_mole.data.prepare.sources.tiny.samples import DOMAINS, IMAGE_SIZE

TRAIN, TEST = 80, 120


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "tiny"
    assert data.build(out, TRAIN, TEST) is True
    return out


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(data, "PACKAGES", ("numpy", "no-such-package"))
    assert data.main(["--out", str(tmp_path / "tiny")]) == 2
    assert "needs the package no-such-package, which is not installed; `pip install no-such" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def questions(world: Path, domain: str, split: str) -> list[tuple[str, str, str]]:
    """(image path, question, answer) of every question of a split."""
    out = []
    for record in json.loads((world / domain / f"{split}.json").read_text()):
        turns = [turn["value"] for turn in record["conversations"]]
        out += [(record["image"], q.removeprefix("<image>\n"), a) for q, a in zip(turns[::2], turns[1::2], strict=True)]
    return out


def pixels(world: Path, path: str) -> np.ndarray:
    return np.asarray(Image.open(world / path).convert("RGB"))


def answer_general(image: np.ndarray, question: str) -> str:
    """Answer an easy-VQA question by looking: palette colour, and how the shape's rows widen."""
    names = {rgb: name for name, rgb in general.COLOURS.items()}
    counts = Counter(map(tuple, image.reshape(-1, 3).tolist()))
    rgb = max((c for c in counts if c in names), key=lambda c: counts[c])
    widths = (image == np.array(rgb)).all(-1).sum(1)
    widths = widths[widths > 0]
    if widths.min() == widths.max():
        shape = "rectangle"
    else:
        half = len(widths) // 2
        shape = "circle" if widths[:half].sum() > 0.6 * widths[-half:].sum() else "triangle"
    if question.startswith(("what color", "what is the color")):
        return names[rgb]
    if question.startswith("what"):
        return shape
    words = set(re.findall(r"[a-z]+", question))
    present = bool(words & {names[rgb], shape})
    return "yes" if present != bool(words & {"not", "no"}) else "no"


def glyphs(texts: tuple[str, ...]) -> dict[str, np.ndarray]:
    font = ImageFont.load_default_imagefont()
    out = {}
    for text in texts:
        canvas = Image.new("L", (6 * len(text), 11), 255)
        pen = ImageDraw.Draw(canvas)
        pen.fontmode = "1"
        pen.text((0, 0), text, fill=0, font=font)
        out[text] = np.asarray(canvas) < 128
    return out


def find_texts(image: np.ndarray, texts: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Where each of `texts` is written in black: text -> (row, column)."""
    black = (image < 60).all(-1)
    found = {}
    for text, glyph in glyphs(texts).items():
        windows = np.lib.stride_tricks.sliding_window_view(black, glyph.shape)
        hits = np.argwhere((windows == glyph).all((-1, -2)))
        if len(hits):
            found[text] = tuple(hits[0])
    return found


@functools.lru_cache(maxsize=1000)
def read_pixels(raw: bytes) -> dict:
    return read_document(np.frombuffer(raw, np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 3))


def read_document(image: np.ndarray) -> dict:
    """Read a chart or table from its pixels alone."""
    names = find_texts(image, document.NAMES)
    is_table = (image[:16] == document.HEADING).all(-1).mean() > 0.5
    page: dict = {"kind": "table" if is_table else "chart", "colours": {}}
    if is_table:
        digits = find_texts(image[:, 26:], tuple("123456789"))
        page["names"] = sorted(names, key=lambda name: names[name][0])
        page["values"] = [
            next(int(digit) for digit, (row, _) in digits.items() if abs(row - names[name][0]) < 4)
            for name in page["names"]
        ]
        darker = np.where((image[:16] < 60).all(-1)[..., None], image[:16], 255)
        page["title"] = next(iter(find_texts(darker.astype(np.uint8), document.TITLES))).lower()
        return page
    page["names"] = sorted(names, key=lambda name: names[name][1])
    page["values"] = []
    base = next(row for row in range(40, 64) if (image[row] == 0).all())
    printed = find_texts(image[:17], tuple("123456789"))
    for name, digit in zip(page["names"], sorted(printed, key=lambda digit: printed[digit][1]), strict=True):
        column = image[:base, names[name][1] + 3]
        page["colours"][name], rgb = next((c, v) for c, v in document.COLOURS.items() if (column[-1] == v).all())
        height = int((column == rgb).all(-1).sum())
        assert height == int(digit) * document.UNIT
        page["values"].append(int(digit))
    return page


def answer_document(image: np.ndarray, question: str) -> str:
    page = read_pixels(image.tobytes())
    names, values = page["names"], page["values"]
    value_of = dict(zip(names, values, strict=True))
    if match := re.fullmatch(r"What (is the name of|is the value of|color is) the (left|middle|right) bar\?", question):
        name = names[{"left": 0, "middle": 1, "right": -1}[match[2]]]
        read = {"is the name of": name, "is the value of": str(value_of[name]), "color is": page["colours"][name]}
        return read[match[1]]
    if match := re.fullmatch(r"What is the value in the (\w+) row\?", question):
        return str(values[document.ORDINALS.index(match[1])])
    if match := re.fullmatch(r"What is the value of (\w+)\?", question):
        return str(value_of[match[1]])
    if match := re.fullmatch(r"Which name has the (highest|lowest) value\?", question):
        return (max if match[1] == "highest" else min)(value_of, key=value_of.get)
    if match := re.fullmatch(r"Which name is in the (\w+) row\?", question):
        return names[document.ORDINALS.index(match[1])]
    if match := re.fullmatch(r"What color is the bar of (\w+)\?", question):
        return page["colours"][match[1]]
    if match := re.fullmatch(r"Which name has the (\w+) bar\?", question):
        return next(name for name, colour in page["colours"].items() if colour == match[1])
    if question == "What does the table show?":
        return page["title"]
    if question == "Are there three bars?":
        return "yes" if len(names) == 3 else "no"
    assert question in (
        "Is the left bar taller than the right bar?",
        "Is the first value larger than the last value?",
    )
    return "yes" if values[0] > values[-1] else "no"


def answer_biomedicine(image: np.ndarray, question: str) -> str | None:
    found = biomedicine.findings(biomedicine.measure(image))
    kind = next(kind for kind, (text, _) in biomedicine.QUESTIONS.items() if text == question)
    return found.get(kind)


ANSWER = {"general": answer_general, "document": answer_document, "biomedicine": answer_biomedicine}


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_true_of_the_saved_picture(world, domain, split):
    asked = questions(world, domain, split)
    assert len(asked) >= (TEST // 2 if split == "test" else TRAIN)
    for path, question, answer in asked:
        assert ANSWER[domain](pixels(world, path), question) == answer, (path, question)


def test_biomedicine_measures_what_the_thresholds_say():
    """A painted patch with known areas: left half DAB brown, upper right blue, lower right white."""
    from skimage.color import hed2rgb

    stain = np.zeros((64, 64, 3))
    stain[:, :32, 2] = 0.12
    stain[:32, 32:, 0] = 0.08
    patch = (hed2rgb(stain) * 255).round().astype(np.uint8)
    measured = biomedicine.measure(patch)
    assert measured.dab == 0.5
    assert measured.nuclei == 0.25
    assert measured.pale == 0.25
    assert measured.quadrants == (1, 0, 1, 0)
    found = biomedicine.findings(measured)
    assert "dab_half" not in found  # exactly half: too near the limit to be asked
    assert "dab_where" not in found  # two quadrants are equally brown
    assert found["left_browner"] == "yes"
    assert found["dab_area"] == "medium"


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_image_is_in_both_splits(world, domain):
    digests = {}
    for split in ("train", "test"):
        paths = sorted((world / domain / "images" / split).iterdir())
        assert paths
        digests[split] = {hashlib.sha256(np.asarray(Image.open(p).convert("RGB")).tobytes()).digest() for p in paths}
    assert not digests["train"] & digests["test"]


def test_biomedicine_patches_stay_in_their_regions(world):
    (train_low, train_high), (test_low, test_high) = (biomedicine.REGIONS[split] for split in ("train", "test"))
    assert train_high + 8 <= test_low or test_high + 8 <= train_low
    photograph = biomedicine.photograph()
    for split, (low, high) in biomedicine.REGIONS.items():
        for path in (world / "biomedicine" / "images" / split).iterdir():
            top, left = map(int, re.search(r"_y(\d+)_x(\d+)", path.stem).groups())
            assert low <= top
            assert top + IMAGE_SIZE <= high
            there = np.sort(photograph[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].reshape(-1, 3), axis=0)
            assert (np.sort(np.asarray(Image.open(path)).reshape(-1, 3), axis=0) == there).all()


@pytest.mark.parametrize("domain", DOMAINS)
def test_yes_and_no_are_balanced_per_test_question(world, domain):
    counts = defaultdict(Counter)
    for _, question, answer in questions(world, domain, "test"):
        counts[question][answer] += 1
    closed = {text: count for text, count in counts.items() if set(count) & {"yes", "no"}}
    assert closed
    for text, count in closed.items():
        assert count["yes"] == count["no"], text


def test_yes_and_no_are_balanced_in_training(world):
    counts = Counter(answer for domain in DOMAINS for _, _, answer in questions(world, domain, "train"))
    assert 0.8 < counts["yes"] / counts["no"] < 1.25


@pytest.mark.parametrize("name", ["general/train", "document/test", "biomedicine/train", "captions/train"])
def test_records_have_llavas_format(world, name):
    records = json.loads((world / f"{name}.json").read_text())
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert set(record) == {"id", "image", "conversations"}
        assert (world / record["image"]).is_file()
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in turns) == 1
        assert all(turn["value"].strip() == turn["value"] != "" for turn in turns)


def test_test_questions_equal_the_test_records(world):
    for domain in DOMAINS:
        lines = [json.loads(line) for line in (world / domain / "test_questions.jsonl").read_text().splitlines()]
        assert TEST / 2 <= len(lines) <= TEST
        assert [(line["image"], line["text"], line["answer"]) for line in lines] == questions(world, domain, "test")
        assert len({line["question_id"] for line in lines}) == len(lines)
        assert all(line["category"] for line in lines)


def test_captions_describe_train_images_of_all_domains(world):
    captions = json.loads((world / "captions" / "train.json").read_text())
    assert Counter(record["image"].split("/")[0] for record in captions) == dict.fromkeys(DOMAINS, TRAIN)
    assert {record["image"].split("/")[2] for record in captions} == {"train"}
    chart = next(r for r in captions if r["image"].startswith("document") and "chart" in r["conversations"][1]["value"])
    page = read_document(pixels(world, chart["image"]))
    for name, value in zip(page["names"], page["values"], strict=True):
        assert f"{name} {value} in {page['colours'][name]}" in chart["conversations"][1]["value"]


def test_photographs_are_there(world):
    assert {path.stem for path in (world / "photos").iterdir()} == set(data.PHOTOS)


def test_same_seed_same_files_and_second_run_reuses_them(world, tmp_path):
    before = (world / "manifest.json").stat().st_mtime_ns
    assert data.build(world, TRAIN, TEST) is False
    assert (world / "manifest.json").stat().st_mtime_ns == before
    again = tmp_path / "again"
    data.build(again, TRAIN, TEST)
    assert (again / "manifest.json").read_bytes() == (world / "manifest.json").read_bytes()
    assert data.tree_digest(again) == data.tree_digest(world)
    # a damaged file is noticed and the folder is written again
    next((again / "general" / "images" / "train").iterdir()).unlink()
    assert data.build(again, TRAIN, TEST) is True
    assert data.tree_digest(again) == data.tree_digest(world)


def test_another_seed_gives_other_questions():
    first, second = (data.domain_samples("document", "train", 5, seed)[0] for seed in (0, 1))
    assert [s.caption for s in first] != [s.caption for s in second]


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(DataError, match="holds other files"):
        data.build(tmp_path, TRAIN, TEST)
    assert data.main(["--out", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert data.main(["--out", str(tmp_path / "x"), "--train-per-domain", "0"]) == 2

"""The tiny world's data: answers are true of the pictures, splits are disjoint, everything follows from the seed."""

import functools
import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from llava_mole.common.errors import DataError
from llava_mole.data.prepare.sources.tiny import biomedicine, document, facts, general
from llava_mole.data.prepare.sources.tiny import world as data
from llava_mole.data.prepare.sources.tiny.samples import DOMAINS, IMAGE_SIZE

SIZE = data.Size(train=80, val=120, test=120)
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "tiny"
    assert data.build(out, SIZE) is True
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
@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_true_of_the_saved_picture(world, domain, split):
    asked = questions(world, domain, split)
    assert len(asked) >= {"train": SIZE.train, "val": SIZE.val // 2, "test": SIZE.test // 2}[split]
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
def test_no_image_is_in_two_splits(world, domain):
    digests = {}
    for split in SPLITS:
        paths = sorted((world / domain / "images" / split).iterdir())
        assert paths
        digests[split] = {hashlib.sha256(np.asarray(Image.open(p).convert("RGB")).tobytes()).digest() for p in paths}
    assert len(set.union(*digests.values())) == sum(map(len, digests.values()))


def test_biomedicine_patches_stay_in_their_regions(world):
    regions = biomedicine.REGIONS
    for one, other in itertools.combinations(regions.values(), 2):  # at least 8 pixels apart
        gaps = (one.top - other.bottom, other.top - one.bottom, one.left - other.right, other.left - one.right)
        assert max(gaps) >= 8
    photograph = biomedicine.photograph()
    for split, region in regions.items():
        for path in (world / "biomedicine" / "images" / split).iterdir():
            top, left = map(int, re.search(r"_y(\d+)_x(\d+)", path.stem).groups())
            assert region.top <= top <= region.bottom - IMAGE_SIZE
            assert region.left <= left <= region.right - IMAGE_SIZE
            there = np.sort(photograph[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].reshape(-1, 3), axis=0)
            assert (np.sort(np.asarray(Image.open(path)).reshape(-1, 3), axis=0) == there).all()


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", ["val", "test"])
def test_yes_and_no_are_balanced_per_held_out_question(world, domain, split):
    counts = defaultdict(Counter)
    for _, question, answer in questions(world, domain, split):
        counts[question][answer] += 1
    closed = {text: count for text, count in counts.items() if set(count) & {"yes", "no"}}
    assert closed
    for text, count in closed.items():
        assert count["yes"] == count["no"], text


def test_yes_and_no_are_balanced_in_training(world):
    counts = Counter(answer for domain in DOMAINS for _, _, answer in questions(world, domain, "train"))
    assert 0.8 < counts["yes"] / counts["no"] < 1.25


@pytest.mark.parametrize(
    "name", ["general/train", "general/val", "document/test", "biomedicine/train", "captions/train"]
)
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


@pytest.mark.parametrize("split", ["val", "test"])
def test_question_lines_equal_the_records(world, split):
    for domain in DOMAINS:
        text = (world / domain / f"{split}_questions.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        limit = getattr(SIZE, split)
        assert limit / 2 <= len(lines) <= limit
        assert [(line["image"], line["text"], line["answer"]) for line in lines] == questions(world, domain, split)
        assert len({line["question_id"] for line in lines}) == len(lines)
        assert all(line["category"] for line in lines)
        assert all(f"-{split}-" in line["question_id"] for line in lines)


def test_by_default_a_domain_has_two_thousand_test_questions():
    """Of easy-VQA's test images there are only 1,000; they must be enough."""
    samples, _ = data.domain_samples("general", "test", data.MOST_IMAGES["test"], 0)
    drawn = data.held_out_questions("general", "test", samples, None, Random(0), 0, data.Size().test)
    assert len(drawn) >= 2000


def test_captions_describe_train_images_of_all_domains(world):
    captions = json.loads((world / "captions" / "train.json").read_text())
    assert Counter(record["image"].split("/")[0] for record in captions) == dict.fromkeys(DOMAINS, SIZE.train)
    assert {record["image"].split("/")[2] for record in captions} == {"train"}
    chart = next(r for r in captions if r["image"].startswith("document") and "chart" in r["conversations"][1]["value"])
    page = read_document(pixels(world, chart["image"]))
    for name, value in zip(page["names"], page["values"], strict=True):
        assert f"{name} {value} in {page['colours'][name]}" in chart["conversations"][1]["value"]


def test_photographs_are_there(world):
    assert {path.stem for path in (world / "photos").iterdir()} == set(data.PHOTOS)


def test_same_seed_same_files_and_second_run_reuses_them(world, tmp_path):
    before = (world / "manifest.json").stat().st_mtime_ns
    assert data.build(world, SIZE) is False
    assert (world / "manifest.json").stat().st_mtime_ns == before
    again = tmp_path / "again"
    data.build(again, SIZE)
    assert (again / "manifest.json").read_bytes() == (world / "manifest.json").read_bytes()
    assert data.tree_digest(again) == data.tree_digest(world)
    # a damaged file is noticed and the folder is written again
    next((again / "general" / "images" / "train").iterdir()).unlink()
    assert data.build(again, SIZE) is True
    assert data.tree_digest(again) == data.tree_digest(world)


def test_another_seed_gives_other_questions():
    first, second = (data.domain_samples("document", "train", 5, seed)[0] for seed in (0, 1))
    assert [s.caption for s in first] != [s.caption for s in second]


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(DataError, match="holds other files"):
        data.build(tmp_path, SIZE)
    assert data.main(["--out", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert data.main(["--out", str(tmp_path / "x"), "--train-per-domain", "0"]) == 2
    assert data.main(["--out", str(tmp_path / "x"), "--val-per-domain", "0"]) == 2


@pytest.fixture(scope="module")
def dialled(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dialled") / "tiny"
    sizes = [f"--{split}-per-domain={getattr(SIZE, split)}" for split in SPLITS]
    assert data.main(["--out", str(out), *sizes, "--facts", "16", "--convention", "0.5"]) == 0
    return out


def test_without_facts_nothing_of_them_is_in_the_data(world, dialled):
    assert json.loads((world / "manifest.json").read_text())["facts"] == 0
    manifest = json.loads((dialled / "manifest.json").read_text())
    assert (manifest["facts"], manifest["convention"]) == (16, 0.5)
    for domain, split in itertools.product(DOMAINS, SPLITS):
        known = {(f.text, f.answer) for f in facts.facts(domain, 16, 0.5)}
        plain, both = (questions(where, domain, split) for where in (world, dialled))
        added = [(question, answer) for _, question, answer in both if (question, answer) in known]
        assert Counter(both) - Counter(plain) == Counter(entry for entry in both if entry[1:] in known)
        assert len(both) == len(plain) + len(added)
        assert set(added) == known  # a fact that is tested was taught
        assert not {(question, answer) for _, question, answer in plain} & known


def test_the_fact_questions_have_files_of_their_own(world, dialled):
    for domain in DOMAINS:
        assert not list((world / domain).glob("*_facts.jsonl"))
        for split in ("val", "test"):
            lines = (dialled / domain / f"{split}_questions.jsonl").read_text().splitlines()
            wanted = [line for line in lines if json.loads(line)["category"] in facts.CATEGORIES]
            assert (dialled / domain / f"{split}_facts.jsonl").read_text().splitlines() == wanted
            assert 0 < len(wanted) < len(lines)


def test_half_of_the_facts_differ_between_the_domains(dialled):
    answers = defaultdict(dict)
    for domain in DOMAINS:
        for line in map(json.loads, (dialled / domain / "test_questions.jsonl").read_text().splitlines()):
            if line["category"] in facts.CATEGORIES:
                answers[line["text"], line["category"]][domain] = line["answer"]
    assert Counter(category for _, category in answers) == {"convention": 8, "fact": 8}
    for (_, category), by_domain in answers.items():
        assert len(set(by_domain.values())) == (3 if category == "convention" else 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--facts", "-1"], "--facts -1"),
        (["--facts", "100000"], "--facts 100000"),
        (["--facts", "8", "--convention", "1.5"], "--convention 1.5"),
        (["--convention", "0.5"], "give their number with --facts"),
    ],
)
def test_a_wrong_dial_is_refused(tmp_path, capsys, given, message):
    assert data.main(["--out", str(tmp_path / "x"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

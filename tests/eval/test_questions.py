"""Question files are read strictly, and chunks cover them exactly."""

import json
import re
from pathlib import Path

import pytest

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.questions import check_images, read_question_lines, read_questions, take_chunk


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_fields_and_groups(tmp_path: Path) -> None:
    first = {"question_id": 3, "image": "a.png", "text": "What?", "category": "color", "answer": "red", "extra": 1}
    path = write(tmp_path / "q.jsonl", first, "", {"question_id": "x", "text": "line\u2028separator"})
    named, bare = read_questions([f"general={path}"]), read_questions([path])
    assert [q.question_id for q in named] == [3, "x"]
    assert (named[0].images, named[0].category) == (("a.png",), "color")
    assert named[1].text == "line\u2028separator"
    assert named[1].where == f"{path}:3"
    assert [q.group for q in named] == ["general", "general"]
    assert [q.group for q in bare] == ["color", "all"]


def test_a_list_of_one_image_is_that_image(tmp_path: Path) -> None:
    forms = [{"image": "a.png"}, {"image": ["a.png"]}, {"images": ["a.png"]}, {"image": "a.png", "images": ["a.png"]}]
    forms += [{}, {"image": None}, {"images": []}]
    path = write(tmp_path / "q.jsonl", *({"question_id": n, "text": "?", **form} for n, form in enumerate(forms)))
    assert [question.images for question in read_questions([path])] == [("a.png",)] * 4 + [()] * 3
    assert [line.get("image") for _, line in read_question_lines([path])] == ["a.png"] * 4 + [None] * 3


def test_several_images_keep_their_order_and_repetitions(tmp_path: Path) -> None:
    forms = [{"image": ["a.png", "b.png"]}, {"images": ["a.png", "b.png"]}, {"images": ["b.png", "a.png", "b.png"]}]
    path = write(tmp_path / "q.jsonl", *({"question_id": n, "text": "?", **form} for n, form in enumerate(forms)))
    pairs = [("a.png", "b.png"), ("a.png", "b.png"), ("b.png", "a.png", "b.png")]
    assert [question.images for question in read_questions([path])] == pairs
    assert [line["image"] for _, line in read_question_lines([path])] == [list(names) for names in pairs]


def test_as_many_placeholders_as_images_or_none(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    for text in ("?", "<image> or <image>?"):
        line = {"question_id": 1, "text": text, "images": ["a.png", "b.png"]}
        check_images(read_questions([write(tmp_path / "q.jsonl", line)]), tmp_path)
    for text, images, problem in (
        ("Is <image> red?", ["a.png", "b.png"], "1 <image> in the text, but 2 images given"),
        ("<image> or <image>?", "a.png", "2 <image> in the text, but one image given"),
        ("<image>?", None, "1 <image> in the text, but no image given"),
    ):
        path = write(tmp_path / "q.jsonl", "", {"question_id": 1, "text": text, "images": images})
        with pytest.raises(DataError, match=rf"^{re.escape(path)}:2: {problem}$"):
            check_images(read_questions([path]), tmp_path)


def test_an_existing_file_with_an_equals_sign_is_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "k=3.jsonl", {"question_id": 1, "text": "What?"})
    assert read_questions([path])[0].group == "all"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"q\.jsonl:1: not valid JSON"),
        (["[" * 200_000], r"q\.jsonl:1: not valid JSON"),
        (["[1]"], r"q\.jsonl:1: list found; the file needs one JSON object"),
        ([{"text": "a"}], r"q\.jsonl:1: question_id must be a number or a non-empty text; found nothing"),
        ([{"question_id": True, "text": "a"}], r"q\.jsonl:1: question_id .* found True"),
        ([{"question_id": 1}], r"q\.jsonl:1: 'text' must be a text; found nothing"),
        ([{"question_id": 1, "text": 5}], r"q\.jsonl:1: 'text' must be a text; found 5"),
        (
            [{"question_id": 1, "text": "a", "image": "x", "images": ["y"]}],
            r"q\.jsonl:1: 'image' and 'images' name different images; keep one of these keys",
        ),
        ([{"question_id": 1, "text": "a", "image": 5}], r"q\.jsonl:1: 'image' must be a path or .* found 5"),
        ([{"question_id": 1, "text": "a", "images": [5]}], r"q\.jsonl:1: 'images' must be a path or .* found \[5\]"),
        (
            [{"question_id": 1, "text": "a"}, {"question_id": "1", "text": "b"}],
            r"q\.jsonl:2: question_id '1' was already used at .*q\.jsonl:1",
        ),
        ([""], "no questions in it"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions([write(tmp_path / "q.jsonl", *lines)])


def test_ids_must_differ_across_files(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", {"question_id": 1, "text": "a"})
    two = write(tmp_path / "two.jsonl", {"question_id": 1, "text": "b"})
    with pytest.raises(DataError, match=r"two\.jsonl:1: question_id 1 was already used at .*one\.jsonl:1"):
        read_questions([one, two])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        read_questions([str(tmp_path / "nowhere.jsonl")])
    questions = read_questions([write(tmp_path / "q.jsonl", {"question_id": 1, "text": "a", "image": "no.png"})])
    with pytest.raises(DataError, match=r"q\.jsonl:1: image 'no\.png' is not a file in the image folder"):
        check_images(questions, tmp_path)
    with pytest.raises(DataError, match=r"--image-folder .*nowhere is not a directory; .*q\.jsonl:1 needs an image"):
        check_images(questions, tmp_path / "nowhere")
    outside = read_questions([write(tmp_path / "q.jsonl", {"question_id": 1, "text": "a", "image": "../q.jsonl"})])
    with pytest.raises(DataError, match=r"q\.jsonl:1: image path '\.\./q\.jsonl' must be relative"):
        check_images(outside, tmp_path)


def test_chunks_partition_any_number_of_items() -> None:
    for n in range(23):
        for num_chunks in range(1, 26):
            chunks = [take_chunk(range(n), num_chunks, i) for i in range(num_chunks)]
            assert [item for chunk in chunks for item in chunk] == list(range(n))
            assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


@pytest.mark.parametrize(
    ("num_chunks", "chunk_idx", "message"),
    [(0, 0, "--num-chunks is 0"), (4, 4, "--chunk-idx is 4; with 4 chunks it must be 0 to 3"), (4, -1, "is -1")],
)
def test_chunk_arguments_are_checked(num_chunks: int, chunk_idx: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take_chunk([1, 2, 3], num_chunks, chunk_idx)

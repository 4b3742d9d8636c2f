"""Question files: every question has an id of its own, however often the raw one comes again."""

import json
from pathlib import Path

from llava_mole.conversation import Turn
from llava_mole.data.converters.base import Draft
from llava_mole.data.converters.questions import QuestionFiles

ROUND = (Turn("user", "<image>\nRed?"), Turn("assistant", "yes"))


def write(folder: Path, *ids: str) -> list[str]:
    files = QuestionFiles(folder, by_source=False)
    for identifier in ids:
        files.add(Draft(identifier, "s", ("a.jpg",), ROUND, "f:1", "test"), "a.jpg")
    files.close()
    assert files.counts == {"test": len(ids)}
    return [json.loads(line)["question_id"] for line in (folder / "test.jsonl").read_text().splitlines()]


def test_ids_that_come_again_are_numbered(tmp_path: Path) -> None:
    assert write(tmp_path, "a", "a#2", "a", "b", "a", "a#2") == ["a", "a#2", "a#3", "b", "a#4", "a#2#2"]


def test_one_id_for_all_rows_costs_one_look_each(tmp_path: Path) -> None:
    looks = 0

    class Id(str):
        def __hash__(self) -> int:
            nonlocal looks
            looks += 1
            return super().__hash__()

    ids = write(tmp_path, *[Id("a")] * 300)
    assert len(set(ids)) == 300
    assert looks < 10 * 300

"""Question files: every question has an id of its own, however often the raw one comes again."""

import json
from pathlib import Path

from llava_mole.conversation import Turn
from llava_mole.data.prepare.report import QuestionFiles
from llava_mole.data.prepare.samples import RawSample

ROUND = (Turn("user", "<image>\nRed?"), Turn("assistant", "yes"))


def write(folder: Path, *ids: str) -> list[str]:
    files = QuestionFiles(folder, by_sub_source=False)
    for identifier in ids:
        files.add(RawSample(identifier, "s", ("a.jpg",), ROUND, "f:1", "test"), "a.jpg")
    files.close()
    assert files.counts == {"test": len(ids)}
    return [json.loads(line)["question_id"] for line in (folder / "test.jsonl").read_text().splitlines()]


def test_ids_that_come_again_are_numbered(tmp_path: Path) -> None:
    assert write(tmp_path, "a", "a#2", "a", "b", "a", "a#2") == ["a", "a#2", "a#3", "b", "a#4", "a#2#2"]


def test_one_id_for_all_rows_is_numbered_without_a_search(tmp_path: Path) -> None:
    tried = 0

    class Id(str):
        def __format__(self, spec: str) -> str:
            nonlocal tried
            tried += 1
            return super().__format__(spec)

    assert len(set(write(tmp_path, *[Id("a")] * 300))) == 300
    assert tried == 299

"""Test splits as question files: JSON lines that the evaluation reads, with the answers."""

import json
from pathlib import Path
from typing import TextIO

from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.data.converters.base import Draft
from llava_mole.data.converters.image_files import safe_name


class QuestionFiles:
    """Writes `<folder>/<split>.jsonl`, or `<split>_<category>.jsonl` for each set of a source with several test files.

    Every round of a conversation is a question: `question_id`, `image` (absent where there is none), `text` without the
    marker, `category`, `answer`, `answers` and `answer_type`. Ids that come again get a suffix.
    """

    def __init__(self, folder: Path, by_source: bool) -> None:
        self._folder = folder
        self._by_source = by_source
        self._files: dict[str, TextIO] = {}
        self._ids: dict[str, int] = {}
        """Every id -> the last number that was put behind it."""
        self.counts: dict[str, int] = {}
        """Questions of each file."""

    def add(self, draft: Draft, image: str | None) -> None:
        """Append the questions of a draft with one image or none."""
        category = draft.category or draft.source
        rounds = [
            (question.text, answer.text)
            for question, answer in zip(draft.turns[::2], draft.turns[1::2], strict=False)
            if answer.text.strip()
        ]
        name = f"{draft.split}_{safe_name(draft.source)}" if self._by_source else draft.split
        for number, (question, answer) in enumerate(rounds, 1):
            identifier = draft.id if len(rounds) == 1 else f"{draft.id}-{number}"
            line: dict[str, object] = {"question_id": self._unused(identifier)}
            if image is not None:
                line["image"] = image
            line["text"] = question.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            line |= {"category": category, "answer": answer, "answers": [answer]}
            if draft.answer_type is not None:
                line["answer_type"] = draft.answer_type
            self._file(name).write(json.dumps(line) + "\n")
            self.counts[name] += 1

    def _unused(self, identifier: str) -> str:
        unused = identifier
        while unused in self._ids:
            self._ids[identifier] += 1
            unused = f"{identifier}#{self._ids[identifier]}"
        self._ids[unused] = 1
        return unused

    def _file(self, name: str) -> TextIO:
        if name not in self._files:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files[name] = (self._folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n")
            self.counts[name] = 0
        return self._files[name]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

"""The questions of a benchmark as they lie on disk, with what its metrics need, and as the model is asked them."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.questions import Question, parse_named_file, read_question_lines
from llava_mole.eval.registry import Benchmark

DATA_ROOT = Path("playground/data")
PREPARED = "prepared.json"
"""Written by `prepare-benchmark` beside the questions: where the images are, and what was converted."""
DEFAULT_VARIANT = "default"
UNKNOWN_VARIANT = "unknown"


@dataclass(frozen=True)
class BenchmarkQuestions:
    """A benchmark's questions, without the prompt's suffix."""

    benchmark: Benchmark
    files: list[str]
    """`[GROUP=]FILE` each."""
    questions: list[Question]
    """Their domain is the group."""
    lines: list[dict[str, Any]]
    """Each question's whole line, in the same order."""
    image_folder: Path
    root: Path
    """The benchmark's folder."""

    def fingerprint(self) -> str:
        """Identity of the question set with its gold answers: sha256 over all lines."""
        digest = hashlib.sha256()
        for question, line in zip(self.questions, self.lines, strict=True):
            digest.update(json.dumps([question.domain, line], sort_keys=True).encode())
        return digest.hexdigest()

    def asked(self, variant: str = DEFAULT_VARIANT) -> list[Question]:
        """The questions with the suffix of a prompt variant at the end."""
        suffix = prompt_suffix(self.benchmark, variant)
        return [dataclasses.replace(question, text=question.text + suffix) for question in self.questions]


def prompt_suffixes(benchmark: Benchmark) -> dict[str, str]:
    """Suffix by variant, the default first."""
    return {DEFAULT_VARIANT: benchmark.prompt.suffix, **benchmark.prompt.variants}


def prompt_suffix(benchmark: Benchmark, variant: str) -> str:
    """Raises ConfigError for a variant the benchmark does not have."""
    suffixes = prompt_suffixes(benchmark)
    if variant not in suffixes:
        raise ConfigError(
            f"--prompt-variant {variant!r}: benchmark {benchmark.name} has the variants {', '.join(suffixes)}"
        )
    return suffixes[variant]


def load_questions(
    benchmark: Benchmark,
    *,
    data_root: Path = DATA_ROOT,
    files: list[str] | None = None,
    image_folder: Path | None = None,
) -> BenchmarkQuestions:
    """Read a benchmark's question files.

    Args:
        files: `[GROUP=]FILE` to read in place of the benchmark's own.
        image_folder: In place of the benchmark's own.

    Raises:
        DataError: no such file (the message says how to get it), a malformed line, a repeated id, a group that the
            benchmark does not have.
    """
    folder = data_root / benchmark.data.folder
    if files is None:
        files = [_below(folder, argument) for argument in benchmark.data.questions]
        for argument in files:
            path = parse_named_file(argument)[1]
            if not path.is_file():
                raise DataError(f"{path}: no such file; {_how_to_get(benchmark)}")
    found = read_question_lines(files)
    questions = [question for question, _ in found]
    for question in questions:
        if benchmark.groups and question.domain not in benchmark.groups:
            raise DataError(
                f"{question.where}: group {question.domain!r}; benchmark {benchmark.name} has the groups "
                f"{', '.join(benchmark.groups)} ('category' names it)"
            )
    if image_folder is None:
        image_folder = _prepared_images(parse_named_file(files[0])[1].parent) or folder / benchmark.data.images
    return BenchmarkQuestions(benchmark, files, questions, [line for _, line in found], image_folder, folder)


def _below(folder: Path, argument: str) -> str:
    group, separator, name = argument.rpartition("=")
    return f"{group}{separator}{folder / name}"


def _how_to_get(benchmark: Benchmark) -> str:
    if benchmark.data.converter:
        return f"`llava-mole prepare-benchmark {benchmark.name} --raw DIR` writes it from {benchmark.data.source}"
    return benchmark.data.source or "give --questions FILE"


def _prepared_images(folder: Path) -> Path | None:
    path = folder / PREPARED
    if not path.is_file():
        return None
    try:
        return Path(json.loads(path.read_text(encoding="utf-8"))["image_folder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error!r}); prepare the benchmark again, or give --image-folder"
        ) from None

"""Scores answers to a benchmark: its numbers with intervals, each question's scores, and what decided them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.common.text import format_table
from llava_mole.eval.aggregate import Units, build_units, compute_numbers
from llava_mole.eval.baseline import read_train_files
from llava_mole.eval.benchmarks.benchmark import UNKNOWN_VARIANT, BenchmarkQuestions, prompt_suffixes
from llava_mole.eval.intervals import RESAMPLES, SEED
from llava_mole.eval.metrics.table import METRICS, Fields
from llava_mole.eval.score import resolve_argument, score_answers

FORMAT = 1
Answers = Mapping[str, Mapping[str, Any]]


def check_answers(loaded: BenchmarkQuestions, answers: Answers) -> str:
    """Check that the answers are to these questions. Returns the prompt variant they were asked with.

    Raises:
        DataError: an answer to another question, a question without answer, or a prompt the benchmark does not have.
    """
    name = loaded.benchmark.name
    keys = {question.key for question in loaded.questions}
    foreign = [key for key in answers if key not in keys]
    if foreign:
        raise DataError(
            f"{len(foreign)} of {len(answers)} answers, the first to question {foreign[0]!r}, are to questions that "
            f"benchmark {name} does not have; these answers belong to another benchmark or question file"
        )
    missing = [question for question in loaded.questions if question.key not in answers]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(loaded.questions)} questions of benchmark {name} have no answer, the first is "
            f"{missing[0].question_id!r} ({missing[0].where}); answer them all, or score with --questions FILE"
        )
    return _variant(loaded, answers)


def _variant(loaded: BenchmarkQuestions, answers: Answers) -> str:
    """The prompt variant whose suffix all prompts have; `unknown` where no answer says its prompt."""
    suffixes = prompt_suffixes(loaded.benchmark)
    possible = dict(suffixes)
    known = False
    for question in loaded.questions:
        prompt = answers[question.key].get("prompt")
        if prompt is None:
            continue
        known = True
        possible = {name: suffix for name, suffix in possible.items() if prompt == question.text + suffix}
        if not possible:
            raise DataError(
                f"{question.where}: question {question.question_id!r} was asked as {prompt!r}, which is not its "
                f"text with one of the prompts {', '.join(suffixes)}; these answers belong to another file or prompt"
            )
    return next(iter(possible)) if known else UNKNOWN_VARIANT


def score_units(loaded: BenchmarkQuestions, answers: Answers) -> tuple[Units, dict[str, int]]:
    """Every question's fields, and per metric how many questions it left out of the denominator.

    Raises:
        DataError: a question that lacks what a metric needs; the message names file and line.
    """
    scored: list[tuple[str, str, Mapping[str, Any], dict[str, Fields]]] = []
    dropped: dict[str, int] = {}
    for question, line in zip(loaded.questions, loaded.lines, strict=True):
        fields: dict[str, Fields] = {}
        for name in loaded.benchmark.metrics_of(question.domain):
            try:
                given = METRICS[name].score(answers[question.key]["text"], line)
            except DataError as error:
                raise DataError(f"{question.where}: {error}") from None
            if given is None:
                dropped[name] = dropped.get(name, 0) + 1
            else:
                fields[name] = given
        scored.append((question.key, question.domain, line, fields))
    return build_units(loaded.benchmark, scored), dropped


def check_scorable(loaded: BenchmarkQuestions) -> None:
    """Score an empty answer to every question, so that a missing gold answer or package is found before the work.

    Raises:
        DataError: a question that lacks what a metric needs, or a damaged training split.
        ConfigError: a package that a metric needs is not installed.
    """
    if loaded.benchmark.primary is None:
        return
    empty = {question.key: {"text": ""} for question in loaded.questions}
    score_units(loaded, empty)
    if loaded.benchmark.data.train_files:
        _with_majority(loaded, empty)


def score_benchmark(
    loaded: BenchmarkQuestions, answers: Answers, *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """Everything that a score file holds, as plain values; see docs/evaluation.md. Raises DataError as the parts do."""
    benchmark = loaded.benchmark
    variant = check_answers(loaded, answers)
    units, dropped = score_units(loaded, answers)
    groups = {group: units.groups.count(group) for group in dict.fromkeys(units.groups)}
    result: dict[str, Any] = {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "primary": benchmark.primary,
        "numbers": compute_numbers(benchmark, units, resamples=resamples, seed=seed),
        "total": len(loaded.questions),
        "complete": benchmark.data.count in (None, len(loaded.questions)),
        "empty_answers": sum(not answers[question.key]["text"].strip() for question in loaded.questions),
        "dropped": dropped,
        "groups": groups,
        "prompt": {"variant": variant, "suffix": prompt_suffixes(benchmark).get(variant)},
        "model_id": sorted({str(answer.get("model_id")) for answer in answers.values()}),
        "interval": {"level": 0.95, "resamples": resamples, "seed": seed},
        "definition": benchmark.to_dict(),
        "question_set": loaded.fingerprint(),
        "questions": [resolve_argument(argument) for argument in loaded.files],
        "image_folder": str(loaded.image_folder.resolve()),
        "per_question": units.to_dict(),
    }
    if benchmark.data.train_files:
        result |= _with_majority(loaded, answers)
    return result


def _with_majority(loaded: BenchmarkQuestions, answers: Answers) -> dict[str, Any]:
    """Accuracies per group beside the commonest answers of the training split."""
    named = [argument.partition("=") for argument in loaded.benchmark.data.train_files]
    arguments = [f"{group}={loaded.root / name}" for group, _, name in named]
    present = all(Path(argument.partition("=")[2]).is_file() for argument in arguments)
    without_prompt = {key: {"text": answer["text"]} for key, answer in answers.items()}
    return score_answers(loaded.questions, without_prompt, read_train_files(arguments) if present else None)


def file_digest(paths: Sequence[Path]) -> str:
    """sha256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def format_number(entry: Mapping[str, Any]) -> str:
    """For example `66.10 [63.1, 69.0] 661/1000`: percent, 95% interval, and k/n where it is a ratio."""
    if entry["value"] is None:
        return "-"
    text = f"{entry['value']:.2f} [{entry['low']:.1f}, {entry['high']:.1f}]"
    if "k" not in entry:
        return text
    k = entry["k"] if isinstance(entry["k"], int) else f"{entry['k']:.1f}"
    return f"{text} {k}/{entry['n']:g}" if isinstance(entry["n"], float) else f"{text} {k}/{entry['n']}"


def format_benchmark(scores: Mapping[str, Any]) -> str:
    """The numbers as a table of text, the primary one marked, and what a reader must know."""
    rows = [("number", "value % [95% interval] k/n", "interval")]
    for name, entry in scores["numbers"].items():
        mark = " *" if name == scores["primary"] else ""
        rows.append((name + mark, format_number(entry), entry["interval"]))
    prompt = scores["prompt"]
    lines = [
        f"{scores['title']} ({scores['benchmark']}): {scores['total']} questions, prompt {prompt['variant']}",
        format_table(rows),
    ]
    if not scores["complete"]:
        lines.append(f"note: the complete set has {scores['definition']['data']['count']} questions")
    if scores["empty_answers"]:
        lines.append(f"note: {scores['empty_answers']} answers are empty")
    for name, count in scores["dropped"].items():
        lines.append(f"note: {name} leaves {count} questions out of the denominator")
    return "\n".join(lines)


def dump_scores(scores: Mapping[str, Any]) -> str:
    """As JSON, the long columns of `per_question` on one line each."""
    head = {key: value for key, value in scores.items() if key != "per_question"}
    text = json.dumps(head, indent=2)
    units = scores["per_question"]
    columns = [f'"ids": {json.dumps(units["ids"])}', f'"groups": {json.dumps(units["groups"])}']
    columns += [f'"{name}": {json.dumps(values)}' for name, values in units["fields"].items()]
    inner = ",\n      ".join(columns[2:])
    block = f'"per_question": {{\n    {columns[0]},\n    {columns[1]},\n    "fields": {{\n      {inner}\n    }}\n  }}'
    return f"{text[:-2]},\n  {block}\n}}\n"

"""Scores answers to a benchmark: its numbers with intervals, each question's scores, and what decided them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.common.text import format_table
from llava_mole.eval.answers import Answers
from llava_mole.eval.benchmarks.benchmark import UNKNOWN_VARIANT, BenchmarkQuestions
from llava_mole.eval.metrics.table import METRICS, Fields
from llava_mole.eval.questions import resolve_argument
from llava_mole.eval.scoring.aggregate import Units, build_units, compute_numbers
from llava_mole.eval.scoring.intervals import LEVEL, RESAMPLES, SEED
from llava_mole.eval.scoring.majority import score_groups
from llava_mole.eval.scoring.score_file import FORMAT


def check_answers(loaded: BenchmarkQuestions, answers: Answers) -> str:
    """Check that the answers belong to these questions. Returns the prompt variant they were asked with.

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
    """Return the prompt variant whose suffix all prompts have; `unknown` if no answer records its prompt."""
    suffixes = loaded.benchmark.prompt_suffixes()
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
    """Return every question's fields, and for each metric how many questions it left out of the denominator.

    Raises:
        DataError: a question that lacks what a metric needs; the message names file and line.
    """
    scored: list[tuple[str, str, Mapping[str, Any], dict[str, Fields]]] = []
    dropped: Counter[str] = Counter()
    for question, line in zip(loaded.questions, loaded.lines, strict=True):
        fields: dict[str, Fields] = {}
        for name in loaded.benchmark.metrics_of(question.group):
            try:
                given = METRICS[name].score(answers[question.key]["text"], line)
            except DataError as error:
                raise DataError(f"{question.where}: {error}") from None
            if given is None:
                dropped[name] += 1
            else:
                fields[name] = given
        scored.append((question.key, question.group, line, fields))
    return build_units(loaded.benchmark, scored), dict(dropped)


def check_scorable(loaded: BenchmarkQuestions) -> None:
    """Score an empty answer to every question, so that a missing gold answer or package is found before the work.

    Raises:
        DataError: a question that lacks what a metric needs, or a damaged training split.
        ConfigError: a package that a metric needs is not installed.
    """
    if loaded.benchmark.primary is not None:
        empty = {question.key: {"text": ""} for question in loaded.questions}
        score_units(loaded, empty)
        if loaded.train_files is not None:
            score_groups(loaded, empty)


def score_benchmark(
    loaded: BenchmarkQuestions, answers: Answers, *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """Return the scores as plain values; the caller adds `answers`, `answers_sha256`, `model_path` and `routing`.

    Raises:
        DataError: as `check_answers`, `score_units` and `score_groups`.
    """
    benchmark = loaded.benchmark
    variant = check_answers(loaded, answers)
    units, dropped = score_units(loaded, answers)
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
        "groups": {group: {"n": n} for group, n in Counter(q.group for q in loaded.questions).items()},
        "prompt": {"variant": variant, "suffix": benchmark.prompt_suffixes().get(variant)},
        "model_id": sorted({str(answer.get("model_id")) for answer in answers.values()}),
        "interval": {"level": LEVEL, "resamples": resamples, "seed": seed},
        "definition": benchmark.to_dict(),
        "question_set": loaded.fingerprint(),
        "questions": [resolve_argument(argument) for argument in loaded.files],
        "image_folder": str(loaded.image_folder.resolve()),
        "per_question": units.to_dict(),
    }
    return result if loaded.train_files is None else result | score_groups(loaded, answers)


def format_number(entry: Mapping[str, Any] | None, digits: int = 2) -> str:
    """Format a number, for example `66.10 [63.1, 69.0] 661/1000`: percent, 95% interval, and k/n if it is a ratio."""
    if entry is None or entry["value"] is None:
        return "-"
    text = f"{entry['value']:.{digits}f} [{entry['low']:.1f}, {entry['high']:.1f}]"
    if "k" not in entry:
        return text
    k = entry["k"] if isinstance(entry["k"], int) else f"{entry['k']:.1f}"
    return f"{text} {k}/{entry['n']:g}" if isinstance(entry["n"], float) else f"{text} {k}/{entry['n']}"


def format_scores(scores: Mapping[str, Any]) -> str:
    """Format the numbers as a table of text, the primary one marked, with the notes a reader needs."""
    rows = [["number", "value % [95% interval] k/n", "interval"]]
    for name, entry in scores["numbers"].items():
        mark = " *" if name == scores["primary"] else ""
        rows.append([name + mark, format_number(entry), entry["interval"]])
    if "majority_from" in scores:
        majority = {name: entry["majority"] for name, entry in scores["groups"].items()}
        cells = [format_number(majority[name]) if name in majority else "" for name in scores["numbers"]]
        for row, cell in zip(rows, [f"commonest answer ({scores['majority_from']})", *cells], strict=True):
            row.append(cell)
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

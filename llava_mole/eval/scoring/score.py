"""Scores answers to a benchmark: its numbers with intervals, the commonest-answer baseline, and the score file."""

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.common.files import read_json, write_text
from llava_mole.common.text import format_table, plain
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.eval.answers import Answers
from llava_mole.eval.benchmarks.benchmark import UNKNOWN_VARIANT, BenchmarkQuestions
from llava_mole.eval.metrics.exact import plain_exact
from llava_mole.eval.metrics.table import METRICS, Fields, gold
from llava_mole.eval.questions import NO_GROUP, parse_named_file, resolve_argument
from llava_mole.eval.scoring.aggregate import Units, build_units, compute_numbers, share_entry
from llava_mole.eval.scoring.intervals import LEVEL, RESAMPLES, SEED


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
        "definition": dataclasses.asdict(benchmark),
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


Pairs = Sequence[tuple[str, str]]
"""(question, answer) each."""


def commonest_answers(pairs: Pairs) -> tuple[dict[str, str], str]:
    """Return the commonest normalised answer to each question text, and the commonest of all, for an unseen text.

    Ties go to the alphabetically first answer. `pairs` has at least one.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in pairs:
        by_text[_question_text(question)][plain(answer)] += 1
    overall = Counter(plain(answer) for _, answer in pairs)
    return {text: _commonest(counts) for text, counts in by_text.items()}, _commonest(overall)


def _commonest(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _question_text(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def read_train_files(arguments: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Read every user turn with its reply from `[GROUP=]FILE`s in LLaVA's JSON format.

    Returns:
        Group -> pairs; those of files without a group, which count for every group, are under `NO_GROUP`.

    Raises:
        DataError: a malformed file.
    """
    from llava_mole.data.store import read_records

    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for argument in arguments:
        group, path = parse_named_file(argument)
        for record in read_records(path, "train"):
            turns = zip(record.turns[::2], record.turns[1::2], strict=False)
            pairs[group or NO_GROUP] += [(asked.text, replied.text) for asked, replied in turns]
    return dict(pairs)


def score_groups(loaded: BenchmarkQuestions, answers: Answers) -> dict[str, Any]:
    """Count right answers by group and category, beside those of the majority baseline.

    The baseline comes from the benchmark's training files. If there are none, or they are not on this machine, it comes
    from the test itself, which no real predictor could know: a question text that occurs once then counts as right.

    Returns:
        `majority_from` (`train` or `test`) and `groups`: name -> `share_entry` with `empty_answers`, `categories` (name
        -> `share_entry`) and `majority` (a `share_entry` with `unseen_questions`).

    Raises:
        DataError: a question without exactly one gold answer, a malformed training file, or a group without pairs.
    """
    files = loaded.train_files or []
    present = bool(files) and all(parse_named_file(argument)[1].is_file() for argument in files)
    train = read_train_files(files) if present else None
    groups: dict[str, Any] = {}
    for group in dict.fromkeys(question.group for question in loaded.questions):
        members = [(q, gold(line)) for q, line in zip(loaded.questions, loaded.lines, strict=True) if q.group == group]
        pairs = [(q.text, wanted) for q, wanted in members] if train is None else _pairs_of(train, group)
        by_text, overall = commonest_answers(pairs)
        hits = [plain_exact(answers[q.key]["text"], wanted) for q, wanted in members]
        guessed = sum(plain_exact(by_text.get(_question_text(q.text), overall), wanted) for q, wanted in members)
        categories: dict[str, list[bool]] = defaultdict(list)
        for (question, _), hit in zip(members, hits, strict=True):
            if question.category is not None:
                categories[question.category].append(hit)
        groups[group] = share_entry(sum(hits), len(members)) | {
            "empty_answers": sum(not answers[q.key]["text"].strip() for q, _ in members),
            "categories": {name: share_entry(sum(found), len(found)) for name, found in sorted(categories.items())},
            "majority": share_entry(guessed, len(members))
            | {"unseen_questions": sum(_question_text(q.text) not in by_text for q, _ in members)},
        }
    return {"majority_from": "test" if train is None else "train", "groups": groups}


def _pairs_of(train: Mapping[str, Pairs], group: str) -> Pairs:
    pairs = [*train.get(group, ()), *(train.get(NO_GROUP, ()) if group != NO_GROUP else ())]
    if not pairs:
        given = ", ".join(train) or "none"
        raise DataError(f"--train-file gives nothing for group {group!r} (groups given: {given}); add {group}=FILE")
    return pairs


FORMAT = 2
SCORE_SUFFIX = ".score.json"
"""Replaces `.jsonl` in the name of an answers file."""

_KEYS = {
    **{"benchmark": str, "numbers": dict, "definition": object, "per_question": object, "question_set": str},
    **{"prompt": dict, "total": int, "empty_answers": int, "dropped": dict, "groups": dict, "questions": list},
    **{"image_folder": str, "answers": list, "model_path": str, "routing": (str, type(None))},
}


def write_score_file(path: Path, scores: Mapping[str, Any]) -> None:
    """Write scores atomically, each long column of `per_question` on one line. Raises ConfigError if it cannot."""
    units = scores["per_question"]
    text = json.dumps({key: value for key, value in scores.items() if key != "per_question"}, indent=2)
    fields = ",\n      ".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in units["fields"].items())
    columns = f'    "ids": {json.dumps(units["ids"])},\n    "groups": {json.dumps(units["groups"])},\n'
    block = f'"per_question": {{\n{columns}    "fields": {{\n      {fields}\n    }}\n  }}'
    write_text(path, f"{text[:-2]},\n  {block}\n}}\n")


def read_score_file(path: Path) -> dict[str, Any]:
    """Read a score file.

    Raises:
        DataError: a file of another format, or one that lacks or damages a value that a report shows.
    """
    scores = read_json(path)
    found = scores.get("format") if isinstance(scores, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{path}: not a score file of format {FORMAT} (found {found!r}); score the answers again, with the "
            "`llava-mole eval` or `llava-mole score` command that wrote it"
        )
    absent = [key for key in _KEYS if key not in scores]
    if absent:
        raise DataError(f"{path}: no {', '.join(absent)} in it; score the answers again")

    def check(name: str, right: bool, value: Any) -> None:
        if not right:
            raise DataError(f"{path}: {name} is damaged ({value!r}); score the answers again")

    for key, kind in _KEYS.items():
        check(key, isinstance(scores[key], kind), scores[key])  # type: ignore[arg-type]
    for name, entry in scores["numbers"].items():
        ratio = ("k", "n") if isinstance(entry, dict) and "k" in entry else ()
        empty = isinstance(entry, dict) and entry.get("value", 0) is None
        check(f"number {name!r}", empty or _has_numbers(entry, "value", "low", "high", *ratio), entry)
    check("prompt", isinstance(scores["prompt"].get("variant"), str), scores["prompt"])
    if "majority_from" in scores:
        check("majority_from", isinstance(scores["majority_from"], str), scores["majority_from"])
        check("groups", bool(scores["groups"]), scores["groups"])
        keys = ("value", "low", "high", "k", "n")
        for name, entry in scores["groups"].items():
            right = _has_numbers(entry, *keys) and _has_numbers(entry.get("majority"), *keys)
            check(f"group {name!r}", right, entry)
    return scores


def _has_numbers(entry: Any, *keys: str) -> bool:
    """Whether `entry` has a finite number for each key. JSON cannot represent NaN and infinity."""
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), (int, float)) and abs(entry[key]) < math.inf for key in keys
    )

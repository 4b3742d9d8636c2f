"""Scores answers to a benchmark: its numbers with intervals, each question's scores, and what decided them."""

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError, command
from llava_mole.common.text import format_table, plain
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.eval.answers import read_answers, refuse_existing, write_text_atomically
from llava_mole.eval.benchmarks.benchmark import UNKNOWN_VARIANT, BenchmarkQuestions, prompt_suffixes
from llava_mole.eval.metrics.exact import plain_exact
from llava_mole.eval.metrics.table import METRICS, Fields
from llava_mole.eval.questions import NO_DOMAIN, Question, parse_named_file, read_questions
from llava_mole.eval.scoring.aggregate import Units, build_units, compute_numbers
from llava_mole.eval.scoring.intervals import RESAMPLES, SEED, wilson_interval


class MajorityBaseline:
    """Commonest (normalised) answer per question string; for an unseen string the commonest answer of all."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        """`pairs` are (question, normalised answer); ties go to the alphabetically first answer."""
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question, answer in pairs:
            by_question[question_string(question)][answer] += 1
            overall[answer] += 1
        self._answers = {question: _commonest(counts) for question, counts in by_question.items()}
        self._fallback = _commonest(overall) if overall else None

    def predict(self, question: str) -> str | None:
        """The baseline's answer; None where it was built from nothing."""
        return self._answers.get(question_string(question), self._fallback)

    def knows(self, question: str) -> bool:
        """Whether this question string occurred among the pairs."""
        return question_string(question) in self._answers


def _commonest(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def question_string(text: str) -> str:
    """A question's text as compared: without image placeholder and surrounding blanks."""
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def training_pairs(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of every user turn and its reply in a LLaVA JSON file. Raises DataError as the reader does."""
    from llava_mole.data.store import read_records

    pairs = []
    for record in read_records(path, "train"):
        for asked, replied in zip(record.turns[::2], record.turns[1::2], strict=False):
            pairs.append((asked.text, replied.text))
    return pairs


def read_train_files(arguments: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Training pairs per domain from `DOMAIN=FILE` or `FILE` (then for every domain, under the key "all").

    Raises:
        DataError: a file is missing or malformed.
    """
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for argument in arguments:
        domain, path = parse_named_file(argument)
        if not path.is_file():
            raise DataError(f"--train-file {argument}: no such file {path}")
        pairs[domain or NO_DOMAIN] += training_pairs(path)
    return dict(pairs)


def answered_pairs(questions: Iterable[Question]) -> list[tuple[str, str]]:
    """(question, answer) of the test questions themselves."""
    return [(question.text, question.answer) for question in questions if question.answer is not None]


NORMALISATION = "surrounding blanks and one trailing period removed, lower case"
SCORE_SUFFIX = ".score.json"
"""Replaces `.jsonl` in the name of an answers file."""


def accuracy(correct: int, total: int) -> dict[str, Any]:
    """`correct`, `total`, `accuracy` and the 95% interval `low`..`high`; shares in 0..1."""
    low, high = wilson_interval(correct, total)
    return {
        "correct": correct,
        "total": total,
        "accuracy": correct / total if total else 0.0,
        "low": low,
        "high": high,
    }


def score_answers(
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[str, Any]],
    train_pairs: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> dict[str, Any]:
    """Score every question's answer; an empty answer is a wrong one.

    Args:
        answers: By question id as text, see `read_answers`.
        train_pairs: (question, answer) of the training split by domain, "all" for every domain. Without it the
            baseline takes each question string's commonest answer in the test itself, which no real predictor
            could know; strings asked once then count as right.

    Returns:
        `domains` (name -> `accuracy`, with the baseline's under `majority`), `overall`, `normalisation` and
        `majority_from`.

    Raises:
        DataError: a question without `answer`, questions and answers that are not of the same set, or a domain
            without training pairs.
    """
    check_references(questions)
    _check_same_set(questions, answers)
    domains: dict[str, Any] = {}
    for domain in dict.fromkeys(question.domain for question in questions):
        members = [question for question in questions if question.domain == domain]
        pairs = answered_pairs(members) if train_pairs is None else _domain_pairs(train_pairs, domain)
        baseline = MajorityBaseline((text, plain(answer)) for text, answer in pairs)
        right = sum(_is_right(question, answers[question.key]["text"]) for question in members)
        guessed = sum(_is_right(question, baseline.predict(question.text) or "") for question in members)
        domains[domain] = accuracy(right, len(members)) | {
            "empty_answers": sum(not answers[question.key]["text"].strip() for question in members),
            "categories": _by_category(members, answers),
            "majority": accuracy(guessed, len(members))
            | {"unseen_questions": sum(not baseline.knows(question.text) for question in members)},
        }
    return {
        "normalisation": NORMALISATION,
        "majority_from": "test" if train_pairs is None else "train",
        "domains": domains,
        "overall": accuracy(sum(d["correct"] for d in domains.values()), len(questions)),
    }


def _is_right(question: Question, answer: str) -> bool:
    assert question.answer is not None
    return plain_exact(answer, question.answer)


def _by_category(members: Sequence[Question], answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    groups: dict[str, list[bool]] = {}
    for question in members:
        if question.category is not None:
            groups.setdefault(question.category, []).append(_is_right(question, answers[question.key]["text"]))
    return {name: accuracy(sum(hits), len(hits)) for name, hits in sorted(groups.items())}


def _domain_pairs(train_pairs: Mapping[str, Sequence[tuple[str, str]]], domain: str) -> list[tuple[str, str]]:
    pairs = [*train_pairs.get(domain, ())]
    if domain != NO_DOMAIN:
        pairs += train_pairs.get(NO_DOMAIN, ())
    if not pairs:
        given = ", ".join(train_pairs) or "none"
        raise DataError(f"--train-file gives nothing for domain {domain!r} (domains given: {given}); add {domain}=FILE")
    return pairs


def check_references(questions: Sequence[Question]) -> None:
    """Raise DataError that names the first question without an answer to score against."""
    for question in questions:
        if question.answer is None:
            raise DataError(f"{question.where}: no 'answer' to score against")


def _check_same_set(questions: Sequence[Question], answers: Mapping[str, Mapping[str, Any]]) -> None:
    keys = {question.key for question in questions}
    for key in answers:
        if key not in keys:
            raise DataError(f"answer to question {key!r}, which the question files do not have: another benchmark's?")
    for question in questions:
        if question.key not in answers:
            raise DataError(f"{question.where}: question {question.question_id!r} has no answer in the answers file")
        prompt = answers[question.key].get("prompt")
        if prompt is not None and prompt != question.text:
            raise DataError(
                f"{question.where}: the answer to question {question.question_id!r} was given to another text, "
                f"{prompt!r}; these answers belong to another question file"
            )


def format_accuracy(entry: Mapping[str, Any]) -> str:
    """For example `66.1 [63.1, 69.0] 661/1000`, in percent."""
    share, low, high = (100 * entry[key] for key in ("accuracy", "low", "high"))
    return f"{share:.1f} [{low:.1f}, {high:.1f}] {entry['correct']}/{entry['total']}"


def format_scores(scores: Mapping[str, Any]) -> str:
    """The scores as a table of text."""
    rows = [("domain", "accuracy % [95% interval] right/all", f"commonest answer ({scores['majority_from']})")]
    for domain, entry in scores["domains"].items():
        rows.append((domain, format_accuracy(entry), format_accuracy(entry["majority"])))
    rows.append(("overall", format_accuracy(scores["overall"]), ""))
    return format_table(rows)


def resolve_argument(argument: str) -> str:
    """`[DOMAIN=]FILE` with the file's full path, so that a report finds it from any directory."""
    domain, path = parse_named_file(argument)
    return str(path.resolve()) if domain is None else f"{domain}={path.resolve()}"


def check_outputs(outputs: Sequence[Path], inputs: Sequence[str | Path], *, overwrite: bool) -> None:
    """Raise ConfigError if a file to write exists and may not be replaced, or is one of the others or of the inputs."""
    taken = {Path(name).resolve() for name in inputs}
    for path in outputs:
        if path.resolve() in taken:
            raise ConfigError(f"{path} is a file that is read, or given twice; give another name")
        refuse_existing(path, overwrite=overwrite)
        taken.add(path.resolve())


def write_scores(path: Path, scores: Mapping[str, Any], **provenance: Any) -> None:
    """Write scores and where they come from as JSON, atomically."""
    write_text_atomically(path, json.dumps({**provenance, **scores}, indent=2) + "\n")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Score from the command line."""
    parser = argparse.ArgumentParser(prog="python -m llava_mole.eval.scoring.score", description="Accuracy per domain.")
    parser.add_argument(
        "--questions", nargs="+", required=True, metavar="[DOMAIN=]FILE", help="question files with answers"
    )
    parser.add_argument("--answers", nargs="+", required=True, metavar="FILE", help="answers, of all chunks if several")
    parser.add_argument(
        "--train-file",
        nargs="+",
        metavar="[DOMAIN=]FILE",
        help="training split (LLaVA JSON) for the majority baseline; without it the test's own answers are used",
    )
    parser.add_argument("--output", metavar="FILE", help="also write the scores as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    args = parser.parse_args(argv)
    if args.output:
        inputs = [parse_named_file(argument)[1] for argument in (*args.questions, *(args.train_file or []))]
        check_outputs([Path(args.output)], [*inputs, *args.answers], overwrite=args.overwrite)
    questions = read_questions(args.questions)
    answers = read_answers([Path(name) for name in args.answers])
    train_pairs = read_train_files(args.train_file) if args.train_file else None
    scores = score_answers(questions, answers, train_pairs)
    print(format_scores(scores))
    if args.output:
        write_scores(
            Path(args.output),
            scores,
            questions=[resolve_argument(argument) for argument in args.questions],
            answers=[str(Path(name).resolve()) for name in args.answers],
        )
    return 0


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


if __name__ == "__main__":
    raise SystemExit(main())

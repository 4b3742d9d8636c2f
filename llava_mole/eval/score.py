"""Accuracy per domain of an answers file, with its interval and the majority baseline beside it.

An answer is right if it equals the reference after `NORMALISATION`. `python -m llava_mole.eval.score --questions
FILE... --answers FILE... [--train-file DOMAIN=FILE...]` prints the table and, with `--output`, writes it as JSON.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError, command
from llava_mole.common.text import format_table
from llava_mole.eval.answers import read_answers, refuse_existing, write_text_atomically
from llava_mole.eval.baseline import MajorityBaseline, answered_pairs, read_train_files
from llava_mole.eval.metrics.exact import plain, plain_exact
from llava_mole.eval.questions import NO_DOMAIN, Question, parse_named_file, read_questions

NORMALISATION = "surrounding blanks and one trailing period removed, lower case"
SCORE_SUFFIX = ".score.json"
"""Replaces `.jsonl` in the name of an answers file."""
Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


def wilson_interval(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, both ends in 0..1; (0, 1) for no observation.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At 0 and at n right answers one end is exactly 0 or 1; rounding must not move it.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


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
    parser = argparse.ArgumentParser(prog="python -m llava_mole.eval.score", description="Accuracy per domain.")
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


if __name__ == "__main__":
    raise SystemExit(main())

"""The part of a report about groups: accuracies beside the majority baseline, expert shares, and one example each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_mole.common.errors import DataError
from llava_mole.common.files import read_json
from llava_mole.common.log import get_logger
from llava_mole.eval.answers import read_answers
from llava_mole.eval.metrics.exact import plain_exact
from llava_mole.eval.metrics.table import gold
from llava_mole.eval.questions import parse_named_file, read_question_lines
from llava_mole.eval.report.compare import Runs

logger = get_logger(__name__)

MAJORITY = "commonest answer"
Scores = Mapping[str, Any]


def add_groups(report: Mapping[str, dict[str, Any]], runs: Runs) -> None:
    """Add the part about groups to each benchmark with a majority baseline.

    Adds to `build_benchmarks`'s entry: `groups`: group -> {`majority`, `runs`: name -> number, `verdicts`: name ->
    {other: verdict}}; `majority_from`; `routing`: name -> `expert_shares`; `examples`: the last run's, by group.
    Benchmarks whose runs answered different questions are left out; their warnings say so.

    Raises:
        DataError: a file that a score file names does not fit it.
    """
    for name, entry in report.items():
        scored = {run: benchmarks[name] for run, benchmarks in runs.items() if name in benchmarks}
        first = next(iter(scored.values()))
        if all("majority_from" in s and s["question_set"] == first["question_set"] for s in scored.values()):
            last_name, last = list(scored.items())[-1]
            files = [parse_named_file(argument)[1] for argument in last["questions"]] + list(map(Path, last["answers"]))
            entry |= {
                "majority_from": first["majority_from"],
                "groups": {group: _compare_group(group, scored) for group in first["groups"]},
                "routing": {
                    run: _read_shares(Path(scores["routing"]))
                    for run, scores in scored.items()
                    if scores["routing"] and _all_there(run, "the routing", [Path(scores["routing"])])
                },
                "examples": examples(last) if _all_there(last_name, "the example questions", files) else {},
            }


def compare(entry: Scores, reference: Scores) -> str:
    """Return `above`, `within` or `below`: whether two accuracies differ by more than their 95% intervals.

    Intervals that do not overlap are a stricter condition than a test of the difference.
    """
    if entry["low"] > reference["high"]:
        return "above"
    return "below" if entry["high"] < reference["low"] else "within"


def _compare_group(group: str, scored: Mapping[str, Scores]) -> dict[str, Any]:
    keys = ("k", "n", "value", "low", "high")
    entries = {name: {key: scores["groups"][group][key] for key in keys} for name, scores in scored.items()}
    reference, *others = entries
    majority = scored[reference]["groups"][group]["majority"]
    against = {reference: entries[reference], MAJORITY: majority}
    verdicts = {name: {other: compare(entries[name], entry) for other, entry in against.items()} for name in others}
    return {"majority": majority, "runs": entries, "verdicts": verdicts}


def _all_there(name: str, what: str, files: Sequence[Path]) -> bool:
    """Whether the files that a score file names still exist. A missing one is logged: it costs a part of the report."""
    gone = [str(path) for path in files if not path.is_file()]
    if gone:
        logger.warning("%s: %s not shown, no such file: %s", name, what, ", ".join(gone))
    return not gone


def _read_shares(path: Path) -> dict[str, Any]:
    """Return `expert_shares` of a file. Raises DataError if it is not what `llava-mole eval` writes."""
    try:
        return expert_shares(read_json(path))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(
            f"{path}: these routing statistics are damaged ({error!r}); run `llava-mole eval` with --overwrite"
        ) from None


def expert_shares(routing: Mapping[str, Any]) -> dict[str, Any]:
    """Average the share of tokens per expert over the layers, and find where the groups differ most.

    Experts of different layers are unrelated, so a mean near uniform does not show that a layer treats the groups
    alike: `largest_spread` is the (layer, expert) with the largest difference between two groups.

    Returns:
        `mean`: group -> modality -> share per expert; `largest_spread`: {`layer`, `expert`, `shares`: group -> share}.
    """
    groups = routing["groups" if "groups" in routing else "domains"]  # "domains": written before score format 2
    share_GLK = np.array([modalities["all"]["share"] for modalities in groups.values()])
    # Rounded, so that the first of equal differences wins; with two experts they come in pairs.
    spread_LK = np.ptp(share_GLK, axis=0).round(9)
    layer, expert = (int(index) for index in np.unravel_index(spread_LK.argmax(), spread_LK.shape))
    shares = dict(zip(groups, share_GLK[:, layer, expert].tolist(), strict=True))
    mean = {
        group: {modality: np.stack(entry["share"]).mean(axis=0).tolist() for modality, entry in modalities.items()}
        for group, modalities in groups.items()
    }
    return {"mean": mean, "largest_spread": {"layer": layer, "expert": expert, "shares": shares}}


def examples(scores: Scores) -> dict[str, dict[str, str | bool]]:
    """Return the first question with an image of each group, with the run's answer and the reference."""
    answers = read_answers([Path(name) for name in scores["answers"]])
    found: dict[str, dict[str, str | bool]] = {}
    for question, line in read_question_lines(scores["questions"]):
        if question.group in found or not question.images:
            continue
        if question.key not in answers:
            raise DataError(
                f"{', '.join(scores['answers'])}: no answer to question {question.question_id!r} of {question.where}"
            )
        text, reference = answers[question.key]["text"], gold(line)
        found[question.group] = {
            "image": ", ".join(str(Path(scores["image_folder"]) / image) for image in question.images),
            "question": question.text,
            "answer": text,
            "reference": reference,
            "correct": plain_exact(text, reference),
        }
    return found

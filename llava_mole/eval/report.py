"""Compares scored runs: one table for a person, `report.json` for a program, `accuracy.png` for a slide.

    python -m llava_mole.eval.report --runs stage1=A.score.json lora=B.score.json mole=C.score.json --out DIR

The first run is what the others are compared with. A run is the score file that `llava-mole eval` wrote, or a
directory with exactly one.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.errors import ConfigError, DataError, command
from llava_mole.eval.answers import read_answers, write_text_atomically
from llava_mole.eval.questions import read_questions
from llava_mole.eval.score import SCORE_SUFFIX, format_accuracy, format_table, normalise

MAJORITY = "commonest answer"
REQUIRED = ("domains", "model_path", "questions", "image_folder", "answers", "routing")


def read_run(argument: str) -> tuple[str, dict[str, Any]]:
    """Name and scores of one `NAME=PATH`.

    Raises:
        ConfigError: no name, or no score file there.
        DataError: a file that `llava-mole eval` did not write.
    """
    name, separator, location = argument.partition("=")
    if not separator or not name:
        raise ConfigError(f"--runs {argument!r}: give NAME=PATH, for example mole=answers/mole{SCORE_SUFFIX}")
    path = Path(location)
    if path.is_dir():
        found = sorted(path.glob(f"*{SCORE_SUFFIX}"))
        if len(found) != 1:
            raise ConfigError(f"--runs {argument}: {len(found)} files *{SCORE_SUFFIX} in {path}; name the file")
        path = found[0]
    if not path.is_file():
        raise ConfigError(f"--runs {argument}: {path} does not exist; `llava-mole eval` writes it")
    scores = _read_json(path)
    absent = [key for key in REQUIRED if key not in scores]
    if absent:
        raise DataError(f"{path}: no {', '.join(absent)} in it; give a score file that `llava-mole eval` wrote")
    return name, scores | {"score_file": str(path)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: {type(value).__name__} found, an object is needed")
    return value


def compare(entry: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """`above`, `within` or `below`: whether two accuracies differ by more than their 95% intervals, which then do not
    overlap. That is stricter than testing the difference."""
    if entry["low"] > reference["high"]:
        return "above"
    return "below" if entry["high"] < reference["low"] else "within"


def build_report(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything the report says, as plain values.

    Returns:
        `domains`: domain -> {`majority`, `runs`: name -> accuracy, `comparisons`: name -> {other: verdict}};
        `majority_from`; `routing`: name -> `expert_shares`; `chat`: an answered question per domain; `files`: name ->
        paths.

    Raises:
        DataError: runs over different domains or questions, or files named by a score file that do not fit it.
    """
    first_name, first = next(iter(runs.items()))
    for name, run in runs.items():
        totals = {domain: entry["total"] for domain, entry in run["domains"].items()}
        expected = {domain: entry["total"] for domain, entry in first["domains"].items()}
        if totals != expected:
            raise DataError(
                f"runs {first_name} and {name} were scored on different questions ({expected} and {totals}); "
                "evaluate them on the same files"
            )
    domains = {domain: _compare_domain(domain, runs) for domain in first["domains"]}
    last_name, last = list(runs.items())[-1]
    return {
        "domains": domains,
        "majority_from": first.get("majority_from"),
        "routing": {
            name: expert_shares(_read_json(Path(run["routing"]))) for name, run in runs.items() if run["routing"]
        },
        "chat": {"run": last_name, "examples": chat_examples(last)},
        "files": {
            name: {key: run[key] for key in ("model_path", "answers", "score_file", "routing")}
            for name, run in runs.items()
        },
    }


def _compare_domain(domain: str, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    keys = ("correct", "total", "accuracy", "low", "high")
    entries = {name: {key: run["domains"][domain][key] for key in keys} for name, run in runs.items()}
    reference, *others = entries
    majority = runs[reference]["domains"][domain]["majority"]
    return {
        "majority": majority,
        "runs": entries,
        "comparisons": {
            name: {
                reference: compare(entries[name], entries[reference]),
                MAJORITY: compare(entries[name], majority),
            }
            for name in others
        },
    }


def expert_shares(routing: Mapping[str, Any]) -> dict[str, Any]:
    """Share of tokens per expert by domain and modality, mean over layers, and the layer where domains differ most.

    Experts of different layers have nothing to do with each other, so a mean near uniform does not show that a layer
    treats the domains alike: `largest_spread` is the (layer, expert) with the largest difference between two domains.
    """
    domains = routing["domains"]
    mean = {
        domain: {
            modality: [
                sum(layer[k] for layer in entry["share"]) / len(entry["share"]) for k in range(len(entry["share"][0]))
            ]
            for modality, entry in modalities.items()
        }
        for domain, modalities in domains.items()
    }
    shares = {domain: modalities["all"]["share"] for domain, modalities in domains.items()}
    any_share = next(iter(shares.values()))
    cells = [(layer, expert) for layer in range(len(any_share)) for expert in range(len(any_share[0]))]

    def values(cell: tuple[int, int]) -> dict[str, float]:
        return {domain: share[cell[0]][cell[1]] for domain, share in shares.items()}

    def spread(cell: tuple[int, int]) -> float:
        # Rounded, so that of equal differences (with two experts they come in pairs) the first is taken.
        return round(max(values(cell).values()) - min(values(cell).values()), 9)

    layer, expert = max(cells, key=spread)
    return {"mean": mean, "largest_spread": {"layer": layer, "expert": expert, "shares": values((layer, expert))}}


def chat_examples(run: Mapping[str, Any]) -> dict[str, dict[str, str | bool | None]]:
    """The first question with an image of each domain, with the run's answer and the reference."""
    questions = read_questions(run["questions"])
    answers = read_answers([Path(run["answers"])])
    examples: dict[str, dict[str, str | bool | None]] = {}
    for question in questions:
        if question.domain in examples or question.image is None:
            continue
        if question.key not in answers:
            raise DataError(f"{run['answers']}: no answer to question {question.question_id!r} of {question.where}")
        text, reference = answers[question.key]["text"], question.answer or ""
        examples[question.domain] = {
            "image": str(Path(run["image_folder"]) / question.image),
            "question": question.text,
            "answer": text,
            "reference": reference,
            "correct": normalise(text) == normalise(reference),
        }
    return examples


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    sections = [_format_accuracies(report), _format_comparisons(report)]
    sections += [_format_routing(name, shares) for name, shares in report["routing"].items()]
    return "\n\n".join([*sections, _format_chat(report), _format_files(report)])


def _format_accuracies(report: Mapping[str, Any]) -> str:
    names = list(next(iter(report["domains"].values()))["runs"])
    rows = [("domain", MAJORITY, *names)]
    for domain, entry in report["domains"].items():
        cells = [entry["majority"], *entry["runs"].values()]
        rows.append((domain, *(format_accuracy(cell) for cell in cells)))
    title = "Accuracy on the test questions in percent [95% interval] right/all"
    return f"{title}; commonest answer from the {report['majority_from']} split\n{format_table(rows)}"


PHRASES = {
    "above": "yes, by more than the intervals",
    "within": "not shown: the intervals overlap",
    "below": "no, below it",
}


def _format_comparisons(report: Mapping[str, Any]) -> str:
    rows = [("domain", "is", "above", "?")]
    for domain, entry in report["domains"].items():
        for name, verdicts in entry["comparisons"].items():
            rows += [(domain, name, other, PHRASES[verdict]) for other, verdict in verdicts.items()]
    return format_table(rows) if len(rows) > 1 else "One run: nothing to compare."


def _format_routing(name: str, shares: Mapping[str, Any]) -> str:
    mean = shares["mean"]
    count = len(next(iter(mean.values()))["all"])
    rows = [("domain", "tokens", *(f"expert {k + 1}" for k in range(count)))]
    for domain, modalities in mean.items():
        for modality, values in modalities.items():
            rows.append((domain, modality, *(f"{100 * value:.1f}%" for value in values)))
    spread = shares["largest_spread"]
    text = ", ".join(f"{domain} {100 * value:.1f}%" for domain, value in spread["shares"].items())
    table = f"Share of prompt tokens per expert of {name}, mean over layers\n{format_table(rows)}"
    if len(mean) < 2:
        return table
    cell = f"layer {spread['layer'] + 1}, expert {spread['expert'] + 1}"
    return f"{table}\nlargest difference between domains: {cell}: {text}"


def _format_chat(report: Mapping[str, Any]) -> str:
    lines = [f"One question a domain, answered by {report['chat']['run']}"]
    for domain, example in report["chat"]["examples"].items():
        verdict = "right" if example["correct"] else f"wrong, it is {example['reference']!r}"
        lines.append(f"  {domain}: {example['image']}")
        lines.append(f"    USER: {example['question']}")
        lines.append(f"    ASSISTANT: {example['answer']}   ({verdict})")
    return "\n".join(lines)


def _format_files(report: Mapping[str, Any]) -> str:
    rows = [("run", "model", "answers", "scores")]
    for name, files in report["files"].items():
        rows.append((name, files["model_path"], files["answers"], files["score_file"]))
    return "On disk\n" + format_table(rows)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison and write it to a directory."""
    parser = argparse.ArgumentParser(prog="llava-mole report", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="NAME=PATH", help="scored runs, the reference first"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="report.txt, report.json and accuracy.png go here")
    args = parser.parse_args(argv)
    runs: dict[str, dict[str, Any]] = {}
    for argument in args.runs:
        name, scores = read_run(argument)
        if name in runs:
            raise ConfigError(f"--runs {argument}: the name {name!r} is given twice")
        runs[name] = scores
    report = build_report(runs)
    text = format_report(report)
    out = Path(args.out)
    write_text_atomically(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_text_atomically(out / "report.txt", text + "\n")
    from llava_mole.eval.figure import draw_accuracies

    drawn = draw_accuracies(report, out / "accuracy.png")
    print(text)
    print(f"\nreport: {out / 'report.txt'}, {out / 'report.json'}" + (f", {out / 'accuracy.png'}" if drawn else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Compares scored runs: tables for a person, `report.json` for a program, pictures for a slide.

    llava-mole report [NAME=]RUN... --out DIR
    llava-mole report --runs stage1=A.score.json lora=B.score.json mole=C.score.json --out DIR

The first run is what the others are compared with. A run is a score file that `llava-mole eval` or `llava-mole score`
wrote, or a directory with such files (or with them in its `eval`). Scores of benchmarks are compared by the
benchmarks' own numbers, with paired tests; accuracies per domain with the majority baseline beside them.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError, command
from llava_mole.common.log import get_logger
from llava_mole.common.text import format_table
from llava_mole.eval.answers import read_answers, refuse_existing, write_text_atomically
from llava_mole.eval.metrics.exact import plain_exact
from llava_mole.eval.questions import parse_named_file, read_questions
from llava_mole.eval.report.compare import build_benchmarks, read_json_object, read_runs
from llava_mole.eval.report.formats import to_latex, to_markdown, to_text
from llava_mole.eval.scoring.score import format_accuracy

logger = get_logger(__name__)

MAJORITY = "commonest answer"
FORMS = ("report.txt", "report.json", "report.md", "report.tex", "accuracy.png", "benchmarks.png")


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
    files = [parse_named_file(argument)[1] for argument in last["questions"]] + [*map(Path, _answer_files(last))]
    shown = _all_there(last_name, "the example questions", files)
    return {
        "domains": domains,
        "majority_from": first.get("majority_from"),
        "routing": {
            name: _read_shares(Path(run["routing"]))
            for name, run in runs.items()
            if run["routing"] and _all_there(name, "the routing", [Path(run["routing"])])
        },
        "chat": {"run": last_name, "examples": chat_examples(last) if shown else {}},
        "files": {
            name: {key: run[key] for key in ("model_path", "answers", "score_file", "routing")}
            for name, run in runs.items()
        },
    }


def _all_there(name: str, what: str, files: Sequence[Path]) -> bool:
    """Whether files that a score file names still exist; a report without them is worth having, so else only warn."""
    gone = [str(path) for path in files if not path.is_file()]
    if gone:
        logger.warning("%s: %s not shown, no such file: %s", name, what, ", ".join(gone))
    return not gone


def same_questions(runs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all runs have the same domains with equally many questions."""
    return len({tuple((domain, e["total"]) for domain, e in run["domains"].items()) for run in runs.values()}) == 1


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


def _read_shares(path: Path) -> dict[str, Any]:
    """`expert_shares` of a file. Raises DataError where it is not what `llava-mole eval` writes."""
    try:
        return expert_shares(read_json_object(path))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, StopIteration) as error:
        raise DataError(
            f"{path}: these routing statistics are damaged ({error!r}); run `llava-mole eval` again"
        ) from None


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


def _answer_files(run: Mapping[str, Any]) -> list[str]:
    """One file, or one for each chunk."""
    return run["answers"] if isinstance(run["answers"], list) else [run["answers"]]


def chat_examples(run: Mapping[str, Any]) -> dict[str, dict[str, str | bool | None]]:
    """The first question with an image of each domain, with the run's answer and the reference."""
    questions = read_questions(run["questions"])
    answers = read_answers([Path(name) for name in _answer_files(run)])
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
            "correct": plain_exact(text, reference),
        }
    return examples


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    sections = [_format_accuracies(report), _format_comparisons(report)]
    sections += [_format_routing(name, shares) for name, shares in report["routing"].items()]
    chat = [_format_chat(report)] if report["chat"]["examples"] else []
    return "\n\n".join([*sections, *chat, _format_files(report)])


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
        rows.append((name, files["model_path"], " ".join(_answer_files(files)), files["score_file"]))
    return "On disk\n" + format_table(rows)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison and write it to a directory."""
    parser = argparse.ArgumentParser(prog="llava-mole report", description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="*", metavar="[NAME=]RUN", help="scored runs, the reference first")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME=PATH", help="the same, each with a name")
    parser.add_argument("--out", metavar="DIR", help="report.{txt,md,tex,json} and the pictures go here")
    parser.add_argument(
        "--published", choices=["main", "all", "none"], default="main", help="published rows beside the runs"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
    args = parser.parse_args(argv)
    if not args.run and not args.runs:
        raise ConfigError("no run to report; give score files or directories with them, for example runs/*/eval")
    out = Path(args.out) if args.out else None
    if out:
        refuse_existing(out / "report.json", overwrite=args.overwrite)
    runs = read_runs(args.runs, args.run)
    domains = {name: run.domains for name, run in runs.items() if run.domains is not None}
    report: dict[str, Any] = {}
    sections = []
    benchmarks = build_benchmarks(runs, published=args.published)
    if benchmarks:
        report["benchmarks"] = benchmarks
        sections.append(to_text(benchmarks))
    if domains and len(domains) == len(runs) and (not benchmarks or same_questions(domains)):
        report |= build_report(domains)
        sections.append(format_report(report))
    elif not benchmarks:
        raise DataError(f"{', '.join(name for name in runs if name not in domains)}: no scores to compare")
    print("\n\n".join(sections))
    if out:
        written = write_report(out, report, "\n\n".join(sections))
        print(f"\nreport: {', '.join(str(path) for path in written)}")
    return 0


def write_report(out: Path, report: Mapping[str, Any], text: str) -> list[Path]:
    """Write every form of the report that there is something for. Returns the files."""
    from llava_mole.eval.report.figure import draw_accuracies, draw_benchmarks

    texts = {"report.txt": text + "\n", "report.json": json.dumps(report, indent=2) + "\n"}
    benchmarks = report.get("benchmarks")
    if benchmarks:
        texts |= {"report.md": to_markdown(benchmarks), "report.tex": to_latex(benchmarks)}
    for name, content in texts.items():
        write_text_atomically(out / name, content)
    written = [out / name for name in texts]
    if "domains" in report and draw_accuracies(report, out / "accuracy.png"):
        written.append(out / "accuracy.png")
    if benchmarks and draw_benchmarks(benchmarks, out / "benchmarks.png"):
        written.append(out / "benchmarks.png")
    for name in FORMS:
        if out / name not in written:
            (out / name).unlink(missing_ok=True)  # of the report that this one replaces
    return written


if __name__ == "__main__":
    raise SystemExit(main())

"""The report as text, Markdown and LaTeX, all three from the same tables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_mole.common.text import format_table
from llava_mole.eval.report.compare import SIGNIFICANT
from llava_mole.eval.report.groups import MAJORITY
from llava_mole.eval.scoring.score import format_number

NOTHING = "-"
Row = list[str]


@dataclass
class Table:
    """A table before it becomes text, Markdown or LaTeX."""

    caption: str
    header: Row
    rows: list[Row]
    spans: list[tuple[str, int]] = field(default_factory=list)
    """Titles above the header, each with its number of columns."""
    rule: int = 0
    """Row above which a line is drawn, counted from 0; 0 draws none."""
    remarks: list[str] = field(default_factory=list)
    """Lines under the table."""

    def __post_init__(self) -> None:
        """Put every text on one line, whatever names and titles contain."""
        self.caption, self.header = _line(self.caption), list(map(_line, self.header))
        self.rows = [list(map(_line, row)) for row in self.rows]
        self.spans = [(_line(title), width) for title, width in self.spans]
        self.remarks = list(map(_line, self.remarks))


def _line(text: str) -> str:
    return " ".join(text.split())


def overview(benchmarks: Mapping[str, Any]) -> Table:
    """Build the paper's Table 2: a row per model, published ones first, and a column per published number.

    A benchmark without published numbers shows all its columns.
    """
    columns = [(name, column) for name, entry in benchmarks.items() for column in entry["compared"]]
    published: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for name, entry in benchmarks.items():
        for row in entry["published"]:
            cells = published.setdefault((row["source"], row["model"]), {})
            cells |= {(name, column): value for column, value in row["values"].items()}
    rows = []
    for (source, model), cells in sorted(published.items(), key=_by_table):
        rows.append([model, source, *(f"{cells[column]:g}" if column in cells else NOTHING for column in columns)])
    ours = dict.fromkeys(run for entry in benchmarks.values() for run in entry["runs"])
    rule = len(rows)
    for run in ours:
        values = [(benchmarks[name]["runs"].get(run) or {"numbers": {}})["numbers"].get(c) for name, c in columns]
        rows.append([run, "measured", *(_value(entry) for entry in values)])
    spans = [("", 2), *((entry["title"], len(entry["compared"])) for entry in benchmarks.values())]
    header = ["model", "source", *(column for _, column in columns)]
    caption = "Benchmarks, in percent; published rows are the publications' own numbers"
    return Table(caption, header, rows, spans, rule)


def _by_table(item: tuple[tuple[str, str], Any]) -> list[Any]:
    """Sort by source, its numbers by size: row 9 before row 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", item[0][0])]


def _value(entry: Mapping[str, Any] | None) -> str:
    return NOTHING if entry is None or entry["value"] is None else f"{entry['value']:.2f}"


def details(entry: Mapping[str, Any]) -> Table:
    """Build the table of one benchmark: a row per run, each number with interval and counts."""
    rows = [
        [run, scores["prompt"]["variant"], *(format_number(scores["numbers"][column]) for column in entry["columns"])]
        for run, scores in entry["runs"].items()
        if all(scores["numbers"].get(column) is not None for column in entry["columns"])
    ]
    caption = f"{entry['title']}: percent [95% interval] right/all"
    return Table(caption, ["run", "prompt", *entry["columns"]], rows)


def comparisons(entry: Mapping[str, Any]) -> Table:
    """Build the table of one benchmark's paired differences to the first run."""
    rows = []
    for result in entry["comparisons"]:
        changed = f"+{result['better']} -{result['worse']}" if "better" in result else f"{result['changed']} differ"
        rows.append(
            [
                f"{result['second']} - {result['first']}",
                result["number"],
                f"{result['difference']:+.2f} [{result['low']:+.2f}, {result['high']:+.2f}]",
                format_p(result["p_value"]),
                format_p(result["p_value_holm"]) + (" *" if result["p_value_holm"] < SIGNIFICANT else ""),
                changed,
                result["test"],
            ]
        )
    caption = f"{entry['title']}: paired differences (Holm: p adjusted for all tests of the report, * < {SIGNIFICANT})"
    header = ["runs", "number", "difference [95% interval]", "p", "p (Holm)", "discordant", "test"]
    return Table(caption, header, rows)


def format_p(p_value: float) -> str:
    """Format with three significant digits; below 0.0001 as a power of ten."""
    return f"{p_value:.3g}" if p_value >= 1e-4 else f"{p_value:.1e}"


def accuracies(entry: Mapping[str, Any]) -> Table:
    """Build the table of accuracies by group: the majority baseline and every run."""
    names = list(entry["runs"])
    rows = [
        [group, *(format_number(cell, 1) for cell in (values["majority"], *values["runs"].values()))]
        for group, values in entry["groups"].items()
    ]
    caption = "Accuracy on the test questions in percent [95% interval] right/all"
    caption += f"; {MAJORITY} from the {entry['majority_from']} split"
    remarks = [] if len(names) > 1 else ["One run: nothing to compare."]
    return Table(caption, ["domain", MAJORITY, *names], rows, remarks=remarks)


PHRASES = {
    "above": "yes, by more than the intervals",
    "within": "not shown: the intervals overlap",
    "below": "no, below it",
}


def verdicts(entry: Mapping[str, Any]) -> Table:
    """Build the table that says whether each later run is above the first run and above the majority baseline."""
    rows = [
        [group, name, other, PHRASES[verdict]]
        for group, values in entry["groups"].items()
        for name, others in values["verdicts"].items()
        for other, verdict in others.items()
    ]
    caption = "Whether a run is above another by more than the intervals, which is stricter than a test"
    return Table(caption, ["domain", "is", "above", "?"], rows)


def routing(name: str, shares: Mapping[str, Any]) -> Table:
    """Build the table of one run's shares of tokens per expert."""
    mean, spread = shares["mean"], shares["largest_spread"]
    count = len(next(iter(mean.values()))["all"])
    rows = [
        [group, modality, *(f"{100 * value:.1f}%" for value in values)]
        for group, modalities in mean.items()
        for modality, values in modalities.items()
    ]
    text = ", ".join(f"{group} {100 * value:.1f}%" for group, value in spread["shares"].items())
    cell = f"layer {spread['layer']}, expert {spread['expert']}"
    remarks = [f"largest difference between domains: {cell}: {text}"] if len(mean) > 1 else []
    caption = f"Share of prompt tokens per expert of {name}, mean over layers; experts and layers count from 0"
    return Table(caption, ["domain", "tokens", *(f"expert {k}" for k in range(count))], rows, remarks=remarks)


def tables(benchmarks: Mapping[str, Any]) -> list[Table]:
    """Build every table, the remarks of a benchmark under its last one of numbers."""
    result = [overview(benchmarks)]
    for entry in benchmarks.values():
        result += [details(entry), *([comparisons(entry)] if entry["comparisons"] else [])]
        remarks = [f"warning: {warning}" for warning in entry["warnings"]] + [f"note: {n}" for n in entry["notes"]]
        for run, scores in entry["runs"].items():
            if scores["empty_answers"]:
                remarks.append(f"note: {run} has {scores['empty_answers']} empty answers")
            remarks += [f"note: {m} leaves {n} questions of {run} out" for m, n in (scores["dropped"] or {}).items()]
        result[-1].remarks = list(map(_line, remarks))
    for entry in [entry for entry in benchmarks.values() if "groups" in entry]:
        result += [accuracies(entry), *([verdicts(entry)] if len(entry["runs"]) > 1 else [])]
        result += [routing(name, shares) for name, shares in entry["routing"].items()]
    return result


def table_text(table: Table) -> str:
    """Format one table for a terminal."""
    lines = format_table([_one_header(table), *table.rows]).split("\n")
    if 0 < table.rule < len(table.rows):
        lines.insert(2 + table.rule, lines[1])
    return "\n".join([table.caption, *lines, *table.remarks])


def to_text(benchmarks: Mapping[str, Any]) -> str:
    """Format the report for a terminal, with an example of each group and the files at the end."""
    parts = [table_text(table) for table in tables(benchmarks)]
    for entry in [entry for entry in benchmarks.values() if "groups" in entry]:
        if entry["examples"]:
            parts.append(_examples(list(entry["runs"])[-1], entry["examples"]))
        runs = entry["runs"].items()
        rows = [[name, run["model_path"], " ".join(run["answers"]), run["score_file"]] for name, run in runs]
        parts.append(f"On disk\n{format_table([['run', 'model', 'answers', 'scores'], *rows])}")
    return "\n\n".join(parts)


def _examples(run: str, examples: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"One question per domain, answered by {run}"]
    for group, example in examples.items():
        verdict = "right" if example["correct"] else f"wrong, it is {example['reference']!r}"
        lines.append(f"  {group}: {example['image']}")
        lines.append(f"    USER: {example['question']}")
        lines.append(f"    ASSISTANT: {example['answer']}   ({verdict})")
    return "\n".join(lines)


def _one_header(table: Table) -> Row:
    """Return the header with each span's title in front of its first column."""
    header, position = [*table.header], 0
    for title, width in table.spans:
        if title:
            header[position] = f"{title}: {header[position]}"
        position += width
    return header


def table_markdown(table: Table) -> str:
    """Format one table as GitHub's Markdown."""
    header = _one_header(table)
    lines = [f"**{_markdown(table.caption)}**", "", _markdown_row(header), "|" + "---|" * len(header)]
    lines += [_markdown_row(row) for row in table.rows]
    if table.remarks:
        lines += ["", *(f"* {_markdown(remark)}" for remark in table.remarks)]
    return "\n".join(lines)


def to_markdown(benchmarks: Mapping[str, Any]) -> str:
    """Format the tables as GitHub's Markdown."""
    return "\n\n".join(map(table_markdown, tables(benchmarks))) + "\n"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>~&$]|(?<=\])\()", r"\\\1", text)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_markdown(cell) for cell in cells) + " |"


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"},
        **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    }
)


def to_latex(benchmarks: Mapping[str, Any]) -> str:
    """Format the tables as LaTeX `tabular`s with booktabs rules, to be `\\input`."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables(benchmarks):
        lines = ["\\begin{table}", f"\\caption{{{table.caption.translate(_LATEX)}}}", "\\centering", "\\small"]
        lines += [f"\\begin{{tabular}}{{{'l' * 2}{'r' * (len(table.header) - 2)}}}", "\\toprule"]
        if table.spans:
            spans = [f"\\multicolumn{{{width}}}{{c}}{{{title.translate(_LATEX)}}}" for title, width in table.spans]
            lines.append(" & ".join(spans) + " \\\\")
        lines += [_latex_row(table.header), "\\midrule"]
        for number, row in enumerate(table.rows):
            if number and number == table.rule:
                lines.append("\\midrule")
            lines.append(_latex_row(row))
        lines += ["\\bottomrule", "\\end{tabular}", *(f"% {remark}" for remark in table.remarks), "\\end{table}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    # A row that begins with a bracket or a star would be read as an argument of the `\\` before it.
    return " & ".join(re.sub(r"\[|^\*", r"{\g<0>}", cell.translate(_LATEX)) for cell in cells) + " \\\\"

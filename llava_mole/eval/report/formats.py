"""The comparison of runs on benchmarks as text, Markdown and LaTeX. All three come from the same tables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_mole.common.text import format_table
from llava_mole.eval.report.compare import SIGNIFICANT
from llava_mole.eval.scoring.score import format_number

NOTHING = "-"
Row = list[str]


@dataclass
class Table:
    """A caption, the header's groups (title and number of columns), the header and the rows."""

    caption: str
    groups: list[tuple[str, int]]
    header: Row
    rows: list[Row]
    rules: list[int]
    """Rows that a line stands above."""


def overview(benchmarks: Mapping[str, Any]) -> Table:
    """The paper's Table 2: a row a model, published ones first, a column a number that has been published (of a
    benchmark without published numbers: every column)."""
    columns = [(name, column) for name, entry in benchmarks.items() for column in entry["compared"]]
    published: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for name, entry in benchmarks.items():
        for row in entry["published"]:
            cells = published.setdefault((row["source"], row["model"]), {})
            cells |= {(name, column): value for column, value in row["values"].items()}
    rows = []
    for (source, model), cells in sorted(published.items(), key=_by_table):
        rows.append([model, source, *(_published(cells.get(column)) for column in columns)])
    ours = dict.fromkeys(run for entry in benchmarks.values() for run in entry["runs"])
    rules = [len(rows)] if rows else []
    for run in ours:
        values = [(benchmarks[name]["runs"].get(run) or {"numbers": {}})["numbers"].get(c) for name, c in columns]
        rows.append([run, "measured", *(_value(entry) for entry in values)])
    groups = [("", 2), *((entry["title"], len(entry["compared"])) for entry in benchmarks.values())]
    header = ["model", "source", *(column for _, column in columns)]
    return Table(
        "Benchmarks, in percent; published rows are the publications' own numbers", groups, header, rows, rules
    )


def _by_table(item: tuple[tuple[str, str], Any]) -> list[Any]:
    """By source, numbers in it by size: row 9 before row 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", item[0][0])]


def _published(value: float | None) -> str:
    return NOTHING if value is None else f"{value:g}"


def _value(entry: Mapping[str, Any] | None) -> str:
    return NOTHING if entry is None or entry["value"] is None else f"{entry['value']:.2f}"


def details(entry: Mapping[str, Any]) -> Table:
    """One benchmark: a row a run, each number with interval and counts."""
    rows = [
        [run, scores["prompt"]["variant"], *(format_number(scores["numbers"][column]) for column in entry["columns"])]
        for run, scores in entry["runs"].items()
        if all(scores["numbers"].get(column) is not None for column in entry["columns"])
    ]
    caption = f"{entry['title']}: percent [95% interval] right/all"
    return Table(caption, [], ["run", "prompt", *entry["columns"]], rows, [])


def comparisons(entry: Mapping[str, Any]) -> Table:
    """One benchmark: paired differences to the first run."""
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
    return Table(caption, [], header, rows, [])


def format_p(p_value: float) -> str:
    """Three significant digits; below 0.0001 as a power of ten."""
    return f"{p_value:.3g}" if p_value >= 1e-4 else f"{p_value:.1e}"


def tables(benchmarks: Mapping[str, Any]) -> list[tuple[Table, list[str]]]:
    """Every table with the remarks that belong under it."""
    result: list[tuple[Table, list[str]]] = [(overview(benchmarks), [])]
    for entry in benchmarks.values():
        result.append((details(entry), []))
        remarks = [f"warning: {warning}" for warning in entry["warnings"]] + [f"note: {n}" for n in entry["notes"]]
        for run, scores in entry["runs"].items():
            if scores["empty_answers"]:
                remarks.append(f"note: {run} has {scores['empty_answers']} empty answers")
            remarks += [f"note: {m} leaves {n} questions of {run} out" for m, n in (scores["dropped"] or {}).items()]
        if entry["comparisons"]:
            result.append((comparisons(entry), remarks))
        else:
            result[-1] = (result[-1][0], remarks)
    return [(_on_one_line(table), [_line(remark) for remark in remarks]) for table, remarks in result]


def _on_one_line(table: Table) -> Table:
    """The table with every text on one line, whatever names and titles hold."""
    groups = [(_line(title), width) for title, width in table.groups]
    rows = [list(map(_line, row)) for row in table.rows]
    return Table(_line(table.caption), groups, list(map(_line, table.header)), rows, table.rules)


def _line(text: str) -> str:
    return " ".join(text.split())


def to_text(benchmarks: Mapping[str, Any]) -> str:
    """For a terminal."""
    parts = []
    for table, remarks in tables(benchmarks):
        header = table.header
        if table.groups:
            header = [f"{group}: {name}" if group else name for group, name in _spread(table)]
        rows = [*table.rows]
        text = format_table([header, *rows])
        if table.rules and table.rules[0] < len(rows):
            lines = text.split("\n")
            lines.insert(2 + table.rules[0], lines[1])
            text = "\n".join(lines)
        parts.append("\n".join([table.caption, text, *remarks]))
    return "\n\n".join(parts)


def _spread(table: Table) -> list[tuple[str, str]]:
    titles = [title for title, width in table.groups for _ in range(width)]
    first = {sum(width for _, width in table.groups[:n]) for n in range(len(table.groups))}
    return [
        (title if n in first else "", name) for n, (title, name) in enumerate(zip(titles, table.header, strict=True))
    ]


def to_markdown(benchmarks: Mapping[str, Any]) -> str:
    """GitHub's tables."""
    parts = []
    for table, remarks in tables(benchmarks):
        header = (
            [f"{group}: {name}" if group else name for group, name in _spread(table)] if table.groups else table.header
        )
        lines = [f"**{_markdown(table.caption)}**", "", _markdown_row(header), "|" + "---|" * len(header)]
        lines += [_markdown_row(row) for row in table.rows]
        if remarks:
            lines += ["", *(f"* {_markdown(remark)}" for remark in remarks)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>~&$]|(?<=\])\()", r"\\\1", text)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_markdown(cell) for cell in cells) + " |"


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(benchmarks: Mapping[str, Any]) -> str:
    """`tabular`s with booktabs rules, to be `\\input`."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table, remarks in tables(benchmarks):
        lines = ["\\begin{table}", f"\\caption{{{_latex(table.caption)}}}", "\\centering", "\\small"]
        lines += [f"\\begin{{tabular}}{{{'l' * 2}{'r' * (len(table.header) - 2)}}}", "\\toprule"]
        if table.groups:
            lines.append(" & ".join(f"\\multicolumn{{{n}}}{{c}}{{{_latex(t)}}}" for t, n in table.groups) + " \\\\")
        lines += [_latex_row(table.header), "\\midrule"]
        for number, row in enumerate(table.rows):
            if number in table.rules:
                lines.append("\\midrule")
            lines.append(_latex_row(row))
        lines += ["\\bottomrule", "\\end{tabular}", *(f"% {remark}" for remark in remarks), "\\end{table}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    # A row that begins with a bracket or a star would be read as an argument of the `\\` above it.
    return " & ".join(re.sub(r"\[|^\*", r"{\g<0>}", _latex(cell)) for cell in cells) + " \\\\"

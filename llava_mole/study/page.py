"""The report as one HTML page that needs nothing else: style and pictures are in it."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from llava_mole.eval.report.formats import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 82rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap }
th.text, td.text { text-align: left }
thead th { border-bottom: 1px solid #888 } thead tr.spans th { border: 0; text-align: center; color: #666 }
tbody tr:nth-child(even) { background: #f6f6f6 }
.remarks { color: #555; font-size: .84rem; margin: .4rem 0 0; padding-left: 1.1rem }
img { max-width: 100%; height: auto } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem }
"""


def html_page(
    title: str, facts: Sequence[str], tables: Sequence[tuple[str, Table]], pictures: Sequence[tuple[str, Path]],
    folded: Sequence[tuple[str, str]],
) -> str:  # fmt: skip
    """Build the page.

    Args:
        title: Its heading.
        facts: Lines under the heading.
        tables: Heading and table; a table without rows is left out.
        pictures: Heading and PNG file.
        folded: Heading and text, shown on a click.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(fact)}</p>" for fact in facts)]
    (first, *rest) = [(heading, html_table(table)) for heading, table in tables if table.rows] or [("", "")]
    drawn = [(heading, _picture(heading, path)) for heading, path in pictures]
    for heading, content in [first, *drawn, *rest]:
        parts += [f"<h2>{escape(heading)}</h2>" if heading else "", content]
    for heading, text in folded:
        parts.append(f"<details><summary>{escape(heading)}</summary><pre>{escape(text)}</pre></details>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def html_table(table: Table) -> str:
    """One table with its remarks."""
    text = [all(not _is_number(row[n]) for row in table.rows) for n in range(len(table.header))]
    lines = ['<div class="scroll"><table><thead>']
    if table.spans:
        spans = "".join(f'<th colspan="{width}">{escape(name)}</th>' for name, width in table.spans if width)
        lines.append(f'<tr class="spans">{spans}</tr>')
    lines += [_row(table.header, text, "th"), "</thead><tbody>"]
    lines += [_row(row, text, "td") for row in table.rows]
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in table.remarks)
    return "\n".join([*lines, "</tbody></table></div>", f'<ul class="remarks">{remarks}</ul>' if remarks else ""])


def _row(cells: Sequence[str], text: Sequence[bool], tag: str) -> str:
    inner = (
        f"<{tag}{' class=text' if left else ''}>{escape(cell)}</{tag}>" for cell, left in zip(cells, text, strict=True)
    )
    return f"<tr>{''.join(inner)}</tr>"


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:2].strip("+-[").isdigit() or cell == "-"


def _picture(heading: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(heading)}" src="data:image/png;base64,{data}">'

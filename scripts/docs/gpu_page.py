"""Writes the GPU part of docs/benchmarks.md from the file that scripts/gpu_check.sh leaves.

    python scripts/docs/gpu_page.py gpu_check.json    writes the page
    python scripts/docs/gpu_page.py                   writes that nothing has been measured

A file of a run on a CPU, or with --quick, holds no measurement of a GPU and is refused.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- GPU: scripts/docs/gpu_page.py -->", "<!-- end of GPU -->"
COMMAND = "`bash scripts/gpu_check.sh`"
ABSENT = f"Not measured. {COMMAND} measures it in at most nine minutes on one H100 or A100."
Row = dict[str, Any]
Columns = Sequence[tuple[str, Callable[[Row], str]]]


def _ms(key: str) -> Callable[[Row], str]:
    return lambda row: f"{1e3 * row[key]:.1f}" if row.get(key) is not None else ""


def _gib(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / 2**30:.1f}" if row.get(key) is not None else ""


def _percent(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.1%}" if row.get(key) is not None else ""


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: format(row[key], form) if row.get(key) is not None else ""


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(key, "")).replace("|", "\\|")


RATIO: Columns = (
    ("ratio to plain LoRA", _number("ratio_to_plain_lora", ".3f")),
    ("95% interval", lambda row: f"{row['low']:.3f} to {row['high']:.3f}"),
)
STEP: Columns = (
    ("variant", _text("variant")), ("ms", _ms("median_s")), *RATIO, ("tokens/s", _number("tokens_per_s", ",.0f")),
    ("MFU", _percent("mfu")), ("HFU", _percent("hfu")), ("peak GiB", _gib("own_peak_bytes")),
)  # fmt: skip
PACKING: Columns = (
    ("kernel", _text("kernel")), ("ms", _ms("median_s")), ("difference", _number("relative_difference", ".1e")),
    ("allowed", _number("tolerance", ".0e")),
)  # fmt: skip
TABLES: dict[str, Columns] = {
    "step": STEP,
    "step: backends": STEP,
    "step: recomputed": STEP,
    "step: NeMo": STEP,
    "decoding": (("sequences", _text("tokens")), ("variant", _text("variant")), ("ms", _ms("median_s")), *RATIO),
    "packing: sdpa": PACKING,
    "packing: flash": PACKING,
    "packing: flex": PACKING,
    "profile": (
        ("name", _text("name")), ("calls", _text("calls")), ("ms", _number("ms", ".2f")), ("share", _percent("share")),
    ),
    "bf16 and fp32 curves": (
        ("precision", _text("precision")), ("steps", _text("steps")), ("first loss", _number("first_loss", ".4f")),
        ("mean of the last quarter", _number("last_quarter", ".4f")),
        ("difference", _percent("relative_difference")),
    ),
    "resume": (
        ("steps", _text("steps")), ("tensors", _text("tensors")),
        ("largest difference", _number("largest_difference", ".1e")),
    ),
    "compile": (
        ("variant", _text("variant")), ("ms", _ms("median_s")), ("ratio to eager", _number("ratio_to_eager", ".3f")),
        ("difference of the loss", _number("loss_difference", ".1e")),
    ),
    "quantised bases": (
        ("base", _text("quantization")), ("difference of logits", _percent("relative_difference")),
        ("weights, GiB", _gib("bytes_of_weights")),
    ),
    "loader": (
        ("loader", _text("variant")), ("images/s, 2 workers", _number("median_images_per_s", ",.0f")),
        ("projected on 16 cores", _number("projected_on_16_cores", ",.0f")),
    ),
    "tests marked gpu": (("test", _text("test")), ("result", _text("result"))),
    "plan and measurement": (
        ("part", _text("part")), ("variant", _text("variant")), ("GiB planned", _gib("predicted_bytes")),
        ("measured", _gib("measured_bytes")), ("ratio", _number("memory_ratio", ".2f")),
        ("ms planned", _ms("predicted_s")), ("measured ms", _ms("measured_s")),
    ),
}  # fmt: skip
"""The columns of each part's table."""


def markdown(values: dict[str, Any]) -> str:
    """The measurements as Markdown. Raises ValueError if no GPU was measured."""
    if not values["device"].startswith("cuda") or values["quick"]:
        raise ValueError(
            f"this file is of a run on {values['device']}{' with --quick' * values['quick']}; it measures no GPU"
        )
    machine = values["machine"]
    lines = [
        f"{COMMAND}, {values['date']}, {values['seconds']:.0f} s: {machine['gpu']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, PEFT {machine['peft']}, bfloat16.",
        "",
        "| part | result | s | |",
        "|---|---|---|---|",
    ]
    for part in values["parts"]:
        reason = str(part["reason"]).replace("|", "\\|")
        lines.append(f"| {part['name']} | {part['status']} | {part['seconds']:.0f} | {reason} |")
    for part in values["parts"]:
        if part["rows"]:
            lines += ["", f"### {part['name'][0].upper()}{part['name'][1:]}", "", *_table(part)]
    return "\n".join(lines)


def _table(part: dict[str, Any]) -> list[str]:
    columns = TABLES[part["name"]]
    lines = [f"| {' | '.join(title for title, _ in columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cell(row) for _, cell in columns)} |" for row in part["rows"]]


def filled(page: str, text: str) -> str:
    """The page with `text` between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str]) -> int:
    try:
        text = markdown(json.loads(Path(arguments[0]).read_text(encoding="utf-8"))) if arguments else ABSENT
    except (OSError, ValueError, KeyError) as error:
        print(
            f"{arguments[0]}: {error if not isinstance(error, KeyError) else 'not a gpu_check.json'}", file=sys.stderr
        )
        return 2
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

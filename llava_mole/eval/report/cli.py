"""`llava-mole report`: compare scored runs in tables, JSON and a picture.

    llava-mole report [NAME=]RUN... --out DIR
    llava-mole report --runs stage1=A.score.json lora=B.score.json mole=C.score.json --out DIR

Every run is compared with every other, or with the one that `--reference` names. A run is a score file that
`llava-mole eval` or `llava-mole score` wrote, or a directory with such files (or with them in its `eval`).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, command
from llava_mole.common.files import refuse_existing, write_errors, write_json, write_text
from llava_mole.common.locks import locked
from llava_mole.eval.report.compare import build_benchmarks, read_runs
from llava_mole.eval.report.figure import draw_benchmarks
from llava_mole.eval.report.formats import to_latex, to_markdown, to_text
from llava_mole.eval.report.groups import add_groups


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison and write it to a directory."""
    parser = argparse.ArgumentParser(prog="llava-mole report", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", nargs="*", metavar="[NAME=]RUN", help="scored runs")
    add("--runs", nargs="+", default=[], metavar="NAME=PATH", help="more runs, each with a name")
    add("--reference", metavar="NAME", help="compare with this run only (default: every run with every other)")
    add("--out", metavar="DIR", help="where report.{txt,md,tex,json} and benchmarks.png go")
    add("--published", choices=["main", "all", "none"], default="main", help="published rows to show (default: main)")
    add("--overwrite", action="store_true", help="replace an existing report")
    args = parser.parse_args(argv)
    if not args.run and not args.runs:
        raise ConfigError("no run to report; give score files or directories with them, for example runs/*/eval")
    out = Path(args.out) if args.out else None
    if out:
        _check_out(out, overwrite=args.overwrite)
    runs = read_runs(args.runs, args.run)
    benchmarks = build_benchmarks(runs, published=args.published, reference=args.reference)
    add_groups(benchmarks, runs)
    print(to_text(benchmarks))
    if out:
        with write_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        with locked(out / "report.lock", f"the report {out}"):
            _check_out(out, overwrite=args.overwrite)  # the process that held the lock may have written it
            print(f"\nreport: {', '.join(str(path) for path in write_report(out, benchmarks))}")
    return 0


def _check_out(out: Path, *, overwrite: bool) -> None:
    """Raise ConfigError unless every file of a report may be written."""
    for name in ("report.txt", "report.md", "report.tex", "benchmarks.png"):
        refuse_existing(out / name, overwrite=True)
    refuse_existing(out / "report.json", overwrite=overwrite)


def write_report(out: Path, benchmarks: Mapping[str, Any]) -> list[Path]:
    """Write every form of the report. Returns the files."""
    texts = {"report.txt": to_text(benchmarks) + "\n"}
    texts |= {"report.md": to_markdown(benchmarks), "report.tex": to_latex(benchmarks)}
    for name, content in texts.items():
        write_text(out / name, content)
    write_json(out / "report.json", {"benchmarks": benchmarks})
    for old in ("benchmarks.png", "accuracy.png"):  # of the report that this one replaces
        (out / old).unlink(missing_ok=True)
    picture = out / "benchmarks.png"
    drawn = draw_benchmarks(benchmarks, picture)
    return [*(out / name for name in (*texts, "report.json")), *([picture] if drawn else [])]


if __name__ == "__main__":
    raise SystemExit(main())

"""`llava-mole study`: run a study's cells, show how far they are, and report what they found.

    llava-mole study STUDY.yaml [--base 7b] [--jobs N]      run what is not finished
    llava-mole study STUDY.yaml --submit slurm              write job scripts for a cluster instead
    llava-mole study status STUDY.yaml                      which cells are finished, run or failed
    llava-mole study report STUDY.yaml                      tables, tests and figures of what is finished

The shipped studies are in configs/studies/; docs/studies.md explains them.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from llava_mole.common.errors import ConfigError, DataError, command
from llava_mole.common.files import write_errors
from llava_mole.common.log import setup_logging
from llava_mole.common.text import count_of, format_table, shorten, whole_number

ACTIONS = ("run", "status", "report")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run, show or report a study."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    action = arguments.pop(0) if arguments and arguments[0] in ACTIONS else "run"
    args = _parser().parse_args(arguments)
    setup_logging()
    # They import torch, which takes seconds.
    from llava_mole.study.cells import plan_study
    from llava_mole.study.definition import matching, read_study, variant
    from llava_mole.study.inputs import Inputs

    study = read_study(
        Path(args.study), base=args.base, seeds=args.seeds, split=args.split, settings=settings_of(args.set)
    )
    out = Path(args.cells) if args.cells else Path("runs/studies") / study.base.name
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise ConfigError(f"{out} may not be written to; give another --cells")
    inputs = Inputs(out / "digests.json")
    plan = plan_study(study, out, inputs)
    inputs.save()
    for remark in plan.remarks:
        print(f"note: {remark}", file=sys.stderr)
    if action == "status":
        from llava_mole.study.results import progress
        from llava_mole.study.tables import status_table

        table = status_table(study, plan)
        print(format_table([table.header, *table.rows]))
        print(f"\n{study.title}: {progress(study, plan)}, in {out / 'cells'}")
        say_missing(plan.missing())
        return 0
    if action == "report":
        from llava_mole.study.report import write_report
        from llava_mole.study.results import collect

        folder = report_folder(args, out / "reports" / variant(study), plan.missing())
        given = shlex.join(["llava-mole", "study", "report", *arguments])
        text, files = write_report(collect(study, plan), folder, given)
        print(text)
        print(f"\nreport: {', '.join(map(str, files))}")
        return 0
    for pattern in args.only:
        if not matching(study, [pattern]) and pattern not in plan.cells:
            raise ConfigError(f"--only {pattern}: nothing has such a name; arms are {shorten([*study.arms], 8)}")
    named = [plan.runs[pair] for pair in matching(study, args.only)] if args.only else list(plan.runs.values())
    chosen = [*named, *(name for name in plan.cells if name in args.only)]
    evaluations = [name for name, cell in plan.cells.items() if cell.kind == "eval" and set(cell.needs) & set(chosen)]
    cells = plan.with_needs([*chosen, *evaluations])
    if args.submit:
        from llava_mole.study.submit import write_jobs

        refuse_missing(plan.missing(cells))
        folder = out / "jobs" / variant(study)
        paths = write_jobs(study, plan, _identifying(args), folder, args.submit, [*chosen, *evaluations])
        print(f"{count_of(len(paths), 'job')} in {folder}; start them with: bash {folder / 'submit.sh'}")
        return 0
    from llava_mole.study.runner import Runner, commands_of, is_done

    if args.dry_run:
        print("\n".join(commands_of([cell for cell in cells.values() if not is_done(cell)])))
        say_missing(plan.missing(cells))
        return 0
    refuse_missing(plan.missing(cells))
    return Runner(cells, jobs=args.jobs, wait=not args.no_wait, break_lock=args.break_lock).run()


def _parser() -> argparse.ArgumentParser:
    parser = base_parser("study", __doc__, folder="configs/studies/", arms="arms", cells="cells")
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="PATTERN", help="run: only arms, ARM/SEED or cells so named")
    add("--submit", choices=["slurm", "shell"], help="run: write job scripts instead of running")
    return parser


def base_parser(name: str, text: str, *, folder: str, arms: str, cells: str) -> argparse.ArgumentParser:
    """The options that the commands about studies share.

    Args:
        name: The command.
        text: Its documentation, whose first line describes it.
        folder: Where the shipped studies are.
        arms: What a study compares, and `cells` what it runs, in the words of the command.
    """
    usage = f"llava-mole {name} [run | status | report] STUDY.yaml [OPTIONS]"
    parser = argparse.ArgumentParser(
        prog=f"llava-mole {name}", usage=usage, description=text.split("\n")[0], epilog="Without an action: run."
    )
    add = parser.add_argument
    add("study", metavar="STUDY.yaml", help=f"the study's file; the shipped ones are in {folder}")
    add("--base", metavar="NAME", help="run it on another base: a file, or the name of one beside the study's own")
    add("--seeds", type=int, nargs="+", metavar="N", help="other seeds than those of study and base")
    add("--split", choices=["test", "validation"], help=f"whose questions to answer; validation chooses among {arms}")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="configuration keys to set in all runs of stage 2")
    add("--cells", metavar="DIR", help="where cells and reports go (default: runs/studies/BASE)")
    add("--out", metavar="DIR", help="report: where it goes (default: CELLS/reports/STUDY)")
    add("--jobs", type=whole_number, default=1, metavar="N", help="run: commands at a time on this machine (default 1)")
    add("--no-wait", action="store_true", help=f"run: end instead of waiting for {cells} that other processes run")
    add("--break-lock", action="store_true", help=f"run: take over {cells} of processes that ended on another machine")
    add("--dry-run", action="store_true", help="run: print the commands that are left")
    return parser


def settings_of(given: Sequence[str]) -> dict[str, object]:
    """`KEY=VALUE` arguments, the values read as YAML. Raises ConfigError for another form."""
    settings: dict[str, object] = {}
    for argument in given:
        key, separator, value = argument.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {argument!r}: write KEY=VALUE, for example train.max_steps=100")
        if key.startswith(("adapter.", "data.mixture", "data.sources", "train.seed", "train.output_dir")):
            raise ConfigError(f"--set {argument!r}: {key} is what the study varies; change it in the study's file")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[key] = value
    return settings


def _identifying(args: argparse.Namespace) -> list[str]:
    """The arguments that say which cells a study has, for the commands of jobs."""
    options = [args.study]
    for name in ("base", "split", "cells"):
        options += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    options += ["--seeds", *map(str, args.seeds)] if args.seeds else []
    return options + (["--set", *args.set] if args.set else [])


def report_folder(args: argparse.Namespace, usual: Path, missing: Sequence[str]) -> Path:
    """Where the report goes: `--out`, or its usual place.

    Raises:
        DataError: inputs are missing, so finished cells may not be recognised, and an earlier report would be replaced.
    """
    say_missing(missing)
    if args.out:
        return Path(args.out)
    if missing and usual.exists():
        raise DataError(
            f"{usual} has a report, and {count_of(len(missing), 'input')} of the study "
            f"{'is' if len(missing) == 1 else 'are'} missing now, so a new one could have less in it; put back what is "
            "missing, or give another folder with --out"
        )
    return usual


def say_missing(missing: Sequence[str]) -> None:
    if missing:
        print(f"missing: {shorten(list(missing), 20)}", file=sys.stderr)


def refuse_missing(missing: Sequence[str]) -> None:
    """Raise DataError if an input does not exist: no run could end, and the cells' digests are not known."""
    if missing:
        listed = "".join(f"\n  {name}" for name in missing[:20])
        raise DataError(f"{count_of(len(missing), 'input')} of the study is missing:{listed}" if len(missing) == 1 else
                        f"{count_of(len(missing), 'input')} of the study are missing:{listed}")  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())

"""`llava-mole continual`: learn tasks one after another by several methods, and report what is kept.

    llava-mole continual STUDY.yaml [--jobs N]      run what is not finished
    llava-mole continual status STUDY.yaml          which steps are finished, run or failed
    llava-mole continual report STUDY.yaml          accuracy matrices, transfer and forgetting, with intervals

The shipped studies are in configs/studies/continual/; docs/continual.md explains them.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_mole.common.errors import ConfigError, command
from llava_mole.common.files import write_errors
from llava_mole.common.log import setup_logging
from llava_mole.common.text import format_table
from llava_mole.study.cli import ACTIONS, base_parser, refuse_missing, report_folder, say_missing, settings_of


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run, show or report a study of continual learning."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    action = arguments.pop(0) if arguments and arguments[0] in ACTIONS else "run"
    args = _parser().parse_args(arguments)
    setup_logging()
    # They import torch, which takes seconds.
    from llava_mole.study.continual import plan_continual, read_continual
    from llava_mole.study.definition import variant
    from llava_mole.study.inputs import Inputs
    from llava_mole.study.runner import Runner, commands_of, is_done, state_of

    continual = read_continual(
        Path(args.study), base=args.base, seeds=args.seeds, split=args.split, settings=settings_of(args.set)
    )
    out = Path(args.cells) if args.cells else Path("runs/studies") / continual.base.name
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise ConfigError(f"{out} may not be written to; give another --cells")
    inputs = Inputs(out / "digests.json")
    steps = plan_continual(continual, out, inputs)
    inputs.save()
    plan = steps.plan
    if action == "status":
        rows = [["method", "seed", "step", "trained on", "run", "evaluation", ""]]
        for (method, seed), runs in steps.runs.items():
            for number, (run, trained) in enumerate(zip(runs, continual.steps(method), strict=True)):
                state, note = state_of(plan.cells[run])
                states = sorted({state_of(plan.cells[name])[0] for name in steps.evaluations[run].values()})
                rows.append([method, str(seed), str(number + 1), trained, state, ", ".join(states), note])
        print(format_table(rows))
        done = sum(is_done(cell) for cell in plan.cells.values())
        print(f"\n{continual.study.title}: {done} of {len(plan.cells)} cells finished, in {out / 'cells'}")
        say_missing(plan.missing())
        return 0
    if action == "report":
        from llava_mole.study.continual_results import write_continual_report

        folder = report_folder(args, out / "reports" / variant(continual.study), plan.missing())
        given = shlex.join(["llava-mole", "continual", "report", *arguments])
        text, files = write_continual_report(continual, steps, folder, given)
        print(text)
        print(f"\nreport: {', '.join(map(str, files))}")
        return 0
    unknown = [name for name in args.only if name not in continual.methods]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: no such method; there are {', '.join(continual.methods)}")
    chosen = [run for (method, _), runs in steps.runs.items() if not args.only or method in args.only for run in runs]
    cells = plan.with_needs([*chosen, *(cell for run in chosen for cell in steps.evaluations[run].values())])
    if args.dry_run:
        print("\n".join(commands_of([cell for cell in cells.values() if not is_done(cell)])))
        say_missing(plan.missing(cells))
        return 0
    refuse_missing(plan.missing(cells))
    return Runner(cells, jobs=args.jobs, wait=not args.no_wait, break_lock=args.break_lock).run()


def _parser() -> argparse.ArgumentParser:
    parser = base_parser("continual", __doc__, folder="configs/studies/continual/", arms="methods", cells="steps")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="run: only these methods")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

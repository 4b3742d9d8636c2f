"""Job scripts for a cluster: one for each run that is not finished, and a script that submits them.

A job is the study's own command with `--only` and `--no-wait`: it claims its cells like any other process, so jobs may
be submitted twice, lost, or run beside a study on another machine.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llava_mole.common.files import write_text
from llava_mole.study.cells import Plan
from llava_mole.study.definition import Study
from llava_mole.study.runner import is_done

Scheduler = Literal["slurm", "shell"]

_HEADER = """\
#!/usr/bin/env bash
# {what}
"""
_SLURM = """\
#SBATCH --job-name={name}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
{options}"""
_BODY = """\
cd {folder} || exit 2
{command} &
child=$!
trap 'kill -TERM "$child"' TERM USR1  # the run saves and ends with 75
code=0; wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
"""
_REQUEUE = """\
if [ "$code" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID" && exit 0; fi
"""


def write_jobs(
    study: Study, plan: Plan, arguments: Sequence[str], folder: Path, scheduler: Scheduler, only: Sequence[str]
) -> list[Path]:
    """Write the scripts of all unfinished runs among the (arm, seed) pairs `only`, and `submit.sh`.

    Args:
        arguments: Of the study's command: the file and the options that say what the cells are.
        only: Cells of stage 2 that are wanted, by name.

    Returns:
        The job scripts; `submit.sh` stands beside them.
    """
    first: dict[str, Path] = {}
    jobs: list[tuple[Path, str | None]] = []
    wanted = plan.with_needs(only)
    for cell in wanted.values():
        if cell.kind == "eval" or _finished(plan, cell.name):
            continue
        base = next((study.bases[arm] for (arm, _), name in plan.runs.items() if name == cell.name), study.base)
        path = folder / f"{cell.name}.{'sbatch' if scheduler == 'slurm' else 'sh'}"
        command = [sys.executable, "-m", "llava_mole.cli", "study", *arguments, "--only", cell.name, "--no-wait"]
        text = _HEADER.format(what=f"{study.title}: {cell.name}")
        if scheduler == "slurm":
            options = "".join(f"#SBATCH {option}\n" for option in base.slurm)
            text += _SLURM.format(name=cell.name, log=path.absolute().with_suffix(".log"), options=options)
        text += _BODY.format(folder=shlex.quote(str(Path.cwd())), command=shlex.join(command))
        text += (_REQUEUE if scheduler == "slurm" else "") + 'exit "$code"\n'
        write_text(path, text)
        if cell.kind == "pretrain":
            first[cell.name] = path
        jobs.append((path, next((need for need in cell.needs if need in first), None)))
    write_text(folder / "submit.sh", _submission(study, jobs, first, scheduler))
    return [path for path, _ in jobs]


def _finished(plan: Plan, name: str) -> bool:
    """Whether a run and its evaluations are finished."""
    own = [cell for cell in plan.cells.values() if cell.name == name or (cell.kind == "eval" and name in cell.needs)]
    return all(is_done(cell) for cell in own)


def _submission(
    study: Study, jobs: Sequence[tuple[Path, str | None]], first: dict[str, Path], scheduler: Scheduler
) -> str:
    """The script that submits the jobs; those of stage 2 start after the stage 1 that they need."""
    lines = [_HEADER.format(what=f"Submits the jobs of: {study.title}"), "set -euo pipefail\n"]
    variables = {name: f"stage1_{n}" for n, name in enumerate(first)}
    for path, need in jobs:
        file = shlex.quote(str(path.absolute()))
        if scheduler == "shell":
            lines.append(f"bash {file}\n")
            continue
        after = f'--dependency=afterok:"${variables[need]}" ' if need else ""
        own = next((variables[name] for name, script in first.items() if script == path), None)
        lines.append(f"{own}=$(sbatch --parsable {file})\n" if own else f"sbatch {after}{file}\n")
    return "".join(lines)

"""Running a study: kills, several processes on one folder, failures and signals; commands are stand-ins."""

import contextlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds.study_world import write_study

from llava_mole.common.locks import locked
from llava_mole.study import runner
from llava_mole.study.cli import main

FORK = multiprocessing.get_context("fork")
PATIENCE_S = 300.0
NUM_CELLS = 1 + 3 + 3
"""Stage 1, three arms with one seed, an evaluation each."""


@pytest.fixture
def journal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JOURNAL", str(folder / "journal"))
    monkeypatch.setenv("STEP_S", "0")
    (folder / "journal").touch()
    return folder / "journal"


def events(journal: Path) -> list[list[str]]:
    """Lines of the journal: cell, event, and what belongs to it."""
    return [line.split() for line in journal.read_text().splitlines()]


def count(journal: Path, event: str) -> Counter[str]:
    return Counter(line[0] for line in events(journal) if line[1] == event)


def run(*arguments: object) -> Any:
    """A process of its own that runs a study; it is forked, so that it need not import anything."""

    def work() -> None:
        os.setsid()
        os._exit(main([str(argument) for argument in arguments]))

    process = FORK.Process(target=work)
    process.start()
    return process


def wait_for(condition: Callable[[], object]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < PATIENCE_S, "it takes too long"
        time.sleep(0.02)


def cells(folder: Path) -> list[str]:
    return [str(folder / "study.yaml"), "--cells", str(folder / "out")]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_a_study_runs_once(folder: Path, journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(folder, seeds=[0])
    assert main([*cells(folder), "--jobs", "3"]) == 0
    assert set(count(journal, "start").values()) == set(count(journal, "end").values()) == {1}
    assert len(count(journal, "end")) == NUM_CELLS
    order = [line[0] for line in events(journal) if line[1] in ("start", "end")]
    assert order[:2] == [order[0]] * 2  # stage 1 ends before anything else starts
    assert order[0].startswith("pretrain")
    assert main(cells(folder)) == 0
    assert len(count(journal, "start")) == NUM_CELLS
    done = next((folder / "out" / "cells").glob("finetune*/done.json"))
    record = json.loads(done.read_text())
    assert record["command"][-2:] == ["llava_mole.train.train", str(done.parent / "config.yaml")]
    assert record["versions"]["torch"]
    assert not list((folder / "out").rglob(".claim*"))
    assert main(["status", *cells(folder)]) == 0
    assert f"A study: {NUM_CELLS} of {NUM_CELLS} cells finished" in capsys.readouterr().out


def test_killed_inside_and_between_cells_it_continues(
    folder: Path, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL ends the study's process at two moments; its commands end with it, and nothing finished runs again."""
    write_study(folder, seeds=[0])
    monkeypatch.setenv("STEP_S", "0.15")
    for moment in (2, 8):  # in stage 1, and in the middle of stage 2
        process = run(*cells(folder), "--jobs", "2")
        wait_for(lambda least=moment: sum(count(journal, "step").values()) >= least)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        commands = {int(line[-1]) for line in events(journal)}
        wait_for(lambda pids=commands: not any(map(alive, pids)))
    finished = {path.parent for path in (folder / "out").rglob("done.json")}
    assert finished
    started = len(events(journal))
    monkeypatch.setenv("STEP_S", "0")
    assert main([*cells(folder), "--jobs", "2"]) == 0
    assert len(count(journal, "end")) == NUM_CELLS
    later = {line[0].partition("/")[2] or line[0] for line in events(journal)[started:] if line[1] == "start"}
    assert not later & {path.name for path in finished}
    assert [line for line in events(journal) if line[1] == "start" and int(line[2]) > 0]  # from the step it had saved
    steps = Counter(tuple(line[:3]) for line in events(journal) if line[1] == "step")
    assert set(steps.values()) == {1}  # and no saved step was repeated


def test_processes_on_one_folder_never_take_the_same_cell(
    folder: Path, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(folder, seeds=[0])
    monkeypatch.setenv("STEP_S", "0.05")
    processes = [run(*cells(folder), "--jobs", "2") for _ in range(3)]
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(count(journal, "start")) == NUM_CELLS
    assert set(count(journal, "start").values()) == {1}


def claim(folder: Path, kind: str, **owner: object) -> Path:
    """A claim of a process on another machine."""
    assert main([*cells(folder), "--submit", "shell"]) == 0
    name = next(p.stem for p in sorted((folder / "out" / "jobs").rglob(f"{kind}*.sh")))
    path = folder / "out" / "cells" / name / ".claim"
    path.parent.mkdir(parents=True)
    holder = {"host": "elsewhere", "pid": 1, "process": "x", "since": "now", "command": "study", "token": "t"}
    path.write_text(json.dumps(holder | owner))
    return path


def test_a_cell_of_another_machine_is_left_to_it(
    folder: Path, journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(folder, seeds=[0])
    path = claim(folder, "finetune-lora-r2-1-0")
    assert main([*cells(folder), "--no-wait", "--jobs", "2"]) == 1
    said = capsys.readouterr().err
    assert path.parent.name not in count(journal, "start")
    assert len(count(journal, "end")) == NUM_CELLS - 2  # without its evaluation
    assert "is in use by process 1 on elsewhere since now" in said
    assert "2 cells not finished, because other processes have them" in said
    assert main(["status", *cells(folder)]) == 0
    assert "process 1 on elsewhere" in capsys.readouterr().out
    assert main([*cells(folder), "--break-lock"]) == 0
    assert len(count(journal, "end")) == NUM_CELLS


def test_a_claim_whose_owner_is_gone_is_taken_over(folder: Path, journal: Path) -> None:
    import platform

    write_study(folder, seeds=[0])
    claim(folder, "finetune-lora-r2-1-0", host=platform.node())  # process 1 is another one since
    assert main(cells(folder)) == 0
    assert len(count(journal, "end")) == NUM_CELLS


def test_it_waits_for_cells_of_others(folder: Path, journal: Path) -> None:
    """The other process ends; its cell and all that depends on it run then."""
    write_study(folder, seeds=[0])
    path = claim(folder, "pretrain")
    process = run(*cells(folder))
    time.sleep(0.5)
    assert process.is_alive()
    assert not count(journal, "start")
    path.unlink()
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert len(count(journal, "end")) == NUM_CELLS


def test_a_signal_lets_commands_save(folder: Path, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(folder, seeds=[0])
    monkeypatch.setenv("STEP_S", "0.2")
    process = run(*cells(folder))
    wait_for(lambda: count(journal, "step"))
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE_S)
    assert process.exitcode == 75
    assert not list((folder / "out").rglob("failed.json"))
    assert not list((folder / "out").rglob(".claim"))
    monkeypatch.setenv("STEP_S", "0")
    assert main(cells(folder)) == 0
    assert set(count(journal, "end").values()) == {1}


def test_a_failed_cell_is_named_and_the_rest_goes_on(
    folder: Path, journal: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(folder, seeds=[0])
    monkeypatch.setenv("FAIL", "mole-paper-r2-k2-1-1-s0")
    assert main([*cells(folder), "--jobs", "2"]) == 1
    said = capsys.readouterr().err
    assert len(count(journal, "end")) == NUM_CELLS - 2
    assert "failed: exit code 3" in said
    assert "ends with\n went wrong" in said
    assert "1 cell failed, and 1 cell cannot run without them; the same command tries them again" in said
    assert main(["status", *cells(folder)]) == 0
    assert "exit code 3, see " in capsys.readouterr().out
    monkeypatch.delenv("FAIL")
    assert main(cells(folder)) == 0
    assert set(count(journal, "end").values()) == {1}
    assert not list((folder / "out").rglob("failed.json"))


def test_a_cell_without_its_results_runs_again(folder: Path, journal: Path) -> None:
    write_study(folder, seeds=[0])
    assert main(cells(folder)) == 0
    lost = next((folder / "out").rglob("*.score.json"))
    lost.unlink()
    assert main(cells(folder)) == 0
    assert sorted(count(journal, "start").values()) == [1] * 6 + [2]


def test_only_some_arms(folder: Path, journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(folder)
    assert main([*cells(folder), "--only", "mo*/1"]) == 0
    assert len(count(journal, "end")) == 3  # stage 1, the run, its evaluation
    assert main([*cells(folder), "--only", "mix"]) == 0
    assert len(count(journal, "end")) == 3 + 4
    assert main([*cells(folder), "--only", "mix", "mole-typo/0"]) == 2
    assert "--only mole-typo/0: nothing has such a name; arms are red, mix, mole" in capsys.readouterr().err


def test_jobs_for_a_cluster(folder: Path, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    write_study(folder, seeds=[0])
    base = (folder / "base.yaml").read_text()
    (folder / "base.yaml").write_text(base + "slurm: [--gpus-per-node=8, --partition=big]\n")
    assert main([*cells(folder), "--submit", "slurm"]) == 0
    jobs = folder / "out" / "jobs" / "study"
    scripts = sorted(jobs.glob("*.sbatch"))
    assert len(scripts) == 1 + 3
    for script in [*scripts, jobs / "submit.sh"]:
        subprocess.run(["bash", "-n", script], check=True)
    text = scripts[0].read_text()
    assert "#SBATCH --gpus-per-node=8\n#SBATCH --partition=big\n" in text
    assert "--no-wait" in text
    assert "scontrol requeue" in text
    fake = folder / "bin"
    fake.mkdir()
    (fake / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {folder}/submitted\necho 17\n')
    (fake / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["bash", jobs / "submit.sh"], check=True)
    first, *others = (folder / "submitted").read_text().splitlines()
    assert first.startswith("--parsable ")
    assert "pretrain" in first
    assert len(others) == 3
    assert all(line.startswith("--dependency=afterok:17 ") for line in others)


def test_a_job_runs_its_cells(folder: Path, journal: Path) -> None:
    import subprocess

    write_study(folder, arms={"red": {"mixture": [1, 0]}}, seeds=[0])
    assert main([*cells(folder), "--submit", "shell"]) == 0
    jobs = folder / "out" / "jobs" / "study"
    done = subprocess.run(["bash", jobs / "submit.sh"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(count(journal, "end").values()) == [1, 1, 1]
    assert main([*cells(folder), "--submit", "shell"]) == 0
    assert (jobs / "submit.sh").read_text().count("bash /") == 0  # nothing is left


def test_every_job_has_its_own_gpus(folder: Path, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, two for each command: two run at a time, and neither sees the other's."""
    write_study(folder, seeds=[0])
    base = (folder / "base.yaml").read_text()
    (folder / "base.yaml").write_text(base + "gpus: 2\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7,8")
    monkeypatch.setenv("STEP_S", "0.3")
    assert main([*cells(folder), "--jobs", "3"]) == 0
    used = [line[2] for line in events(journal) if line[1] == "gpus"]
    assert set(used) == {"5,6", "7,8"}
    running: set[str] = set()
    names = {line[0]: line[2] for line in events(journal) if line[1] == "gpus"}
    for line in events(journal):
        if line[0] in names and line[1] == "gpus":
            assert names[line[0]] not in running
            running.add(names[line[0]])
        elif line[0] in names and line[1] == "end":
            running.remove(names[line[0]])
    (folder / "base.yaml").write_text(base + "gpus: 5\n")
    assert main([*cells(folder), "--only", "mix", "--cells", str(folder / "again")]) == 2


def test_two_studies_on_one_machine_share_its_gpus(
    folder: Path, journal: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four GPUs, two for each command, and another study has one of them: one command runs at a time."""
    write_study(folder, seeds=[0])
    base = (folder / "base.yaml").read_text()
    (folder / "base.yaml").write_text(base + "gpus: 2\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7,8")
    monkeypatch.setenv("STEP_S", "0.05")
    runner.GPU_CLAIMS.mkdir(parents=True)
    with locked(runner.GPU_CLAIMS / "gpu--6", "GPU 6"):
        assert main([*cells(folder), "--jobs", "3"]) == 0
        assert {line[2] for line in events(journal) if line[1] == "gpus"} == {"5,7"}
        with locked(runner.GPU_CLAIMS / "gpu--7", "GPU 7"), locked(runner.GPU_CLAIMS / "gpu--8", "GPU 8"):
            assert main([*cells(folder), "--cells", str(folder / "again"), "--no-wait"]) == 1
    assert "it needs 2 GPUs, and other studies on this machine use the others" in capsys.readouterr().err
    assert not list(runner.GPU_CLAIMS.iterdir())
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # whose GPUs are its own, whatever their numbers
    with locked(runner.GPU_CLAIMS / "gpu--5", "GPU 5"), locked(runner.GPU_CLAIMS / "gpu--6", "GPU 6"):
        assert main([*cells(folder), "--cells", str(folder / "job")]) == 0


def test_dry_run_prints_the_commands(folder: Path, journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(folder, seeds=[0])
    assert main([*cells(folder), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("OMP_NUM_THREADS=1 python ") for line in lines)
    assert not count(journal, "start")


def test_missing_inputs_are_refused_before_anything_runs(
    folder: Path, journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(folder, seeds=[0])
    base = (folder / "base.yaml").read_text()
    (folder / "base.yaml").write_text(base.replace("data_root: ", "data_root: /nowhere"))
    assert main(cells(folder)) == 2
    assert "1 input of the study is missing" in capsys.readouterr().err
    assert not count(journal, "start")
    with contextlib.suppress(FileNotFoundError):
        assert not list((folder / "out" / "cells").iterdir())


def test_the_commands_of_the_page_run(folder: Path, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of docs/studies.md, on a small study in place of the shipped one."""
    text = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", text, re.S)
    assert block
    studies = folder / "configs" / "studies"
    (studies / "bases").mkdir(parents=True)
    base = (folder / "base.yaml").read_text()
    for name in ("stage1", "stage2", "colors_test", "colors_val"):
        shutil.copy(folder / f"{name}.yaml", studies / "bases")
    for name in ("tiny", "7b"):
        (studies / "bases" / f"{name}.yaml").write_text(base.replace("name: small", f"name: {name}"))
    write_study(studies, "table2", base="bases/tiny.yaml", arms={"mix-111": {}, "mole-111": {"method": "mole"}})
    monkeypatch.chdir(folder)
    monkeypatch.setattr("llava_mole.study.results.collect", lambda study, plan: None)  # the stand-ins score nothing
    monkeypatch.setattr("llava_mole.study.report.write_report", lambda results, out, command: (command, []))
    commands = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    assert len(commands) >= 6
    for words in commands:
        assert words[:2] == ["llava-mole", "study"]
        assert main(words[2:]) == 0
    assert set(count(journal, "end").values()) == {1}
    assert (folder / "runs/studies/7b/jobs/table2/submit.sh").is_file()

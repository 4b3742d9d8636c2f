"""Ranks share the questions of one run, and answer together what one process answers, also after a kill."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from worlds.eval_models import make_questions
from worlds.processes import fork_python, launch_environment

from llava_mole import cli
from llava_mole.eval.model_vqa import main
from llava_mole.eval.questions import Question, read_questions
from llava_mole.eval.ranks import share_of_rank

WORKER = Path(__file__).parent / "sharded_worker.py"


def command(run_dir: Path, asked: Path, answers: Path, *more: str) -> list[str]:
    given = ["--model-path", str(run_dir), "--question-file", str(asked), "--image-folder", str(asked.parent)]
    return [*given, "--answers-file", str(answers), "--max_new_tokens", "6", "--device", "cpu", *more]


def test_shares_are_equal_complete_and_keep_images_together() -> None:
    images = ["a", "b", None, "a", "c", "b", "a", None, "c", "d", "a"]
    asked = [Question(n, "?", (image,) if image else (), "all", None, f"q:{n}") for n, image in enumerate(images)]
    for ranks in (1, 2, 3, 16):
        shares = [share_of_rank(asked, rank, ranks) for rank in range(ranks)]
        assert sorted(q.key for share in shares for q in share) == sorted(q.key for q in asked)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        in_order = [q.images for share in shares for q in share]
        changes = sum(one != other for one, other in itertools.pairwise(in_order))
        assert changes == len(set(images)) - 1  # the questions about one image follow each other


@pytest.mark.slow
def test_killed_sharded_run_goes_on_with_another_number_of_ranks(mole_run: Path, tmp_path: Path) -> None:
    asked = make_questions(tmp_path, count=40)
    single, sharded = tmp_path / "single.jsonl", tmp_path / "sharded.jsonl"
    stats = [tmp_path / f"{name}.routing.json" for name in ("single", "sharded")]
    assert main(command(mole_run, asked, single, "--batch-size", "1", "--routing-stats", str(stats[0]))) == 0

    options = ("--batch-size", "1", "--routing-stats", str(stats[1]))
    killed = fork_python(WORKER, *command(mole_run, asked, sharded, *options), ranks=2, DIE_AFTER="2")
    assert killed.returncode != 0
    assert (tmp_path / "sharded.jsonl.lock").exists()  # of a process that has ended: the next one takes it over
    left = sorted(tmp_path.glob("sharded.jsonl.partial*"))
    assert [p.name for p in left] == ["sharded.jsonl.partial", "sharded.jsonl.partial.1"]
    answered = [json.loads(line)["question_id"] for p in left for line in p.read_text().splitlines()[1:]]
    assert len(answered) == len(set(answered))
    assert 0 < len(answered) < 40

    done = fork_python(WORKER, *command(mole_run, asked, sharded, *options), ranks=3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 answers in") == 1
    assert f"continuing after {len(answered)} answers" in done.stderr
    assert sharded.read_bytes() == single.read_bytes()
    assert not [*tmp_path.glob("*.partial*"), *tmp_path.glob("*.lock")]
    one, three = (json.loads(p.read_text())["groups"] for p in stats)
    assert set(one) == set(three) == {"one", "two"}
    for group in one:
        assert one[group]["all"]["tokens"] == three[group]["all"]["tokens"]
        for name in ("share", "sample_mean", "sample_std"):
            for ours, theirs in zip(one[group]["all"][name], three[group]["all"][name], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-12)
    assert len(read_questions([str(asked)])) == one["one"]["all"]["samples"] + one["two"]["all"]["samples"] == 40


@pytest.mark.slow
def test_ranks_share_question_files_of_ones_own(mole_run: Path, asked: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        given = ["eval", str(mole_run), "--questions", str(asked), "--image-folder", str(asked.parent)]
        return [*given, "--answers-file", str(tmp_path / name), "--max_new_tokens", "6", "--device", "cpu"]

    assert cli.main(arguments("single.jsonl")) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = [*launcher, "-m", "llava_mole.cli", *arguments("sharded.jsonl")]
    done = subprocess.run(given, env=launch_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1
    assert (tmp_path / "sharded.jsonl").read_bytes() == (tmp_path / "single.jsonl").read_bytes()
    one, two = (json.loads((tmp_path / f"{name}.score.json").read_text()) for name in ("single", "sharded"))
    assert one["groups"] == two["groups"]
    assert one["numbers"] == two["numbers"]
    assert not list(tmp_path.glob("*.partial*"))

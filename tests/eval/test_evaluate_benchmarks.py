"""`llava-mole eval --benchmarks` with a random miniature model: answers, scores, report, and what it refuses."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from llava_mole import cli
from llava_mole.errors import ConfigError
from llava_mole.eval import evaluate_benchmarks
from llava_mole.eval.evaluate_benchmarks import output_folder, split_names
from llava_mole.inference import Predictor

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def loaded_once(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes the session's model in place of loading it again."""
    monkeypatch.setattr(evaluate_benchmarks, "load_predictor", lambda path, args: predictor)


@pytest.fixture
def benchmark(tmp_path: Path, asked: Path) -> Path:
    """A benchmark over the shared question file."""
    value = {
        "name": "colors",
        "title": "Colors",
        "data": {"folder": asked.parent.name, "questions": [asked.name], "count": 11, "source": "made by the tests"},
        "prompt": {"suffix": " Say it.", "max_new_tokens": 6, "variants": {"bare": ""}},
        "groups": ["one", "two"],
        "metrics": {"*": ["plain_exact"]},
        "numbers": {"{group}": {"value": "plain_exact.hit"}, "all": {"value": "plain_exact.hit"}},
        "primary": "all",
        "columns": ["all", "one", "two"],
    }
    path = tmp_path / "colors.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def command(run: Path, asked: Path, benchmark: Path, out: Path, *more: str) -> list[str]:
    options = ["--benchmarks", str(benchmark), "--data-root", str(asked.parent.parent), "--out", str(out)]
    return ["eval", str(run), *options, "--device", "cpu", *more]


def test_answers_scores_and_report(
    mole_run: Path, asked: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(command(mole_run, asked, benchmark, out)) == 0
    printed = capsys.readouterr().out
    assert "Colors (colors): 11 questions, prompt default" in printed
    assert "0.00 [0.0, 25.9] 0/11" in printed
    names = ["colors.jsonl", "colors.routing.json", "colors.run.json", "colors.score.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    answers = [json.loads(line) for line in (out / "colors.jsonl").read_text().splitlines()]
    assert len(answers) == 11
    assert all(answer["prompt"].endswith(" Say it.") for answer in answers)
    scores = json.loads((out / "colors.score.json").read_text())
    assert scores["prompt"] == {"variant": "default", "suffix": " Say it."}
    assert scores["run"]["decoding"]["max_new_tokens"] == 6
    assert (scores["template"], scores["complete"]) == ("vicuna_v1", True)
    assert Path(scores["routing"]).is_file()

    # Again: nothing is asked a second time, nothing is overwritten.
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert cli.main(command(mole_run, asked, benchmark, out)) == 0
    assert "colors: done already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}

    # Answers without scores: scored without asking.
    (out / "colors.score.json").unlink()
    assert cli.main(command(mole_run, asked, benchmark, out)) == 0
    assert (out / "colors.jsonl").stat().st_mtime_ns == before[out / "colors.jsonl"]
    assert json.loads((out / "colors.score.json").read_text())["numbers"] == scores["numbers"]

    # Another prompt is another run.
    assert cli.main(command(mole_run, asked, benchmark, out, "--prompt-variant", "bare")) == 2
    assert "comes from another model, prompt, question file or decoding" in capsys.readouterr().err
    assert cli.main(command(mole_run, asked, benchmark, out, "--prompt-variant", "bare", "--overwrite")) == 0
    assert json.loads((out / "colors.score.json").read_text())["prompt"]["variant"] == "bare"


def test_a_server_benchmark_gets_its_submission(
    mole_run: Path, asked: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = yaml.safe_load(benchmark.read_text()) | {"primary": None, "columns": [], "numbers": {}, "metrics": {}}
    benchmark.write_text(yaml.safe_dump(value | {"submission": "mm_vet"}, sort_keys=False))
    for _ in range(2):
        assert cli.main(command(mole_run, asked, benchmark, tmp_path / "out")) == 0
    assert "colors: done already" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "colors.submission.json").read_text())) == 11
    assert not (tmp_path / "out" / "colors.score.json").exists()


def test_everything_is_checked_before_the_model_is_loaded(
    asked: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(path: str, args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(evaluate_benchmarks, "load_predictor", never)
    out = tmp_path / "out"

    def refused(*more: str) -> str:
        assert cli.main(command(tmp_path / "run", asked, benchmark, out, *more)) == 2
        assert not out.exists() or [path.name for path in out.iterdir()] == ["colors.jsonl"]
        return capsys.readouterr().err

    assert "--prompt-variant 'long': benchmark colors has the variants default, bare" in refused(
        "--prompt-variant", "long"
    )
    assert "is no directory; " in refused("--image-folder", str(tmp_path / "none"))
    assert "--benchmarks and --questions are two forms" in refused("--questions", str(asked))
    assert "--benchmarks and --train-file are two forms" in refused("--train-file", "x")
    out.mkdir()
    (out / "colors.jsonl").write_text("")
    assert "colors.jsonl exists; give --overwrite" in refused()


def test_the_two_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "run"]) == 2
    assert "give --benchmarks NAME,..., or --questions FILE... with --answers-file FILE" in capsys.readouterr().err
    assert cli.main(["eval", "run", "--questions", "q", "--answers-file", "a", "--out", "o"]) == 2
    assert "--out needs --benchmarks" in capsys.readouterr().err


def test_names_and_folders() -> None:
    assert split_names(["a,b", "c"]) == ["a", "b", "c"]
    for wrong in ([","], ["a", "a"]):
        with pytest.raises(ConfigError, match="give each once, of chartqa, "):
            split_names(wrong)
    assert output_folder("runs/x") == Path("runs/x/eval")
    assert output_folder("runs/x/checkpoint-5") == Path("runs/x/eval/checkpoint-5")


def test_script_passes_everything_on(tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": "x"}
    script = ["bash", str(ROOT / "scripts" / "eval" / "run.sh")]
    done = subprocess.run(
        [*script, "pope,mme", "runs/x", "--batch-size", "4"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "-m llava_mole.cli eval runs/x --benchmarks pope,mme --batch-size 4\n"
    wrong = subprocess.run([*script, "pope"], env=environment, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr[:6]) == (2, "usage:")

"""`llava-mole eval --benchmarks` with a random miniature model: answers, scores, report, and what it refuses."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from worlds.eval_models import make_questions

from llava_mole import cli
from llava_mole.common.errors import EXIT_INTERRUPTED, ConfigError
from llava_mole.eval import evaluate, questions
from llava_mole.eval.answers import AnswerFile
from llava_mole.eval.evaluate import output_folder, prepared_images, split_names
from llava_mole.inference.predictor import Predictor

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def loaded_once(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes the session's model in place of loading it again."""
    monkeypatch.setattr(evaluate, "load_predictor", lambda path, args: predictor)


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
    assert "comes from another model, prompt, question file, image folder or decoding" in capsys.readouterr().err
    assert cli.main(command(mole_run, asked, benchmark, out, "--prompt-variant", "bare", "--overwrite")) == 0
    assert json.loads((out / "colors.score.json").read_text())["prompt"]["variant"] == "bare"


def test_a_server_benchmark_gets_its_submission(
    mole_run: Path, asked: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = yaml.safe_load(benchmark.read_text()) | {"primary": None, "columns": [], "numbers": {}, "metrics": {}}
    benchmark.write_text(yaml.safe_dump(value | {"submission": "mm_vet"}, sort_keys=False))
    assert cli.main(command(mole_run, asked, benchmark, tmp_path / "out")) == 0
    submission = tmp_path / "out" / "colors.submission.json"
    content = submission.read_bytes()
    assert len(json.loads(content)) == 11
    submission.write_text("of older answers")
    capsys.readouterr()
    assert cli.main(command(mole_run, asked, benchmark, tmp_path / "out")) == 0
    assert "11 questions" not in capsys.readouterr().out  # nothing is asked again
    assert submission.read_bytes() == content
    assert not (tmp_path / "out" / "colors.score.json").exists()


def test_a_killed_overwrite_leaves_nothing_old(
    mole_run: Path,
    asked: Path,
    benchmark: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert cli.main(command(mole_run, asked, benchmark, out)) == 0
    bare = command(mole_run, asked, benchmark, out, "--prompt-variant", "bare", "--batch-size", "1")
    generate, calls = Predictor.generate, []

    def interrupted(self: Predictor, *args, **options) -> list[str]:
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *args, **options)

    monkeypatch.setattr(questions, "WINDOW", 4)
    monkeypatch.setattr(Predictor, "generate", interrupted)
    assert cli.main([*bare, "--overwrite"]) == EXIT_INTERRUPTED
    assert sorted(path.name for path in out.iterdir()) == ["colors.jsonl.partial", "colors.run.json"]
    capsys.readouterr()
    assert cli.main(bare) == 0
    assert sum(calls[2:]) == 11 - calls[0]  # continued, not started over
    assert "11 questions, prompt bare" in capsys.readouterr().out
    answers = [json.loads(line) for line in (out / "colors.jsonl").read_text().splitlines()]
    assert not any(answer["prompt"].endswith(" Say it.") for answer in answers)
    assert json.loads((out / "colors.score.json").read_text())["prompt"]["variant"] == "bare"


def test_statistics_written_before_a_kill_do_not_block_the_rest(
    mole_run: Path, asked: Path, benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: AnswerFile) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "finish", killed)
        assert cli.main(command(mole_run, asked, benchmark, out)) == EXIT_INTERRUPTED
    assert (out / "colors.routing.json").exists()
    assert cli.main(command(mole_run, asked, benchmark, out)) == 0
    assert (out / "colors.score.json").exists()


def test_a_second_runner_touches_nothing_of_the_first(
    mole_run: Path, asked: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their answers would stand under the other's description."""
    out = tmp_path / "out"
    first = AnswerFile(out / "colors.jsonl", [], {})
    for name in ("colors.run.json", "colors.routing.json"):
        (out / name).write_text(f"{name} of the first")
    for overwrite in ([], ["--overwrite"]):
        assert cli.main(command(mole_run, asked, benchmark, out, "--prompt-variant", "bare", *overwrite)) == 2
        assert "colors.jsonl is in use by process" in capsys.readouterr().err
    first.close()
    assert cli.main(command(mole_run, asked, benchmark, out)) == 2  # what is left is of other settings
    assert "colors.jsonl.partial comes from a run with" in capsys.readouterr().err
    for name in ("colors.run.json", "colors.routing.json"):
        assert (out / name).read_text() == f"{name} of the first"


def test_finished_answers_are_scored_again_after_a_change(
    mole_run: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = make_questions(tmp_path / "asked"), tmp_path / "out"
    value = yaml.safe_load(benchmark.read_text())
    value["data"] |= {"folder": "asked"}
    benchmark.write_text(yaml.safe_dump(value, sort_keys=False))
    run = command(mole_run, asked, benchmark, out)
    answers, scores = out / "colors.jsonl", out / "colors.score.json"

    def scored() -> dict:
        assert cli.main(run) == 0
        assert "done already" not in capsys.readouterr().out
        return json.loads(scores.read_text())

    assert scored()["numbers"]["all"]["k"] == 0
    first = json.loads(answers.read_text().splitlines()[0])
    # Another gold answer: that of the first question is now what the model said.
    asked.write_text(asked.read_text().replace('"answer": "red"', f'"answer": {json.dumps(first["text"])}', 1))
    assert scored()["numbers"]["all"]["k"] == 1
    # Another definition.
    benchmark.write_text(yaml.safe_dump(value | {"title": "Colours"}, sort_keys=False))
    assert scored()["title"] == "Colours"
    # Other answers.
    changed = first | {"text": "something else"}
    answers.write_text(answers.read_text().replace(json.dumps(first), json.dumps(changed)))
    assert scored()["numbers"]["all"]["k"] == 0
    # A score file of another version.
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"format": 1}))
    assert scored()["format"] == 2
    # Other images: other answers are to be expected.
    other = make_questions(tmp_path / "other").parent
    assert cli.main([*run, "--image-folder", str(other)]) == 2
    assert "image folder" in capsys.readouterr().err


def test_everything_is_checked_before_the_model_is_loaded(
    asked: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(path: str, args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(evaluate, "load_predictor", never)
    out = tmp_path / "out"

    def refused(*more: str) -> str:
        assert cli.main(command(tmp_path / "run", asked, benchmark, out, *more)) == 2
        assert not out.exists() or [path.name for path in out.iterdir()] == ["colors.jsonl"]
        return capsys.readouterr().err

    assert "--prompt-variant 'long': benchmark colors has the variants default, bare" in refused(
        "--prompt-variant", "long"
    )
    assert "is not a directory; " in refused("--image-folder", str(tmp_path / "none"))
    assert "--benchmarks and --questions are two forms" in refused("--questions", str(asked))
    assert "--benchmarks and --train-file are two forms" in refused("--train-file", "x")
    out.mkdir()
    (out / "colors.jsonl").write_text("")
    assert "colors.jsonl exists; give --overwrite" in refused()


def test_missing_golds_are_found_before_the_model_is_loaded(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_predictor", lambda path, args: pytest.fail("the model was loaded"))
    asked = make_questions(tmp_path / "asked")
    asked.write_text(asked.read_text().replace(', "answer": "red"', "", 1))
    benchmark.write_text(
        benchmark.read_text().replace(yaml.safe_load(benchmark.read_text())["data"]["folder"], "asked")
    )
    assert cli.main(command(tmp_path / "run", asked, benchmark, tmp_path / "out")) == 2
    assert "q.jsonl:1: no 'answer' (a text) or 'answers'" in capsys.readouterr().err


def test_the_two_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "run"]) == 2
    assert "give --benchmarks NAME,..., or --questions FILE..." in capsys.readouterr().err
    assert cli.main(["eval", "run", "--questions", "q", "--answers-file", "a", "--out", "o"]) == 2
    assert "--out needs --benchmarks" in capsys.readouterr().err


def test_own_questions_need_no_other_option(mole_run: Path, asked: Path, tmp_path: Path) -> None:
    """Questions that `prepare` wrote lie beside their images; the answers go where a benchmark's would."""
    shutil.copytree(asked.parent, tmp_path / "mine" / "images", ignore=shutil.ignore_patterns("*.jsonl"))
    (tmp_path / "mine" / "questions").mkdir()
    (tmp_path / "mine" / "report.json").write_text("{}")
    questions = Path(shutil.copy(asked, tmp_path / "mine" / "questions" / "test.jsonl"))
    assert prepared_images([f"group={questions}"]) == tmp_path / "mine" / "images"
    assert prepared_images([str(asked)]) == Path()
    run = Path(shutil.copytree(mole_run, tmp_path / "run"))
    assert cli.main(["eval", str(run), "--questions", str(questions), "--device", "cpu", "--max-new-tokens", "2"]) == 0
    names = {path.name for path in (run / "eval").iterdir()}
    assert {"questions.jsonl", "questions.score.json", "questions.routing.json"} <= names


def test_names_and_folders() -> None:
    assert split_names(["a,b", "c"]) == ["a", "b", "c"]
    for wrong in ([","], ["a", "a"]):
        with pytest.raises(ConfigError, match="give each once, of chartqa, "):
            split_names(wrong)
    assert output_folder("runs/x") == Path("runs/x/eval")
    assert output_folder("runs/x/checkpoint-5") == Path("runs/x/eval/checkpoint-5")


def test_script_passes_everything_on(tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$PWD ${PYTHONPATH%%:*} $@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": "x"}
    script = ["bash", str(ROOT / "scripts" / "eval" / "run.sh")]
    done = subprocess.run(
        [*script, "pope,mme", "runs/x", "--batch-size", "4"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{tmp_path} {ROOT} -m llava_mole.cli eval runs/x --benchmarks pope,mme --batch-size 4\n"
    wrong = subprocess.run([*script, "pope"], env=environment, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr[:6]) == (2, "usage:")


def test_prompts_of_all_benchmarks_are_checked_before_the_first_answer(
    mole_run: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = make_questions(tmp_path / "asked"), tmp_path / "out"
    value = yaml.safe_load(benchmark.read_text())
    value["data"] |= {"folder": "asked"}
    benchmark.write_text(yaml.safe_dump(value, sort_keys=False))
    long = asked.with_name("long.jsonl")
    long.write_text(asked.read_text().replace("What color", "one " * 5000 + "What color", 1))
    value["data"] |= {"questions": ["long.jsonl"]}
    second = benchmark.with_name("second.yaml")
    second.write_text(yaml.safe_dump(value | {"name": "second"}, sort_keys=False))
    both = command(mole_run, asked, Path(f"{benchmark},{second}"), out)
    assert cli.main(both) == 2
    assert f"error: {long}:1: " in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", ["jsonl", "run.json", "score.json", "routing.json"])
def test_links_and_pipes_are_not_replaced(
    mole_run: Path, asked: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / f"colors.{name}")
    (tmp_path / "elsewhere").write_text("{}")
    for overwrite in ([], ["--overwrite"]):
        assert cli.main(command(mole_run, asked, benchmark, out, *overwrite)) == 2
        assert f"colors.{name} is a pipe and is not replaced" in capsys.readouterr().err
    (out / f"colors.{name}").unlink()
    (out / f"colors.{name}").symlink_to(tmp_path / "elsewhere")
    assert cli.main(command(mole_run, asked, benchmark, out, "--overwrite")) == 2
    assert f"colors.{name} is a link to {tmp_path / 'elsewhere'} and is not replaced" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [f"colors.{name}"]
    assert (tmp_path / "elsewhere").read_text() == "{}"


def test_a_lock_of_another_machine_is_broken_only_on_request(
    mole_run: Path, asked: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "colors.jsonl.lock").write_text('{"host": "elsewhere", "pid": 7, "token": "theirs"}')
    assert cli.main(command(mole_run, asked, benchmark, out)) == 2
    assert "is in use by process 7 on elsewhere" in capsys.readouterr().err
    assert cli.main(command(mole_run, asked, benchmark, out, "--break-lock")) == 0
    assert not list(out.glob("*.lock"))

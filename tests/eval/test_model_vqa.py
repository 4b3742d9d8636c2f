"""The runner: LLaVA's file formats; single, batched, chunked and interrupted runs write the same answers."""

import json
import re
from pathlib import Path

import pytest
import torch
from worlds.eval_models import make_checkpoint, make_questions
from worlds.tiny_models import NUM_IMAGE_TOKENS

from llava_mole import cli
from llava_mole.common.errors import EXIT_INTERRUPTED
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.eval import model_vqa, questions
from llava_mole.eval.answers import AnswerFile
from llava_mole.eval.model_vqa import answer_questions, main, model_id
from llava_mole.eval.questions import read_questions
from llava_mole.eval.routing_stats import collect_routing_stats
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import Predictor

DECODING = Decoding(max_new_tokens=6)


def run(run_dir: Path, asked: Path, answers: Path, *more: str) -> int:
    command = ["--model-path", str(run_dir), "--question-file", str(asked), "--image-folder", str(asked.parent)]
    return main([*command, "--answers-file", str(answers), "--max_new_tokens", "6", "--device", "cpu", *more])


@pytest.fixture
def loaded_once(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take the model that is already loaded."""
    monkeypatch.setattr(model_vqa, "load_predictor", lambda path, args: Predictor(predictor.loaded))
    monkeypatch.setattr("llava_mole.eval.evaluate.load_predictor", lambda path, args: Predictor(predictor.loaded))


@pytest.fixture(scope="module")
def reference(predictor: Predictor, asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of an uninterrupted run, one prompt a batch."""
    path = tmp_path_factory.mktemp("reference") / "a.jsonl"
    answer_questions(predictor, read_questions([str(asked)]), asked.parent, path, DECODING, batch_size=1)
    return path


def test_command_writes_llavas_format(
    mole_run: Path, asked: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers" / "a.jsonl"
    assert run(mole_run, asked, path) == 0
    assert "11 answers in" in capsys.readouterr().out
    records = [json.loads(line) for line in path.read_text().splitlines()]
    given = [json.loads(line) for line in asked.read_text().splitlines()]
    for record, question in zip(records, given, strict=True):
        assert list(record) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert record["question_id"] == question["question_id"]
        assert record["prompt"] == question["text"]
        assert record["text"] == record["text"].strip()
        assert record["model_id"] == "run_checkpoint-1"
        assert record["metadata"] == {}
    assert len({record["answer_id"] for record in records}) == len(records)
    assert len({record["text"] for record in records}) > 3
    assert path.read_bytes() == reference.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("num_chunks", [3, 13])
def test_chunks_in_order_are_the_whole(
    mole_run: Path, asked: Path, reference: Path, tmp_path: Path, num_chunks: int
) -> None:
    content = b""
    for i in range(num_chunks):
        path = tmp_path / f"{i}.jsonl"
        assert run(mole_run, asked, path, "--num-chunks", str(num_chunks), "--chunk-idx", str(i)) == 0
        content += path.read_bytes()
    assert content == reference.read_bytes()


@pytest.mark.usefixtures("loaded_once")
def test_links_out_of_the_image_folder_are_followed_only_if_asked(
    mole_run: Path, asked: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in {json.loads(line).get("image") for line in asked.read_text().splitlines()} - {None}:
        (linked / name).parent.mkdir(parents=True, exist_ok=True)
        (linked / name).symlink_to(asked.parent / name)
    folder = ["--image-folder", str(linked)]
    assert run(mole_run, asked, tmp_path / "a.jsonl", *folder) == 2
    assert "outside the image folder" in (said := capsys.readouterr().err)
    assert "--follow-links" in said
    assert run(mole_run, asked, tmp_path / "a.jsonl", *folder, "--follow-links") == 0
    texts = [
        [json.loads(line)["text"] for line in p.read_text().splitlines()] for p in (tmp_path / "a.jsonl", reference)
    ]
    assert texts[0] == texts[1]
    answers = ["--answers-file", str(tmp_path / "b.jsonl"), "--device", "cpu", "--max_new_tokens", "4"]
    assert cli.main(["eval", str(mole_run), "--questions", str(asked), *folder, "--follow-links", *answers]) == 0


def test_sampled_answers_are_the_questions_own(mole_run: Path, asked: Path, tmp_path: Path) -> None:
    options, whole = ("--temperature", "2", "--top_p", "0.95"), tmp_path / "whole.jsonl"
    assert run(mole_run, asked, whole, *options) == 0
    content = b""
    for i in range(2):
        path = tmp_path / f"{i}.jsonl"
        chunk = ("--num-chunks", "2", "--chunk-idx", str(i), "--batch-size", "2")
        assert run(mole_run, asked, path, *options, *chunk) == 0
        content += path.read_bytes()
    assert content == whole.read_bytes()
    assert len({json.loads(line)["text"] for line in content.splitlines()}) > 8


@pytest.mark.usefixtures("loaded_once")
def test_interrupted_run_continues(
    mole_run: Path, asked: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    monkeypatch.setattr(questions, "WINDOW", 2)
    generate, calls = Predictor.generate, []

    def interrupted(self: Predictor, *args, **options) -> list[str]:
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *args, **options)

    monkeypatch.setattr(Predictor, "generate", interrupted)
    assert run(mole_run, asked, path, "--batch-size", "2") == EXIT_INTERRUPTED
    assert not path.exists()
    assert run(mole_run, asked, path, "--batch-size", "2") == 0
    assert calls == [4, 4, 3, 3]  # the eight answers that were there are not asked for again
    assert path.read_bytes() == reference.read_bytes()


@pytest.mark.usefixtures("loaded_once")
def test_partial_answers_of_other_settings_are_refused(
    mole_run: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Predictor, *args, **options) -> list[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Predictor, "generate", broken)
        assert run(mole_run, asked, tmp_path / "a.jsonl") == EXIT_INTERRUPTED
    assert run(mole_run, asked, tmp_path / "a.jsonl", "--temperature", "0.7") == 2
    assert "comes from a run with decoding {'max_new_tokens': 6, 'temperature': 0.0" in capsys.readouterr().err
    assert run(mole_run, asked, tmp_path / "a.jsonl", "--temperature", "0.7", "--overwrite") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model-path", "no/such/run"], "no/such/run does not exist"),
        (["--question-file", "no.jsonl"], "no.jsonl: no such file"),
        (["--image-folder", "/nowhere"], "--image-folder /nowhere is not a directory"),
        (["--conv-mode", "nope"], "template 'nope' does not exist"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--num-chunks", "2", "--chunk-idx", "2"], "--chunk-idx is 2"),
        (["--temperature", "nan"], "temperature is nan; it must be 0"),
        (["--answers-file", "EXISTING"], "exists; give --overwrite to replace it"),
        (["--answers-file", "/", "--overwrite"], "/ is a directory; name a file"),
        (["--answers-file", "/dev/null", "--overwrite"], "/dev/null is a device and is not replaced; name a file"),
        (["--routing-stats", "/dev/null"], "/dev/null is a device and is not replaced"),
        (["--routing-stats", "/dev/null/r.json"], "/dev/null is not a directory that may be written to"),
        (["--routing-stats", "r.json", "--answers-file", "r.json"], "are both r.json; name two files"),
    ],
)
def test_bad_arguments_write_nothing(
    mole_run: Path,
    asked: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    existing = tmp_path / "existing.jsonl"
    existing.write_text("kept")
    assert run(mole_run, asked, tmp_path / "a.jsonl", *[str(existing) if c == "EXISTING" else c for c in change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("llava-mole: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["existing.jsonl"]
    assert existing.read_text() == "kept"


@pytest.mark.parametrize("size", ["0", "-1", "a"])
def test_batch_size_is_checked(asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, asked, tmp_path / "a.jsonl", "--batch-size", size)
    assert f"argument --batch-size: '{size}' must be a whole number, at least 1" in capsys.readouterr().err


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("one " * 5000, "15067 tokens with its image leave no room"),
        ("<image> a", "1 <image> in the text, but no image"),
        ("\ud800", "it holds an unpaired surrogate"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(
    mole_run: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str
) -> None:
    path = tmp_path / "q.jsonl"
    texts = ["a"] * 20 + [text]
    path.write_text("".join(json.dumps({"question_id": n, "text": t}) + "\n" for n, t in enumerate(texts)))
    for more in ([], ["--batch-size", "1"], ["--num-chunks", "2", "--chunk-idx", "1", "--batch-size", "1"]):
        assert run(mole_run, path, tmp_path / "a.jsonl", *more) == 2
        assert f"error: {path}:21: {problem}" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]  # found before the first answer


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a\x00\x00\x00\x00"])
def test_an_image_that_cannot_be_decoded_names_the_question(
    mole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    asked = make_questions(tmp_path)
    (tmp_path / "images" / "1.png").write_bytes(content)
    assert run(mole_run, asked, tmp_path / "a.jsonl") == 2
    assert re.search(rf"error: {asked}:\d+: image '.*1\.png' cannot be decoded: ", capsys.readouterr().err)


def test_model_id_names_checkpoint_and_run(tmp_path: Path) -> None:
    assert model_id(tmp_path / "my_run" / "checkpoint-20") == "my_run_checkpoint-20"
    assert model_id(tmp_path / "my_run") == "my_run"


def test_routing_shares_count_prompt_tokens_once(predictor: Predictor, asked: Path) -> None:
    given = read_questions([str(asked)])
    single = collect_routing_stats(predictor, given, asked.parent, batch_size=1).result()
    assert set(single["groups"]) == {"one", "two"}
    rows: dict[str, list[torch.Tensor]] = {"one": [], "two": []}
    for question in given:
        images = [asked.parent / image for image in question.images]
        (batch,) = predictor.batches([images], [question.text], batch_size=1)
        rows[question.group].append(batch.input_ids[0])
    for domain, ids in rows.items():
        tokens = {name: entry["tokens"] for name, entry in single["groups"][domain].items()}
        images = sum(int((row == IMAGE_TOKEN_INDEX).sum()) for row in ids)
        assert images % NUM_IMAGE_TOKENS == 0
        total = sum(map(len, ids))
        assert tokens == {"all": total, "image": images, "text": total - images}

    batched = collect_routing_stats(predictor, given, asked.parent, batch_size=8).result()
    for domain, modalities in single["groups"].items():
        for modality, entry in modalities.items():
            share = torch.tensor(entry["share"])
            assert share.shape == (2, 2)  # layers, experts
            torch.testing.assert_close(share.sum(dim=1), torch.ones(2))
            torch.testing.assert_close(torch.tensor(batched["groups"][domain][modality]["share"]), share)
    assert 0 < single["groups"]["one"]["all"]["share"][0][0] < 1


def test_routing_spread_is_that_of_the_samples_shares(predictor: Predictor, asked: Path) -> None:
    """Mean and deviation over samples, from one run a sample."""
    given = read_questions([str(asked)])
    together = collect_routing_stats(predictor, given, asked.parent, batch_size=4).result()["groups"]
    for domain in ("one", "two"):
        for modality in ("all", "image", "text"):
            shares = []
            for question in given:
                if question.group == domain:
                    alone = collect_routing_stats(predictor, [question], asked.parent).result()["groups"][domain]
                    shares += [torch.tensor(alone[modality]["share"])] if modality in alone else []
            entry = together[domain][modality]
            assert (
                entry["samples"]
                == len(shares)
                == (5 if (domain, modality) == ("one", "image") else 6 - (domain == "two"))
            )
            torch.testing.assert_close(torch.tensor(entry["sample_mean"]), torch.stack(shares).mean(dim=0))
            torch.testing.assert_close(torch.tensor(entry["sample_std"]), torch.stack(shares).std(dim=0))
            assert torch.tensor(entry["sample_std"]).max() > 0


def test_routing_statistics_need_experts(asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make_checkpoint(tmp_path / "world", "lora")
    assert run(plain, asked, tmp_path / "a.jsonl", "--routing-stats", str(tmp_path / "r.json")) == 2
    assert "routing statistics need a model with adapter.method 'mole'" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl.partial").exists()


@pytest.mark.usefixtures("loaded_once")
def test_eval_answers_scores_and_counts_routing(
    mole_run: Path, asked: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "out" / "mole.jsonl"
    command = ["eval", str(mole_run), "--questions", f"colors={asked}", "--image-folder", str(asked.parent)]
    command += ["--answers-file", str(answers), "--max_new_tokens", "6", "--device", "cpu"]
    assert cli.main(command) == 0
    assert "colors * 0.00 [0.0, 25.9] 0/11 wilson 100.00 [74.1, 100.0] 11/11" in " ".join(
        capsys.readouterr().out.split()
    )
    assert answers.read_bytes() == reference.read_bytes()
    names = ["mole.jsonl", "mole.routing.json", "mole.run.json", "mole.score.json"]
    assert sorted(p.name for p in answers.parent.iterdir()) == names
    scores = json.loads((answers.parent / "mole.score.json").read_text())
    assert scores["template"] == "vicuna_v1"
    assert scores["groups"]["colors"]["majority"]["k"] == 11
    assert json.loads(Path(scores["routing"]).read_text())["groups"]["colors"]["all"]["tokens"] > 0

    assert cli.main(command) == 0  # the same run again: nothing is asked a second time
    assert "questions: done already" in capsys.readouterr().out
    other = [*command, "--max_new_tokens", "5"]
    assert cli.main(other) == 2
    assert "mole.jsonl exists and comes from another model" in capsys.readouterr().err
    assert cli.main([*other, "--overwrite"]) == 0
    (answers.parent / "mole.run.json").unlink()
    assert cli.main(command) == 2  # answers of an unknown run
    assert "mole.jsonl exists; give --overwrite" in capsys.readouterr().err


def test_eval_needs_reference_answers(mole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "What?"}\n')
    command = ["eval", str(mole_run), "--questions", str(tmp_path / "q.jsonl"), "--answers-file", str(tmp_path / "a")]
    assert cli.main(command) == 2
    assert "q.jsonl:1: no 'answer' (a text) or 'answers'" in capsys.readouterr().err


@pytest.mark.usefixtures("loaded_once")
def test_statistics_of_a_run_that_was_cut_off_do_not_block_it(
    mole_run: Path, asked: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: AnswerFile) -> None:
        raise KeyboardInterrupt

    path, stats = tmp_path / "a.jsonl", tmp_path / "r.json"
    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "finish", killed)
        assert run(mole_run, asked, path, "--routing-stats", str(stats)) == EXIT_INTERRUPTED
    assert stats.exists()
    assert run(mole_run, asked, path, "--routing-stats", str(stats)) == 0
    assert path.read_bytes() == reference.read_bytes()


@pytest.mark.usefixtures("loaded_once")
def test_report_goes_on_without_files_that_are_gone(
    mole_run: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["eval", str(mole_run), "--questions", str(asked), "--image-folder", str(asked.parent), "--device", "cpu"]
    assert cli.main([*command, "--answers-file", "a.jsonl", "--max_new_tokens", "6"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["report", str(tmp_path / "a.score.json")]) == 0
    printed = capsys.readouterr().out
    assert "Share of prompt tokens per expert" in printed
    assert "One question per domain" in printed
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.routing.json").unlink()
    assert cli.main(["report", str(tmp_path / "a.score.json")]) == 0
    printed = capsys.readouterr().out
    assert "Accuracy on the test questions" in printed
    assert "Share of prompt tokens per expert" not in printed
    assert "One question per domain" not in printed

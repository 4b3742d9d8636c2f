"""The chat: one-shot, piped and typed; its history; its refusals."""

import io
import sys

import pytest

from llava_mole import cli
from llava_mole.conversation import Turn
from llava_mole.inference.predictor import Predictor
from llava_mole.serve.cli import main

GREEDY = ["--temperature", "0", "--max-new-tokens", "6", "--device", "cpu"]


class Typed(io.StringIO):
    """Standard input as if a person typed it; ends like `text` ends, or with an interrupt."""

    interrupt = False

    def isatty(self) -> bool:
        return True

    def readline(self, *args: int) -> str:
        line = super().readline(*args)
        if not line and self.interrupt:
            raise KeyboardInterrupt
        return line


def expected_answers(chat_run, photo: str, questions: list[str]) -> list[str]:
    predictor = Predictor.from_pretrained(chat_run, device="cpu")
    turns: list[Turn] = []
    answers = []
    for question in questions:
        turns.append(Turn("user", question))
        answers += predictor.generate([photo], [turns], max_new_tokens=6)
        turns.append(Turn("assistant", answers[-1]))
    return answers


def transcript(questions: list[str], answers: list[str]) -> str:
    return "".join(f"USER: {q}\nASSISTANT: {a}\n" for q, a in zip(questions, answers, strict=True))


def test_prompts_are_the_turns_of_one_conversation(chat_run, photo, capsys: pytest.CaptureFixture[str]) -> None:
    questions = ["What color is this?", "Is it blue?"]
    prompts = [part for question in questions for part in ("--prompt", question)]
    command = ["chat", "--model-path", str(chat_run), "--image-file", photo, *GREEDY, *prompts]
    assert cli.main(command) == 0
    header, _, rest = capsys.readouterr().out.partition("\n")
    assert "template: vicuna_v1 (as stored in the checkpoint)" in header
    assert "checkpoint-1" in header
    answers = expected_answers(chat_run, photo, questions)
    assert all(answers)
    assert rest == transcript(questions, answers)


def test_piped_lines_end_at_an_empty_one(
    chat_run, photo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What color is this?\nIs it blue?\n\nnever asked\n"))
    assert main(["--model-path", str(chat_run), "--image-file", photo, *GREEDY]) == 0
    questions = ["What color is this?", "Is it blue?"]
    printed = capsys.readouterr().out.partition("\n")[2]
    assert printed == transcript(questions, expected_answers(chat_run, photo, questions))


def test_piped_bytes_that_are_no_text_are_reported_and_ignored(
    chat_run, photo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO(b"What color\xe9 is this?\n\xff\nIs it blue?\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, encoding="utf-8"))
    assert main(["--model-path", str(chat_run), "--image-file", photo, *GREEDY]) == 0
    captured = capsys.readouterr()
    questions = ["What color is this?", "Is it blue?"]
    assert captured.out.partition("\n")[2] == transcript(questions, expected_answers(chat_run, photo, questions))
    assert captured.err.count("note: ignored 1 byte of a line that is no text in UTF-8") == 2


@pytest.mark.parametrize(("text", "interrupt"), [("Is it?\n", False), ("Is it?\n\n", False), ("Is it?\n", True)])
def test_typed_chat_ends_cleanly(
    chat_run,
    photo,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    interrupt: bool,
) -> None:
    typed = Typed(text)
    typed.interrupt = interrupt
    monkeypatch.setattr(sys, "stdin", typed)
    assert main(["--model-path", str(chat_run), "--image-file", photo, *GREEDY]) == 0
    assert capsys.readouterr().out.count("ASSISTANT: ") == 1


def test_interrupt_while_answering_ends_cleanly(
    chat_run, photo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Predictor, image, turns, **options):
        yield "half an"
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "stream", interrupted)
    assert main(["--model-path", str(chat_run), "--image-file", photo, *GREEDY, "--prompt", "What?"]) == 0
    assert capsys.readouterr().out.endswith("ASSISTANT: half an\n")


def test_history_has_no_end_marks_and_sampling_is_llavas(chat_run, photo, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, options = [], []

    def stream(self: Predictor, image, turns, **given):
        seen.append(list(turns))
        options.append(given)
        yield from ("a ", "b")

    monkeypatch.setattr(Predictor, "stream", stream)
    command = ["--model-path", str(chat_run), "--image-file", photo, "--prompt", "one", "--prompt", "two"]
    assert main([*command, "--conv-mode", "llava_llama_2"]) == 0
    assert seen[1] == [Turn("user", "one"), Turn("assistant", "a b"), Turn("user", "two")]
    assert options[0] == {"max_new_tokens": 512, "temperature": 0.2, "top_p": None}


def test_a_given_template_is_named(chat_run, photo, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model-path", str(chat_run), "--image-file", photo, *GREEDY, "--prompt", "What?"]
    assert main([*command, "--conv-mode", "llava_v1"]) == 0
    assert "template: llava_v1 (as asked for)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--image-file", "https://example.org/a.png"], "addresses are not opened; download the image"),
        (["--image-file", "no/such.png"], "such.png"),
        (["--model-path", "no/such/run"], "no/such/run does not exist"),
        (["--conv-mode", "nope"], "template 'nope' does not exist"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "look at <image>", "--prompt", "and this <image>"], "2 <image> in the text, but one image given"),
    ],
)
def test_errors(chat_run, photo, capsys: pytest.CaptureFixture[str], change: list[str], message: str) -> None:
    command = ["--model-path", str(chat_run), "--image-file", photo, *GREEDY]
    assert main([*command, *(change if "--prompt" in change else [*change, "--prompt", "What?"])]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llava-mole: error: ")
    assert message in error


def test_loading_options_reach_the_loader(chat_run, photo, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    load = Predictor.from_pretrained

    def spy(path, **options):
        seen.update(options)
        return load(path, device="cpu")

    monkeypatch.setattr(Predictor, "from_pretrained", spy)
    monkeypatch.setattr(Predictor, "stream", lambda self, image, turns, **options: iter(()))
    command = ["--model-path", str(chat_run), "--image-file", photo, "--prompt", "What?", "--model-base", "elsewhere"]
    assert main([*command, "--dtype", "bfloat16", "--device", "cuda", "--conv-mode", "v1", "--load-4bit"]) == 0
    assert seen == {
        "model_base": "elsewhere", "vision_tower": None, "device": "cuda", "dtype": "bfloat16",
        "quantization": "4bit", "template": "v1",
    }  # fmt: skip

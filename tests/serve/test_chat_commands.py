"""The chat's commands, its memory, and a real terminal: editing, history, Ctrl-C, colours."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from worlds.eval_models import make_checkpoint

from llava_mole.common.errors import ConfigError, ContextError, DataError
from llava_mole.conversation import Turn, with_system
from llava_mole.inference import token_routing
from llava_mole.inference.batching import encode_prompt, place_images
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.token_routing import route_answer
from llava_mole.mole import collect_routing, force_expert
from llava_mole.serve.cli import main
from llava_mole.serve.session import Session
from llava_mole.serve.terminal import paint_routing, printable

NEW = 6
GREEDY = ["--temperature", "0", "--max-new-tokens", str(NEW), "--device", "cpu"]


@pytest.fixture
def model(mole_run: Path) -> Predictor:
    return Predictor.from_pretrained(mole_run, device="cpu")


@pytest.fixture
def other_photo(tmp_path: Path) -> str:
    Image.new("RGB", (20, 20), (10, 10, 250)).save(tmp_path / "other.png")
    return str(tmp_path / "other.png")


@pytest.fixture
def talk(
    mole_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Pipes lines into the chat. Returns the exit code, what was printed after the first line, and the notes."""

    def run(*lines: str, options: list[str] | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["--model-path", str(mole_run), *GREEDY, *(options or [])])
        captured = capsys.readouterr()
        return code, captured.out.partition("\n")[2], captured.err

    return run


def notes(error: str) -> str:
    """What the chat has written to stderr, without the bars of loading."""
    return re.sub(r"\rLoading weights:[^\r\n]*\n?", "", error)


def test_without_an_image(talk, model: Predictor) -> None:
    answer = model.generate([None], ["What?"], max_new_tokens=NEW)[0]
    code, printed, error = talk("What?")
    assert (code, printed, notes(error)) == (0, f"USER: What?\nASSISTANT: {answer}\n", "")


def test_images_join_the_conversation(talk, model: Predictor, photo: str, other_photo: str) -> None:
    code, printed, _ = talk(f"/image {other_photo}", "What?", "Is it?", f"/image {photo}", "And this?")
    first = model.generate([other_photo], ["What?"], max_new_tokens=NEW)[0]
    turns = [Turn("user", "What?"), Turn("assistant", first), Turn("user", "Is it?")]
    second = model.generate([other_photo], [turns], max_new_tokens=NEW)[0]
    shown = [Turn("user", "<image>\nWhat?"), *turns[1:], Turn("assistant", second), Turn("user", "<image>\nAnd this?")]
    third = model.generate([[other_photo, photo]], [shown], max_new_tokens=NEW)[0]
    assert code == 0
    assert re.findall("ASSISTANT: (.*)", printed) == [first, second, third]
    assert printed.count("(1 image with the next question)") == 2
    both = talk("What?", options=["--image-file", photo, "--image-file", other_photo])[1]
    assert both.endswith(f"ASSISTANT: {model.generate([[photo, other_photo]], ['What?'], max_new_tokens=NEW)[0]}\n")


def test_retry_reset_system_and_a_plain_slash(talk, model: Predictor, photo: str) -> None:
    printed = talk(
        "What?", "/retry", "/reset", "/system Be brief.", "/system", "//etc?", options=["--image-file", photo]
    )[1]
    answer = model.generate([photo], ["What?"], max_new_tokens=NEW)[0]
    again = Predictor(model.loaded)
    again.template = with_system(model.template, "Be brief.")
    last = again.generate([photo], ["/etc?"], max_new_tokens=NEW)[0]
    assert re.findall("ASSISTANT: (.*)", printed) == [answer, answer, last]
    assert "(the conversation is forgotten; 1 image with the next question)" in printed
    assert printed.count("(system text: Be brief.)") == 2


def test_save_writes_a_record_and_overwrites_nothing(talk, photo: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    code, printed, _ = talk("What?", "Is it?", f"/save {file}", options=["--image-file", photo])
    assert code == 0
    answers = re.findall("ASSISTANT: (.*)", printed)
    (record,) = json.loads(file.read_text())
    assert record["image"] == photo
    assert record["conversations"] == [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": answers[0]},
        {"from": "human", "value": "Is it?"},
        {"from": "gpt", "value": answers[1]},
    ]
    before = file.read_bytes()
    code, _, error = talk("What?", f"/save {file}")
    assert code == 2
    assert "talk.json" in error
    assert file.read_bytes() == before


def test_an_expert_can_be_forced(talk, model: Predictor) -> None:
    printed = talk("What?", "/expert 1", "/retry", "/expert", "/expert off", "/retry")[1]
    free = model.generate([None], ["What?"], max_new_tokens=NEW)[0]
    with force_expert(model.loaded.model.language_model, 1):
        forced = model.generate([None], ["What?"], max_new_tokens=NEW)[0]
    assert re.findall("ASSISTANT: (.*)", printed) == [free, forced, free]
    assert free != forced
    assert printed.count("(every token uses expert 1)") == 2
    assert "(the router chooses the experts)" in printed


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["/expert 7"], "expert 7 cannot be forced: the adapter has the experts 0 to 1"),
        (["/expert one"], "/expert one: give the number of an expert"),
        (["/routing"], "there is no answer yet whose routing could be shown"),
        (["What?", "/routing 9"], "/routing 9: the layers with experts are 0 to 1"),
        (["/image"], "/image needs a file"),
        (["/image no/such.png"], "such.png' does not exist"),
        (["/image https://example.org/a.png"], "addresses are not opened"),
        (["/save"], "/save needs a file"),
        (["/save a.json"], "nothing has been asked yet"),
        (["/retry"], "nothing has been asked yet"),
        (["/fly"], "there is no command /fly; /help lists them"),
        (["see <image>"], "1 <image> in the text, but no image given"),
    ],
)
def test_mistakes_end_a_pipe(talk, lines: list[str], message: str) -> None:
    code, _, error = talk(*lines)
    assert code == 2
    assert message in error


def test_help_and_quit(talk) -> None:
    code, printed, _ = talk("/help", "/quit", "never asked")
    assert code == 0
    assert "/routing [LAYER]" in printed
    assert "never" not in printed


def test_a_full_context_drops_the_oldest_rounds(model: Predictor, photo: str) -> None:
    session = Session(model, [photo], Decoding(NEW))
    question = "one two three four five six seven eight nine ten " * 3
    asked, dropped = [], 0
    for n in range(14):
        asked.append(f"{n} {question}")
        dropped += session.make_room(asked[-1])
        "".join(session.ask(asked[-1]))
    assert dropped > 3
    assert [each.question for each in session.rounds] == asked[dropped:]
    assert [each.images for each in session.rounds] == [[photo]] + [[]] * (14 - dropped - 1)
    with pytest.raises(ContextError, match="leave no room"):
        session.make_room(question * 40)
    assert len(session.rounds) == 14 - dropped


def test_the_drop_is_announced(talk) -> None:
    question = "one two three four five six seven eight nine ten " * 6
    printed = talk(*[question] * 12)[1]
    assert "(the context is full: the oldest 1 question" in printed


def test_an_answer_that_is_stopped_counts(model: Predictor, photo: str) -> None:
    session = Session(model, [photo], Decoding(100))
    pieces = session.ask("What?")
    first = next(pieces)
    pieces.close()
    assert [(each.question, each.answer) for each in session.rounds] == [("What?", first)]
    assert session.pending == []
    pieces = session.ask("Never begun")
    pieces.close()
    assert len(session.rounds) == 1


def test_a_failure_leaves_the_conversation_as_it_was(
    model: Predictor, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(model, [photo], Decoding(4))

    def broken(self: Predictor, *args: object, **options: object) -> Iterator[str]:
        yield "half"
        raise DataError("broken")

    monkeypatch.setattr(Predictor, "stream", broken)
    with pytest.raises(DataError, match="broken"):
        list(session.ask("What?"))
    assert (session.rounds, session.pending) == ([], [photo])


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_the_routing_of_an_answer_is_that_of_decoding(
    granularity: str, tmp_path: Path, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Predictor.from_pretrained(make_checkpoint(tmp_path, options={"granularity": granularity}), device="cpu")
    seen: list[torch.Tensor] = []
    written: list[int] = []
    language_model = model.loaded.model.language_model

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen.append(torch.stack([index[0, -1, 0] for index in collect_routing(language_model).index]))
        if kwargs.get("input_ids") is not None:
            written.append(int(kwargs["input_ids"][0, -1]))

    hook = model.loaded.model.causal_lm.register_forward_hook(note, with_kwargs=True)
    answer = "".join(model.stream(photo, "What?", max_new_tokens=10))
    hook.remove()
    prompt = encode_prompt(model.loaded, model.template, "What?", 1, 0)
    ids, count = token_routing._tokens(model, place_images("What?", 1, 0), 1, answer)
    assert ids[:-count] == prompt
    found = route_answer(model, photo, "What?", answer).part("answer")
    assert "".join(found.pieces) == answer
    decoded = torch.stack(seen[1:], dim=1)  # the pass after the prompt computes the first token
    # A random model writes its answer in other tokens than the tokenizer would.
    with monkeypatch.context() as patch:
        patch.setattr(token_routing, "_tokens", lambda *_: ([*prompt, *written], len(written)))
        assert len(written) > 3
        assert torch.equal(route_answer(model, photo, "What?", answer).part("answer").experts, decoded)
    assert found.of_layer(1) == found.experts[1].tolist()
    with force_expert(language_model, 1):
        assert route_answer(model, photo, "What?", answer).part("answer").of_layer(None) == [1] * len(found.pieces)
    painted = paint_routing(found, 0, colors=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", painted).startswith(f"{answer}\nlayer 0:  expert 0 ")
    plain = paint_routing(found, 0, colors=False)
    assert "\x1b" not in plain
    assert re.sub(r"\[\d\]", "", plain.partition("\n")[0]) == answer
    lora = Predictor.from_pretrained(make_checkpoint(tmp_path / "lora", "lora"), device="cpu")
    with pytest.raises(ConfigError, match="has no experts"):
        route_answer(lora, photo, "What?", answer)


def test_a_model_cannot_control_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\nc\td\x9b") == "a\ufffd[2Jb\ufffd\nc\td\ufffd"


class Terminal:
    """The chat in a terminal of its own."""

    def __init__(self, run: Path, history: Path, *options: str) -> None:
        self.leader, follower = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "XDG_STATE_HOME": str(history), "COLUMNS": "200"}
        environment.pop("NO_COLOR", None)
        command = [sys.executable, "-W", "ignore", "-m", "llava_mole.serve.cli", "--model-path", str(run)]
        self.process = subprocess.Popen(
            [*command, "--temperature", "0", "--device", "cpu", *options],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(follower)
        self.text = ""

    def read_until(self, pattern: str, seconds: float = 60) -> str:
        """What is printed up to the first place after the last read where the pattern matches."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            if select.select([self.leader], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.leader, 65536).decode("utf-8", "replace")
                except OSError:  # the other side has closed
                    assert re.search(pattern, self.text), f"ended without {pattern!r}: {self.text!r}"
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())


@pytest.mark.slow
def test_a_real_terminal(mole_run: Path, tmp_path: Path) -> None:
    terminal = Terminal(mole_run, tmp_path, "--max-new-tokens", "450")
    try:
        terminal.read_until("leave with /quit, Ctrl-D or an empty line")
        terminal.read_until("USER: ")
        terminal.type("Whaat?\x1b[D\x1b[D\x1b[D\b\r")  # three to the left, and remove a letter
        terminal.read_until("ASSISTANT: ....")
        terminal.type("\x03")
        terminal.read_until(r"\(stopped\)")
        terminal.read_until("USER: ")
        terminal.type("/routing\r")
        painted = terminal.read_until("USER: ")
        assert "\x1b[48;5;" in painted
        assert "the expert that most layers use" in painted
        time.sleep(1)  # readline prints its prompt before it listens, and a signal in between would wait for a key
        terminal.type("half a line\x03")
        terminal.read_until(r"\(Ctrl-C again, /quit or Ctrl-D leaves\)")
        terminal.read_until("USER: ")
        os.write(terminal.leader, b"/he\t\r")  # completed
        terminal.read_until("/retry")
        terminal.read_until("USER: ")
        terminal.type("/fly\r")
        terminal.read_until("note: there is no command /fly")
        terminal.read_until("USER: ")
        terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\x15/quit\r")  # through the history, and something else
        assert terminal.process.wait(30) == 0
        history = tmp_path / "llava_mole" / "chat_history"
        lines = history.read_text().splitlines()
        assert lines[:2] == ["What?", "/routing"]
        assert lines[-1] == "/quit"
        assert history.stat().st_mode & 0o777 == 0o600
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGKILL)
            terminal.process.wait()
        os.close(terminal.leader)

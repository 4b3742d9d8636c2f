"""The command `llava-mole serve`: its arguments, its port, its signals; the docs name what it has."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava_mole.common.errors import ConfigError
from llava_mole.serve.api import cli
from llava_mole.serve.api.images import ImagePolicy, open_image
from scripts.bench.serve_load import percentile

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def test_models_are_called_by_their_folder_or_as_asked() -> None:
    assert cli.named_runs(["runs/one", "other=runs/x=y", "runs/two/checkpoint-7"]) == {
        "one": "runs/one", "other": "runs/x=y", "two": "runs/two/checkpoint-7"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="two models are called 'a', runs/a and more/a; name them: NAME=RUN"):
        cli.named_runs(["runs/a", "more/a"])
    with pytest.raises(ConfigError, match="'a=' was given as a model"):
        cli.named_runs(["a="])


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("one\n\n two \n")
    assert cli.read_keys(None) == []
    monkeypatch.setenv("LLAVA_MOLE_API_KEY", "three")
    assert cli.read_keys(tmp_path / "keys") == ["three", "one", "two"]
    (tmp_path / "empty").write_text("\n")
    for name, message in (("empty", "holds no key"), ("none", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            cli.read_keys(tmp_path / name)


def test_a_port_in_use_is_refused_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert cli.main(["no/such/run", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use; choose another --port" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/run"], "no/such/run does not exist"),
        (["no/such/run", "--port", "70000"], "--port is 70000; it must be 0 to 65535"),
        (["no/such/run", "--host", "no.such.host.invalid"], "--host no.such.host.invalid is no address"),
        (["no/such/run", "--conv-mode", "nope"], "template 'nope' does not exist"),
        (["no/such/run", "--api-key-file", "no/such/file"], "--api-key-file no/such/file cannot be read"),
        (["RUN", "--allow-image-folder", "no/such/folder"], "--allow-image-folder no/such/folder is not a folder"),
        (["RUN", "--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_mistakes(chat_run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(chat_run) if word == "RUN" else word for word in arguments]
    assert cli.main(["--port", "0", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_hosts_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_mole.serve.api.errors import ApiError

    policy = ImagePolicy(100, 100, hosts=["Example.org"])
    for url in ("http://example.org.evil.net/a", "http://evil.net/example.org", "http://a@evil.net/", "http://[/"):
        with pytest.raises(ApiError, match="which this server does not open"):
            open_image(url, policy, "here")
    with pytest.raises(ApiError, match="cannot be fetched from 127.0.0.1"):
        open_image("http://127.0.0.1:1/a.png", ImagePolicy(100, 100, hosts=["127.0.0.1"]), "here")


@pytest.mark.slow
def test_the_server_of_the_command_line(chat_run: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "llava_mole.cli", "serve", f"mine={chat_run}", "--port", "0"]
    environment = {**os.environ, "LLAVA_MOLE_API_KEY": "key"}
    with subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"serving mine at (http://127\.0\.0\.1:\d+/v1)   stop with Ctrl-C\n", line)
        assert found, line
        if shutil.which("curl"):
            curl = ["curl", "-sS", "-H", "Authorization: Bearer key", "-H", "Content-Type: application/json"]
            body = (
                '{"model": "mine", "max_tokens": 3, "messages": [{"role": "user", "content": "What?"}], "stream": true}'
            )
            done = subprocess.run(
                [*curl, f"{found[1]}/chat/completions", "-d", body], capture_output=True, text=True, check=True
            )
            assert done.stdout.endswith("data: [DONE]\n\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_every_option_is_in_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    parser_text = Path(cli.__file__).read_text(encoding="utf-8")
    for name in re.findall(r'\("(max-[a-z-]+|drain-seconds)", \d+', parser_text):
        assert f"`--{name}`" in text or f"`--{name}," in text or f"--{name}`" in text, name
    for name in re.findall(r'"(--[a-z-]+)"', parser_text):
        assert name in text, name


def test_percentiles() -> None:
    assert [percentile(list(range(1, 101)), share) for share in (0.5, 0.95, 1.0)] == [50, 95, 100]
    assert percentile([3.0], 0.5) == 3.0

"""Entry points end in one line and an exit code."""

import subprocess
import sys

import pytest

from llava_mole.common.errors import DataError, command


def raising(error: BaseException):
    @command
    def main() -> None:
        raise error

    return main


def test_a_user_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(DataError("a.json:3: no conversations"))() == 2
    assert capsys.readouterr().err == "llava-mole: error: a.json:3: no conversations\n"


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt())() == 130
    assert capsys.readouterr().err == "llava-mole: interrupted\n"


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())()


def test_a_full_gpu_is_one_line_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    assert raising(full)() == 1
    assert capsys.readouterr().err.startswith("llava-mole: error: CUDA out of memory; in training, use shorter rows")
    with pytest.raises(RuntimeError, match="another"):
        raising(RuntimeError("another"))()


def test_success_is_exit_code_0() -> None:
    assert command(lambda: None)() == 0


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_enough_is_no_traceback(lines: int) -> None:
    """Few lines are still in the buffer when the command ends, many fill the pipe before."""
    code = f"from llava_mole.common.errors import command\n@command\ndef main():\n    print('a line\\n' * {lines})\n"
    code += "import sys; sys.stdin.read(); raise SystemExit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read().decode() == ""
        assert process.wait() == 141


def test_a_broken_pipe_elsewhere_is_not_hidden() -> None:
    with pytest.raises(BrokenPipeError):
        raising(BrokenPipeError())()

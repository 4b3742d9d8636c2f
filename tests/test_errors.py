"""Entry points end in one line and an exit code."""

import pytest

from llava_mole.errors import DataError, command


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


def test_success_is_exit_code_0() -> None:
    assert command(lambda: None)() == 0

"""The errors a user can cause, and how a command ends on one.

A message says what was given, what is allowed and what to do. `command` turns it into one line on stderr and an
exit code, so that no entry point prints a traceback for a mistake in a file or an option.
"""

import contextlib
import functools
import os
import select
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""A signal asked the run to stop: it has saved and can go on (sysexits.h: EX_TEMPFAIL, try again later)."""
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141
"""What read the output, such as `head`, has enough of it (a shell's 128 + SIGPIPE)."""


class UserError(Exception):
    """A mistake in what the user gave; the message is complete and needs no traceback."""

    on_every_rank = False
    """All ranks raise it together, so that one of them is enough to print it."""


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class DataError(UserError):
    """A record or an image is wrong; the message starts with `file:line`."""


class PromptError(DataError):
    """A prompt that cannot be answered: `position` is its place in the list, `problem` the rest of the message."""

    def __init__(self, position: int, problem: str):
        super().__init__(position, problem)
        self.position, self.problem = position, problem

    def __str__(self) -> str:
        return f"prompt {self.position}: {self.problem}"


class WeightsError(UserError):
    """A weight file is absent, does not fit or cannot be used."""


class CheckpointError(UserError):
    """A checkpoint directory is incomplete, damaged or of another kind."""


@contextlib.contextmanager
def value_errors_as(kind: type[UserError]) -> Iterator[None]:
    """Turn a ValueError of the block into `kind`: the door between commands and `mole/` or PEFT, which raise it."""
    try:
        yield
    except ValueError as error:
        raise kind(str(error)) from error


@contextlib.contextmanager
def one_line(advice: str) -> Iterator[None]:
    """What the system refuses within the block, or a worker process that was killed, becomes a DataError.

    Args:
        advice: What must be possible, behind the system's own reason.
    """
    try:
        yield
    except BrokenExecutor:
        raise DataError("a worker process was killed, most likely for want of memory; lower --workers") from None
    except BrokenPipeError:  # `command` knows what to do
        raise
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise DataError(f"{reason}; {advice}") from error


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Make `main` an entry point: a `UserError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            try:
                code = main(*args, **kwargs) or 0
            except SystemExit:  # argparse, after its help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            return EXIT_READER_GONE
        except UserError as error:
            if not error.on_every_rank or os.environ.get("RANK", "0") == "0":
                print(f"llava-mole: error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print("llava-mole: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED

    return run


def _reader_is_gone() -> bool:
    """Whether stdout is the broken pipe; what is still to be written is then thrown away."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file, or a closed one
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True

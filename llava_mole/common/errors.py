"""The errors a user can cause, and the exit codes of commands.

A message says what was given, what is allowed and what to do. `command` prints it as one line on stderr and returns an
exit code, so that no entry point shows a traceback for a mistake in a file or an option.
"""

import contextlib
import functools
import os
import select
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""A signal asked the run to stop; it saved and can be resumed (sysexits.h: EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141
"""The reader closed the pipe (e.g. `head`); the shell's 128 + SIGPIPE."""
SPARE_MEMORY = (
    "in training, use shorter rows (--train.pack_length), --train.activation_checkpointing all or --model.quantization "
    "4bit; `llava-mole plan` says what fits. Elsewhere, use a smaller --batch-size or --load-4bit"
)


class UserError(Exception):
    """A mistake in the user's input. The message is complete; it needs no traceback."""

    on_every_rank = False
    """Whether all ranks raise it together, so that only rank 0 prints it."""


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class DataError(UserError):
    """A record or an image is wrong; the message starts with `file:line`."""


class StorageError(UserError):
    """What holds the data fails (no answer, refusal, damaged bytes, files that changed); the run can be continued."""


class PromptError(DataError):
    """A prompt that cannot be answered: `position` is its index in the list, `problem` the rest of the message."""

    def __init__(self, position: int, problem: str):
        super().__init__(position, problem)
        self.position, self.problem = position, problem

    def __str__(self) -> str:
        return f"prompt {self.position}: {self.problem}"


class ContextError(PromptError):
    """A prompt that leaves no room for an answer in the model's context."""


class WeightsError(UserError):
    """A weight file is missing, does not fit or cannot be used."""


class CheckpointError(UserError):
    """A checkpoint directory is incomplete, damaged or of the wrong kind."""


def without_worker(error: UserError) -> UserError:
    """An error from a data loader's process, which PyTorch wraps in a traceback, with its message alone."""
    kind = type(error)
    return kind(str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())


@contextlib.contextmanager
def value_errors_as(kind: type[UserError]) -> Iterator[None]:
    """Turn a ValueError of the block into `kind`: the door between commands and `mole/` or PEFT, which raise it."""
    try:
        yield
    except ValueError as error:
        raise kind(str(error)) from error


@contextlib.contextmanager
def one_line(advice: str) -> Iterator[None]:
    """Turn an OSError inside the block, or a killed worker process, into a DataError.

    Args:
        advice: What the user must do; it follows the system's reason.
    """
    try:
        yield
    except BrokenExecutor:
        raise DataError("a worker process was killed, most likely because memory ran out; lower --workers") from None
    except BrokenPipeError:  # handled by `command`
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
        except RuntimeError as error:
            if not _is_full_memory(error):
                raise
            print(f"llava-mole: error: {str(error).split('. ')[0]}; {SPARE_MEMORY}", file=sys.stderr)
            return EXIT_FAILURE

    return run


def _is_full_memory(error: RuntimeError) -> bool:
    """Whether this is PyTorch's error for a GPU whose memory is full, without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _reader_is_gone() -> bool:
    """Whether stdout is the broken pipe. If so, discard what is still buffered."""
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

"""`python -m llava_mole.train.torchrun`: torchrun, silent about ranks that have ended with a message of their own.

Arguments, environment and result are torchrun's. After a rank that failed, torchrun prints a traceback of itself and a
table of ranks, which would bury the one line that says what to correct. They are left out if the first rank that failed
ended with the exit code of a mistake in what was given; after a crash they are printed as usual.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from llava_mole.common.errors import EXIT_USER_ERROR


def _is_about_a_crash(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(f"failed (exitcode: {EXIT_USER_ERROR})")


def main() -> int:
    """Run torchrun with the arguments of the command line. Returns its exit code."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_about_a_crash)
    try:
        torchrun()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != EXIT_USER_ERROR:
            raise
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Logging: one logger tree, one line an event, on rank zero only (errors on every rank)."""

import logging
import os
import sys


class _RankFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


def get_logger(name: str) -> logging.Logger:
    """The logger of module `name`; `setup_logging` decides where it writes."""
    return logging.getLogger(name)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr. Called by entry points, never at import."""
    root = logging.getLogger("llava_mole")
    root.setLevel(level)
    root.propagate = False
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        handler.addFilter(_RankFilter())
        root.addHandler(handler)

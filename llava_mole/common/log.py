"""Logging: one logger tree, one line an event, on rank zero only (errors on every rank)."""

import logging
import os
import sys
import warnings


class _RankFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


class _StderrHandler(logging.StreamHandler):
    """Writes to what `sys.stderr` is at the time, which tests and progress bars replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def get_logger(name: str) -> logging.Logger:
    """The logger of module `name`; `setup_logging` decides where it writes."""
    return logging.getLogger(name)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr and quieten libraries. Called by entry points, never at import."""
    import torch

    quieten_libraries()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
    root = logging.getLogger("llava_mole")
    root.setLevel(level)
    root.propagate = False
    if not root.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        handler.addFilter(_RankFilter())
        root.addHandler(handler)


def quieten_libraries() -> None:
    """Keep messages that no user can act on off the screen. Works best before the libraries are imported."""
    # PEFT and transformers call each other's renamed methods; both names work.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # It repeats at every 8-bit product that inputs are cast to float16, which is how 8 bits are done, and misses a
    # package at import that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

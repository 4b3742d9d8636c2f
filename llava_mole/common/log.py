"""Logging: one logger tree and one line per event, from rank 0 only (errors from every rank)."""

import logging
import os
import sys
import warnings


class _RankFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


class _StderrHandler(logging.StreamHandler):
    """Writes to the current `sys.stderr`, which tests and progress bars replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def get_logger(name: str) -> logging.Logger:
    """The logger of module `name`; `setup_logging` decides where it writes."""
    return logging.getLogger(name)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr and silence libraries. Call it in entry points, never at import."""
    import torch

    quieten_libraries()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns about a missing accelerator
    root = logging.getLogger("llava_mole")
    root.setLevel(level)
    root.propagate = False
    if not root.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        handler.addFilter(_RankFilter())
        root.addHandler(handler)


def quieten_libraries() -> None:
    """Silence library messages that users cannot act on. Call it before the libraries are imported."""
    # PEFT and transformers call each other's renamed methods; both names work.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # It warns at every 8-bit product that inputs are cast to float16, which LLM.int8() always does, and at import
    # about a package that is not needed here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

"""The `llava-mole` command: finds a subcommand by name and imports only its module."""

import importlib
import sys
from collections.abc import Sequence

from llava_mole import __version__
from llava_mole.common.errors import ConfigError, command
from llava_mole.common.keys import nearest
from llava_mole.common.log import quieten_libraries

SUBCOMMANDS = {
    "train": ("llava_mole.train.cli", "train one stage: CONFIG.yaml [--key value ...]"),
    "chat": ("llava_mole.serve.cli", "chat with a model about an image"),
    "web": ("llava_mole.serve.gradio_app", "chat in a web page that shows which expert computes which patch and word"),
    "serve": ("llava_mole.serve.api.cli", "serve models to OpenAI clients, many requests at once"),
    "eval": ("llava_mole.eval.evaluate", "answer question files with a model and score the answers"),
    "score": ("llava_mole.eval.scoring.cli", "score existing answers by a benchmark's published rules"),
    "report": ("llava_mole.eval.report.cli", "compare scored runs in one table"),
    "study": ("llava_mole.study.cli", "run a grid of trainings as one experiment, and report it"),
    "continual": ("llava_mole.study.continual_cli", "learn tasks one after another, and report what is kept"),
    "plan": ("llava_mole.analysis.plan.cli", "estimate memory, FLOPs and hours of a run before it starts"),
    "conflict": ("llava_mole.analysis.conflict.cli", "measure whether the sources of a mixture pull weights apart"),
    "routing": ("llava_mole.serve.overlay.cli", "measure the routers of a run, or draw those of one image and prompt"),
    "plot": ("llava_mole.train.plot", "plot a run's metrics"),
    "prepare": ("llava_mole.data.prepare.cli", "convert a published data set, or your own, for training"),
    "check-data": ("llava_mole.analysis.check.cli", "check every record and image of a run before it starts"),
    "prepare-benchmark": ("llava_mole.eval.prepare", "convert a benchmark's official files to questions"),
    "convert": ("llava_mole.interop.cli", "import LLaVA and Hugging Face checkpoints, or export ours"),
    "consolidate": ("llava_mole.train.consolidate", "make one checkpoint of the pieces that ranks wrote"),
    "compose": ("llava_mole.interop.compose.cli", "make one LoRA of several, by a search on a few examples"),
    "inspect": ("llava_mole.interop.inspect.cli", "show what a directory or weight file is and contains"),
    "completion": ("llava_mole.common.completion", "print a script that lets Tab complete commands: bash, zsh, fish"),
}
"""Name -> module with `main(argv)`, and its line in the help."""


def usage() -> str:
    """The text of `llava-mole --help`."""
    lines = [f"llava-mole {__version__}", "", "usage: llava-mole COMMAND [ARGUMENTS]", "", "commands:"]
    lines += [f"  {name:<18}{text}" for name, (_, text) in SUBCOMMANDS.items()]
    return "\n".join([*lines, "", "`llava-mole COMMAND --help` lists a command's arguments."])


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand named by `argv[0]` with the remaining arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if arguments[0] not in SUBCOMMANDS:
        meant = nearest(arguments[0], SUBCOMMANDS)
        suggested = f", did you mean {meant}?" if meant else ""
        raise ConfigError(f"no command {arguments[0]!r}{suggested}; there are {', '.join(SUBCOMMANDS)}")
    quieten_libraries()
    module = importlib.import_module(SUBCOMMANDS[arguments[0]][0])
    return int(module.main(arguments[1:]) or 0)


if __name__ == "__main__":
    raise SystemExit(main())

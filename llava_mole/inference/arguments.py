"""The command-line options for loading a model and decoding its answers: every command words them alike.

Importing this file takes milliseconds, so that `--help` does not wait for PyTorch.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_mole.common.text import whole_number
from llava_mole.inference.decoding import DEVICES, DTYPES

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor


def add_loading_arguments(parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int) -> None:
    """Add the options for loading a model and decoding its answers, with a command's own defaults."""
    add = parser.add_argument
    add("--model-base", metavar="DIR", help="language model, if it has moved since training")
    add("--vision-tower", metavar="DIR", help="open_clip vision tower, if it has moved since training")
    add("--conv-mode", metavar="TEMPLATE", help="conversation template (default: the checkpoint's)")
    add(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=f"0 is greedy; above 0, tokens are sampled (default {temperature:g})",
    )
    add("--top-p", "--top_p", type=float, metavar="P", help="sample only within this probability mass (default 1)")
    add(
        "--max-new-tokens",
        "--max_new_tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"longest answer in tokens (default {max_new_tokens})",
    )
    add("--device", default="auto", choices=DEVICES, help="default auto: the GPU if there is one")
    add("--dtype", default="float32", choices=DTYPES, help="default float32; bfloat16 is for GPUs")
    group = parser.add_mutually_exclusive_group()
    for name, value, text in (
        ("4bit", "4bit", "load the language model in 4 bits (default: as in training)"),
        ("8bit", "8bit", "load the language model in 8 bits"),
        ("full", "none", "load the language model unquantised"),
    ):
        group.add_argument(f"--load-{name}", dest="quantization", action="store_const", const=value, help=text)


def add_listening_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Add the address that a server listens at, with its own default port."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)"
    )
    parser.add_argument(
        "--port", type=int, default=port, metavar="N", help=f"port to listen at (default {port}; 0: any free one)"
    )


def add_limits(parser: argparse.ArgumentParser, limits: Sequence[tuple[str, int, str]]) -> None:
    """Add a group of limits, each a name, its default and what it bounds."""
    group = parser.add_argument_group("limits")
    for name, value, text in limits:
        group.add_argument(f"--{name}", type=whole_number, default=value, metavar="N", help=f"{text} (default {value})")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `add_loading_arguments` and the options of commands that answer many questions and write files."""
    add_loading_arguments(parser, temperature=0.0, max_new_tokens=128)
    add = parser.add_argument
    add("--num-beams", "--num_beams", type=int, default=1, metavar="N", help="beams of beam search (default 1: none)")
    add("--batch-size", type=whole_number, default=16, metavar="N", help="questions per forward pass (default 16)")
    add("--overwrite", action="store_true", help="replace existing output files")
    add("--break-lock", action="store_true", help="take over the answers file's lock of a process on another machine")


def load_predictor(model_path: str, args: argparse.Namespace) -> "Predictor":
    """The model that the options of `add_model_arguments` describe."""
    from llava_mole.inference.predictor import Predictor

    return Predictor.from_pretrained(
        model_path,
        model_base=args.model_base,
        vision_tower=args.vision_tower,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        template=args.conv_mode,
    )

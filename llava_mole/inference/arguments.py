"""The command-line options for loading a model and decoding its answers: every command words them alike.

Importing this file takes milliseconds, so that `--help` does not wait for PyTorch.
"""

import argparse
from typing import TYPE_CHECKING

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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `add_loading_arguments` and the options of commands that answer many questions and write files."""
    add_loading_arguments(parser, temperature=0.0, max_new_tokens=128)
    add = parser.add_argument
    add("--num-beams", "--num_beams", type=int, default=1, metavar="N", help="beams of beam search (default 1: none)")
    add("--batch-size", type=_batch_size, default=16, metavar="N", help="questions per forward pass (default 16)")
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


def _batch_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)

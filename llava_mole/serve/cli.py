"""Chat about an image in the terminal; answers appear as they are generated.

    python -m llava_mole.serve.cli --model-path RUN --image-file photo.png

The image belongs to the first turn. An empty line, Ctrl-D or Ctrl-C ends the chat. Questions can also be piped in, or
given with `--prompt`; several of them are the turns of one conversation.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llava_mole.common.errors import DataError, command
from llava_mole.common.log import setup_logging
from llava_mole.conversation import Turn
from llava_mole.data.images import open_image
from llava_mole.inference.arguments import add_loading_arguments, load_predictor
from llava_mole.inference.decoding import Decoding

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with LLaVA's names and defaults."""
    parser = argparse.ArgumentParser(prog="llava-mole chat", description=__doc__.split("\n")[0])
    parser.add_argument("--model-path", required=True, metavar="DIR", help="run directory or checkpoint")
    parser.add_argument("--image-file", required=True, metavar="FILE", help="image to talk about")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="ask this instead of reading lines; repeatable"
    )
    add_loading_arguments(parser, temperature=0.2, max_new_tokens=512)
    return parser.parse_args(argv)


def check_image(name: str) -> None:
    """Raise DataError for a URL or a file that is not an image, before the model is loaded."""
    if "://" in name:
        raise DataError(f"--image-file {name}: addresses are not opened; download the image and give its path")
    open_image(name)


def questions_from(prompts: Sequence[str] | None) -> Iterator[str]:
    """The user's turns: the given prompts, or else lines of the terminal or a pipe up to an empty line or the end.

    Every turn is printed, unless the user typed it in the terminal.
    """
    if prompts is not None:
        for prompt in prompts:
            print(f"USER: {prompt}")
            yield prompt
        return
    typed = sys.stdin.isatty()
    while True:
        try:
            line = input("USER: ") if typed else sys.stdin.readline().rstrip("\r\n")
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise DataError(f"the input is not text in {error.encoding}: {error.reason}") from None
        if not line.strip():
            return
        if not typed:
            print(f"USER: {line}")
        yield line


def chat(predictor: "Predictor", image, questions: Iterator[str], decoding: Decoding) -> None:
    """Answer the questions one by one on stdout; each one sees the turns before it."""
    turns: list[Turn] = []
    for question in questions:
        turns.append(Turn("user", question))
        print("ASSISTANT: ", end="", flush=True)
        answer = ""
        pieces = predictor.stream(
            image,
            turns,
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
        )
        for piece in pieces:
            print(piece, end="", flush=True)
            answer += piece
        print(flush=True)
        turns.append(Turn("assistant", answer))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Load the model, then chat."""
    args = parse_arguments(argv)
    setup_logging()
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p)
    check_image(args.image_file)
    predictor = load_predictor(args.model_path, args)
    origin = "as asked for" if args.conv_mode else "as stored in the checkpoint"
    quantization = predictor.loaded.quantization
    base = "" if quantization == "none" else f"   language model in {quantization}"
    print(f"model: {predictor.loaded.path}   template: {predictor.template.name} ({origin}){base}", flush=True)
    try:
        chat(predictor, args.image_file, questions_from(args.prompt), decoding)
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

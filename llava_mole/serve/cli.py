"""Chat about an image in the terminal: answers appear as they are generated.

    python -m llava_mole.serve.cli --model-path RUN --image-file photo.png

The image belongs to the first turn. An empty line, Ctrl-D or Ctrl-C ends the chat. Lines may also be piped in, and
`--prompt` (repeatable: the turns of one conversation) asks without reading any.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llava_mole.common.errors import DataError, command
from llava_mole.common.log import setup_logging
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import add_quantization_arguments

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with LLaVA's names and defaults."""
    parser = argparse.ArgumentParser(prog="llava-mole chat", description=__doc__.split("\n")[0])
    parser.add_argument("--model-path", required=True, metavar="DIR", help="run directory or checkpoint")
    parser.add_argument("--model-base", metavar="DIR", help="language model, where it has moved since training")
    parser.add_argument("--image-file", required=True, metavar="FILE")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="ask this instead of reading lines; repeatable"
    )
    parser.add_argument("--conv-mode", metavar="TEMPLATE", help="default: the template stored in the checkpoint")
    parser.add_argument("--temperature", type=float, default=0.2, help="default 0.2; 0 is greedy")
    parser.add_argument("--top-p", "--top_p", type=float)
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=512)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is for GPUs")
    add_quantization_arguments(parser)
    return parser.parse_args(argv)


def read_image(name: str):
    """The image as RGB. Raises DataError for an address on the network or a file that is no image."""
    if "://" in name:
        raise DataError(f"--image-file {name}: addresses are not opened; download the image and give its path")
    from llava_mole.data.images import open_image

    return open_image(name)


def questions_from(prompts: Sequence[str] | None) -> Iterator[str]:
    """The user's turns: the given ones, or lines from the terminal or a pipe until an empty one or the end.

    Every turn stands in the output, also where it was not typed there.
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
    """Answer one question after the other on stdout; each sees the turns before it."""
    from llava_mole.conversation import Turn

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
    """Load, then chat."""
    args = parse_arguments(argv)
    setup_logging()
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p)
    image = read_image(args.image_file)
    from llava_mole.inference.predictor import Predictor

    predictor = Predictor.from_pretrained(
        args.model_path,
        model_base=args.model_base,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        template=args.conv_mode,
    )
    origin = "as asked for" if args.conv_mode else "as stored in the checkpoint"
    quantization = predictor.loaded.config.model.quantization
    base = "" if quantization == "none" else f"   language model in {quantization}"
    print(f"model: {predictor.loaded.path}   template: {predictor.template.name} ({origin}){base}", flush=True)
    try:
        chat(predictor, image, questions_from(args.prompt), decoding)
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

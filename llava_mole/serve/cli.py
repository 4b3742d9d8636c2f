"""Chat in the terminal, with or without images; answers appear as they are generated.

    llava-mole chat --model-path RUN --image-file photo.png

The images belong to the first question. `/help` lists the commands; an empty line, Ctrl-D or `/quit` ends the chat, and
Ctrl-C stops an answer. Questions can also be piped in, or given with `--prompt`; several of them are the turns of one
conversation.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_mole.common.errors import ConfigError, UserError, command
from llava_mole.common.log import setup_logging
from llava_mole.common.text import count_of
from llava_mole.inference.arguments import add_loading_arguments, load_predictor
from llava_mole.inference.decoding import Decoding
from llava_mole.serve.terminal import Lines, default_history, has_colors, paint_routing, printable

if TYPE_CHECKING:
    from llava_mole.serve.session import Session

HELP = {
    "/help": "this list",
    "/image FILE": "show an image with the next question; repeat it for several",
    "/system [TEXT]": "replace the system text, or show it",
    "/retry": "answer the last question again",
    "/reset": "forget the conversation",
    "/save FILE": "write the conversation as a record in LLaVA's form (JSON)",
    "/expert K": "let every token use expert K (from 0); /expert off lets the router choose again",
    "/routing [LAYER]": "show the last answer with each token in the colour of its expert",
    "/quit": "leave",
}
"""The commands. A question that begins with a slash is written with two."""
LEAVING = "/help lists the commands, Ctrl-C stops an answer; leave with /quit, Ctrl-D or an empty line"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with LLaVA's names and defaults."""
    parser = argparse.ArgumentParser(prog="llava-mole chat", description=__doc__.split("\n")[0])
    parser.add_argument("--model-path", required=True, metavar="DIR", help="run directory or checkpoint")
    parser.add_argument(
        "--image-file", action="append", default=[], metavar="FILE", help="image to talk about; repeatable"
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="ask this instead of reading lines; repeatable"
    )
    parser.add_argument(
        "--history-file", type=Path, metavar="FILE", help=f"where typed lines are kept (default {_home_as_tilde()})"
    )
    add_loading_arguments(parser, temperature=0.2, max_new_tokens=512)
    return parser.parse_args(argv)


def _home_as_tilde() -> str:
    path = default_history()
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


class Chat:
    """Carries out lines: questions and commands.

    With `patient`, for a chat that a person types, mistakes are reported and Ctrl-C stops an answer only. Otherwise
    both are raised.
    """

    def __init__(self, session: "Session", *, patient: bool) -> None:
        self.session, self._patient = session, patient
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "image": self._image,
            "system": self._system,
            "retry": self._retry,
            "reset": self._reset,
            "save": self._save,
            "expert": self._expert,
            "routing": self._routing,
        }

    def ask(self, question: str) -> None:
        """Answer a question on stdout. Raises UserError if it cannot be asked."""
        dropped = self.session.make_room(question)
        if dropped:
            rounds = count_of(dropped, "question")
            print(f"(the context is full: the oldest {rounds} and answers were dropped)", flush=True)
        print("ASSISTANT: ", end="", flush=True)
        try:
            with contextlib.closing(self.session.ask(question)) as pieces:
                for piece in pieces:
                    print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        except KeyboardInterrupt:
            if not self._patient:
                raise
            print(" (stopped)", end="")
        print(flush=True)

    def line(self, line: str) -> bool:
        """Carry out a line. Returns whether the chat goes on. Raises UserError for a mistake, unless `patient`."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                word, _, argument = line[1:].partition(" ")
                if word.lower() in ("quit", "exit"):
                    return False
                if word.lower() not in self._commands:
                    raise ConfigError(f"there is no command /{word}; /help lists them, and // begins a plain slash")
                self._commands[word.lower()](argument.strip())
            else:
                self.ask(line.removeprefix("/") if line.startswith("//") else line)
        except UserError as error:
            if not self._patient:
                raise
            print(f"note: {getattr(error, 'problem', None) or error}", file=sys.stderr, flush=True)
        return True

    def _help(self, argument: str) -> None:
        for name, text in HELP.items():
            print(f"  {name:<18}{text}")

    def _image(self, argument: str) -> None:
        if not argument:
            raise ConfigError("/image needs a file: /image photo.png")
        self.session.add_image(os.path.expanduser(argument))  # a Path would merge the slashes of an address
        print(f"({count_of(len(self.session.pending), 'image')} with the next question)")

    def _system(self, argument: str) -> None:
        if argument:
            self.session.set_system(argument)
        own = self.session.predictor.template
        shown = self.session.system or (own.system or own.first_text_prefix).strip() or "none"
        print(f"(system text: {shown})")

    def _retry(self, argument: str) -> None:
        question = self.session.take_back()
        print(f"USER: {question}")
        self.ask(question)

    def _reset(self, argument: str) -> None:
        self.session.reset()
        images = count_of(len(self.session.pending), "image")
        print(f"(the conversation is forgotten; {images} with the next question)")

    def _save(self, argument: str) -> None:
        if not argument:
            raise ConfigError("/save needs a file: /save talk.json")
        path = Path(argument).expanduser()
        self.session.save(path)
        print(f"(saved to {path})")

    def _expert(self, argument: str) -> None:
        if not argument.isdecimal() and argument not in ("off", ""):
            raise ConfigError(f"/expert {argument}: give the number of an expert, from 0, or off")
        if argument:
            self.session.set_expert(int(argument) if argument.isdecimal() else None)
        expert = self.session.expert
        print("(the router chooses the experts)" if expert is None else f"(every token uses expert {expert})")

    def _routing(self, argument: str) -> None:
        routing = self.session.routing().part("answer")
        if argument and not (argument.isdecimal() and int(argument) < len(routing.experts)):
            raise ConfigError(f"/routing {argument}: the layers with experts are 0 to {len(routing.experts) - 1}")
        print(paint_routing(routing, int(argument) if argument else None, colors=has_colors()))


def chat(session: "Session", lines: Lines) -> None:
    """Carry out lines up to an empty one, `/quit` or the end; two Ctrl-C in a row also end a typed chat."""
    doing, interrupted = Chat(session, patient=lines.typed), False
    while True:
        try:
            line = lines.read()
            interrupted = False
            if line is None or not line.strip():
                return
            if not lines.typed:
                print(f"USER: {line}")
            if not doing.line(line):
                return
        except KeyboardInterrupt:
            if interrupted or not lines.typed:
                raise
            interrupted = True
            print("\n(Ctrl-C again, /quit or Ctrl-D leaves)")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Load the model, then chat."""
    args = parse_arguments(argv)
    setup_logging()
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p)
    from llava_mole.serve.session import Session, check_image

    for name in args.image_file:
        check_image(name)
    predictor = load_predictor(args.model_path, args)
    origin = "as asked for" if args.conv_mode else "as stored in the checkpoint"
    quantization = predictor.loaded.quantization
    base = "" if quantization == "none" else f"   language model in {quantization}"
    print(f"model: {predictor.loaded.path}   template: {predictor.template.name} ({origin}){base}", flush=True)
    session = Session(predictor, args.image_file, decoding)
    try:
        if args.prompt is not None:
            for prompt in args.prompt:
                print(f"USER: {prompt}")
                Chat(session, patient=False).ask(prompt)
            return 0
        lines = Lines([name.partition(" ")[0] for name in HELP], args.history_file or default_history())
        if lines.typed:
            print(LEAVING, flush=True)
        with lines.editing():
            chat(session, lines)
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The terminal side of the chat: lines with editing and history, or from a pipe, and text in colours."""

import contextlib
import glob
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mole.common.figures import COLORS
from llava_mole.common.text import count_of

if TYPE_CHECKING:
    from llava_mole.inference.token_routing import TokenRouting

HISTORY_LINES = 1000
_BAD_BYTES = re.compile("[\udc80-\udcff]")
"""What undecodable bytes become under `surrogateescape`."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Lines:
    """The user's lines: typed, with editing, history and completion of commands, or piped.

    Args:
        commands: Words that begin with `/`, for completion.
        history: File that keeps the typed lines; None keeps none.
    """

    def __init__(self, commands: Sequence[str], history: Path | None) -> None:
        self.typed = sys.stdin.isatty()
        self._commands, self._history = list(commands), history
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")

    @contextlib.contextmanager
    def editing(self) -> Iterator[None]:
        """Keep history and complete words inside the block, if lines are typed and this Python has readline."""
        readline: Any = None
        if self.typed and sys.stdin is sys.__stdin__:
            with contextlib.suppress(ImportError):
                readline = importlib.import_module("readline")
        if readline is None:
            yield
            return
        readline.set_completer(self._complete)
        readline.set_completer_delims(" \t\n")
        bind = "bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete"
        readline.parse_and_bind(bind)
        readline.set_history_length(HISTORY_LINES)
        if self._history is not None:
            with contextlib.suppress(OSError):
                readline.read_history_file(self._history)
        try:
            yield
        finally:
            if self._history is not None:
                with contextlib.suppress(OSError):  # a home that cannot be written to is no reason to fail
                    self._history.parent.mkdir(parents=True, exist_ok=True)
                    self._history.touch(mode=0o600)
                    readline.write_history_file(self._history)

    def read(self) -> str | None:
        """The next line; None at the end. Bytes that are no text are reported and left out.

        A line of which nothing is left then is skipped. Raises KeyboardInterrupt for Ctrl-C.
        """
        while True:
            try:
                line = input("USER: ") if self.typed else sys.stdin.readline()
            except EOFError:
                print()
                return None
            if not line and not self.typed:
                return None
            line = line.rstrip("\r\n")
            clean, bad = _BAD_BYTES.subn("", line)
            if not bad:
                return line
            print(f"note: ignored {count_of(bad, 'byte')} of a line that is no text in UTF-8", file=sys.stderr)
            if clean.strip():
                return clean

    def _complete(self, word: str, state: int) -> str | None:
        import readline

        if readline.get_begidx() == 0:
            found = [f"{command} " for command in self._commands if command.startswith(word)]
        else:
            paths = sorted(glob.glob(glob.escape(os.path.expanduser(word)) + "*"))
            found = [path + "/" if os.path.isdir(path) else path for path in paths]
        return found[state] if state < len(found) else None


def default_history() -> Path:
    """Where typed lines are kept between chats."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "llava_mole" / "chat_history"


def printable(text: str) -> str:
    """A model's text without characters that would control the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def has_colors() -> bool:
    """Whether standard output shows colours."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")


def paint_routing(routing: "TokenRouting", layer: int | None, *, colors: bool) -> str:
    """The answer with each token in the colour of its expert, or followed by its number, and a legend."""
    experts = routing.of_layer(layer)
    tokens = list(zip(routing.pieces, experts, strict=True))
    where = "the expert that most layers use" if layer is None else f"layer {layer}"
    legend = []
    for expert in range(routing.num_experts):
        name = f"expert {expert}"
        share = f"{100 * experts.count(expert) / max(1, len(experts)):.0f}%"
        legend.append(f"{_paint(f' {name} ', expert)} {share}" if colors else f"{name} {share}")
    if colors:
        text = "".join(_paint(printable(piece), expert) for piece, expert in tokens)
    else:
        text = "".join(f"{printable(piece)}[{expert}]" for piece, expert in tokens)
    return f"{text}\n{where}: {'   '.join(legend)}"


def _paint(text: str, expert: int) -> str:
    """Text on the expert's colour, line by line so that no line's rest is coloured."""
    red, green, blue = (int(COLORS[expert % len(COLORS)][n : n + 2], 16) for n in (1, 3, 5))
    ground = 16 + sum(round(value / 51) * step for value, step in ((red, 36), (green, 6), (blue, 1)))
    ink = 16 if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else 231
    return "\n".join(f"\x1b[48;5;{ground};38;5;{ink}m{line}\x1b[0m" if line else "" for line in text.split("\n"))

"""What a source of `llava-mole prepare` declares: what it reads, and its own command-line options."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_mole.data.prepare.defects import Defects
from llava_mole.data.prepare.samples import RawSample, Split


def option(text: str, *, metavar: str | None = None, parse: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """Metadata of a dataclass field that is also an option of the command line, `--like-this` for `like_this`.

    The field's type decides how the option is read: bool (a flag), int, Literal (one of its values), tuple of str or
    of a Literal (comma-separated).

    Args:
        text: Help for the option; the default is added to it.
        metavar: Name of the value in the help.
        parse: Reads a value of any other type; raises ValueError that says what is allowed.
    """
    return {"help": text, "metavar": metavar, "parse": parse}


TRAIN_SPLITS = "raw splits to train on"


@dataclass(frozen=True)
class SourceOptions:
    """Options of every source; a source with more of them derives its own class."""

    train_splits: tuple[Split, ...] = field(default=("train",), metadata=option(TRAIN_SPLITS))
    test_splits: tuple[Split, ...] = field(default=("test",), metadata=option("raw splits that become question files"))

    def wants(self, split: Split) -> bool:
        """Whether samples of a raw split are used at all."""
        return split in self.train_splits or split in self.test_splits


MultiImage = Literal["skip", "first", "keep"]
MULTI_IMAGE = "records with several images: leave out and count, use the first image, or keep all"


@dataclass(frozen=True)
class Source:
    """One source of `llava-mole prepare`."""

    name: str
    summary: str
    """One line for the list of sources; at most 77 columns."""
    expects: str
    """What lies below `--raw`, with the licence and known defects; the text of `prepare SOURCE --help`."""
    iterate: Callable[[Path, Any, Defects], Iterator[RawSample]]
    """Yields the usable samples below `--raw`, given an instance of `options`; counts the others."""
    options: type[SourceOptions] = SourceOptions
    embedded: bool = False
    """Whether images come inside the records, so that they must be unpacked and are decoded by default."""
    searches: bool = True
    """Whether it reads every file of a kind below `--raw`, so that the output must lie elsewhere."""
    image_folder: str = ""
    """Folder below `--raw` that image paths are relative to, if it exists; else they are relative to `--raw`."""
    questions_by_sub_source: bool = False
    """Whether each sub-source gets a question file of its own."""

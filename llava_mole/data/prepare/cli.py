"""`llava-mole prepare SOURCE`: convert a data set to a form that training opens at once; or write a small model."""

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llava_mole.common.errors import ConfigError, DataError, WeightsError, command, one_line
from llava_mole.common.text import HELP_WIDTH
from llava_mole.data.chat_template import check_template_name
from llava_mole.data.images import IMAGE_MODES
from llava_mole.data.prepare.files import unpack_archives
from llava_mole.data.prepare.samples import Source, SourceOptions
from llava_mole.data.prepare.sources import MODULES, get_module, get_source

MODELS = {"smollm2": "llava_mole.data.prepare.smollm2"}
"""Model -> module with `main(argv)` and `SUMMARY`."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the source that `argv[0]` names with the other arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0
    name, rest = arguments[0], arguments[1:]
    module = importlib.import_module(MODELS[name]) if name in MODELS else get_module(name)
    if hasattr(module, "main"):
        return int(module.main(rest) or 0)
    with one_line("`prepare` must be able to read --raw and to write --out and beside it"):
        return run(get_source(name), rest)


def help_text() -> str:
    """Return the text of `llava-mole prepare --help`: every source, and what it expects."""
    lines = [
        "usage: llava-mole prepare SOURCE --raw DIR --out DIR [ARGUMENTS]",
        "",
        "Converts a published data set, or your own, into OUT:",
        "  train/             the prepared set, for data.sources.<name>.annotations",
        "  images             the image folder, for data.sources.<name>.image_folder",
        "                     (a link if the images stay in place)",
        "  questions/*.jsonl  test splits, for llava-mole eval",
        "  report.json        counts beside the published ones",
        "  defects.jsonl      every record that was left out or repaired",
        "",
        "sources and what they expect in --raw:",
    ]
    for name in MODULES:
        module = get_module(name)
        lines.append(f"  {name:<20} {module.SUMMARY if hasattr(module, 'main') else get_source(name).summary}")
    lines += ["", "models, from an installed package to --out:"]
    lines += [f"  {name:<20} {importlib.import_module(module).SUMMARY}" for name, module in MODELS.items()]
    return "\n".join([*lines, "", "`llava-mole prepare SOURCE --help` lists a source's options and known defects."])


def make_parser(source: Source) -> argparse.ArgumentParser:
    """Return the argument parser of one source: the options of `prepare`, then the source's own."""
    parser = argparse.ArgumentParser(
        prog=f"llava-mole prepare {source.name}",
        allow_abbrev=False,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=HELP_WIDTH),
        description=f"{source.summary}\n\n{source.expects}",
    )
    add = parser.add_argument
    add("--raw", type=Path, required=True, metavar="DIR", help="the raw data; for your own data also a single file")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist yet")
    add("--overwrite", action="store_true", help="replace what an earlier call wrote to --out")
    add("--image-root", type=Path, metavar="DIR", help="folder that image paths are relative to (default: --raw)")
    add("--images", choices=("keep", "unpack"), help="leave image files in place (default), or copy each one, named by "
        "its hash; images inside records are always unpacked")  # fmt: skip
    add("--missing-images", choices=("drop", "error"), default="drop", help="leave out and count records without their "
        "image, or stop (default %(default)s)")  # fmt: skip
    add("--check-images", choices=("exist", "decode", "none"), default="decode" if source.embedded else "exist",
        help="check that each file exists, decode it, or check nothing (default %(default)s)")  # fmt: skip
    add("--image-modes", choices=IMAGE_MODES, default="llava", help="data.image_modes of the runs: strict leaves out "
        "deep and transparent images; all report them if images are decoded (default %(default)s)")  # fmt: skip
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that open images (default %(default)s)")
    add(
        "--unpack-archives",
        type=Path,
        metavar="DIR",
        help="unpack the zip and tar files of --raw into DIR and read DIR",
    )
    add("--tokenizer", metavar="DIR", help="count tokens now with the tokenizer in DIR, so that no run has to")
    add("--template", default="vicuna_v1", help="conversation template for --tokenizer (default %(default)s)")
    _add_options(parser, source.options)
    return parser


def _add_options(parser: argparse.ArgumentParser, options: type[SourceOptions]) -> None:
    """Add an option for each field of a source's options; its type decides how it is parsed, see `samples.option`."""
    defaults, types = options(), get_type_hints(options)
    for field in fields(options):
        flag, kind, default = "--" + field.name.replace("_", "-"), types[field.name], getattr(defaults, field.name)
        parse, text, metavar = (field.metadata[key] for key in ("parse", "help", "metavar"))
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        read: Callable[[str], Any] = int if kind is int else str
        choices = get_args(kind) if get_origin(kind) is Literal else None
        shown = default
        if get_origin(kind) is tuple:
            read = functools.partial(_parse_names, allowed=get_args(get_args(kind)[0]))
            metavar, shown = "NAME,...", ",".join(default)
        if parse or get_origin(kind) is tuple:
            read = functools.partial(_named_errors, flag, parse or read)
        text += f" (default {shown or 'none'})" if kind is not int else f" (default {shown})"
        parser.add_argument(flag, type=read, choices=choices, default=default, metavar=metavar, help=text)


def _named_errors(flag: str, parse: Callable[[str], Any], text: str) -> Any:
    """`parse(text)`. Raises ConfigError that names the option instead of a ValueError."""
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{flag} {text[:200]!r}: {error}") from None


def _parse_names(text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct names of a comma-separated text. Raises ValueError for one not `allowed` (empty: any)."""
    names = tuple(dict.fromkeys(name for name in text.split(",") if name))
    unknown = [name for name in names if allowed and name not in allowed]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(allowed)}")
    return names


def run(source: Source, argv: Sequence[str]) -> int:
    """Prepare one source and print its report."""
    given = make_parser(source).parse_args(argv)
    _check_arguments(source, given)
    from llava_mole.data.prepare.pipeline import IMAGES, QUESTIONS, TRAIN, Request, prepare
    from llava_mole.data.prepare.report import report_text

    raw = given.raw
    if given.unpack_archives is not None:
        unpack_archives(raw, given.unpack_archives)
        raw = given.unpack_archives
    image_folder = raw.parent if raw.is_file() else raw / source.image_folder
    request = Request(
        source=source,
        raw=raw,
        out=Path(os.path.realpath(given.out)),  # a link to another disk stays, and unfinished output lies there
        image_root=given.image_root or (image_folder if image_folder.is_dir() else raw),
        options=source.options(**{field.name: getattr(given, field.name) for field in fields(source.options)}),
        check=given.check_images,
        modes=given.image_modes,
        copy=given.images == "unpack",
        workers=given.workers,
        missing_images=given.missing_images,
        overwrite=given.overwrite,
    )
    if not request.image_root.is_dir():
        raise DataError(f"--image-root {request.image_root} is not a directory; image paths are relative to it")
    report = prepare(request)
    print(report_text(report))
    if (given.out / TRAIN).is_dir():
        print(f"\nannotations: {given.out / TRAIN}\nimage_folder: {given.out / IMAGES}")
        if given.follow_links:
            print("follow_links: true")
        if given.tokenizer is not None:
            from llava_mole.data.lengths import add_lengths
            from llava_mole.data.tokenization import load_tokenizer

            tokens = add_lengths(given.out / TRAIN, load_tokenizer(given.tokenizer), given.template)
            print(f"tokens: {tokens:,}, images not counted")
    for name, count in report["questions"].items():
        print(f"questions: {given.out / QUESTIONS / name}.jsonl ({count:,})")
    return 0


def _check_arguments(source: Source, given: argparse.Namespace) -> None:
    """Refuse arguments that cannot succeed, before the work."""
    if not given.raw.exists():
        raise DataError(f"--raw {given.raw} does not exist; `llava-mole prepare {source.name} --help` describes it")
    if given.out.name in ("", ".."):
        raise ConfigError(f"--out {given.out} names no folder of its own; unfinished output lies beside it")
    if given.workers < 1:
        raise ConfigError(f"--workers is {given.workers}; it must be at least 1")
    if given.images == "keep" and source.embedded:
        raise ConfigError(f"--images keep: the images of {source.name} are inside its records and must be unpacked")
    if given.image_modes == "strict" and given.check_images != "decode":
        raise ConfigError(
            f"--image-modes strict with --check-images {given.check_images}: only decoded pixels show what they are; "
            "give --check-images decode"
        )
    if given.tokenizer is not None:
        check_template_name(given.template)
        if not Path(given.tokenizer).is_dir():
            raise WeightsError(f"--tokenizer {given.tokenizer} is not a directory; name that of the language model")


if __name__ == "__main__":
    raise SystemExit(main())

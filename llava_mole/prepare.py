"""`llava-mole prepare SOURCE`: writes a data set to disk, in the form that training opens at once."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError, WeightsError, command, one_line
from llava_mole.data.chat_template import check_template_name
from llava_mole.data.converters.base import SPLITS, Converter, Options, Split, parse_upsample
from llava_mole.data.converters.registry import MODULES, get_converter

SOURCES = {"tiny": ("llava_mole.tiny.data", "the embedded default: three small domains, --out playground/data/tiny")}
"""Name -> module with its own `main(argv)`, and its line in the help; the other sources are converters."""
_USES_ONE_ROOT = ("ureader_images",)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the source that `argv[0]` names with the rest of the arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in SOURCES:
        return int(importlib.import_module(SOURCES[name][0]).main(rest) or 0)
    if name not in MODULES:
        raise ConfigError(f"no source {name!r} to prepare; there are {', '.join([*SOURCES, *MODULES])}")
    with one_line("`prepare` must be able to read --raw and to write --out and beside it"):
        return run(get_converter(name), rest)


def help_text() -> str:
    """The page of `llava-mole prepare --help`: every source, and what it expects."""
    lines = [
        "usage: llava-mole prepare SOURCE --raw DIR --out DIR [ARGUMENTS]",
        "",
        "Converts a data set as published, or your own, into OUT:",
        "  train/             the prepared set: data.sources.<name>.annotations",
        "  images             the image folder: data.sources.<name>.image_folder (a link where images stay in place)",
        "  questions/*.jsonl  test splits, for llava-mole eval",
        "  report.json        counts beside the published ones; defects.jsonl lists every record that was left out",
        "",
        "sources and what they expect in --raw:",
        *(f"  {name:<20} {text}" for name, (_, text) in SOURCES.items()),
        *(f"  {name:<20} {get_converter(name).summary}" for name in MODULES),
        "",
        "`llava-mole prepare SOURCE --help` has the details, the options and the known defects of a source.",
    ]
    return "\n".join(lines)


def make_parser(converter: Converter) -> argparse.ArgumentParser:
    """Arguments of one source."""
    embedded = converter.embedded
    parser = argparse.ArgumentParser(
        prog=f"llava-mole prepare {converter.name}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{converter.summary}\n\n{converter.expects}",
    )
    add = parser.add_argument
    add("--raw", type=Path, required=True, metavar="DIR", help="the data as published; for your own data also a file")
    add("--out", type=Path, required=True, metavar="DIR", help="what to write; must not exist yet")
    add("--overwrite", action="store_true", help="replace what an earlier call wrote to --out")
    add("--image-root", type=Path, metavar="DIR", help="what image paths are relative to (default: --raw)")
    add("--images", choices=("keep", "unpack"), help="leave image files in place (default), or copy each one under its "
        "hash; images inside records are always unpacked")  # fmt: skip
    add(
        "--missing-images", choices=("drop", "error"), default="drop", help="leave out and count, or stop (%(default)s)"
    )
    add("--check-images", choices=("exist", "decode", "none"), default="decode" if embedded else "exist",
        help="look for the file, decode it, or trust (default %(default)s)")  # fmt: skip
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes for images (default %(default)s)")
    add("--unpack-archives", type=Path, metavar="DIR", help="unpack the zip and tar files of --raw there and read that")
    add("--tokenizer", metavar="DIR", help="count tokens now, with the language model in DIR, so that no run has to")
    add("--template", default="vicuna_v1", help="conversation template that --tokenizer counts with (%(default)s)")
    add("--train-splits", default=",".join(converter.default_train_splits), metavar="NAME,...",
        help="raw splits to train on (%(default)s)")  # fmt: skip
    add("--test-splits", default="test", metavar="NAME,...", help="raw splits to ask questions of (%(default)s)")
    if converter.name in ("m3it", "ureader", "messages"):
        usual = "keep" if converter.name == "messages" else "skip"
        add("--multi-image", choices=("skip", "first", "keep"), default=usual,
            help="several images in a row: leave out and count, take the first, keep all (%(default)s)")  # fmt: skip
    if converter.name == "m3it":
        add("--seed", type=int, default=0, help="draws instructions for records without one (%(default)s)")
        add("--ignore-keys", default="", metavar="NAME,...", help="raw keys that hold nothing to train on")
    if converter.name == "ureader":
        add("--upsample", default="none", metavar="NAME=FACTOR,...", help="repeat sub-sources; `official` or `none`")
    if converter.name == "pathvqa":
        add("--closed-suffix", action="store_true", help="add LLaVA-Med's suffix to yes/no questions")
    if converter.name == "messages":
        add("--system", choices=("drop", "prepend"), default="drop", help="system prompts (%(default)s)")
    return parser


def run(converter: Converter, argv: Sequence[str]) -> int:
    """Prepare one source and print its report."""
    from llava_mole.data.converters.pipeline import IMAGES, QUESTIONS, TRAIN, Request, prepare
    from llava_mole.data.converters.published import report_text

    given = make_parser(converter).parse_args(argv)
    if not given.raw.exists():
        raise DataError(
            f"--raw {given.raw} does not exist; `llava-mole prepare {converter.name} --help` says what it is"
        )
    if given.out.name in ("", ".."):
        raise ConfigError(f"--out {given.out} names no folder of its own; what is unfinished lies beside it")
    if given.workers < 1:
        raise ConfigError(f"--workers is {given.workers}; it must be at least 1")
    if given.images == "keep" and converter.embedded:
        raise ConfigError(f"--images keep: the images of {converter.name} come in its records and must be unpacked")
    if given.tokenizer is not None:  # before the work, not after it
        check_template_name(given.template)
        if not Path(given.tokenizer).is_dir():
            raise WeightsError(f"--tokenizer {given.tokenizer} is no directory; name that of the language model")
    raw = given.raw if given.unpack_archives is None else _unpack(given.raw, given.unpack_archives)
    request = Request(
        source=converter.name,
        raw=raw,
        out=Path(os.path.realpath(given.out)),  # a link to another disk stays, and what is unfinished lies there
        image_root=given.image_root or _default_root(raw),
        options=_options(converter, given),
        check=given.check_images,
        copy=given.images == "unpack",
        workers=given.workers,
        missing_images=given.missing_images,
        overwrite=given.overwrite,
    )
    if not request.image_root.is_dir():
        raise DataError(f"--image-root {request.image_root} is no directory; image paths are relative to it")
    report = prepare(converter, request)
    print(report_text(report))
    if (given.out / TRAIN).is_dir():
        print(f"\nannotations: {given.out / TRAIN}\nimage_folder: {given.out / IMAGES}")
        if given.tokenizer is not None:
            print(f"tokens: {_count_tokens(given.out / TRAIN, given.tokenizer, given.template):,}, images not counted")
    for name, count in report["questions"].items():
        print(f"questions: {given.out / QUESTIONS / name}.jsonl ({count:,})")
    return 0


def _count_tokens(directory: Path, tokenizer: str, template: str) -> int:
    """Store the token counts of a prepared set in it; returns their sum."""
    from llava_mole.data.lengths import add_lengths
    from llava_mole.data.tokenization import load_tokenizer

    return add_lengths(directory, load_tokenizer(tokenizer), template)


def _options(converter: Converter, given: argparse.Namespace) -> Options:
    from llava_mole.data.converters.ureader import PRESETS

    values: dict[str, Any] = {
        "train_splits": _splits("--train-splits", given.train_splits),
        "test_splits": _splits("--test-splits", given.test_splits),
    }
    for name in ("seed", "multi_image", "closed_suffix", "system"):
        if hasattr(given, name):
            values[name] = getattr(given, name)
    if hasattr(given, "ignore_keys"):
        values["ignore_keys"] = tuple(key for key in given.ignore_keys.split(",") if key)
    if hasattr(given, "upsample"):
        values["upsample"] = parse_upsample(given.upsample, PRESETS)
    return Options(**values)


def _splits(option: str, text: str) -> tuple[Split, ...]:
    names = tuple(dict.fromkeys(name for name in text.split(",") if name))
    unknown = [name for name in names if name not in SPLITS]
    if unknown:
        raise ConfigError(f"{option} {text!r}: {unknown[0]!r} is no split; choose from {', '.join(SPLITS)}")
    return names  # type: ignore[return-value]


def _default_root(raw: Path) -> Path:
    """The folder of a file; the folder of images that UReader unpacks beside its JSON lines; else `--raw` itself."""
    if raw.is_file():
        return raw.parent
    return next((raw / name for name in _USES_ONE_ROOT if (raw / name).is_dir()), raw)


def _unpack(raw: Path, folder: Path) -> Path:
    from llava_mole.data.archives import is_archive, unpack_archive

    archives = sorted(path for path in raw.iterdir() if path.is_file() and is_archive(path)) if raw.is_dir() else [raw]
    if not archives or not is_archive(archives[0]):
        raise DataError(f"--unpack-archives: {raw} holds no zip or tar file")
    for archive in archives:
        unpack_archive(archive, folder)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())

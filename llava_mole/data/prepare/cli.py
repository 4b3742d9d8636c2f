"""`llava-mole prepare SOURCE`: writes a data set to disk, in the form that training opens at once."""

import argparse
import importlib
import lzma
import os
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from llava_mole.common.errors import ConfigError, DataError, WeightsError, command, one_line
from llava_mole.data.chat_template import check_template_name
from llava_mole.data.prepare.drafts import SPLITS, Converter, Options, Split, parse_upsample
from llava_mole.data.prepare.sources.registry import MODULES, get_converter

SOURCES = {
    "tiny": (
        "llava_mole.data.prepare.sources.tiny.world",
        "the embedded default: three small domains, --out playground/data/tiny",
    )
}
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
    from llava_mole.data.prepare.pipeline import IMAGES, QUESTIONS, TRAIN, Request, prepare
    from llava_mole.data.prepare.report import report_text

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
    from llava_mole.data.prepare.sources.ureader import PRESETS

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

    archives = sorted(path for path in raw.iterdir() if path.is_file() and is_archive(path)) if raw.is_dir() else [raw]
    if not archives or not is_archive(archives[0]):
        raise DataError(f"--unpack-archives: {raw} holds no zip or tar file")
    for archive in archives:
        unpack_archive(archive, folder)
    return folder


SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LARGEST_RATIO = 200
"""Bytes that an archive may hold for one of its own: more is a decompression bomb."""
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
)
_SMALL = 64 << 20
_BLOCK = 1 << 20


class _Header(tarfile.TarInfo):
    """A member's header. `tarfile` takes one that is damaged or cut for the end of the archive: here it is an error."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in the stubs
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset:,}") from None


class _Member(NamedTuple):
    name: str
    kind: str
    """`file`, `folder`, or what else it is."""
    open: "object"
    size: int


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive that `unpack_archive` reads."""
    return path.name.lower().endswith(SUFFIXES)


def unpack_archive(archive: Path, folder: Path) -> int:
    """Write the files of an archive below `folder` and return how many. Nothing is written if a name is refused.

    A second call finds `<folder>/.unpacked/<name>` and does nothing; an interrupted one is begun again.

    Raises:
        DataError: a member is absolute, climbs with `..`, is a link or a device, or two have one name; the archive is
            damaged, encrypted, or a decompression bomb.
    """
    done = folder / ".unpacked" / archive.name
    if done.is_file() and done.read_text(encoding="utf-8") == str(archive.stat().st_size):
        return 0
    try:
        with _open(archive) as opened:
            members = list(_members(opened, archive))
            _check(members, archive)
            count = 0
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit=" files", disable=None, delay=3.0):
                if member.kind == "file":
                    _write(opened, member, folder)
                    count += 1
    except _DAMAGE as error:
        raise DataError(f"{archive}: cannot be unpacked: {' '.join(str(error).split())}; download it again") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{archive}: cannot be unpacked: {reason}; is it damaged, or the disk full?") from None
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(str(archive.stat().st_size), encoding="utf-8")
    return count


def _open(archive: Path) -> zipfile.ZipFile | tarfile.TarFile:
    return zipfile.ZipFile(archive) if archive.suffix.lower() == ".zip" else tarfile.open(archive, tarinfo=_Header)


def _members(opened: zipfile.ZipFile | tarfile.TarFile, archive: Path) -> Iterator[_Member]:
    """Name, kind and size of every member; nothing is unpacked."""
    if isinstance(opened, zipfile.ZipFile):
        for info in opened.infolist():
            mode = info.external_attr >> 16
            kind = "folder" if info.is_dir() else "link" if stat.S_ISLNK(mode) else "file"
            yield _Member(info.filename, kind, info, info.file_size)
    else:
        total, most = 0, _most(archive)
        for entry in opened:
            kind = "file" if entry.isreg() else "folder" if entry.isdir() else "link" if _is_link(entry) else "device"
            total += entry.size
            if total > most:  # now, since reading a compressed tar's names means decompressing it
                raise _bomb(archive, total)
            yield _Member(entry.name, kind, entry, entry.size)
        # Compressed files are checked at their very end, which lies behind the last member.
        while opened.fileobj is not None and (rest := opened.fileobj.read(_BLOCK)):
            if rest.strip(b"\0"):  # a hole in a download is zeros, too, and looks like the end
                raise tarfile.ReadError("more data behind its end")
            total += len(rest)
            if total > most:
                raise _bomb(archive, total)


def _is_link(entry: tarfile.TarInfo) -> bool:
    return entry.issym() or entry.islnk()


def _check(members: list[_Member], archive: Path) -> None:
    seen: set[str] = set()
    for member in members:
        name = member.name.replace("\\", "/")
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or ":" in parts[0] or "\0" in name:
            raise DataError(f"{archive}: member {member.name[:100]!r} would be written elsewhere; nothing was unpacked")
        if member.kind not in ("file", "folder"):
            raise DataError(f"{archive}: member {member.name[:100]!r} is a {member.kind}; nothing was unpacked")
        if member.kind == "file":
            if name in seen:
                raise DataError(f"{archive}: two members are called {member.name[:100]!r}; nothing was unpacked")
            seen.add(name)
    total = sum(member.size for member in members)
    if total > _most(archive):
        raise _bomb(archive, total)


def _most(archive: Path) -> int:
    return max(_SMALL, LARGEST_RATIO * archive.stat().st_size)


def _bomb(archive: Path, total: int) -> DataError:
    return DataError(
        f"{archive}: {total:,} bytes or more from {archive.stat().st_size:,}, a decompression bomb; nothing was "
        "unpacked"
    )


def _write(opened: zipfile.ZipFile | tarfile.TarFile, member: _Member, folder: Path) -> None:
    """Write one file beside its name, and no more bytes than the archive said."""
    target = folder / member.name.replace("\\", "/")
    home = os.path.realpath(folder)
    if os.path.commonpath([os.path.realpath(target.parent), home]) != home:
        raise DataError(f"{target}: a link leads out of {folder}; unpack into a folder without links")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    source: IO[bytes] | None
    if isinstance(opened, zipfile.ZipFile):
        source = opened.open(member.open)  # type: ignore[arg-type]
    else:
        source = opened.extractfile(member.open)  # type: ignore[arg-type]
    if source is None:
        raise DataError(f"{target}: the archive holds no bytes for it; download it again")
    with source, temporary.open("wb") as file:
        shutil.copyfileobj(source, file, _BLOCK)
    os.replace(temporary, target)


if __name__ == "__main__":
    raise SystemExit(main())

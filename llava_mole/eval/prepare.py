"""`llava-mole prepare-benchmark NAME --raw DIR`: convert a benchmark's official files to a question file with answers.

Images stay where they are. `prepared.json` beside the questions records where that is, and what was converted.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from llava_mole.common.errors import ConfigError, DataError, command
from llava_mole.common.files import refuse_existing, sha256_of, write_json, write_text
from llava_mole.eval.benchmarks.benchmark import DATA_ROOT, PREPARED, Benchmark, BenchmarkQuestions, load_questions
from llava_mole.eval.benchmarks.official import CONVERTERS
from llava_mole.eval.benchmarks.registry import get_benchmark, list_benchmarks
from llava_mole.eval.scoring.score import check_scorable

SOURCES_LISTED = 50
"""Limit on the files whose checksums are recorded."""


def _checked(benchmark: Benchmark, text: str, path: Path, images: Path) -> BenchmarkQuestions:
    """Return the questions as they will be read back from `path`, which is not written yet.

    Raises:
        DataError: they cannot be read or scored.
    """
    with TemporaryDirectory() as folder:
        staged = Path(folder) / path.name
        write_text(staged, text)
        try:
            loaded = load_questions(benchmark, files=[str(staged)], image_folder=images)
            try:
                check_scorable(loaded)
            except ConfigError as error:  # scoring needs a package that preparing does not
                print(f"note: scoring was not tried: {error}")
        except DataError as error:
            raise DataError(f"{str(error).replace(str(staged), str(path))}; it was not written") from None
    return loaded


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert, check by reading back, write, and print what was written."""
    parser = argparse.ArgumentParser(
        prog="llava-mole prepare-benchmark",
        description=__doc__.split("\n")[0],
        epilog=f"benchmarks: {', '.join(list_benchmarks())}",
    )
    add = parser.add_argument
    add("benchmark", metavar="NAME", help="benchmark: a name, or a YAML file")
    add("--raw", required=True, metavar="DIR", help="folder of the official files")
    add("--out", metavar="DIR", help=f"where to write the questions (default: below {DATA_ROOT})")
    add("--overwrite", action="store_true", help="replace an existing question file")
    args = parser.parse_args(argv)
    benchmark = get_benchmark(args.benchmark)
    if benchmark.data.converter is None:
        raise ConfigError(f"benchmark {benchmark.name} needs no conversion: {benchmark.data.source}")
    raw = Path(args.raw)
    if not raw.is_dir():
        raise DataError(f"--raw {raw}: no such directory; {benchmark.name} needs {benchmark.data.source}")
    out = Path(args.out) if args.out else DATA_ROOT / benchmark.data.folder
    path = out / benchmark.data.questions[0]
    if path.exists() and not args.overwrite:
        raise ConfigError(f"{path} exists; give --overwrite to replace it, or another --out")
    refuse_existing(path, overwrite=True)
    converted = CONVERTERS[benchmark.data.converter](raw, benchmark.data.options)
    if not converted.lines:
        raise DataError(f"{', '.join(map(str, converted.sources)) or raw}: no questions in it")
    text = "".join(json.dumps(line) + "\n" for line in converted.lines)
    loaded = _checked(benchmark, text, path, converted.images)
    write_text(path, text)
    groups = Counter(question.group for question in loaded.questions)
    report = {
        "benchmark": benchmark.name,
        "converter": benchmark.data.converter,
        "options": benchmark.data.options,
        "image_folder": str(converted.images.resolve()),
        "questions": len(loaded.questions),
        "groups": dict(groups),
        "fingerprint": loaded.fingerprint(),
        "sources": {str(source): sha256_of(source) for source in converted.sources[:SOURCES_LISTED]},
        "remarks": converted.remarks,
    }
    write_json(out / PREPARED, report)
    print(f"{path}: {len(loaded.questions)} questions ({', '.join(f'{g} {n}' for g, n in groups.items())})")
    print(f"images: {converted.images}")
    if benchmark.data.count not in (None, len(loaded.questions)):
        print(f"note: the complete {benchmark.title} has {benchmark.data.count} questions")
    for remark in converted.remarks:
        print(f"note: {remark}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

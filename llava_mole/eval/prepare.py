"""`llava-mole prepare-benchmark NAME --raw DIR`: the official files of a benchmark as a question file with its answers.

Images stay where they are: `prepared.json` beside the questions says where, what was converted and how much.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from llava_mole.common.errors import ConfigError, DataError, command
from llava_mole.eval.answers import write_text_atomically
from llava_mole.eval.benchmarks.benchmark import (
    DATA_ROOT,
    PREPARED,
    Benchmark,
    BenchmarkQuestions,
    get_benchmark,
    list_benchmarks,
    load_questions,
)
from llava_mole.eval.benchmarks.official import CONVERTERS
from llava_mole.eval.scoring.score import check_scorable, file_digest

SOURCES_LISTED = 50


def _checked(benchmark: Benchmark, text: str, path: Path, images: Path) -> BenchmarkQuestions:
    """The questions as they will be read back from `path`, which stays as it is until all is well.

    Raises:
        DataError: they cannot be read, or not be scored.
    """
    with TemporaryDirectory() as folder:
        staged = Path(folder) / path.name
        write_text_atomically(staged, text)
        try:
            loaded = load_questions(benchmark, files=[str(staged)], image_folder=images)
            try:
                check_scorable(loaded)
            except ConfigError as error:  # a package is missing that scoring needs, preparing does not
                print(f"note: not tried to score: {error}")
        except DataError as error:
            raise DataError(f"{str(error).replace(str(staged), str(path))}; it was not written") from None
    return loaded


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert, check by reading back, say what is there."""
    parser = argparse.ArgumentParser(
        prog="llava-mole prepare-benchmark",
        description=__doc__.split("\n")[0],
        epilog=f"benchmarks: {', '.join(list_benchmarks())}",
    )
    parser.add_argument("benchmark", metavar="NAME", help="a benchmark, or its YAML file")
    parser.add_argument("--raw", required=True, metavar="DIR", help="where the official files lie")
    parser.add_argument("--out", metavar="DIR", help="default: the benchmark's folder below playground/data")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing question file")
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
    converted = CONVERTERS[benchmark.data.converter](raw, benchmark.data.options)
    if not converted.lines:
        raise DataError(f"{', '.join(map(str, converted.sources)) or raw}: no questions in it")
    text = "".join(json.dumps(line) + "\n" for line in converted.lines)
    loaded = _checked(benchmark, text, path, converted.images)
    write_text_atomically(path, text)
    groups = Counter(question.domain for question in loaded.questions)
    report = {
        "benchmark": benchmark.name,
        "converter": benchmark.data.converter,
        "options": benchmark.data.options,
        "image_folder": str(converted.images.resolve()),
        "questions": len(loaded.questions),
        "groups": dict(groups),
        "fingerprint": loaded.fingerprint(),
        "sources": {str(source): file_digest([source]) for source in converted.sources[:SOURCES_LISTED]},
        "remarks": converted.remarks,
    }
    write_text_atomically(out / PREPARED, json.dumps(report, indent=2) + "\n")
    print(f"{path}: {len(loaded.questions)} questions ({', '.join(f'{g} {n}' for g, n in groups.items())})")
    print(f"images: {converted.images}")
    if benchmark.data.count not in (None, len(loaded.questions)):
        print(f"note: the complete {benchmark.title} has {benchmark.data.count} questions")
    for remark in converted.remarks:
        print(f"note: {remark}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`llava-mole score ANSWERS --benchmark NAME`: scores answers that exist, or writes the file that a server scores."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_mole.common.errors import ConfigError, command
from llava_mole.eval.answers import read_answers, write_bytes_atomically, write_text_atomically
from llava_mole.eval.benchmarks.benchmark import DATA_ROOT, get_benchmark, list_benchmarks, load_questions
from llava_mole.eval.benchmarks.submission import WRITERS
from llava_mole.eval.questions import parse_named_file
from llava_mole.eval.scoring.score import (
    SCORE_SUFFIX,
    check_answers,
    check_outputs,
    dump_scores,
    file_digest,
    format_benchmark,
    score_benchmark,
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Score, print, write."""
    parser = argparse.ArgumentParser(
        prog="llava-mole score",
        description=__doc__.split("\n")[0],
        epilog=f"benchmarks: {', '.join(list_benchmarks())}",
    )
    parser.add_argument("answers", nargs="+", metavar="ANSWERS", help="answers file; all chunks' files if several")
    parser.add_argument("--benchmark", required=True, metavar="NAME", help="a benchmark, or its YAML file")
    parser.add_argument("--questions", nargs="+", metavar="[GROUP=]FILE", help="in place of the benchmark's own")
    parser.add_argument("--data-root", default=str(DATA_ROOT), metavar="DIR", help=f"default {DATA_ROOT}")
    parser.add_argument(
        "--output", metavar="FILE", help=f"default: the (first) answers file's name with {SCORE_SUFFIX}"
    )
    parser.add_argument("--submission", metavar="FILE", help="also write the file that the benchmark's server takes")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args(argv)
    benchmark = get_benchmark(args.benchmark)
    files = [Path(name) for name in args.answers]
    output = Path(args.output) if args.output else files[0].with_suffix(SCORE_SUFFIX)
    submission = Path(args.submission) if args.submission else None
    if submission and benchmark.submission is None:
        raise ConfigError(f"--submission: benchmark {benchmark.name} has no server; its score is computed here")
    if submission is None and benchmark.primary is None:
        raise ConfigError(f"benchmark {benchmark.name} is scored by a server; give --submission FILE to write its file")
    loaded = load_questions(benchmark, data_root=Path(args.data_root), files=args.questions)
    outputs = [*([output] if benchmark.primary else []), *([submission] if submission else [])]
    inputs = [*files, *(parse_named_file(argument)[1] for argument in loaded.files)]
    check_outputs(outputs, inputs, overwrite=args.overwrite)
    answers = read_answers(files)
    if submission:
        check_answers(loaded, answers)
        write_bytes_atomically(submission, WRITERS[benchmark.submission or ""](loaded, answers))
        print(f"submission: {submission} ({len(answers)} answers; {'; '.join(benchmark.notes) or 'no score yet'})")
    if benchmark.primary:
        scores = score_benchmark(loaded, answers)
        scores |= {"answers": [str(file.resolve()) for file in files], "answers_sha256": file_digest(files)}
        scores |= {"model_path": ", ".join(scores["model_id"]), "routing": None}
        write_text_atomically(output, dump_scores(scores))
        print(format_benchmark(scores))
        print(f"scores: {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

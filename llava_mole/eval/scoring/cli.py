"""`llava-mole score ANSWERS --benchmark NAME`: score existing answers, or write the file that a server scores."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from llava_mole.common.errors import ConfigError, command
from llava_mole.common.files import refuse_existing, sha256_of, write_bytes, write_errors
from llava_mole.common.locks import locked
from llava_mole.eval.answers import read_answers
from llava_mole.eval.benchmarks.benchmark import DATA_ROOT, BenchmarkQuestions, load_questions, own_questions
from llava_mole.eval.benchmarks.registry import get_benchmark, list_benchmarks
from llava_mole.eval.benchmarks.submission import WRITERS
from llava_mole.eval.questions import parse_named_file
from llava_mole.eval.scoring.score import SCORE_SUFFIX, check_answers, format_scores, score_benchmark, write_score_file


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Score, print, write."""
    parser = argparse.ArgumentParser(
        prog="llava-mole score",
        description=__doc__.split("\n")[0],
        epilog=f"benchmarks: {', '.join(list_benchmarks())}",
    )
    add = parser.add_argument
    add("answers", nargs="+", metavar="ANSWERS", help="answers file, or the files of all chunks")
    add("--benchmark", metavar="NAME", help="benchmark to score by: a name, or a YAML file")
    own = "question files to use instead of the benchmark's; without --benchmark, scored by exact match"
    add("--questions", nargs="+", metavar="[GROUP=]FILE", help=own)
    train = "training splits for the majority baseline of your own --questions (default: the test itself)"
    add("--train-file", nargs="+", metavar="[GROUP=]FILE", help=train)
    add("--data-root", default=str(DATA_ROOT), metavar="DIR", help=f"where benchmark data is (default {DATA_ROOT})")
    add("--image-folder", metavar="DIR", help="root of the questions' image paths, for the report")
    add("--output", metavar="FILE", help=f"score file (default: the first answers file's name with {SCORE_SUFFIX})")
    add("--submission", metavar="FILE", help="also write the file that the benchmark's server takes")
    add("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args(argv)
    loaded = _load(args)
    benchmark = loaded.benchmark
    files = [Path(name) for name in args.answers]
    output = Path(args.output) if args.output else files[0].with_suffix(SCORE_SUFFIX)
    submission = Path(args.submission) if args.submission else None
    if submission and benchmark.submission is None:
        raise ConfigError(f"--submission: benchmark {benchmark.name} has no server; its score is computed here")
    if submission is None and benchmark.primary is None:
        raise ConfigError(f"benchmark {benchmark.name} is scored by a server; give --submission FILE to write its file")
    outputs = [*([output] if benchmark.primary else []), *([submission] if submission else [])]
    read = [parse_named_file(argument)[1] for argument in (*loaded.files, *(loaded.train_files or []))]
    check_outputs(outputs, [*files, *read], overwrite=args.overwrite)
    answers = read_answers(files)
    with ExitStack() as locks:
        for path in outputs:
            with write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(locked(path.with_name(f"{path.name}.lock"), f"{path}"))
            refuse_existing(path, overwrite=args.overwrite)  # the process that held the lock may have written it
        if submission:
            check_answers(loaded, answers)
            write_bytes(submission, WRITERS[benchmark.submission or ""](loaded, answers))
            print(f"submission: {submission} ({len(answers)} answers; {'; '.join(benchmark.notes) or 'no score yet'})")
        if benchmark.primary:
            scores = score_benchmark(loaded, answers)
            scores |= {
                "answers": [str(file.resolve()) for file in files],
                "answers_sha256": [sha256_of(file) for file in files],
                "model_path": ", ".join(scores["model_id"]),
                "routing": None,
            }
            write_score_file(output, scores)
            print(format_scores(scores))
            print(f"scores: {output}")
    return 0


def _load(args: argparse.Namespace) -> BenchmarkQuestions:
    """Return the questions of `--benchmark`, or of `--questions` alone."""
    images = Path(args.image_folder) if args.image_folder else None
    if args.benchmark is None:
        if not args.questions:
            raise ConfigError("give --benchmark NAME, or --questions FILE... to score question files of your own")
        return own_questions(args.questions, image_folder=images or Path(), train_files=args.train_file)
    if args.train_file:
        raise ConfigError("--train-file belongs to --questions without --benchmark; a benchmark names its own")
    benchmark, root = get_benchmark(args.benchmark), Path(args.data_root)
    return load_questions(benchmark, data_root=root, files=args.questions, image_folder=images)


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raise ConfigError if a file to write exists and may not be replaced, or is an input or given twice."""
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in taken:
            raise ConfigError(f"{path} is an input, or given twice; give another name")
        refuse_existing(path, overwrite=overwrite)
        taken.add(path.resolve())


if __name__ == "__main__":
    raise SystemExit(main())

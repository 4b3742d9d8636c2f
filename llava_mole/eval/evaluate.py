"""`llava-mole eval`: answer questions with a model and score the answers, in one command.

    llava-mole eval RUN --benchmarks tiny,chartqa
    llava-mole eval RUN --questions general=Q1.jsonl document=Q2.jsonl --image-folder DIR --answers-file answers.jsonl

The first form takes everything from the benchmarks' files and writes `RUN/eval/<benchmark>.jsonl`, `.score.json` and
so on. The second is for question files of one's own: beside `answers.jsonl` it writes `answers.score.json` and, for a
model with experts, `answers.routing.json`. `llava-mole report` compares the score files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_mole.common.distributed import on_main
from llava_mole.common.errors import ConfigError, command
from llava_mole.common.log import setup_logging
from llava_mole.decoding import Decoding
from llava_mole.eval.answers import read_answers, refuse_existing
from llava_mole.eval.baseline import read_train_files
from llava_mole.eval.benchmark_questions import DATA_ROOT, DEFAULT_VARIANT
from llava_mole.eval.evaluate_benchmarks import run_benchmarks
from llava_mole.eval.model_vqa import add_model_arguments, answer_questions, load_predictor
from llava_mole.eval.questions import Question, check_images, read_questions
from llava_mole.eval.ranks import joined_ranks
from llava_mole.eval.score import (
    SCORE_SUFFIX,
    check_references,
    format_scores,
    resolve_argument,
    score_answers,
    write_scores,
)

MAX_NEW_TOKENS = 128


def check_forms(args: argparse.Namespace) -> None:
    """Raise ConfigError unless the options are those of one of the two forms."""
    own = {"--questions": args.questions, "--answers-file": args.answers_file}
    given = [name for name, value in own.items() if value]
    if args.benchmarks:
        if given or args.train_file:
            raise ConfigError(f"--benchmarks and {given[0] if given else '--train-file'} are two forms; give one")
        return
    if len(given) < len(own):
        raise ConfigError("give --benchmarks NAME,..., or --questions FILE... with --answers-file FILE")
    extra = {"--out": args.out, "--prompt-variant": args.prompt_variant != DEFAULT_VARIANT}
    unused = [name for name, value in extra.items() if value]
    if unused:
        raise ConfigError(f"{unused[0]} needs --benchmarks")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run and score."""
    parser = argparse.ArgumentParser(prog="llava-mole eval", description=__doc__.split("\n")[0])
    parser.add_argument("model_path", metavar="MODEL_DIR", help="run directory or checkpoint")
    parser.add_argument("--benchmarks", nargs="+", metavar="NAME", help="by name or YAML file, comma or blank between")
    parser.add_argument("--prompt-variant", default=DEFAULT_VARIANT, metavar="NAME", help="of the benchmarks' prompts")
    parser.add_argument(
        "--data-root", default=str(DATA_ROOT), metavar="DIR", help=f"of benchmarks; default {DATA_ROOT}"
    )
    parser.add_argument("--out", metavar="DIR", help="of benchmarks; default MODEL_DIR/eval")
    parser.add_argument("--questions", nargs="+", metavar="[DOMAIN=]FILE", help="with answers")
    parser.add_argument("--image-folder", default="", metavar="DIR", help="root of the questions' image paths")
    parser.add_argument("--answers-file", metavar="FILE", help="the scores are written beside it")
    parser.add_argument(
        "--train-file", nargs="+", metavar="[DOMAIN=]FILE", help="training split, for the majority baseline"
    )
    add_model_arguments(parser)
    parser.set_defaults(max_new_tokens=None)
    args = parser.parse_args(argv)
    setup_logging()
    check_forms(args)
    with joined_ranks():
        if args.benchmarks:
            run_benchmarks(args)
        else:
            _run_own(args)
    return 0


def _run_own(args: argparse.Namespace) -> None:
    """Answer and score question files of one's own. Ranks share the questions, rank 0 does everything else."""
    decoding = Decoding(args.max_new_tokens or MAX_NEW_TOKENS, args.temperature, args.top_p, args.num_beams)
    image_folder, answers_file = Path(args.image_folder), Path(args.answers_file)
    score_file = answers_file.with_suffix(SCORE_SUFFIX)

    def check() -> tuple[list[Question], dict[str, list[tuple[str, str]]] | None]:
        for path in (answers_file, score_file):
            refuse_existing(path, overwrite=args.overwrite)
        questions = read_questions(args.questions)
        check_references(questions)
        check_images(questions, image_folder)
        return questions, read_train_files(args.train_file) if args.train_file else None

    questions, train_pairs = on_main(check)
    predictor = load_predictor(args.model_path, args)
    has_experts = predictor.loaded.config.adapter.method == "mole"
    routing_file = answers_file.with_suffix(".routing.json") if has_experts else None
    answer_questions(
        predictor,
        questions,
        image_folder,
        answers_file,
        decoding,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        routing_stats=routing_file,
    )

    def score() -> None:
        scores = score_answers(questions, read_answers([answers_file]), train_pairs)
        write_scores(
            score_file,
            scores,
            model_path=str(predictor.loaded.path.resolve()),
            template=predictor.template.name,
            questions=[resolve_argument(argument) for argument in args.questions],
            image_folder=str(image_folder.resolve()),
            answers=str(answers_file.resolve()),
            routing=str(routing_file.resolve()) if routing_file else None,
        )
        print(format_scores(scores))
        print(f"answers: {answers_file}   scores: {score_file}")

    on_main(score)


if __name__ == "__main__":
    raise SystemExit(main())

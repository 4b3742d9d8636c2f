"""`llava-mole eval`: answer questions with a model and score the answers, in one command.

    llava-mole eval RUN --benchmarks tiny,chartqa
    llava-mole eval RUN --questions general=Q1.jsonl document=Q2.jsonl --image-folder DIR --answers-file answers.jsonl

The first form takes everything from the benchmarks' files and writes `RUN/eval/<benchmark>.jsonl`, `.score.json` and
so on. The second is for question files of one's own: beside `answers.jsonl` it writes `answers.score.json` and, for a
model with experts, `answers.routing.json`. `llava-mole report` compares the score files.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mole.common.distributed import is_main_process, on_main
from llava_mole.common.errors import ConfigError, command
from llava_mole.common.log import setup_logging
from llava_mole.eval.answers import read_answers, refuse_existing, write_bytes_atomically, write_text_atomically
from llava_mole.eval.benchmarks.benchmark import (
    DATA_ROOT,
    DEFAULT_VARIANT,
    BenchmarkQuestions,
    get_benchmark,
    list_benchmarks,
    load_questions,
    prompt_suffix,
)
from llava_mole.eval.benchmarks.submission import SUFFIXES, WRITERS, check_submission
from llava_mole.eval.model_vqa import answer_questions, describe_run
from llava_mole.eval.questions import Question, check_images, read_questions
from llava_mole.eval.ranks import joined_ranks
from llava_mole.eval.report.compare import Run, build_benchmarks, read_json_object
from llava_mole.eval.report.formats import to_text
from llava_mole.eval.scoring.score import (
    SCORE_SUFFIX,
    check_answers,
    check_references,
    check_scorable,
    dump_scores,
    file_digest,
    format_benchmark,
    format_scores,
    read_train_files,
    resolve_argument,
    score_answers,
    score_benchmark,
    write_scores,
)
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import add_model_arguments, load_predictor

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor


@dataclass(frozen=True)
class Job:
    """One benchmark to be run."""

    loaded: BenchmarkQuestions
    variant: str
    decoding: Decoding
    answers: Path

    @property
    def scores(self) -> Path:
        """The score file beside the answers."""
        return self.answers.with_suffix(SCORE_SUFFIX)

    @property
    def submission(self) -> Path | None:
        """The file for the benchmark's server, if it has one."""
        kind = self.loaded.benchmark.submission
        return self.answers.with_suffix(f".submission{SUFFIXES[kind]}") if kind else None

    @property
    def record(self) -> Path:
        """What the answers depend on, as `describe_run` says it."""
        return self.answers.with_suffix(".run.json")

    @property
    def routing(self) -> Path:
        """The routing statistics of a model with experts."""
        return self.answers.with_suffix(".routing.json")

    def remove_results(self) -> None:
        """Remove what an earlier run has written, answers first: none of it belongs to the run that starts."""
        for path in (self.answers, self.scores, self.submission, self.routing):
            if path is not None:
                path.unlink(missing_ok=True)


def output_folder(model_path: str) -> Path:
    """`<run>/eval`, or `<run>/eval/checkpoint-<step>`: never inside a checkpoint."""
    path = Path(model_path)
    return path.parent / "eval" / path.name if path.name.startswith("checkpoint-") else path / "eval"


def split_names(names: list[str]) -> list[str]:
    """`a,b c` -> a, b, c. Raises ConfigError where there is none or one comes twice."""
    found = [name for part in names for name in part.split(",") if name]
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"--benchmarks {' '.join(names)!r}: give each once, of {', '.join(list_benchmarks())}")
    return found


def plan_jobs(args: argparse.Namespace, folder: Path) -> list[Job]:
    """The benchmarks that `args` names, with their questions and images checked. Raises UserErrors as the parts do."""
    jobs = []
    for name in split_names(args.benchmarks):
        benchmark = get_benchmark(name)
        prompt_suffix(benchmark, args.prompt_variant)
        images = Path(args.image_folder) if args.image_folder else None
        loaded = load_questions(benchmark, data_root=Path(args.data_root), image_folder=images)
        check_images(loaded.questions, loaded.image_folder)
        check_submission(loaded)
        check_scorable(loaded)
        limit = args.max_new_tokens or benchmark.prompt.max_new_tokens
        decoding = Decoding(limit, args.temperature, args.top_p, args.num_beams)
        job = Job(loaded, args.prompt_variant, decoding, folder / f"{benchmark.name}.jsonl")
        if not job.record.exists():
            refuse_existing(job.answers, overwrite=args.overwrite)
        jobs.append(job)
    return jobs


def run_benchmarks(args: argparse.Namespace) -> None:
    """Answer, score and report; see the module. Ranks share the questions, rank 0 does everything else."""
    folder = Path(args.out) if args.out else output_folder(args.model_path)
    jobs = on_main(lambda: plan_jobs(args, folder))
    predictor = load_predictor(args.model_path, args)
    run = Run(Path(args.model_path).name)
    for job in jobs:
        scores = _run_job(predictor, job, args)
        if scores is not None:
            run.benchmarks[job.loaded.benchmark.name] = scores
    if run.benchmarks and is_main_process():
        report = build_benchmarks({run.name: run})
        print(to_text(report))
        print(f"\nresults: {folder}   compare runs: llava-mole report RUN1 RUN2 --out DIR")


def _run_job(predictor: "Predictor", job: Job, args: argparse.Namespace) -> dict[str, Any] | None:
    """One benchmark's scores, from a finished run or a new one; None where a server scores it."""
    asked = job.loaded.asked(job.variant)
    run = describe_run(predictor, asked, job.loaded.image_folder, job.decoding)
    has_experts = predictor.loaded.adapter == "mole"
    answered = on_main(lambda: _is_answered(job, run, overwrite=args.overwrite))
    if not answered:
        answer_questions(
            predictor,
            asked,
            job.loaded.image_folder,
            job.answers,
            job.decoding,
            batch_size=args.batch_size,
            overwrite=args.overwrite,
            routing_stats=job.routing if has_experts else None,
            begin=lambda: _begin(job, run),
        )
    return on_main(lambda: _finish(predictor, job, run))


def _is_answered(job: Job, run: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether the answers are there already, from the same run.

    Raises:
        ConfigError: there are answers of another run, and they may not be replaced.
    """
    run = json.loads(json.dumps(run))
    if job.answers.exists() and not overwrite:
        if read_json_object(job.record) != run:
            raise ConfigError(
                f"{job.answers} exists and comes from another model, prompt, question file, image folder or decoding; "
                "give --overwrite to replace it, or another --out"
            )
        return True
    print(f"{job.loaded.benchmark.name}: {len(job.loaded.questions)} questions")
    return False


def _begin(job: Job, run: Mapping[str, Any]) -> None:
    """Write what the answers to come depend on, after everything that another run has left there is gone."""
    job.remove_results()
    write_text_atomically(job.record, json.dumps(run, indent=2) + "\n")


def _finish(predictor: "Predictor", job: Job, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Write what the benchmark asks for: its server's file, and scores unless they are there and up to date."""
    benchmark = job.loaded.benchmark
    answers = read_answers([job.answers])
    if job.submission is not None:
        check_answers(job.loaded, answers)
        write_bytes_atomically(job.submission, WRITERS[benchmark.submission or ""](job.loaded, answers))
        print(f"{benchmark.name}: submission file {job.submission}")
    if benchmark.primary is None:
        return None
    digest = file_digest([job.answers])
    stored = _current_scores(job, digest)
    if stored is not None:
        print(f"{benchmark.name}: done already, see {job.scores}")
        return stored | {"score_file": str(job.scores)}
    scores = score_benchmark(job.loaded, answers)
    scores |= {
        "model_path": str(predictor.loaded.path.resolve()),
        "template": predictor.template.name,
        "answers": str(job.answers.resolve()),
        "answers_sha256": digest,
        "routing": str(job.routing.resolve()) if job.routing.exists() else None,
        "run": run,
    }
    write_text_atomically(job.scores, dump_scores(scores))
    print(format_benchmark(scores) + "\n")
    return scores | {"score_file": str(job.scores)}


def _current_scores(job: Job, answers_sha256: str) -> dict[str, Any] | None:
    """The scores on disk, if they are of these answers, gold answers and this definition of the benchmark."""
    if not job.scores.exists():
        return None
    stored = read_json_object(job.scores)
    expected = {
        "question_set": job.loaded.fingerprint(),
        "definition": json.loads(json.dumps(job.loaded.benchmark.to_dict())),
        "answers_sha256": answers_sha256,
    }
    return stored if all(stored.get(key) == value for key, value in expected.items()) else None


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
    has_experts = predictor.loaded.adapter == "mole"
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

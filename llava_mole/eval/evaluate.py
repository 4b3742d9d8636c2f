"""`llava-mole eval`: answer questions with a model and score the answers.

    llava-mole eval RUN --benchmarks tiny,chartqa
    llava-mole eval RUN --questions general=Q1.jsonl document=Q2.jsonl --image-folder DIR

The first form writes `RUN/eval/<benchmark>.jsonl`, `.score.json` and so on. The second is for question files of your
own and writes `RUN/eval/questions.jsonl` and the same files beside it. `llava-mole report` compares the score files.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mole.common.distributed import end_rank, is_main_process, on_main
from llava_mole.common.errors import ConfigError, command
from llava_mole.common.files import read_json, refuse_existing, sha256_of, write_bytes, write_json
from llava_mole.common.log import setup_logging
from llava_mole.eval.answers import lock_answers, read_answers
from llava_mole.eval.benchmarks.benchmark import (
    DATA_ROOT,
    DEFAULT_VARIANT,
    OWN,
    BenchmarkQuestions,
    load_questions,
    own_questions,
)
from llava_mole.eval.benchmarks.registry import get_benchmark, list_benchmarks
from llava_mole.eval.benchmarks.submission import SUFFIXES, WRITERS, check_submission
from llava_mole.eval.model_vqa import answer_questions, check_prompts, describe_run
from llava_mole.eval.questions import check_images, parse_named_file
from llava_mole.eval.ranks import joined_ranks
from llava_mole.eval.report.compare import build_benchmarks
from llava_mole.eval.report.formats import to_text
from llava_mole.eval.scoring import score
from llava_mole.eval.source_routing import parse_sources, sources_of_groups
from llava_mole.inference.arguments import add_model_arguments, load_predictor
from llava_mole.inference.decoding import Decoding

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor


@dataclass(frozen=True)
class Job:
    """One benchmark to run."""

    loaded: BenchmarkQuestions
    variant: str
    decoding: Decoding
    answers: Path

    @property
    def scores(self) -> Path:
        """The score file."""
        return self.answers.with_suffix(score.SCORE_SUFFIX)

    @property
    def record(self) -> Path:
        """Everything the answers depend on, as `describe_run` returns it."""
        return self.answers.with_suffix(".run.json")

    @property
    def routing(self) -> Path:
        """The routing statistics of a model with experts."""
        return self.answers.with_suffix(".routing.json")

    @property
    def submission(self) -> Path | None:
        """The file for the benchmark's server, if it has one."""
        kind = self.loaded.benchmark.submission
        return self.answers.with_suffix(f".submission{SUFFIXES[kind]}") if kind else None


def output_folder(model_path: str) -> Path:
    """Return `<run>/eval`, or `<run>/eval/checkpoint-<step>`: never inside a checkpoint."""
    path = Path(model_path)
    return path.parent / "eval" / path.name if path.name.startswith("checkpoint-") else path / "eval"


def split_names(names: list[str]) -> list[str]:
    """Split `a,b c` into a, b, c. Raises ConfigError if there is none, or one comes twice."""
    found = [name for part in names for name in part.split(",") if name]
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"--benchmarks {' '.join(names)!r}: give each once, of {', '.join(list_benchmarks())}")
    return found


def prepared_images(files: Sequence[str]) -> Path:
    """The image folder of question files (`[GROUP=]FILE` each) that `llava-mole prepare` wrote.

    It lies beside their folder: `DIR/questions/test.jsonl` and `DIR/images`. Of other files it is the working
    directory.
    """
    folders = {parse_named_file(file)[1].absolute().parent for file in files}
    folder = folders.pop()
    images = folder.parent / "images"
    prepared = not folders and folder.name == "questions" and (folder.parent / "report.json").is_file()
    return images if prepared and images.is_dir() else Path()


def plan_jobs(args: argparse.Namespace) -> list[Job]:
    """Return the benchmarks to run, with questions and images checked. Raises UserErrors as the parts do."""
    images = Path(args.image_folder) if args.image_folder else None
    folder = Path(args.out) if args.out else output_folder(args.model_path)
    if not args.benchmarks:
        answers = Path(args.answers_file) if args.answers_file else folder / f"{OWN}.jsonl"
        images = images or prepared_images(args.questions)
        return [_plan(own_questions(args.questions, image_folder=images, train_files=args.train_file), answers, args)]
    jobs = []
    for name in split_names(args.benchmarks):
        benchmark = get_benchmark(name)
        benchmark.prompt_suffix(args.prompt_variant)
        loaded = load_questions(benchmark, data_root=Path(args.data_root), image_folder=images)
        jobs.append(_plan(loaded, folder / f"{benchmark.name}.jsonl", args))
    return jobs


def _plan(loaded: BenchmarkQuestions, answers: Path, args: argparse.Namespace) -> Job:
    check_images(loaded.questions, loaded.image_folder, follow_links=args.follow_links)
    check_submission(loaded)
    score.check_scorable(loaded)
    limit = args.max_new_tokens or loaded.benchmark.prompt.max_new_tokens
    job = Job(loaded, args.prompt_variant, Decoding(limit, args.temperature, args.top_p, args.num_beams), answers)
    refuse_existing(job.answers, overwrite=args.overwrite or job.record.exists())
    for path in (job.record, job.scores, job.routing, *([job.submission] if job.submission else [])):
        refuse_existing(path, overwrite=True)
    return job


def run_jobs(args: argparse.Namespace) -> None:
    """Answer, score and report. Ranks share the questions; rank 0 does everything else."""
    jobs = on_main(lambda: plan_jobs(args))
    predictor = load_predictor(args.model_path, args)
    for job in jobs[1:]:  # `answer_questions` checks the first; a prompt of the last is to be found before its answers
        asked = job.loaded.asked(job.variant)
        check_prompts(predictor, asked, job.loaded.image_folder, follow_links=args.follow_links)
    found = {job.loaded.benchmark.name: _run_job(predictor, job, args) for job in jobs}
    run = {name: scores for name, scores in found.items() if scores is not None}
    if run and is_main_process():
        print(to_text(build_benchmarks({Path(args.model_path).name: run})))
        print(f"\nresults: {jobs[0].answers.parent}   compare runs: llava-mole report RUN1 RUN2 --out DIR")


def _run_job(predictor: "Predictor", job: Job, args: argparse.Namespace) -> dict[str, Any] | None:
    """Return one benchmark's scores, from a finished run or a new one; None if a server scores it."""
    asked = job.loaded.asked(job.variant)
    sources = sources_of_groups(predictor, asked, parse_sources(args.source_of), job.loaded.benchmark.name)
    run = describe_run(predictor, asked, job.loaded.image_folder, job.decoding, sources)
    if not on_main(lambda: _is_answered(job, run, overwrite=args.overwrite)):
        answer_questions(
            predictor,
            asked,
            job.loaded.image_folder,
            job.answers,
            job.decoding,
            batch_size=args.batch_size,
            follow_links=args.follow_links,
            overwrite=args.overwrite,
            break_lock=args.break_lock,
            routing_stats=job.routing if predictor.loaded.adapter == "mole" else None,
            begin=lambda: _begin(job, run),
            sources=sources,
        )
    return on_main(lambda: _finish(predictor, job, run, args.break_lock))


def _is_answered(job: Job, run: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether the answers of this same run are already there.

    Raises:
        ConfigError: there are answers of another run, and they may not be replaced.
    """
    if job.answers.exists() and not overwrite:
        if read_json(job.record) != json.loads(json.dumps(run)):
            raise ConfigError(
                f"{job.answers} exists and comes from another model, prompt, question file, image folder or decoding; "
                "give --overwrite to replace it, or another place for the new answers"
            )
        return True
    print(f"{job.loaded.benchmark.name}: {len(job.loaded.questions)} questions")
    return False


def _begin(job: Job, run: Mapping[str, Any]) -> None:
    """Remove the files of another run, answers first, and record what the new answers depend on."""
    for path in (job.answers, job.scores, job.submission, job.routing):
        if path is not None:
            path.unlink(missing_ok=True)
    write_json(job.record, run)


def _finish(predictor: "Predictor", job: Job, run: Mapping[str, Any], break_lock: bool) -> dict[str, Any] | None:
    """Write the server's file, if the benchmark has one, and the scores, unless they are up to date."""
    benchmark = job.loaded.benchmark
    answers = read_answers([job.answers])
    if job.submission is not None:
        score.check_answers(job.loaded, answers)
        with lock_answers(job.answers, break_lock):
            write_bytes(job.submission, WRITERS[benchmark.submission or ""](job.loaded, answers))
        print(f"{benchmark.name}: submission file {job.submission}")
    if benchmark.primary is None:
        return None
    digests = [sha256_of(job.answers)]
    if scores := _current_scores(job, digests):
        print(f"{benchmark.name}: done already, see {job.scores}")
    else:
        scores = score.score_benchmark(job.loaded, answers)
        scores |= {
            "model_path": str(predictor.loaded.path.resolve()),
            "template": predictor.template.name,
            "answers": [str(job.answers.resolve())],
            "answers_sha256": digests,
            "routing": str(job.routing.resolve()) if job.routing.exists() else None,
            "run": run,
        }
        with lock_answers(job.answers, break_lock):
            score.write_score_file(job.scores, scores)
        print(score.format_scores(scores) + "\n")
    return scores | {"score_file": str(job.scores)}


def _current_scores(job: Job, answers_sha256: list[str]) -> dict[str, Any] | None:
    """Return the scores on disk, if they are of these answers, gold answers and this definition of the benchmark."""
    if not job.scores.exists():
        return None
    stored = read_json(job.scores)
    expected = {
        "format": score.FORMAT,
        "question_set": job.loaded.fingerprint(),
        "definition": json.loads(json.dumps(asdict(job.loaded.benchmark))),
        "answers_sha256": answers_sha256,
    }
    same = isinstance(stored, dict) and all(stored.get(key) == value for key, value in expected.items())
    return stored if same else None


def check_forms(args: argparse.Namespace) -> None:
    """Raise ConfigError unless the options belong to one of the two forms."""
    own = {
        "--questions": args.questions,
        "--answers-file": args.answers_file,
        "--train-file": args.train_file,
    }
    given = [name for name, value in own.items() if value]
    if args.benchmarks:
        if given:
            raise ConfigError(f"--benchmarks and {given[0]} are two forms; give one")
        return
    if not args.questions:
        raise ConfigError("give --benchmarks NAME,..., or --questions FILE...")
    extra = {"--out": args.out, "--prompt-variant": args.prompt_variant != DEFAULT_VARIANT}
    unused = [name for name, value in extra.items() if value]
    if unused:
        raise ConfigError(f"{unused[0]} needs --benchmarks")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run and score."""
    parser = argparse.ArgumentParser(prog="llava-mole eval", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model_path", metavar="MODEL_DIR", help="run directory or checkpoint")
    add(
        "--benchmarks", nargs="+", metavar="NAME", help="benchmarks, names or YAML files, separated by commas or blanks"
    )
    add("--prompt-variant", default=DEFAULT_VARIANT, metavar="NAME", help="which of the benchmark's prompts to use")
    add("--data-root", default=str(DATA_ROOT), metavar="DIR", help=f"where benchmark data is (default {DATA_ROOT})")
    add("--out", metavar="DIR", help="where benchmarks' results go (default MODEL_DIR/eval)")
    add("--questions", nargs="+", metavar="[GROUP=]FILE", help="your own question files, with answers")
    add(
        "--image-folder",
        default="",
        metavar="DIR",
        help="root of the questions' image paths (default: what prepare wrote beside them, else this directory)",
    )
    add("--follow-links", action="store_true", help="let symbolic links lead out of the image folder")
    add(
        "--answers-file",
        metavar="FILE",
        help=f"answers to --questions; scores are written beside it (default MODEL_DIR/eval/{OWN}.jsonl)",
    )
    add("--train-file", nargs="+", metavar="[GROUP=]FILE", help="training splits for --questions' majority baseline")
    add(
        "--source-of",
        nargs="+",
        default=[],
        metavar="NAME=SOURCE",
        help="source of a group or benchmark, for models that route by source (default: the group's name)",
    )
    add_model_arguments(parser)
    parser.set_defaults(max_new_tokens=None)
    args = parser.parse_args(argv)
    setup_logging()
    check_forms(args)
    with joined_ranks():
        run_jobs(args)
    return 0


if __name__ == "__main__":
    end_rank(main())

"""Answers, scores and reports benchmarks with one model: `llava-mole eval MODEL --benchmarks a,b,c`.

Everything that a user can have got wrong is checked for all benchmarks before the model is loaded. A benchmark that is
finished already, with the same model, questions, images, prompt and decoding, is not asked again; it is scored again
where gold answers, the benchmark's definition or the answers have changed since.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mole.common.distributed import is_main_process, on_main
from llava_mole.common.errors import ConfigError
from llava_mole.decoding import Decoding
from llava_mole.eval.answers import read_answers, refuse_existing, write_bytes_atomically, write_text_atomically
from llava_mole.eval.benchmark_questions import BenchmarkQuestions, load_questions, prompt_suffix
from llava_mole.eval.benchmark_report import build_benchmarks
from llava_mole.eval.benchmark_score import (
    check_answers,
    check_scorable,
    dump_scores,
    file_digest,
    format_benchmark,
    score_benchmark,
)
from llava_mole.eval.model_vqa import answer_questions, describe_run, load_predictor
from llava_mole.eval.questions import check_images
from llava_mole.eval.registry import get_benchmark, list_benchmarks
from llava_mole.eval.report_formats import to_text
from llava_mole.eval.report_runs import Run, read_json_object
from llava_mole.eval.score import SCORE_SUFFIX
from llava_mole.eval.submission import SUFFIXES, WRITERS, check_submission

if TYPE_CHECKING:
    from llava_mole.inference import Predictor


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
    has_experts = predictor.loaded.config.adapter.method == "mole"
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

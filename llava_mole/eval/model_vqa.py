"""Answers question files with a model: LLaVA's `model_vqa`, batched and resumable.

    python -m llava_mole.eval.model_vqa --model-path RUN --question-file Q.jsonl --image-folder DIR --answers-file A

Decoding is greedy unless `--temperature` is above 0. An interrupted run continues when the same command is given again,
on any number of ranks. `--num-chunks N --chunk-idx I` answers one part; the parts' files, concatenated in order, are
the file of a single run. Under torchrun or `accelerate launch` the ranks share the questions.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llava_mole.common.distributed import end_rank, get_rank, get_world_size, is_main_process, on_main
from llava_mole.common.errors import ConfigError, command
from llava_mole.common.files import refuse_existing, sha256_of, write_json
from llava_mole.common.log import setup_logging
from llava_mole.data.images import resolve_image
from llava_mole.eval.answers import AnswerFile, answer_record
from llava_mole.eval.questions import Question, check_images, errors_named_after, read_questions, take_chunk, windows
from llava_mole.eval.ranks import joined_ranks, share_of_rank
from llava_mole.eval.source_routing import by_source, parse_sources, routed_by, sources_of_groups
from llava_mole.inference.arguments import add_model_arguments, load_predictor
from llava_mole.inference.decoding import Decoding

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor


def model_id(path: Path) -> str:
    """Return the directory's name for the answers file, preceded by its parent's for a `checkpoint-<step>`."""
    path = path.resolve()
    return f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name


def describe_run(
    predictor: "Predictor",
    questions: Sequence[Question],
    image_folder: Path,
    decoding: Decoding,
    sources: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return everything the answers depend on, by which a partial file of the same run is recognised."""
    from llava_mole.model.checkpoint import MANIFEST

    # Questions about one image or none are written as before there were others: their files stay recognisable.
    asked = [(q.key, q.text, q.images if len(q.images) > 1 else q.images[0] if q.images else None) for q in questions]
    path = predictor.loaded.path
    routed = {} if sources is None else {"sources": dict(sources)}
    return {
        **routed,
        "model": str(path.resolve()),
        "manifest": sha256_of(path / MANIFEST),
        "quantization": predictor.loaded.quantization,
        "dtype": str(next(predictor.loaded.model.parameters()).dtype),
        "template": predictor.template.name,
        "decoding": dataclasses.asdict(decoding),
        "questions": hashlib.sha256(repr(asked).encode()).hexdigest(),
        "image_folder": str(image_folder.resolve()),
    }


def check_prompts(
    predictor: "Predictor", questions: Sequence[Question], image_folder: Path, *, follow_links: bool = False
) -> None:
    """Raise DataError that names the first question that the model cannot be asked, on every rank."""

    def check() -> None:
        texts = [q.text for q in questions]
        with errors_named_after(questions):
            if predictor.loaded.image_processor.grid is None:
                predictor.check([len(q.images) for q in questions], texts)
            else:  # the length of a prompt depends on the sizes of its images
                find = partial(resolve_image, root=image_folder, follow_links=follow_links)
                predictor.check([[find(image) for image in q.images] for q in questions], texts)

    on_main(check)


def answer_questions(
    predictor: "Predictor",
    questions: Sequence[Question],
    image_folder: Path,
    answers_file: Path,
    decoding: Decoding,
    *,
    batch_size: int = 16,
    follow_links: bool = False,
    overwrite: bool = False,
    break_lock: bool = False,
    routing_stats: Path | None = None,
    begin: Callable[[], None] | None = None,
    sources: Mapping[str, int] | None = None,
) -> None:
    """Answer the questions and write `answers_file`; see the module.

    Args:
        follow_links: Whether symbolic links may lead out of `image_folder`.
        routing_stats: File for the share of tokens per expert.
        begin: Called on rank 0 once the answers file is open and no other process writes it.
        sources: Group -> number of its source, for a model that routes by source (`sources_of_groups`).

    Raises:
        ConfigError: an output file exists and `overwrite` is not set, or it cannot be written; `routing_stats` for a
            model without experts.
        DataError: an image is missing or unreadable, or a prompt is too long.
    """
    if routing_stats:
        from llava_mole.eval.routing_stats import RoutingStats, collect_routing_stats

        RoutingStats(predictor)  # refuses a model without experts before the work, not after it
    check_prompts(predictor, questions, image_folder, follow_links=follow_links)
    run = describe_run(predictor, questions, image_folder, decoding, sources)
    name = model_id(predictor.loaded.path)
    title = f"rank 0 of {get_world_size()}" if get_world_size() > 1 else None
    with closing(AnswerFile(answers_file, questions, run, overwrite=overwrite, break_lock=break_lock)) as output:
        if begin is not None:
            on_main(begin)
        if routing_stats and len(output.pending) == len(questions):
            # If answers are resumed, existing statistics are of the same run, which was interrupted before it finished.
            on_main(lambda: refuse_existing(routing_stats, overwrite=overwrite))
        mine = share_of_rank(output.pending, get_rank(), get_world_size())
        with tqdm(total=len(mine), desc=title, unit="q", disable=None if is_main_process() else True) as progress:
            for source, part in by_source(mine, sources):
                for window, images in windows(part, image_folder, batch_size, follow_links=follow_links):
                    with errors_named_after(window), routed_by(predictor, source):
                        texts = predictor.generate(
                            images,
                            [q.text for q in window],
                            seeds=[_seed(q) for q in window],
                            batch_size=batch_size,
                            **dataclasses.asdict(decoding),
                        )
                    output.add([answer_record(q, text, name) for q, text in zip(window, texts, strict=True)])
                    progress.update(len(window))
        if routing_stats:
            stats = collect_routing_stats(
                predictor, questions, image_folder, sources, batch_size=batch_size, follow_links=follow_links
            )
            on_main(lambda: write_json(routing_stats, stats.result(), indent=None))
        output.finish()


def _seed(question: Question) -> int:
    """Derive the seed from the question alone: sampled answers do not depend on batch, chunk, rank or interruptions."""
    return int.from_bytes(hashlib.sha256(json.dumps(question.key).encode()).digest()[:8], "big")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question file, or one chunk of it."""
    parser = argparse.ArgumentParser(prog="python -m llava_mole.eval.model_vqa", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model-path", required=True, metavar="DIR", help="run directory or checkpoint")
    add("--question-file", nargs="+", required=True, metavar="[GROUP=]FILE", help="questions as JSON lines")
    add("--image-folder", default="", metavar="DIR", help="root of the questions' image paths")
    add("--follow-links", action="store_true", help="let symbolic links lead out of the image folder")
    add("--answers-file", required=True, metavar="FILE", help="answers, written when all are complete")
    add("--num-chunks", type=int, default=1, metavar="N", help="parts to split the questions into")
    add("--chunk-idx", type=int, default=0, metavar="I", help="part to answer, 0 to N-1")
    add("--source-of", nargs="+", default=[], metavar="GROUP=SOURCE", help="for models that route by source")
    add("--routing-stats", metavar="FILE", help="write the share of tokens per expert as JSON")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    setup_logging()
    with joined_ranks():
        decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, args.num_beams)
        questions = on_main(lambda: _read_chunk(args))
        predictor = load_predictor(args.model_path, args)
        answer_questions(
            predictor,
            questions,
            Path(args.image_folder),
            Path(args.answers_file),
            decoding,
            batch_size=args.batch_size,
            follow_links=args.follow_links,
            overwrite=args.overwrite,
            break_lock=args.break_lock,
            routing_stats=Path(args.routing_stats) if args.routing_stats else None,
            sources=sources_of_groups(predictor, questions, parse_sources(args.source_of), ""),
        )
        if is_main_process():
            print(f"{len(questions)} answers in {Path(args.answers_file)}")
    return 0


def _read_chunk(args: argparse.Namespace) -> Sequence[Question]:
    """Return the questions to answer, after checking everything that can be checked without the model."""
    questions = take_chunk(read_questions(args.question_file), args.num_chunks, args.chunk_idx)
    check_images(questions, Path(args.image_folder), follow_links=args.follow_links)
    refuse_existing(Path(args.answers_file), overwrite=args.overwrite)
    if args.routing_stats:
        if Path(args.routing_stats) == Path(args.answers_file):
            raise ConfigError(f"--routing-stats and --answers-file are both {args.answers_file}; name two files")
        refuse_existing(Path(args.routing_stats), overwrite=True)  # it may exist if this continues a run
    return questions


if __name__ == "__main__":
    end_rank(main())

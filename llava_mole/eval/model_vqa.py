"""Answers question files with a model: LLaVA's `model_vqa`, batched and resumable.

    python -m llava_mole.eval.model_vqa --model-path RUN --question-file Q.jsonl --image-folder DIR --answers-file A

Decoding is greedy unless `--temperature` is above 0. An interrupted run continues where it stopped when the same
command is given again, on as many ranks as it is started with then. `--num-chunks N --chunk-idx I` answers one part;
the parts' files in order are the whole. Under torchrun or `accelerate launch` the ranks share the questions.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mole.common.distributed import get_rank, get_world_size, is_main_process, on_main
from llava_mole.common.errors import ConfigError, command
from llava_mole.common.log import setup_logging
from llava_mole.eval.answers import AnswerFile, answer_record, refuse_existing
from llava_mole.eval.questions import Question, check_images, naming, read_questions, take_chunk, windows
from llava_mole.eval.ranks import joined_ranks, share_of_rank
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import add_model_arguments, load_predictor

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor


def model_id(path: Path) -> str:
    """The name in the answers file: the directory's, with its parent's in front for a `checkpoint-<step>`."""
    path = path.resolve()
    return f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name


def describe_run(
    predictor: "Predictor", questions: Sequence[Question], image_folder: Path, decoding: Decoding
) -> dict[str, Any]:
    """Everything the answers depend on, to recognise a partial file of the same run."""
    from llava_mole.model.checkpoint import MANIFEST

    asked = [(question.key, question.text, question.image) for question in questions]
    path = predictor.loaded.path
    return {
        "model": str(path.resolve()),
        "manifest": hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest(),
        "quantization": predictor.loaded.quantization,
        "dtype": str(next(predictor.loaded.model.parameters()).dtype),
        "template": predictor.template.name,
        "decoding": dataclasses.asdict(decoding),
        "questions": hashlib.sha256(repr(asked).encode()).hexdigest(),
        "image_folder": str(image_folder.resolve()),
    }


def answer_questions(
    predictor: "Predictor",
    questions: Sequence[Question],
    image_folder: Path,
    answers_file: Path,
    decoding: Decoding,
    *,
    batch_size: int = 16,
    overwrite: bool = False,
    routing_stats: Path | None = None,
    begin: Callable[[], None] | None = None,
) -> None:
    """Answer the questions into `answers_file`; see the module.

    `begin` is called on rank 0 once it is certain that nothing stands in the way and no other process writes the file.

    Raises:
        ConfigError: an output file exists and `overwrite` is not set, or it cannot be written; routing statistics of a
            model without experts.
        DataError: an image is missing or unreadable, or a prompt is too long.
    """
    from tqdm import tqdm

    from llava_mole.eval.routing_stats import RoutingStats, collect_routing_stats

    if routing_stats:
        RoutingStats(predictor)  # refuses an unfit model before the work, not after it
    run = describe_run(predictor, questions, image_folder, decoding)
    name = model_id(predictor.loaded.path)
    title = f"rank 0 of {get_world_size()}" if get_world_size() > 1 else None
    with closing(AnswerFile(answers_file, questions, run, overwrite=overwrite)) as output:
        if begin is not None:
            on_main(begin)
        if routing_stats and len(output.pending) == len(questions):
            # Where answers are resumed, the statistics are of the same run, cut off before the answers were complete.
            on_main(lambda: refuse_existing(routing_stats, overwrite=overwrite))
        mine = share_of_rank(output.pending, get_rank(), get_world_size())
        with tqdm(total=len(mine), desc=title, unit="q", disable=None if is_main_process() else True) as progress:
            for window, images in windows(mine, image_folder, batch_size):
                with naming(window):
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
            stats = collect_routing_stats(predictor, questions, image_folder, batch_size=batch_size)
            on_main(lambda: stats.write(routing_stats))
        output.finish()


def _seed(question: Question) -> int:
    """Of the question alone, so that sampled answers do not depend on batch, chunk, rank or an interruption."""
    return int.from_bytes(hashlib.sha256(json.dumps(question.key).encode()).digest()[:8], "big")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question file, or one chunk of it."""
    parser = argparse.ArgumentParser(prog="python -m llava_mole.eval.model_vqa", description=__doc__.split("\n")[0])
    parser.add_argument("--model-path", required=True, metavar="DIR", help="run directory or checkpoint")
    parser.add_argument("--question-file", nargs="+", required=True, metavar="[DOMAIN=]FILE", help="JSON lines")
    parser.add_argument("--image-folder", default="", metavar="DIR", help="root of the questions' image paths")
    parser.add_argument("--answers-file", required=True, metavar="FILE", help="written when complete")
    parser.add_argument("--num-chunks", type=int, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0)
    parser.add_argument("--routing-stats", metavar="FILE", help="write the share of tokens per expert as JSON")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    setup_logging()
    with joined_ranks():
        return _answer(args)


def _answer(args: argparse.Namespace) -> int:
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, args.num_beams)
    answers_file = Path(args.answers_file)
    questions = on_main(lambda: _read_chunk(args))
    answer_questions(
        load_predictor(args.model_path, args),
        questions,
        Path(args.image_folder),
        answers_file,
        decoding,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        routing_stats=Path(args.routing_stats) if args.routing_stats else None,
    )
    if is_main_process():
        print(f"{len(questions)} answers in {answers_file}")
    return 0


def _read_chunk(args: argparse.Namespace) -> Sequence[Question]:
    """The questions to answer, after everything that can be checked without the model."""
    questions = take_chunk(read_questions(args.question_file), args.num_chunks, args.chunk_idx)
    check_images(questions, Path(args.image_folder))
    refuse_existing(Path(args.answers_file), overwrite=args.overwrite)
    if args.routing_stats:
        if Path(args.routing_stats) == Path(args.answers_file):
            raise ConfigError(f"--routing-stats and --answers-file are both {args.answers_file}; name two files")
        refuse_existing(Path(args.routing_stats), overwrite=True)  # one that exists may be of the run that goes on
    return questions


if __name__ == "__main__":
    raise SystemExit(main())

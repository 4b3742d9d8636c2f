"""Questions answered per second: batches of 16 against LLaVA's loop over single questions, and the memory of long runs.

Measured: the same questions about the same image files, answered greedily by the same model, one at a time (as LLaVA's
`model_vqa` does) and in batches, in turn; and the peak memory of a process after a short and after a long question
list. The models are the shipped tiny one and a random Llama of 110M parameters, both with MoLE. Untrained answers never
end by themselves, so every answer has `--new-tokens` tokens: that is fair to both.
"""

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import mole_common as common

from llava_mole.config import DataConfig, RunConfig, SourceConfig, TrainConfig
from llava_mole.data.tokenization import HFTextTokenizer
from llava_mole.eval.answers import AnswerFile, answer_record
from llava_mole.eval.questions import Question, read_questions, windows
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import Predictor
from llava_mole.model.builder import LoadedModel, attach_adapter, build_image_processor, build_parts

ASSETS = Path(__file__).parents[2] / "playground" / "models" / "tiny"
WORDS = "what color is the small round shape beside large dark square near its upper left corner please".split()
SIZES = {"tiny": {}, "llama-110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}}


def build(name: str, device: str) -> Predictor:
    """The tiny model, or its tower in front of a random Llama; with a fresh MoLE adapter."""
    data = DataConfig(sources={"unused": SourceConfig(annotations="unused")})
    config = RunConfig(stage="finetune", train=TrainConfig(output_dir="unused"), data=data)
    config.model.language_model = str(ASSETS / "language_model")
    config.model.vision_tower.name = str(ASSETS / "vision_tower" / "config.json")
    config.model.vision_tower.weights = str(ASSETS / "vision_tower" / "model.safetensors")
    config.adapter.method = "mole"
    torch.manual_seed(0)
    model, hf_tokenizer, _ = build_parts(config.model)
    if SIZES[name]:
        llama = LlamaConfig(vocab_size=32000, num_attention_heads=12, tie_word_embeddings=True, **SIZES[name])
        model = type(model)(model.vision_tower, wider_projector(model, llama.hidden_size), LlamaForCausalLM(llama))
    attach_adapter(model, config.adapter)
    model.requires_grad_(False).to(device, common.precision(device)).eval()
    loaded = LoadedModel(
        model=model,
        tokenizer=HFTextTokenizer(hf_tokenizer),
        image_processor=build_image_processor(model, "pad"),
        template="vicuna_v1",
        context_length=2048,
        path=Path("random"),
        adapter="mole",
    )
    predictor = Predictor(loaded)
    predictor.eos_ids = ()  # answers of one length, whatever the random weights say
    return predictor


def wider_projector(model: Any, width: int) -> Any:
    """A projector to another width."""
    from llava_mole.model.multimodal_projector import build_projector

    return build_projector("mlp2x_gelu", model.vision_tower.hidden_size, width)


def write_questions(folder: Path, count: int, images: int) -> list[Question]:
    """`count` questions of 4 to 40 words about `images` pictures."""
    rng = random.Random(0)
    for n in range(images):
        color = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (320 + 40 * (n % 5), 240), color).save(folder / f"{n}.jpg")
    path = folder / f"{count}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            text = " ".join(rng.choices(WORDS, k=rng.randint(4, 40)))
            file.write(json.dumps({"question_id": n, "image": f"{n % images}.jpg", "text": text}) + "\n")
    return read_questions([str(path)])


def answer(predictor: Predictor, questions: Sequence[Question], folder: Path, batch_size: int, new_tokens: int) -> int:
    """Answer as the runner does, into a file. Returns the number of answers."""
    decoding = Decoding(max_new_tokens=new_tokens)
    with tempfile.TemporaryDirectory() as out:
        output = AnswerFile(Path(out) / "a.jsonl", questions, {})
        # One question a window is LLaVA's loop: its image is opened, encoded and forgotten for each question.
        parts = [[q] for q in questions] if batch_size == 1 else [questions]
        for part in parts:
            for window, images in windows(part, folder, batch_size):
                texts = predictor.generate(
                    images, [q.text for q in window], batch_size=batch_size, max_new_tokens=decoding.max_new_tokens
                )
                output.add([answer_record(q, text, "bench") for q, text in zip(window, texts, strict=True)])
        output.finish()
    return len(questions)


def measure(name: str, args: Any, folder: Path) -> list[dict[str, Any]]:
    """Rows of one model."""
    predictor = build(name, args.device)
    parameters = sum(p.numel() for p in predictor.loaded.model.causal_lm.parameters())
    questions = write_questions(folder, args.questions, images=max(1, args.questions // 2))
    shown = [[folder / image for image in q.images] for q in questions[:3]]
    asked = [q.text for q in questions[:3]]
    single = predictor.generate(shown, asked, batch_size=1, max_new_tokens=4)
    batched = predictor.generate(shown, asked, max_new_tokens=4)
    if single != batched:
        raise SystemExit("batched answers differ from single ones; nothing is measured")
    seconds: dict[int, list[float]] = {1: [], args.batch_size: []}
    for round_ in tqdm(range(args.repeats), desc=name, unit="round", disable=None):
        for size in (1, args.batch_size) if round_ % 2 else (args.batch_size, 1):
            start = time.perf_counter()
            answer(predictor, questions, folder, size, args.new_tokens)
            common.synchronize(args.device)
            seconds[size].append(time.perf_counter() - start)
    rows = []
    for size, own in seconds.items():
        ratios = [base / value for base, value in zip(seconds[1], own, strict=True)]
        rows.append(
            {
                "model": name,
                "parameters": parameters,
                "batch": size,
                "new_tokens": args.new_tokens,
                "median_s": sorted(own)[len(own) // 2],
                "min_s": min(own),
                "max_s": max(own),
                "answers_per_s": len(questions) / sorted(own)[len(own) // 2],
                "speed_ratio_to_single": sorted(ratios)[len(ratios) // 2],
            }
        )
    return rows


def measure_memory(args: Any, folder: Path) -> list[dict[str, Any]]:
    """Peak memory of this process after a short list of questions and after one eight times as long."""
    predictor = build("tiny", args.device)
    rows = []
    for count in (2 * args.batch_size * 8, 16 * args.batch_size * 8):
        questions = write_questions(folder, count, images=count // 2)
        answer(predictor, questions, folder, args.batch_size, new_tokens=2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append({"model": "tiny", "questions": count, "batch": args.batch_size, "peak_bytes": peak})
    rows[1]["growth_bytes"] = rows[1]["peak_bytes"] - rows[0]["peak_bytes"]
    rows[0]["growth_bytes"] = 0
    return rows


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--questions", type=int, help="questions of a round")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of every answer")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.questions = args.questions or (16 if args.quick else 48)
    args.repeats = args.repeats or (1 if args.quick else 5)
    models = args.models[:1] if args.quick else args.models
    args.batch_size = 4 if args.quick else args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        # Memory first: the peak of a process only ever rises.
        memory = measure_memory(args, Path(folder))
        rows = [row for name in models for row in measure(name, args, Path(folder))]
    common.report("Answers per second (measured)", rows)
    common.report("Peak memory by the length of the question list (measured)", memory)
    common.save([*rows, *memory], args.json)


if __name__ == "__main__":
    main()

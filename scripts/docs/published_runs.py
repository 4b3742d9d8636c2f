"""Writes the table of docs/planning.md that compares `llava-mole plan` with published hours.

    python scripts/docs/published_runs.py          writes the table
    python scripts/docs/published_runs.py --print  prints it

Every number that the publications do not give is in `RUNS`, and the page names it.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from llava_mole.analysis.plan.architecture import Trained
from llava_mole.analysis.plan.estimates import PlanOptions, Sharing
from llava_mole.analysis.plan.network import network_of
from llava_mole.analysis.plan.plan import ImageSize, Plan, make_plan
from llava_mole.config import DataConfig, SourceConfig, parse_run_config
from llava_mole.model.flops import find_gpu

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "planning.md"
BEGIN, END = "<!-- published runs: scripts/docs/published_runs.py -->", "<!-- end of published runs -->"
FULL = Trained(language_model="full")


@dataclass(frozen=True)
class PublishedRun:
    """One run whose hours are published, as far as it is known."""

    name: str
    hours: float
    """Published wall time."""
    gpus: int
    gpu: str
    config: str
    overrides: tuple[str, ...]
    sharing: Sharing = "zero2"
    sources: tuple[str, ...] = ()
    """Names in `KNOWN_SOURCES` or `given`, in place of the configuration's sources. Each is planned alone and the hours
    are added: LLaVA's batches hold only samples with an image, or only samples without one."""
    given: dict[str, tuple[int, float]] = field(default_factory=dict)
    max_length: int = 2048
    trained: Trained | None = None
    image: ImageSize | None = None
    link: float | None = None


def _llava(model: str, *more: str) -> tuple[str, ...]:
    """LLaVA-1.5's scripts: no adapter, all layers recomputed."""
    path = f"playground/models/vicuna-{model}-v1.5"
    common = ("--adapter.method", "none", "--train.activation_checkpointing", "all", "--train.warmup_steps", "0")
    return ("--model.language_model", path, *common, *more)


_PRETRAIN = ("--train.batching", "padded", "--train.global_batch_size", "256", "--train.micro_batch_size", "32")
_FINETUNE = ("--train.batching", "grouped", "--train.global_batch_size", "128", "--train.micro_batch_size", "16",
             "--projector_weights", "null")  # fmt: skip
_INSTRUCT = ("llava-instruct", "llava-instruct-text")
RUNS = (
    PublishedRun(
        "LLaVA-MoLE, stage 2, 7B", 16.0, 64, "a100-80g", "finetune_mole.yaml",
        ("--train.batching", "padded", "--train.activation_checkpointing", "all"), max_length=4096,
    ),
    PublishedRun(
        "LLaVA-1.5, stage 1, 7B", 3.5, 8, "a100-80g", "pretrain.yaml", _llava("7b", *_PRETRAIN),
        sources=("llava-pretrain",),
    ),
    PublishedRun(
        "LLaVA-1.5, stage 1, 13B", 5.5, 8, "a100-80g", "pretrain.yaml", _llava("13b", *_PRETRAIN),
        sources=("llava-pretrain",),
    ),
    PublishedRun(
        "LLaVA-1.5, stage 2, 7B", 10.0, 8, "a100-40g", "finetune_lora.yaml", _llava("7b", *_FINETUNE),
        sharing="zero3", sources=_INSTRUCT, trained=FULL,
    ),
    PublishedRun(
        "LLaVA-1.5, stage 2, 13B", 20.0, 8, "a100-80g", "finetune_lora.yaml", _llava("13b", *_FINETUNE),
        sharing="zero3", sources=_INSTRUCT, trained=FULL,
    ),
    PublishedRun(
        "LLaVA-OneVision-1.5, mid-training, 8B", 3.7 * 24, 128, "a100-80g", "finetune_lora.yaml",
        ("--model.language_model", "playground/models/Qwen3-8B-Base", "--adapter.method", "none",
         "--train.activation_checkpointing", "all", "--train.batching", "packed", "--train.pack_length", "8192",
         "--train.global_batch_size", "5632", "--train.warmup_steps", "0", "--projector_weights", "null"),
        sources=("onevision",), given={"onevision": (85_000_000, 745)}, max_length=8192,
        trained=Trained("full", "all"), image=ImageSize(3.9, 560), link=200e9,
    ),
)  # fmt: skip


def plans_of(run: PublishedRun, steps: int = 16) -> list[Plan]:
    """The plans of a published run, `configured` as it was; one for each of its sources, or one of all."""
    zero2 = ("--train.deepspeed_config", str(ROOT / "scripts" / "zero2.json"))
    config = parse_run_config([str(ROOT / "configs" / run.config), *zero2, *run.overrides])
    gpu = find_gpu(run.gpu)
    network = network_of(gpu, link=run.link)
    plans = []
    for name in run.sources or (None,):
        data, given = config.data, None
        if name is not None:
            source = SourceConfig(annotations=f"playground/data/{name}.json")
            data = DataConfig(sources={name: source}, max_length=run.max_length)
            given = {name: run.given[name]} if name in run.given else None
        plans.append(
            make_plan(
                PlanOptions(run.gpus, gpu, steps=steps, given=given, sharing=run.sharing, network=network),
                stage=config.stage,
                model=config.model,
                adapter=config.adapter,
                data=data,
                train=config.train,
                train_projector=config.train_projector,
                trained=run.trained,
                image=run.image,
            )
        )
    return plans


def predicted_hours(run: PublishedRun) -> tuple[int, float, float]:
    """Samples, predicted hours of a published run, and those without padding and waiting."""
    plans = plans_of(run)
    compute = 0.0
    for plan in plans:
        estimate = plan.configured
        compute += estimate.hours * (estimate.step.useful + estimate.step.recompute) / estimate.step.seconds
    return sum(plan.samples for plan in plans), sum(plan.configured.hours for plan in plans), compute


def table(runs: tuple[PublishedRun, ...] = RUNS) -> str:
    """The table as Markdown."""
    header = ("run", "GPUs", "samples", "published h", "predicted h", "predicted / published", "the same, compute only")
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for run in runs:
        samples, hours, compute = predicted_hours(run)
        name = "a800-80g" if run.link else run.gpu
        rows.append(
            f"| {run.name} | {run.gpus} {name} | {samples:,} | {run.hours:g} | {hours:.1f} | "
            f"**{hours / run.hours:.2f}** | {compute / run.hours:.2f} |"
        )
    return "\n".join(rows)


def filled(page: str, text: str) -> str:
    """The page with `text` between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    text = table()
    if "--print" in sys.argv[1:]:
        print(text)
    else:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()

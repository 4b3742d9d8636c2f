"""Estimates parameters, GPU memory, FLOPs and hours of a run; needs no weights, data or GPU."""

import math
from dataclasses import dataclass, replace

from llava_mole.analysis.plan.architecture import Trained, build_meta_model
from llava_mole.analysis.plan.estimates import Estimate, Planner, PlanOptions
from llava_mole.analysis.plan.lengths import SourceLengths, source_lengths
from llava_mole.analysis.plan.simulation import draw_steps
from llava_mole.common.errors import ConfigError
from llava_mole.config import AdapterConfig, DataConfig, ModelConfig, TrainConfig
from llava_mole.data.batching import count_steps
from llava_mole.data.mixture import mixture_counts
from llava_mole.model.adapters import parameter_report
from llava_mole.model.builder import configured_image_processor
from llava_mole.model.flops import ModelShape, model_shape, training_flops
from llava_mole.model.language_model import check_max_length


@dataclass(frozen=True)
class SourcePlan:
    """One source of the mixture over the whole run."""

    name: str
    samples: int
    mean_tokens: float
    longest: int
    teraflops: float
    """Mean per sample, without recomputation."""
    basis: str


@dataclass(frozen=True)
class Plan:
    """The estimates of a run."""

    options: PlanOptions
    stage: str
    assumptions: tuple[str, ...]
    parameters: list[tuple[str, int, int]]
    """Part, trainable, all."""
    sources: list[SourcePlan]
    samples: int
    steps: int
    batch: int
    sample_teraflops: float
    checkpoint_bytes: int
    configured: Estimate
    """The configuration as it is, on the requested GPUs."""
    recommended: Estimate
    """The configured batching on the requested GPUs, with the best rows and recomputation."""
    reason: str
    """Why this recomputation was chosen."""
    estimates: list[Estimate]
    """All estimates compared, including these two."""
    planner: Planner
    """What the estimates come from."""
    lengths: tuple[SourceLengths, ...]
    counts: tuple[int, ...]
    """Samples of each source in `lengths` over the run."""

    def fits(self, estimate: Estimate) -> bool:
        """Whether an estimate fits into the GPU's memory."""
        return estimate.memory_bytes <= self.options.gpu.memory_bytes


@dataclass(frozen=True)
class ImageSize:
    """What a mean image takes in the sequence and in the tower."""

    tiles: float = 1.0
    """Squares of the tower's size that an image is cut into, its overview included."""
    tokens: int | None = None
    """Positions in the sequence. None: the tower's patches for every tile."""

    def __post_init__(self) -> None:
        if not 1 <= self.tiles < math.inf:
            raise ConfigError(f"--tiles is {self.tiles:g}; it must be at least 1")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"--image-tokens is {self.tokens}; it must be at least 1")

    def apply(self, shape: ModelShape) -> ModelShape:
        """The shape of a model that takes such images."""
        tokens = round(shape.image_tokens * self.tiles) if self.tokens is None else self.tokens
        return replace(shape, image_tokens=tokens, tower_flops=shape.tower_flops * self.tiles)


def make_plan(
    options: PlanOptions,
    *,
    stage: str,
    model: ModelConfig,
    adapter: AdapterConfig,
    data: DataConfig,
    train: TrainConfig,
    train_projector: bool,
    trained: Trained | None = None,
    image: ImageSize | None = None,
) -> Plan:
    """Estimate a run from the sections of its configuration.

    Args:
        trained: Which of the model's own weights train. None: adapters and projector only.
        image: What an image takes if it is cut into tiles. None: one square.

    Raises:
        ConfigError, WeightsError, DataError: The configuration is wrong, or names a model or source that is neither
            known nor on disk.
    """
    _check(options)
    trained, image = trained or Trained(), image or ImageSize()
    if trained.language_model == "full" and model.quantization != "none":
        raise ConfigError(f"model.quantization is {model.quantization!r}; a language model that trains needs 'none'")
    meta = build_meta_model(model, adapter, train_projector=train_projector, trained=trained)
    check_max_length(meta.model.causal_lm.config, data.max_length, model.language_model)
    shape = image.apply(model_shape(meta.model))
    if shape.image_tokens >= data.max_length:
        raise ConfigError(
            f"an image takes {shape.image_tokens:,} tokens, data.max_length is {data.max_length:,}; raise it, or lower "
            "--tiles or --image-tokens"
        )
    # A mean given by hand takes the place of sizes that are measured or assumed.
    grid = configured_image_processor(meta.model, data).grid if image == ImageSize() else None
    lengths = source_lengths(
        data, model.language_model, shape.image_tokens, grid=grid, sample=options.sample, given=options.given
    )
    sizes = {source.name: max(1, source.records - data.validation_samples) for source in lengths}
    lambdas = {name: value for name, value in data.mixture.items() if name in sizes}
    counts = {name: n * train.epochs for name, n in mixture_counts(sizes, lambdas).items()}
    batch = train.global_batch_size
    steps, _ = count_steps(sum(counts.values()), batch)
    steps = steps if train.max_steps is None else min(steps, train.max_steps)
    drawn = list(draw_steps(lengths, list(counts.values()), batch, options.steps, seed=train.seed))
    parameters = parameter_report(meta.model)
    trainable = sum(part[1] for part in parameters)
    frozen = sum(part[2] for part in parameters) - trainable
    positions = meta.tower_blocks_trained * (meta.model.num_image_tokens + 1) * image.tiles
    planner = Planner(
        train, adapter, model.quantization, data.max_length, options, shape, drawn, steps, trainable, frozen, positions
    )
    configured = planner.configured(options.gpus)
    recommended, reason = planner.recommend(options.gpus, train.batching)
    sources = [_source_plan(shape, source, counts[source.name]) for source in lengths]
    assumed = ", ".join(source.name for source in lengths if source.assumed)
    assumptions = (f"number and lengths of the samples of {assumed} (table below)",) if assumed else ()
    return Plan(
        options=options,
        stage=stage,
        assumptions=meta.assumptions + assumptions,
        parameters=parameters,
        sources=sources,
        samples=sum(counts.values()),
        steps=steps,
        batch=batch,
        sample_teraflops=sum(s.teraflops * s.samples for s in sources) / sum(s.samples for s in sources),
        checkpoint_bytes=16 * trainable,
        configured=configured,
        recommended=recommended,
        reason=reason,
        estimates=planner.compare(configured, recommended),
        planner=planner,
        lengths=tuple(lengths),
        counts=tuple(counts[source.name] for source in lengths),
    )


def _check(options: PlanOptions) -> None:
    if options.gpus < 1:
        raise ConfigError(f"--gpus is {options.gpus}; it must be at least 1")
    if not 0 < options.utilisation <= 1:
        raise ConfigError(f"--utilisation is {options.utilisation}; it must be above 0 and at most 1")
    if not 0 <= options.jitter < 1:
        raise ConfigError(f"--jitter is {options.jitter}; it must be at least 0 and below 1")
    if not 0 <= options.slow_share <= 1 or not 1 <= options.slow_factor < math.inf:
        raise ConfigError(
            f"--slow {options.slow_share:g},{options.slow_factor:g}: the share is 0 to 1, the factor at least 1"
        )
    for key in ("steps", "sample"):
        if getattr(options, key) < 1:
            raise ConfigError(f"--{key} is {getattr(options, key)}; it must be at least 1")


def _source_plan(shape: ModelShape, source: SourceLengths, samples: int) -> SourcePlan:
    tokens = source.tokens.astype(float)
    flops = training_flops(shape, tokens, tokens**2, source.supervised.astype(float), source.images.astype(float))
    return SourcePlan(
        name=source.name,
        samples=samples,
        mean_tokens=float(tokens.mean()),
        longest=int(source.tokens.max()),
        teraflops=float(flops.mean()) / 1e12,
        basis=source.basis,
    )

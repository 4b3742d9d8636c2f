"""Estimates parameters, GPU memory, FLOPs and hours of a run; needs no weights, data or GPU."""

from dataclasses import dataclass

from llava_mole.analysis.plan.architecture import build_meta_model
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

    def fits(self, estimate: Estimate) -> bool:
        """Whether an estimate fits into the GPU's memory."""
        return estimate.memory_bytes <= self.options.gpu.memory_bytes


def make_plan(
    options: PlanOptions,
    *,
    stage: str,
    model: ModelConfig,
    adapter: AdapterConfig,
    data: DataConfig,
    train: TrainConfig,
    train_projector: bool,
) -> Plan:
    """Estimate a run from the sections of its configuration.

    Raises:
        ConfigError, WeightsError, DataError: The configuration is wrong, or names a model or source that is neither
            known nor on disk.
    """
    _check(options)
    meta = build_meta_model(model, adapter, train_projector=train_projector)
    check_max_length(meta.model.causal_lm.config, data.max_length, model.language_model)
    shape = model_shape(meta.model)
    grid = configured_image_processor(meta.model, data).grid
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
    planner = Planner(
        train, adapter, model.quantization, data.max_length, options, shape, drawn, steps, trainable, frozen
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
    )


def _check(options: PlanOptions) -> None:
    if options.gpus < 1:
        raise ConfigError(f"--gpus is {options.gpus}; it must be at least 1")
    if not 0 < options.utilisation <= 1:
        raise ConfigError(f"--utilisation is {options.utilisation}; it must be above 0 and at most 1")
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

"""Ways to run a configuration (batching, row length, recomputation, number of GPUs) and the best of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llava_mole.analysis.plan.memory import TOWER_NUMBERS, Row, Strategy, frozen_bytes, memory_items
from llava_mole.analysis.plan.network import Network, Traffic, network_of, traffic_of
from llava_mole.analysis.plan.simulation import (
    Rows,
    Samples,
    StepTime,
    draw_slowness,
    grouped_rows,
    mean_step,
    padded_rows,
    step_time,
)
from llava_mole.config import AdapterConfig, Quantization, TrainConfig, check_batch, deepspeed_config
from llava_mole.data.batching import assign_step
from llava_mole.model.flops import GIB, Gpu, ModelShape
from llava_mole.model.head_loss import CHUNK_ELEMENTS

Batching = Literal["padded", "grouped", "packed"]
Sharing = Literal["zero2", "zero3", "fsdp2", "ddp"]
"""How ranks share the model's state, as in `train.distributed`."""
COMPARED_GPUS = (8, 16, 32, 64)
"""Numbers of GPUs in the table, besides the requested one."""
ROWS = (1, 2, 4)
"""Capacities tried for packed rows, in multiples of the longest sample."""
GAIN = 0.02
"""Share of the time that a larger row must save to be chosen."""
EVERY = (8, 4, 3, 2)
"""Intervals tried for the policy `every_n`, least recomputation first."""


@dataclass(frozen=True)
class PlanOptions:
    """The options of a plan besides the configuration."""

    gpus: int
    gpu: Gpu
    utilisation: float = 0.5
    """Share of the GPU's peak that a rank sustains while computing."""
    steps: int = 200
    """Optimizer steps to simulate."""
    sample: int = 2000
    """Records to tokenize per source."""
    given: Mapping[str, tuple[int, float]] | None = None
    """`(records, mean tokens)` of sources without data."""
    network: Network | None = None
    """None takes that of the GPU's usual nodes."""
    jitter: float = 0.0
    """How much longer a rank takes for a micro-batch now and then; see `draw_slowness`."""
    slow_share: float = 0.0
    """Probability that a GPU is slow throughout."""
    slow_factor: float = 1.1
    """Its time over that of the others."""
    sharing: Sharing | None = None
    """None takes `train.distributed`."""

    @property
    def connection(self) -> Network:
        """The network of the plan."""
        return self.network or network_of(self.gpu)


@dataclass(frozen=True)
class Policy:
    """Which activations are recomputed."""

    name: str
    """`none`, `every_<n>` or `all`."""
    recomputed_layers: int

    @property
    def setting(self) -> str:
        """The options of `llava-mole train` that select it."""
        if not self.name.startswith("every_"):
            return f"--train.activation_checkpointing {self.name}"
        n = self.name.removeprefix("every_")
        return f"--train.activation_checkpointing every_n --train.checkpoint_every_n {n}"


@dataclass(frozen=True)
class Estimate:
    """One way to run a configuration."""

    gpus: int
    batching: str
    row_tokens: int
    """Most tokens of a micro-batch, padding included."""
    policy: Policy
    memory: dict[str, float]
    """Bytes per item on one GPU."""
    step: StepTime
    hours: float
    mfu: float
    """Useful FLOPs over what the GPUs could do in the time."""
    bytes_sent: float = 0.0
    """By one rank in a step."""

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def setting(self) -> str:
        """The options of `llava-mole train` that select it."""
        rows = f" --train.pack_length {self.row_tokens}" if self.batching == "packed" else ""
        return f"--train.batching {self.batching}{rows} {self.policy.setting}"

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus


@dataclass(frozen=True)
class Planner:
    """Estimates one model and mixture on different numbers of GPUs."""

    train: TrainConfig
    adapter: AdapterConfig
    quantization: Quantization
    max_length: int
    """Longest sample in tokens."""
    options: PlanOptions
    shape: ModelShape
    drawn: Sequence[Samples]
    total_steps: int
    trainable: int
    frozen: int
    tower_positions: float = 0.0
    """Patches of an image times the tower's blocks that train."""

    @property
    def sharing(self) -> str:
        """The strategy of the plan: of the options, else of the configuration."""
        return self.options.sharing or self.train.distributed

    @property
    def compute_bytes(self) -> int:
        """Size of a number in the compute precision."""
        return 2 if self.train.precision == "bf16" else 4

    def configured(self, gpus: int) -> Estimate:
        """The configuration as it is. Raises ConfigError if its batch cannot be spread over the ranks."""
        train = self.train
        layers = {"none": 0, "every_n": -(-self.shape.layers // train.checkpoint_every_n), "all": self.shape.layers}
        recomputes = train.activation_checkpointing
        name = f"every_{train.checkpoint_every_n}" if recomputes == "every_n" else recomputes
        packed = train.pack_length or self.max_length
        row_tokens = packed if train.batching == "packed" else self._padded_row()
        return self.estimate(gpus, train.batching, Policy(name, layers[recomputes]), row_tokens)

    def recommend(self, gpus: int, batching: Batching) -> tuple[Estimate, str]:
        """The fastest estimate that fits, or else the one with the most recomputation; and the reason.

        Padded micro-batches have the configured size. Packed rows may be longer than a sample: with fewer rows, ranks
        wait for each other less often.
        """
        sizes = [self._padded_row()]
        if batching == "packed":
            given = self.train.pack_length
            sizes = [multiple * self.max_length for multiple in ROWS] if given is None else [given]
        best: tuple[Estimate, str] | None = None
        for row_tokens in sizes:
            policy, reason, fits = self._choose_policy(gpus, batching, row_tokens)
            if best is not None and not fits:
                break
            estimate = self.estimate(gpus, batching, policy, row_tokens)
            if best is None or estimate.step.seconds < (1 - GAIN) * best[0].step.seconds:
                best = estimate, reason
        assert best is not None
        return best

    def _choose_policy(self, gpus: int, batching: Batching, row_tokens: int) -> tuple[Policy, str, bool]:
        """The fitting policy with the least recomputation, the reason, and whether any policy fits."""
        capacity = self.options.gpu.memory_bytes
        need = {policy: sum(self.memory(gpus, batching, policy, row_tokens).values()) for policy in self.policies()}
        fitting = [policy for policy, size in need.items() if size <= capacity]
        chosen = fitting[0] if fitting else list(need)[-1]
        none, have = next(iter(need)), f"{_gib(capacity)} GiB"
        if not fitting:
            reason = f"even with every layer recomputed {_gib(need[chosen])} GiB are needed, there are {have}"
        elif chosen == none:
            reason = f"all activations fit ({_gib(need[none])} of {have}), so nothing needs to be computed twice"
        else:
            reason = (
                f"keeping all activations would need {_gib(need[none])} of {have}; recomputing "
                f"{chosen.recomputed_layers} of {self.shape.layers} layers is the least that fits "
                f"({_gib(need[chosen])} GiB)"
            )
        return chosen, reason, bool(fitting)

    def compare(self, configured: Estimate, recommended: Estimate) -> list[Estimate]:
        """On each number of GPUs: padded with full recomputation as in LLaVA, padded or grouped, and packed."""
        padded: Batching = "grouped" if self.train.batching == "grouped" else "padded"
        estimates = []
        for gpus in sorted({*COMPARED_GPUS, self.options.gpus}):
            if self.train.global_batch_size % (gpus * self.train.micro_batch_size) == 0:
                estimates.append(self.estimate(gpus, "padded", self.policies()[-1], self._padded_row()))
                estimates.append(self.recommend(gpus, padded)[0])
            if gpus <= self.train.global_batch_size:
                estimates.append(self.recommend(gpus, "packed")[0])
        for known in (recommended, configured):
            if known not in estimates:
                estimates.append(known)
        return sorted(estimates, key=lambda e: e.gpus)

    def estimate(self, gpus: int, batching: Batching, policy: Policy, row_tokens: int) -> Estimate:
        """Memory and time of one way to run it. Raises ConfigError if padded batches do not divide."""
        check_batch(batching, self.train.global_batch_size, self.train.micro_batch_size, gpus)
        step = mean_step(self.step_times(self.drawn, gpus, batching, policy, row_tokens))
        return Estimate(
            gpus=gpus,
            batching=batching,
            row_tokens=row_tokens,
            policy=policy,
            memory=self.memory(gpus, batching, policy, row_tokens),
            step=step,
            hours=step.seconds * self.total_steps / 3600,
            mfu=step.useful_share * self.options.utilisation,
            bytes_sent=self.traffic(gpus).bytes_sent(gpus, self.passes(self.drawn, gpus, batching, row_tokens)),
        )

    def step_times(
        self, drawn: Sequence[Samples], gpus: int, batching: Batching, policy: Policy, row_tokens: int
    ) -> list[StepTime]:
        """The time of each of the drawn steps."""
        options, traffic, times = self.options, self.traffic(gpus), []
        generator = np.random.Generator(np.random.Philox(key=self.train.seed))
        for samples in drawn:
            ranks = self._place(samples.tokens.tolist(), gpus, batching, row_tokens)
            slowness = None
            if options.jitter or options.slow_share:
                slowness = draw_slowness(
                    gpus,
                    max(len(rows) for rows in ranks),
                    jitter=options.jitter,
                    slow_share=options.slow_share,
                    slow_factor=options.slow_factor,
                    generator=generator,
                )
            times.append(
                step_time(
                    self.shape,
                    samples,
                    ranks,
                    padded=batching != "packed",
                    recomputed_layers=policy.recomputed_layers,
                    flops_per_s=options.gpu.bf16_flops * options.utilisation,
                    lock_step=gpus > 1 and self.sharing != "ddp",
                    exposed=lambda compute, last: traffic.exposed(options.connection, gpus, compute, last=last),
                    slowness_RP=slowness,
                )
            )
        return times

    def passes(self, drawn: Sequence[Samples], gpus: int, batching: Batching, row_tokens: int) -> float:
        """Mean number of micro-batches of a rank in the drawn steps."""
        placed = [self._place(samples.tokens.tolist(), gpus, batching, row_tokens) for samples in drawn]
        return sum(max(len(rows) for rows in ranks) for ranks in placed) / len(placed)

    def traffic(self, gpus: int) -> Traffic:
        """The collectives of a step on so many GPUs."""
        overlap = True  # DeepSpeed's default for ZeRO-3
        if gpus > 1 and (self.sharing == "zero2" or self.sharing == self.train.distributed == "zero3"):
            zero = deepspeed_config(self.train, gpus)["zero_optimization"]
            overlap = bool(zero.get("overlap_comm", self.sharing == "zero3"))
        return traffic_of(
            self._strategy(gpus),
            self.shape,
            frozen=frozen_bytes(self.shape, self.frozen, self.compute_bytes, self.quantization),
            trainable=self.trainable,
            compute_bytes=self.compute_bytes,
            overlap_comm=overlap,
        )

    def memory(self, gpus: int, batching: Batching, policy: Policy, row_tokens: int) -> dict[str, float]:
        """Bytes per item on one GPU at its peak."""
        return memory_items(
            self.shape,
            frozen_parameters=self.frozen,
            trainable_parameters=self.trainable,
            compute_bytes=self.compute_bytes,
            strategy=self._strategy(gpus),
            row=self._row(batching, row_tokens),
            adapter=self.adapter.method,
            rank=self.adapter.rank,
            recomputed_layers=policy.recomputed_layers,
            head_chunk=CHUNK_ELEMENTS // self.shape.vocab_size,
            quantization=self.quantization,
            tower_numbers=TOWER_NUMBERS * self.shape.tower_width * self.tower_positions,
        )

    def policies(self) -> list[Policy]:
        """The policies compared, from no recomputation to full recomputation."""
        layers = self.shape.layers
        every = [Policy(f"every_{n}", -(-layers // n)) for n in EVERY if n < layers]
        return [Policy("none", 0), *every, Policy("all", layers)]

    def _place(self, lengths: list[int], gpus: int, batching: Batching, row_tokens: int) -> Sequence[Rows]:
        """Each rank's micro-batches of a step."""
        if batching == "packed":
            quadratic = self.shape.quadratic_length
            return assign_step(lengths, world_size=gpus, capacity=row_tokens, quadratic=quadratic)
        if batching == "grouped":
            return grouped_rows(lengths, gpus, self.train.micro_batch_size)
        return padded_rows(len(lengths), gpus, self.train.micro_batch_size)

    def _strategy(self, gpus: int) -> Strategy:
        if gpus == 1 or self.sharing != "zero2":
            return Strategy("single" if gpus == 1 else self.sharing, gpus)
        zero = deepspeed_config(self.train, gpus)["zero_optimization"]
        bucket = zero.get("reduce_bucket_size")
        return Strategy(f"zero{zero['stage']}", gpus, *([bucket] if isinstance(bucket, int) else []))

    def _padded_row(self) -> int:
        return self.train.micro_batch_size * self.max_length

    def _row(self, batching: Batching, row_tokens: int) -> Row:
        """The largest micro-batch: samples of full length or, packed, a full row of samples with hardly any text."""
        image, size = self.shape.image_tokens, self.train.micro_batch_size
        packed = batching == "packed"
        images = row_tokens // image if packed else size
        fewest_images = row_tokens // self.max_length if packed else size
        return Row(tokens=row_tokens, images=images, supervised=row_tokens - fewest_images * image, packed=packed)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"

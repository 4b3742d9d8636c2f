"""Bytes that ranks exchange in a step, and the time this takes beside the compute that can hide it.

Collectives are rings, as NCCL's are for large messages: to gather or to reduce-scatter S bytes over W ranks, each rank
sends (W - 1) / W S. An all-reduce is both. Within a node the GPUs' links set the speed; across nodes it is the slower
of a GPU's link and the node's network cards together, because NCCL builds one ring for each card.
"""

from dataclasses import dataclass

from llava_mole.analysis.plan.memory import Strategy
from llava_mole.common.errors import ConfigError
from llava_mole.model.flops import Gpu, ModelShape

LINKS = {
    "a100": 300e9,  # NVLink 3, 600 GB/s both ways (A100 data sheet)
    "h100": 450e9,  # NVLink 4, 900 GB/s both ways (H100 data sheet)
    "h200": 450e9,
    "b200": 900e9,  # NVLink 5, 1.8 TB/s both ways (DGX B200 data sheet)
}
"""Bytes per second of a GPU to its node's other GPUs, one way, by the beginning of its name."""
PCIE = 32e9
"""The same for a GPU without NVLink: PCIe 4.0 with 16 lanes."""
EFFICIENCY = 0.8
"""Share of the nominal bandwidth that collectives reach."""
LINK_LATENCY, NETWORK_LATENCY = 3.4e-6, 14e-6
"""Seconds of one step of a ring over NVLink and over the network, protocol Simple (`hwLat` of NCCL's tuning table)."""
NODE_BANDWIDTH = 200e9
"""Default bytes per second of a node's network, one way: eight cards of 200 Gbit/s."""


@dataclass(frozen=True)
class Network:
    """How GPUs are connected; all rates are bytes per second in one direction."""

    link: float
    """Of a GPU within its node."""
    node: float = NODE_BANDWIDTH
    """Of all network cards of a node together."""
    gpus_per_node: int = 8
    overlap: float = 0.8
    """Share of the compute time in which communication can run beside it."""

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise ConfigError(f"--gpus-per-node is {self.gpus_per_node}; it must be at least 1")
        for name, value in (("--link-gbs", self.link), ("--node-gbs", self.node)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value / 1e9:g}; it must be a positive number of GB/s")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"--overlap is {self.overlap}; it is a share, 0 to 1")

    @property
    def words(self) -> str:
        """The network in one phrase."""
        return (
            f"{self.gpus_per_node} GPUs a node, {self.link / 1e9:g} GB/s a GPU within it, {self.node / 1e9:g} GB/s a "
            "node between them"
        )

    def nodes(self, ranks: int) -> int:
        """Nodes that so many ranks occupy."""
        return -(-ranks // self.gpus_per_node)

    def seconds(self, size: float, ranks: int, calls: float = 1.0) -> float:
        """Time to gather (or reduce-scatter) `size` bytes in all over the ranks in `calls` collectives."""
        if ranks == 1:
            return 0.0
        nodes = self.nodes(ranks)
        bandwidth = self.link if nodes == 1 else min(self.link, self.node)
        across = nodes if nodes > 1 else 0
        latency = (ranks - 1 - across) * LINK_LATENCY + across * NETWORK_LATENCY
        return size * (ranks - 1) / ranks / (EFFICIENCY * bandwidth) + calls * max(0.0, latency)


def network_of(gpu: Gpu, **options: float | int | None) -> Network:
    """The network of a GPU's usual nodes; options that are not None replace parts of it."""
    link = next((rate for name, rate in LINKS.items() if gpu.name.startswith(name)), PCIE)
    given = {key: value for key, value in options.items() if value is not None}
    return Network(**{"link": link, **given})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Collectives:
    """What is gathered or reduced at one point: bytes of the whole tensors, and the number of calls."""

    size: float = 0.0
    calls: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """Collectives of a training step."""

    every_pass: Collectives
    """For each micro-batch."""
    hidden: bool
    """Whether those run beside the computation."""
    last_pass: Collectives
    """Beside the backward pass of the step's last micro-batch."""
    after_step: Collectives
    """After the optimizer; nothing runs beside it."""

    def bytes_sent(self, ranks: int, passes: float) -> float:
        """Bytes that one rank sends in a step of so many micro-batches."""
        whole = passes * self.every_pass.size + self.last_pass.size + self.after_step.size
        return whole * (ranks - 1) / ranks

    def exposed(self, network: Network, ranks: int, compute: float, *, last: bool) -> float:
        """Seconds that ranks wait for communication in a micro-batch that computes for `compute` seconds."""
        every = network.seconds(self.every_pass.size, ranks, self.every_pass.calls)
        waited = max(0.0, every - network.overlap * compute) if self.hidden else every
        if last:
            # Of a micro-batch's forward and backward pass, the backward is about two thirds.
            reduced = network.seconds(self.last_pass.size, ranks, self.last_pass.calls)
            waited += max(0.0, reduced - network.overlap * compute * 2 / 3)
            waited += network.seconds(self.after_step.size, ranks, self.after_step.calls)
        return waited

    def pass_seconds(self, network: Network, ranks: int) -> float:
        """Seconds that the collectives of one micro-batch take."""
        return network.seconds(self.every_pass.size, ranks, self.every_pass.calls)


def traffic_of(
    strategy: Strategy, shape: ModelShape, *, frozen: float, trainable: float, compute_bytes: int, overlap_comm: bool
) -> Traffic:
    """The collectives of a strategy.

    Args:
        frozen, trainable: Bytes of the frozen weights (quantised ones are smaller), number of trainable parameters.
        compute_bytes: Size of a number in the compute precision.
        overlap_comm: DeepSpeed's setting; nothing is hidden without it.
    """
    nothing, e = Collectives(), compute_bytes
    buckets = max(1.0, trainable / strategy.bucket_elements)
    if strategy.kind == "single":
        return Traffic(nothing, True, nothing, nothing)
    if strategy.kind == "ddp":  # float32 gradients, all-reduced beside the last backward pass
        return Traffic(nothing, True, Collectives(2 * 4 * trainable, 2 * buckets), nothing)
    if strategy.shards_weights:
        # Every layer is gathered for the forward and again for the backward pass; gradients are reduce-scattered.
        gathered, reduced = frozen + e * trainable, (4 if strategy.kind == "fsdp2" else e) * trainable
        calls = (3.0 if trainable else 2.0) * (shape.layers + 1)
        hidden = overlap_comm or strategy.kind == "fsdp2"
        return Traffic(Collectives(2 * gathered + reduced, calls), hidden, nothing, nothing)
    reduced = e * trainable * (2.0 if strategy.kind == "zero0" else 1.0)
    updated = nothing if strategy.kind == "zero0" else Collectives(e * trainable, buckets)
    return Traffic(Collectives(reduced, buckets), overlap_comm, nothing, updated)

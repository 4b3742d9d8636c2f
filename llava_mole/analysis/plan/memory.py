"""Memory of one GPU in training, by item; docs/planning.md derives the formulas.

`compute_bytes`, e in the formulas, is the size of a number in the compute precision (bfloat16 2, float32 4): frozen
weights, activations and, under DeepSpeed, trainable weights and gradients. float32 copies always take 4.
"""

from dataclasses import dataclass

from llava_mole.config import Quantization
from llava_mole.model.flops import ModelShape
from llava_mole.model.quantization import BYTES_PER_WEIGHT

RESERVE_BYTES = 2 * 2**30
"""CUDA context, NCCL's buffers, cuBLAS's workspace."""
FRAGMENTATION = 0.05
"""Share of everything else that the allocator loses to fragmentation."""
DEEPSPEED_BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`: the length of the buffer it allocates."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`: gathered weights that a rank holds at a time."""
TOWER_NUMBERS = 20
"""Tensors of the tower's width that one trained block of it keeps: input and output of both norms, q, k and v, the
attention's output, and three of four times the width around QuickGELU."""


@dataclass(frozen=True)
class Strategy:
    """How ranks share state: `single` (one process), `ddp`, `zero0` to `zero3` of DeepSpeed, or `fsdp2`."""

    kind: str
    world_size: int
    bucket_elements: int = DEEPSPEED_BUCKET

    @property
    def shards_optimizer(self) -> bool:
        return self.kind in ("zero1", "zero2", "zero3", "fsdp2")

    @property
    def shards_weights(self) -> bool:
        """Whether every rank keeps only its part of all weights, the frozen ones included."""
        return self.kind in ("zero3", "fsdp2")


@dataclass(frozen=True)
class Row:
    """The largest micro-batch a rank runs."""

    tokens: int
    """Padding included."""
    images: int
    supervised: int
    """Positions with logits."""
    packed: bool = False
    """Whether several samples share the row."""


def layer_bytes_per_token(
    shape: ModelShape, adapter: str, rank: int, compute_bytes: int, packed: bool = False
) -> float:
    """Bytes that one decoder layer of Llama's kind keeps for its backward pass, per token.

    Args:
        adapter: `none`, `lora` or `mole`.
        packed: attention runs sample by sample; its outputs are kept both separately and concatenated.
    """
    e, d, f = compute_bytes, shape.hidden_size, shape.ffn_size
    norms = 2 * 4.0 * (d + 1)  # both RMSNorms: the input in float32, the reciprocal of its root mean square
    attention = e * (2.0 * shape.attention_width + 2.0 * shape.key_value_width) + 4.0 * shape.attention_heads
    trains = shape.trained_linear_parameters > 0
    norms += 2.0 * e * d if trains else 0.0  # what the norms' own weights are multiplied with
    if adapter == "none" and not trains:
        return norms + attention + e * 3.0 * f  # gate and its activation, up
    attention += e * d  # input of q, k and v; that of o, the attention's output, is kept anyway
    attention += e * shape.attention_width if packed else 0.0
    low_rank = e * rank * (4.0 + 3.0 * shape.experts_used) if adapter != "none" else 0.0
    if adapter in ("none", "lora"):
        return norms + attention + low_rank + e * (d + 4.0 * f)  # also the FFN's input and that of down
    router = 4.0 * d if e < 4 and shape.has_router else 0.0  # the router's float32 copy of its input
    return norms + attention + low_rank + e * (d + 2.0 * f) + router  # MoLE recomputes the activation of gate


def activation_bytes(
    shape: ModelShape,
    row: Row,
    adapter: str,
    rank: int,
    compute_bytes: int,
    recomputed_layers: int,
    tower_numbers: float = 0.0,
) -> float:
    """Bytes kept between forward and backward pass, with one recomputed layer at its full size.

    `tower_numbers` are those that trained blocks of the vision tower keep for one image.
    """
    layer = layer_bytes_per_token(shape, adapter, rank, compute_bytes, row.packed) * row.tokens
    inputs = compute_bytes * shape.hidden_size * row.tokens
    kept = (shape.layers - recomputed_layers) * layer + recomputed_layers * inputs
    unfolded = layer if recomputed_layers else 0.0
    ends = (2 * compute_bytes + 4) * shape.hidden_size * row.tokens  # embeddings, final norm and its output
    # The projector keeps its input and, around each GELU, two tensors of the model's width.
    projected = compute_bytes * shape.image_tokens * (shape.tower_width + 2 * shape.hidden_size) * row.images
    return kept + unfolded + ends + projected + compute_bytes * tower_numbers * row.images


def frozen_bytes(shape: ModelShape, parameters: int, compute_bytes: int, quantization: Quantization) -> float:
    """Bytes of `parameters` frozen weights; those of the decoder layers' linears may be quantised."""
    if quantization == "none":
        return float(compute_bytes * parameters)
    quantised = shape.linear_parameters
    return compute_bytes * (parameters - quantised) + BYTES_PER_WEIGHT[quantization] * quantised


def trainable_adapter_parameters(shape: ModelShape, trainable: float) -> float:
    """Trainable weights beside the language model's own, at most: what wraps around the decoder layers."""
    return max(0.0, trainable - shape.trained_linear_parameters - shape.projector_parameters)


def int8_input_bytes(shape: ModelShape, tokens: int, adapter: str, compute_bytes: int, recomputed_layers: int) -> float:
    """Bytes of the linears' inputs that only 8-bit products keep.

    bitsandbytes keeps the input of an 8-bit product even if the weight is frozen, and recomputation does not free it.
    """
    d, w, f = shape.hidden_size, shape.attention_width, shape.ffn_size
    beyond_others = {"none": 2 * d + f, "lora": 0, "mole": f}[adapter]
    kept = (shape.layers - recomputed_layers) * beyond_others + recomputed_layers * (2 * d + w + f)
    return float(compute_bytes * kept * tokens)


def memory_items(
    shape: ModelShape,
    *,
    frozen_parameters: int,
    trainable_parameters: int,
    compute_bytes: int,
    strategy: Strategy,
    row: Row,
    adapter: str,
    rank: int,
    recomputed_layers: int,
    head_chunk: int,
    quantization: Quantization = "none",
    tower_numbers: float = 0.0,
) -> dict[str, float]:
    """Bytes per item on one GPU at its peak.

    Args:
        row: the largest micro-batch.
        adapter, rank: as for `layer_bytes_per_token`.
        recomputed_layers: decoder layers whose activations are recomputed.
        head_chunk: positions whose logits exist at a time.
        quantization: of the language model's linears.
        tower_numbers: as for `activation_bytes`.
    """
    e, trainable = compute_bytes, float(trainable_parameters)
    shard = trainable / strategy.world_size if strategy.shards_optimizer else trainable
    frozen = frozen_bytes(shape, frozen_parameters, e, quantization)
    buckets = float(e * strategy.bucket_elements)
    if strategy.kind in ("single", "ddp"):
        weights = 4 * trainable + (2 * trainable if e < 4 else 0.0)  # autocast keeps bfloat16 copies
        gradients = 4 * trainable
        optimizer = 8 * trainable  # the weights are the masters
        buckets = 4 * trainable if strategy.kind == "ddp" else 0.0
    elif strategy.kind == "fsdp2":
        # The sharded weights are the float32 masters. Two layers are gathered at a time, the one that computes and the
        # next one; a layer's gradients are whole until they are reduced.
        weights, gradients, optimizer = 4 * shard, 4 * shard, 8 * shard
        layer = (shape.linear_parameters + trainable_adapter_parameters(shape, trainable)) / shape.layers
        buckets = e * max(2.0 * layer, 2.0 * shape.head_parameters) + (e + 4) * layer * (trainable > 0)
    else:
        weights = e * (shard if strategy.kind == "zero3" else trainable)
        gradients = e * (shard if strategy.kind in ("zero2", "zero3") else trainable)
        optimizer = 12 * shard  # float32 master and both moments
        if strategy.kind == "zero3":
            buckets += e * min(float(LIVE_PARAMETERS), frozen_parameters + trainable)
    if strategy.shards_weights:
        frozen /= strategy.world_size
    width, tokens = shape.hidden_size, row.tokens
    # With the float32 copy, the softmax and the gradients.
    logits = min(row.supervised, head_chunk) * shape.vocab_size * (2 * e + 12)
    activations = activation_bytes(shape, row, adapter, rank, e, recomputed_layers, tower_numbers)
    if quantization == "8bit":
        activations += int8_input_bytes(shape, tokens, adapter, e, recomputed_layers)
    expanded = 0 if quantization == "none" else e * width * shape.ffn_size  # one weight at a time, for a product
    items = {
        "frozen weights": frozen,
        "trainable weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "logits": logits + 2.0 * e * width * row.supervised,
        # Gradients passing through one layer, the optimizer's temporaries, pixels as bytes and normalised.
        "workspace": max(e * tokens * (5.0 * shape.ffn_size + 4.0 * width) + expanded, 8 * shard)
        + 5.0 * 3 * shape.image_size**2 * row.images,
        "buckets": buckets,
    }
    items["reserve"] = RESERVE_BYTES + FRAGMENTATION * sum(items.values())
    return items

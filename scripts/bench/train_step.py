"""A whole training step on packed rows: plain LoRA, MoLE and the dense mixture, on Vicuna-7B with CLIP ViT-L/14-336.

Measured, with random weights: tokens per second, model FLOPs per second (without recomputation or padding; as a share
of the GPU's peak where it is known: MFU) and peak memory, of forward, backward and AdamW over one row of several
samples with an image each. Without a GPU it runs a small model in float32 and says so: the ratios then hold for small
models on this machine only.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import open_clip
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import mole_common as common

from llava_mole.analysis.plan.estimates import PlanOptions
from llava_mole.analysis.plan.lengths import KNOWN_SOURCES, assumed_lengths
from llava_mole.analysis.plan.memory import Row, Strategy, memory_items
from llava_mole.analysis.plan.simulation import draw_steps
from llava_mole.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.data.collator import Example, collate_packed
from llava_mole.model.adapters import add_adapter, trainable_parameters
from llava_mole.model.batch_loss import next_token_targets, per_sample, sample_losses, weigh
from llava_mole.model.flops import gpu_of_device, model_shape, recompute_flops, training_flops
from llava_mole.model.head_loss import CHUNK_ELEMENTS
from llava_mole.model.language_model import set_recompute
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.multimodal_encoder import VisionTower
from llava_mole.model.multimodal_projector import build_projector
from llava_mole.model.packed_attention import enable_packing
from llava_mole.mole import collect_routing, mole_auxiliary_loss

PAPER = ("m3it", "sharegpt4v-instruct", "ureader", "pathvqa")


class Variant(NamedTuple):
    """An adapter, and how much is recomputed (None: as `--recompute` says)."""

    method: str
    experts: int = 1
    options: Mapping[str, Any] = MappingProxyType({})
    recompute: str | None = None


VARIANTS: dict[str, Variant] = {
    "plain_lora": Variant("lora"),
    "mole K=3": Variant("mole", 3),
    "dense K=3": Variant("mole", 3, {"mode": "dense"}),
    "frozen": Variant("none"),
    **{f"mole K={k}": Variant("mole", k) for k in (1, 8, 16)},
    **{
        f"mole K={k} {backend}": Variant("mole", k, {"backend": backend})
        for k in (3, 8, 16)
        for backend in ("masked", "grouped", "loop")
    },
    "mole K=3, all recomputed": Variant("mole", 3, recompute="all"),
}
DEFAULT = ("plain_lora", "mole K=3", "dense K=3")
BASELINE = "plain_lora"


def language_model(small: bool, device: str) -> LlamaForCausalLM:
    """Vicuna-7B's shape or a small one, random, frozen."""
    sizes = (
        {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
        if small
        else {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    )
    config = LlamaConfig(vocab_size=2000 if small else 32000, max_position_embeddings=8192, **sizes)
    model = common.random_llama(LlamaForCausalLM, config, device)
    enable_packing(model)
    return model.requires_grad_(False)


def vision_tower(small: bool, device: str) -> VisionTower:
    """CLIP ViT-L/14 at 336 px or a small ViT, random."""
    if small:
        sizes = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
        clip = open_clip.CLIP(
            embed_dim=32,
            vision_cfg=sizes,
            text_cfg={"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
            quick_gelu=True,
        )
    else:
        clip = open_clip.create_model("ViT-L-14-336-quickgelu")
    return VisionTower(clip.visual, select_layer=-2, weights_fingerprint="random").to(device, common.precision(device))


def make_row(lengths: Sequence[int], tower: VisionTower, vocabulary: int, *, images: bool = True) -> dict[str, Any]:
    """One row of samples with an image each, the last tenth supervised; without images all tokens are."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for index, size in enumerate(lengths):
        patches = tower.num_patches if images else 0
        text = torch.randint(3, vocabulary, (size - patches,), generator=generator).tolist()
        ids = [1, *[IMAGE_TOKEN_INDEX] * patches, *text[1:]]
        answer = max(1, size // 10) if images else size - 1
        pixels = torch.randn(1, 3, tower.image_size, tower.image_size, generator=generator) if images else None
        labels = [IGNORE_INDEX] * (size - answer) + ids[-answer:]
        examples.append(Example(str(index), "s", 0, ids, labels, pixels))
    return collate_packed(examples, pad_token_id=0)


def mixture_rows(length: int, count: int, patches: int) -> list[list[int]]:
    """Lengths of the samples in `count` rows of `length` tokens, drawn from the paper's mixture in order.

    The last sample of a row is cut to fill it. In shorter rows than 4,096 tokens the samples are shorter, too.
    """
    sources = [assumed_lengths(name, KNOWN_SOURCES[name], 576, 4096, "assumed") for name in PAPER]
    shares = [source.records for source in sources]
    rows: list[list[int]] = [[]]
    for drawn in draw_steps(sources, shares, 64, 64, seed=0):
        for tokens in drawn.tokens.tolist():
            size = max(patches + 8, tokens * length // 4096)
            room = length - sum(rows[-1])
            if room < patches + 8:
                if len(rows) == count:
                    return rows
                rows.append([])
                room = length
            rows[-1].append(min(size, room))
    return rows


def build(variant: str, base: nn.Module, tower: VisionTower, args: Any) -> LlavaMole:
    """The composed model with its adapter, around shared frozen weights."""
    method, experts, options, recompute = VARIANTS[variant]
    causal_lm = common.share(base)
    set_recompute(causal_lm, recompute or args.recompute, 2)
    adapted = add_adapter(
        causal_lm,
        method,
        rank=args.rank,
        alpha=None,
        dropout=None,
        num_experts=experts,
        preset="paper",
        options=dict(options),
    )
    device = next(base.parameters()).device
    projector = build_projector("mlp2x_gelu", tower.hidden_size, base.config.hidden_size).to(device)
    model = LlavaMole(tower, projector, adapted).train()
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.to(device, common.precision(device.type))
    return common.randomize(model)  # type: ignore[return-value]


def training_step(model: LlavaMole, rows: Sequence[dict[str, Any]]) -> Callable[[], None]:
    """Forward and backward over the packed rows, and one update."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-5)
    samples = sum(len(row["ids"]) for row in rows)

    def step() -> None:
        for row in rows:
            row_loss(model, row, samples).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def row_loss(model: LlavaMole, row: dict[str, Any], samples: int) -> torch.Tensor:
    """The part of a row in the loss of a step of so many samples, balance loss included."""
    mask, targets = next_token_targets(row["labels"])
    losses = model(
        row["input_ids"],
        row["attention_mask"],
        row["images"],
        sample_lengths=row["sample_lengths"],
        loss_mask=mask,
        targets=targets,
    )
    loss = weigh(*sample_losses(losses, row["sample_index"][mask], len(row["ids"])), "sample_mean", samples, 1.0)
    routing, masks = per_sample(row, collect_routing(model.language_model), token_mask=row["attention_mask"])
    return loss + mole_auxiliary_loss(model.language_model, routing=routing, **masks) * (len(row["ids"]) / samples)


def peak_bytes(step: Callable[[], None]) -> int:
    """Peak of allocated GPU memory over a step."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def predicted_bytes(model: LlavaMole, rows: Sequence[dict[str, Any]], variant: str, args: Any) -> float:
    """What `llava-mole plan` expects torch to allocate at the peak: its items without context and fragmentation.

    The benchmark's optimizer has no float32 master: two moments in the weights' precision.
    """
    shape, recompute = model_shape(model), VARIANTS[variant].recompute or args.recompute
    layers = {"none": 0, "every_n": -(-shape.layers // 2), "all": shape.layers}[recompute]
    trainable = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    element = common.precision(args.device).itemsize
    items = memory_items(
        shape,
        frozen_parameters=sum(parameter.numel() for parameter in model.parameters()) - trainable,
        trainable_parameters=trainable,
        compute_bytes=element,
        strategy=Strategy("zero2", 1, bucket_elements=0),
        row=Row(
            tokens=max(sum(row["sample_lengths"]) for row in rows),
            images=max(0 if row["images"] is None else len(row["images"]) for row in rows),
            supervised=max(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows),
            packed=True,
        ),
        adapter=VARIANTS[variant].method,
        rank=args.rank,
        recomputed_layers=layers,
        head_chunk=CHUNK_ELEMENTS // shape.vocab_size,
    )
    items["optimizer"] = 2.0 * element * trainable
    return sum(size for name, size in items.items() if name != "reserve")


def measure(
    names: Sequence[str], base: nn.Module, tower: VisionTower, rows: Sequence[dict[str, Any]], args: Any, repeats: int
) -> list[dict[str, Any]]:
    """One row a variant: time beside the baseline, tokens/s, rates of FLOPs, and memory beside the plan's."""
    on_gpu = args.device.startswith("cuda")
    models = {name: build(name, base, tower, args) for name in names}
    steps = {name: training_step(model, rows) for name, model in models.items()}
    lengths = [n for row in rows for n in row["sample_lengths"]]
    tokens = sum(lengths)
    found = common.summary(common.interleave(steps, BASELINE, repeats, args.device), BASELINE, tokens=tokens)
    gpu = gpu_of_device(torch.cuda.get_device_name()) if on_gpu else None
    squares = float(sum(n * n for n in lengths))
    supervised = float(sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows))
    images = float(sum(0 if row["images"] is None else len(row["images"]) for row in rows))
    for entry in found:
        name = entry["variant"]
        shape = model_shape(models[name])
        flops = training_flops(shape, float(tokens), squares, supervised, images)
        recompute = VARIANTS[name].recompute or args.recompute
        layers = {"none": 0, "every_n": -(-shape.layers // 2), "all": shape.layers}[recompute]
        entry["tokens_per_s"] = tokens / entry["median_s"]
        entry["model_flops_per_s"] = flops / entry["median_s"]
        if gpu is not None:
            entry["mfu"] = entry["model_flops_per_s"] / gpu.bf16_flops
            computed = flops + recompute_flops(shape, float(tokens), squares, layers)
            entry["hfu"] = computed / entry["median_s"] / gpu.bf16_flops
            entry["predicted_s"] = computed / gpu.bf16_flops / PlanOptions.utilisation
        if on_gpu:
            entry["peak_bytes"] = peak_bytes(steps[name])
            # Other variants' adapters lie in memory, too; the plan knows of one.
            others = sum(_state_bytes(model) for other, model in models.items() if other != name)
            entry["own_peak_bytes"] = entry["peak_bytes"] - others
        entry["predicted_bytes"] = predicted_bytes(models[name], rows, name, args)
    return found


def _state_bytes(model: LlavaMole) -> int:
    """Bytes of trainable weights and both moments."""
    return sum(3 * parameter.numel() * parameter.element_size() for parameter in trainable_parameters(model).values())


def on_device(rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """The rows on the device, pixels in its precision."""
    moved = []
    for row in rows:
        row = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in row.items()}
        if row["images"] is not None:
            row["images"] = row["images"].to(common.precision(device))
        moved.append(row)
    return moved


def arguments() -> Any:
    """The options of this benchmark."""
    parser = common.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, help="tokens of the row")
    parser.add_argument("--samples", type=int, default=4, help="samples in the row")
    parser.add_argument("--mixture", type=int, metavar="ROWS", help="rows of the paper's length mixture instead")
    parser.add_argument("--text-only", action="store_true", help="no images, every token supervised")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--recompute", choices=["none", "every_n", "all"], default="none")
    return parser


def main() -> None:
    args = arguments().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    common.report(*run(args))


def run(args: Any) -> tuple[str, list[dict[str, Any]]]:
    """Measure what the options say; title and rows."""
    small = args.quick or not args.device.startswith("cuda")
    length = args.tokens or (256 if args.quick else 1024 if small else 4096)
    repeats = args.repeats or (3 if args.quick else 15)
    if small:
        print("no GPU (or --quick): a small model in place of Vicuna-7B and CLIP-L; its ratios are not theirs")
    base, tower = language_model(small, args.device), vision_tower(small, args.device)
    lengths = [[length // args.samples] * args.samples]
    if args.mixture:
        lengths = mixture_rows(length, args.mixture, tower.num_patches)
    rows = [make_row(each, tower, base.config.vocab_size, images=not args.text_only) for each in lengths]
    names = list(dict.fromkeys([BASELINE, *args.variants]))
    found = measure(names, base, tower, on_device(rows, args.device), args, repeats)
    common.save(found, args.json)
    return f"Training step, rows of {length} tokens, recompute {args.recompute} (measured)", found


if __name__ == "__main__":
    main()

"""A whole training step on packed rows: plain LoRA, MoLE and the dense mixture, on Vicuna-7B with CLIP ViT-L/14-336.

Measured, with random weights: tokens per second, model FLOPs per second (without recomputation or padding; as a share
of the GPU's peak where it is known: MFU) and peak memory, of forward, backward and AdamW over one row of several
samples with an image each. Without a GPU it runs a small model in float32 and says so: the ratios then hold for small
models on this machine only.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import mole_common as common

from llava_mole.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.data.collator import Example, collate_packed
from llava_mole.model.adapters import add_adapter, trainable_parameters
from llava_mole.model.batch_loss import next_token_targets, per_sample, sample_losses, weigh
from llava_mole.model.flops import gpu_of_device, model_shape, training_flops
from llava_mole.model.language_model import set_recompute
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.multimodal_encoder import VisionTower
from llava_mole.model.multimodal_projector import build_projector
from llava_mole.model.packed_attention import enable_packing
from llava_mole.mole import collect_routing, mole_auxiliary_loss

VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain_lora": ("lora", 1, {}),
    "mole K=3": ("mole", 3, {}),
    "dense K=3": ("mole", 3, {"mode": "dense"}),
}


def language_model(small: bool, device: str) -> LlamaForCausalLM:
    """Vicuna-7B's shape or a small one, random, frozen."""
    sizes = (
        {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
        if small
        else {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    )
    config = LlamaConfig(vocab_size=2000 if small else 32000, max_position_embeddings=8192, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(common.precision(device))
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(default)
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


def make_row(length: int, samples: int, tower: VisionTower, vocabulary: int) -> dict[str, Any]:
    """`samples` samples of like length with an image each in one row; the last tenth of each is supervised."""
    generator = torch.Generator().manual_seed(0)
    size = length // samples
    examples = []
    for index in range(samples):
        text = torch.randint(3, vocabulary, (size - tower.num_patches,), generator=generator).tolist()
        ids = [1, *[IMAGE_TOKEN_INDEX] * tower.num_patches, *text[1:]]
        answer = max(1, size // 10)
        images = torch.randn(1, 3, tower.image_size, tower.image_size, generator=generator)
        labels = [IGNORE_INDEX] * (size - answer) + ids[-answer:]
        examples.append(Example(str(index), "s", 0, ids, labels, images))
    return collate_packed(examples, pad_token_id=0)


def build(variant: str, base: nn.Module, tower: VisionTower, args: Any) -> LlavaMole:
    """The composed model with its adapter, around shared frozen weights."""
    method, experts, options = VARIANTS[variant]
    causal_lm = common.share(base)
    set_recompute(causal_lm, args.recompute, 2)
    adapted = add_adapter(
        causal_lm,
        method,
        rank=args.rank,
        alpha=None,
        dropout=None,
        num_experts=experts,
        preset="paper",
        options=options,
    )
    device = next(base.parameters()).device
    projector = build_projector("mlp2x_gelu", tower.hidden_size, base.config.hidden_size).to(device)
    model = LlavaMole(tower, projector, adapted).train()
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.to(device, common.precision(device.type))
    return common.randomize(model)  # type: ignore[return-value]


def training_step(model: LlavaMole, row: dict[str, Any]) -> Callable[[], None]:
    """Forward, backward and update over one packed row."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-5)
    mask, targets = next_token_targets(row["labels"])
    samples = len(row["ids"])

    def step() -> None:
        losses = model(
            row["input_ids"],
            row["attention_mask"],
            row["images"],
            sample_lengths=row["sample_lengths"],
            loss_mask=mask,
            targets=targets,
        )
        loss = weigh(*sample_losses(losses, row["sample_index"][mask], samples), "sample_mean", samples, 1.0)
        routing, masks = per_sample(row, collect_routing(model.language_model), token_mask=row["attention_mask"])
        (loss + mole_auxiliary_loss(model.language_model, routing=routing, **masks)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(step: Callable[[], None]) -> int:
    """Peak of allocated GPU memory over a step."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="tokens of the row")
    parser.add_argument("--samples", type=int, default=4, help="samples in the row")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--recompute", choices=["none", "every_n", "all"], default="none")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = args.device.startswith("cuda")
    small = args.quick or not on_gpu
    length = args.tokens or (256 if args.quick else 1024 if small else 4096)
    repeats = args.repeats or (3 if args.quick else 15)
    if small:
        print("no GPU (or --quick): a small model in place of Vicuna-7B and CLIP-L; its ratios are not theirs")
    base, tower = language_model(small, args.device), vision_tower(small, args.device)
    row = make_row(length, args.samples, tower, base.config.vocab_size)
    row = {key: value.to(args.device) if isinstance(value, torch.Tensor) else value for key, value in row.items()}
    row["images"] = row["images"].to(common.precision(args.device))
    models = {name: build(name, base, tower, args) for name in VARIANTS}
    steps = {name: training_step(model, row) for name, model in models.items()}
    rows = common.summary(common.interleave(steps, "plain_lora", repeats, args.device), "plain_lora", tokens=length)
    gpu = gpu_of_device(torch.cuda.get_device_name()) if on_gpu else None
    lengths = row["sample_lengths"]
    supervised = float((row["labels"] != IGNORE_INDEX).sum())
    for entry in rows:
        shape = model_shape(models[entry["variant"]])
        flops = training_flops(
            shape, float(sum(lengths)), float(sum(n * n for n in lengths)), supervised, float(len(lengths))
        )
        entry["tokens_per_s"] = length / entry["median_s"]
        entry["model_flops_per_s"] = flops / entry["median_s"]
        if gpu is not None:
            entry["mfu"] = entry["model_flops_per_s"] / gpu.bf16_flops
        if on_gpu:
            entry["peak_bytes"] = peak_bytes(steps[entry["variant"]])
    common.report(f"Training step, row of {length} tokens, recompute {args.recompute} (measured)", rows)
    common.save(rows, args.json)


if __name__ == "__main__":
    main()

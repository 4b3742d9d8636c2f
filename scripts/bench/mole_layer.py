"""Time of one training step (forward and backward) of one Vicuna-7B decoder layer with MoLE, against plain LoRA.

Measured: seconds of each variant, in pairs with PEFT's LoRA of the same rank on the same layer, and their ratio.
`frozen` has no adapter at all. `loop` computes every expert for every token, one after the other; `stacked` is the
dense mixture that stacks the K full outputs, as the authors' code does. Steps of ours include the balance loss.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import mole_common as common


class StackedMlp(nn.Module):
    """Softmax mixture of K LoRA experts whose full outputs are stacked: `[T, K, out]` in every projection."""

    def __init__(self, base: nn.Module, num_experts: int, r: int) -> None:
        super().__init__()
        self.base = base
        like = {"device": base.gate_proj.weight.device, "dtype": base.gate_proj.weight.dtype}
        self.router = nn.Linear(base.gate_proj.in_features, num_experts, **like)
        self.experts = nn.ModuleDict()
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(base, name)
            pairs = (
                nn.Sequential(
                    nn.Linear(linear.in_features, r, bias=False, **like),
                    nn.Linear(r, linear.out_features, bias=False, **like),
                )
                for _ in range(num_experts)
            )
            self.experts[name] = nn.ModuleList(pairs)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.softmax(self.router(x), dim=-1)

        def project(name: str, value: Tensor) -> Tensor:
            outputs = torch.stack([expert(value) for expert in self.experts[name]], dim=-2)
            return getattr(self.base, name)(value) + 2 * (outputs * weight.unsqueeze(-1)).sum(dim=-2)

        return project("down_proj", self.base.act_fn(project("gate_proj", x)) * project("up_proj", x))


def stacked_dense(base: nn.Module, num_experts: int, r: int) -> nn.Module:
    """Plain LoRA on attention (PEFT's), stacked dense experts in the FFN."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=common.LORA_TARGETS[:4])
    model = get_peft_model(common.share(base), config, autocast_adapter_dtype=False)
    for layer in model.base_model.model.layers:
        layer.mlp = StackedMlp(layer.mlp, num_experts, r)
    return model


def report_floor(rows: list[dict[str, Any]], length: int, width: int, rank: int) -> None:
    """Print what no implementation of rank-r adapters can beat: the frozen layer plus the adapters' own products.

    FLOPs a token: 4 for every frozen weight (forward and input gradient), 6 r (in + out) for every adapted linear
    (six products), attention's 6 T D for causal scores and values, forward and backward.
    """
    ffn_width = width * 43 // 16
    sizes = [(width, width)] * 4 + [(width, ffn_width)] * 2 + [(ffn_width, width)]
    base = 4 * sum(i * o for i, o in sizes) + 6 * length * width
    adapters = 6 * rank * sum(i + o for i, o in sizes)
    frozen = next(row["ratio_to_plain_lora"] for row in rows if row["variant"] == "frozen")
    print(
        f"floor (computed): adapters add {adapters / base:.2%} of the frozen layer's FLOPs; at its speed that is "
        f"{frozen * (1 + adapters / base):.3f} of plain LoRA's time (frozen layer: {frozen:.3f})"
    )


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", help="sequence lengths, one sample each")
    parser.add_argument("--experts", type=int, nargs="+", help="values of K")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--width", type=int, help="hidden size; the FFN is 2.6875 times as wide")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="auto, masked, grouped, loop")
    parser.add_argument("--no-dense", action="store_true", help="leave the loop and the dense variants out")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    width = args.width or (512 if args.quick else 4096)
    tokens = args.tokens or ([128] if args.quick else [256, 1024])
    experts = args.experts or ([1, 3] if args.quick else [1, 2, 3, 5, 8, 16])
    repeats = args.repeats or (3 if args.quick else 7)
    base = common.decoder(width, width * 43 // 16, max(1, width // 128), args.device)
    rows: list[dict[str, Any]] = []
    for length in tokens:
        x = torch.randn(1, length, width, device=args.device, dtype=common.precision(args.device)).requires_grad_()
        models: dict[str, nn.Module] = {"frozen": common.share(base), "plain_lora": common.plain_lora(base, args.rank)}
        for count in experts:
            for backend in args.backends:
                models[f"mole K={count} {backend}"] = common.mole(base, r=args.rank, num_experts=count, backend=backend)
        if not args.no_dense:
            models["mole K=3 loop"] = common.mole(base, r=args.rank, num_experts=3, backend="loop")
            models["dense K=3 ours"] = common.mole(base, r=args.rank, num_experts=3, mode="dense")
            models["dense K=3 stacked"] = stacked_dense(base, 3, args.rank)
        steps = {name: common.training_step(model, x) for name, model in models.items()}
        pairs = common.interleave(steps, "plain_lora", repeats, args.device)
        found = common.summary(pairs, "plain_lora", tokens=length, width=width, rank=args.rank)
        common.report("Training step of one decoder layer (measured)", found)
        report_floor(found, length, width, args.rank)
        rows += found
    common.save(rows, args.json)


if __name__ == "__main__":
    main()

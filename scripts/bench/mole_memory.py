"""Activation memory of one training step of one Vicuna-7B decoder layer with MoLE, against plain LoRA.

Measured: bytes that autograd keeps between forward and backward (each storage once, weights left out), and on a GPU
the peak of allocated memory over a step. Both have no timing noise, so each variant runs once.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import mole_common as common
from mole_layer import stacked_dense


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages that the graph of one forward pass holds, without parameters and buffers."""
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(inputs_embeds=x, use_cache=False).last_hidden_state
        total = sum(held.values())
        del out
    return total


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """Peak of allocated GPU memory above what is there before the step."""
    step = common.training_step(model, x)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="sequence length of the one sample")
    parser.add_argument("--experts", type=int, nargs="+", help="values of K")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--width", type=int, help="hidden size; the FFN is 2.6875 times as wide")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    width = args.width or (512 if args.quick else 4096)
    length = args.tokens or (128 if args.quick else 1024)
    experts = args.experts or ([1, 3] if args.quick else [1, 2, 3, 5, 8, 16])
    base = common.decoder(width, width * 43 // 16, max(1, width // 128), args.device)
    x = torch.randn(1, length, width, device=args.device, dtype=common.precision(args.device)).requires_grad_()
    unit = length * width * x.element_size()
    rows: list[dict[str, Any]] = []
    for dropout in args.dropout:
        variants: dict[str, nn.Module] = {
            "plain_lora": common.plain_lora(base, args.rank, dropout),
            "frozen": common.share(base),
        }
        for count in experts:
            for mode in ("sparse", "dense") if count > 1 else ("sparse",):
                variants[f"{mode} K={count}"] = common.mole(
                    base, r=args.rank, num_experts=count, mode=mode, dropout=dropout
                )
        if dropout == 0:
            variants["dense K=3 stacked"] = stacked_dense(base, 3, args.rank)
        baseline = None
        for name, model in variants.items():
            model.train()
            held = saved_bytes(model, x)
            baseline = baseline or held
            row = {"tokens": length, "width": width, "dropout": dropout, "variant": name, "saved_bytes": held}
            row |= {"saved_units_of_T_d": held / unit, "ratio_to_plain_lora": held / baseline}
            if args.device.startswith("cuda"):
                row["peak_bytes"] = peak_bytes(model, x)
            rows.append(row)
    common.report("Activation memory of one decoder layer (measured)", rows)
    common.save(rows, args.json)


if __name__ == "__main__":
    main()

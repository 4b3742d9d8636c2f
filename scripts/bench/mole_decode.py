"""Time of decoding: one forward pass of T tokens through a Vicuna-7B decoder layer with MoLE, against plain LoRA.

Measured: seconds of each variant without gradients, interleaved, and the ratio to PEFT's LoRA of the same rank.
T stands for the sequences decoded together, one token each. `--layers 32 --context 512` decodes with the whole model
and a cache of 512 tokens.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))
import mole_common as common


def decoding_step(model: nn.Module, x: Tensor, passes: int) -> common.Step:
    """`passes` forward passes, so that one measurement is well above the clock's resolution."""

    def step() -> None:
        with torch.inference_mode():
            for _ in range(passes):
                model(inputs_embeds=x, use_cache=False)

    return step


def cached_step(model: nn.Module, x: Tensor, cache: DynamicCache) -> common.Step:
    """One token for each sequence after the tokens of the cache, which is as it was afterwards."""

    def step() -> None:
        with torch.inference_mode():
            model(inputs_embeds=x, past_key_values=cache, use_cache=True)
            cache.crop(-1)

    return step


def measure(
    models: dict[str, nn.Module], sequences: int, width: int, device: str, *, context: int, passes: int, repeats: int
) -> list[dict[str, Any]]:
    """Rows of all variants for so many sequences; they share one cache."""
    x = torch.randn(sequences, 1, width, device=device, dtype=common.precision(device))
    if context:
        cache = DynamicCache()
        with torch.inference_mode():
            models["frozen"](inputs_embeds=x.expand(-1, context, -1), past_key_values=cache, use_cache=True)
        steps, passes = {name: cached_step(model, x, cache) for name, model in models.items()}, 1
    else:
        steps = {name: decoding_step(model, x, passes) for name, model in models.items()}
    pairs = common.interleave(steps, "plain_lora", repeats, device)
    each = {name: [[own / passes, base / passes] for own, base in values] for name, values in pairs.items()}
    return common.summary(each, "plain_lora", tokens=sequences, width=width)


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", help="values of T")
    parser.add_argument("--experts", type=int, nargs="+", help="values of K")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--width", type=int, help="hidden size; the FFN is 2.6875 times as wide")
    parser.add_argument("--backends", nargs="+", default=["auto", "masked"])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--context", type=int, default=0, help="tokens in the cache (default: no cache)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    width = args.width or (512 if args.quick else 4096)
    tokens = args.tokens or ([1, 4] if args.quick else [1, 2, 4, 8, 16])
    experts = args.experts or ([1, 3] if args.quick else [1, 3, 8, 16])
    passes, repeats = (5, 5) if args.quick else (3, 15)
    repeats = args.repeats or repeats
    base = common.decoder(width, width * 43 // 16, max(1, width // 128), args.device, args.layers)
    models: dict[str, nn.Module] = {"frozen": common.share(base), "plain_lora": common.plain_lora(base, args.rank)}
    for count in experts:
        for backend in args.backends if count > 1 else ["auto"]:
            models[f"mole K={count} {backend}"] = common.mole(base, r=args.rank, num_experts=count, backend=backend)
    for model in models.values():
        model.eval()
    rows: list[dict[str, Any]] = []
    for count in tokens:
        found = measure(models, count, width, args.device, context=args.context, passes=passes, repeats=repeats)
        found = [{**row, "rank": args.rank, "layers": args.layers, "context": args.context} for row in found]
        common.report("Decoding (measured)", found)
        rows += found
    common.save(rows, args.json)


if __name__ == "__main__":
    main()

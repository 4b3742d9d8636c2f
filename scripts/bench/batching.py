"""Useful tokens per second of packed rows against LLaVA-style padded batches, at the same batch in samples.

Measured: training steps (forward, backward, AdamW) of a small Llama with MoLE on text of paper-like lengths, an eighth
as long; both ways train the same samples from the same weights, in turn, and their losses are compared step by step.
Computed: the same comparison for Vicuna-7B's costs and full lengths on up to 64 ranks, from the plan of each step.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import mole_common as common

from llava_mole.constants import IGNORE_INDEX
from llava_mole.data.batching import BatchPlan, sample_cost
from llava_mole.data.collator import Example, collate, collate_packed
from llava_mole.model.batch_loss import next_token_targets, per_sample, sample_losses, weigh
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.packed_attention import enable_packing
from llava_mole.mole import MoleConfig, collect_routing, mole_auxiliary_loss

CONTEXT = 4096
IMAGE = 576
VICUNA_QUADRATIC = 32_900.0
"""Length at which Vicuna-7B's causal attention costs as much as its linears (`ModelShape.quadratic_length`)."""
SOURCES = {
    # name: (samples, mean text tokens, share of samples that fill the context). The paper gives the counts and says
    # that many UReader samples reach 4096 tokens; the lengths are assumptions: M3IT about 736 in all, ShareGPT4V 1026,
    # PathVQA 636, UReader 1000 or the whole context.
    "general (M3IT)": (1_600_000, 160, 0.0),
    "general (ShareGPT4V)": (688_000, 450, 0.0),
    "document (UReader)": (1_100_000, 424, 0.2),
    "biomedicine (PathVQA)": (20_000, 60, 0.0),
}


def draw_lengths(count: int, seed: int, scale: int) -> list[int]:
    """`count` sample lengths from the mixture, divided by `scale`."""
    rng = np.random.default_rng(seed)
    sizes = np.array([size for size, _, _ in SOURCES.values()], dtype=float)
    source = rng.choice(len(SOURCES), size=count, p=sizes / sizes.sum())
    mean = np.array([text for _, text, _ in SOURCES.values()])[source]
    full = rng.random(count) < np.array([share for _, _, share in SOURCES.values()])[source]
    lengths = np.where(full, CONTEXT, np.minimum(CONTEXT, IMAGE + rng.gamma(2.0, mean / 2.0)))
    return [max(8, int(n) // scale) for n in lengths]


class NoTower(nn.Module):
    """Stands where the vision tower would be; the samples are text."""

    grid = (1, 1)
    trains = False


def make_model(width: int, layers: int) -> LlavaMole:
    """A random Llama with MoLE in our composition, for text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
    )
    causal_lm = LlamaForCausalLM(config).requires_grad_(False)
    enable_packing(causal_lm)
    adapted = get_peft_model(causal_lm, MoleConfig.from_preset("paper", r=8, num_experts=3, task_type="CAUSAL_LM"))
    projector = nn.Sequential(nn.Linear(1, 1)).requires_grad_(False)
    return LlavaMole(NoTower(), projector, common.randomize(adapted)).train()  # type: ignore[arg-type]


def make_example(index: int, length: int) -> Example:
    """Random tokens, of which the last tenth is supervised."""
    ids = np.random.default_rng(index).integers(3, 2000, length).tolist()
    answer = max(1, length // 10)
    labels = [IGNORE_INDEX] * (length - answer) + ids[-answer:]
    return Example(str(index), "text", 0, ids, labels, None)


class Run:
    """One way of batching: its model, its optimizer, and its measured steps."""

    def __init__(self, model: LlavaMole, plan: BatchPlan, examples: Sequence[Example]) -> None:
        self.model, self.plan, self.examples = model, plan, examples
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.computed = 0

    def step(self, step: int) -> None:
        """Train one optimizer step on one rank."""
        started = time.perf_counter()
        total = 0.0
        put_together = collate_packed if self.plan.batching == "packed" else collate
        for positions in self.plan.micro_batches(step, 0):
            batch = put_together([self.examples[p] for p in positions], pad_token_id=0)
            self.computed += batch["input_ids"].numel()
            total += self._micro_batch(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(total)

    def _micro_batch(self, batch: dict[str, Any]) -> float:
        mask, targets = next_token_targets(batch["labels"])
        losses = self.model(
            batch["input_ids"],
            batch["attention_mask"],
            sample_lengths=batch["sample_lengths"],
            loss_mask=mask,
            targets=targets,
        )
        sums, counts = sample_losses(losses, batch["sample_index"][mask], len(batch["ids"]))
        loss = weigh(sums, counts, "sample_mean", self.plan.global_batch_size, 1.0)
        routing, masks = per_sample(
            batch, collect_routing(self.model.language_model), token_mask=batch["attention_mask"]
        )
        auxiliary = mole_auxiliary_loss(self.model.language_model, routing=routing, **masks)
        loss = loss + auxiliary * (len(batch["ids"]) / self.plan.global_batch_size)
        loss.backward()
        return float(loss.detach())


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train both ways in turn; one row a way."""
    scale = 8
    lengths = draw_lengths(args.batch * args.steps, seed=0, scale=scale)
    examples = [make_example(i, n) for i, n in enumerate(lengths)]
    model = make_model(args.width, args.layers)
    ffn_width = model.causal_lm.config.intermediate_size
    quadratic = 4 * (4 * args.width**2 + 3 * args.width * ffn_width) / (6 * args.width)
    runs = {}
    for batching in ("padded", "packed"):
        plan = BatchPlan(
            batching=batching,  # type: ignore[arg-type]
            global_batch_size=args.batch,
            micro_batch_size=args.micro_batch,
            world_size=1,
            lengths=lambda positions: [lengths[p] for p in positions],
            capacity=CONTEXT // scale,
            quadratic=quadratic,
        )
        runs[batching] = Run(copy.deepcopy(model), plan, examples)
    for step in tqdm(range(args.steps), unit="step", desc="measured", disable=None):
        for name in list(runs)[:: 1 if step % 2 else -1]:
            runs[name].step(step)
    difference = max(abs(a - b) for a, b in zip(runs["padded"].losses, runs["packed"].losses, strict=True))
    useful = [sum(lengths[step * args.batch : (step + 1) * args.batch]) for step in range(args.steps)]
    ratios = [a / b for a, b in zip(runs["padded"].seconds[1:], runs["packed"].seconds[1:], strict=True)]
    rows = []
    for name, run in runs.items():
        speeds = [tokens / seconds for tokens, seconds in zip(useful[1:], run.seconds[1:], strict=True)]
        rows.append(
            {
                "batching": name,
                "samples_a_step": args.batch,
                "useful_share": sum(useful) / run.computed,
                "median_s": statistics.median(run.seconds[1:]),
                "min_s": min(run.seconds[1:]),
                "max_s": max(run.seconds[1:]),
                "useful_tokens_per_s": statistics.median(speeds),
                "ratio_to_padded": 1.0 if name == "padded" else statistics.median(ratios),
                "last_loss": run.losses[-1],
            }
        )
    print(f"\nlargest difference of the losses of {args.steps} steps: {difference:.1e} (must be below 1e-5)")
    if difference > 1e-5:
        raise SystemExit("the two ways of batching do not train the same")
    return rows


def simulate(steps: int) -> list[dict[str, Any]]:
    """Cost of a step (that of its slowest rank) for both ways, by number of ranks and batch; one row each."""
    rows = []
    for world_size, batch in ((1, 64), (8, 64), (16, 64), (32, 64), (64, 64), (64, 256), (64, 1024)):
        lengths = draw_lengths(batch * steps, seed=1, scale=1)
        micro = min(16, batch // world_size)
        totals = {}
        for batching in ("padded", "packed"):
            plan = BatchPlan(
                batching=batching,  # type: ignore[arg-type]
                global_batch_size=batch,
                micro_batch_size=micro,
                world_size=world_size,
                lengths=lambda positions, lengths=lengths: [lengths[p] for p in positions],
                capacity=CONTEXT,
                quadratic=VICUNA_QUADRATIC,
            )
            totals[batching] = sum(_step_cost(plan, step, lengths) for step in range(steps))
        ideal = sum(sample_cost(n, VICUNA_QUADRATIC) for n in lengths) / world_size
        rows.append(
            {
                "ranks": world_size,
                "samples_a_step": batch,
                "padded_micro_batch": micro,
                "padded_efficiency": ideal / totals["padded"],
                "packed_efficiency": ideal / totals["packed"],
                "speed_ratio_to_padded": totals["padded"] / totals["packed"],
            }
        )
    return rows


def _step_cost(plan: BatchPlan, step: int, lengths: Sequence[int]) -> float:
    """Micro-batches in lock-step, as ZeRO-2 runs them: each lasts as long as the slowest rank's."""
    ranks = []
    for rank in range(plan.world_size):
        costs = []
        for row in plan.micro_batches(step, rank):
            sizes = [lengths[p] for p in row]
            if plan.batching == "padded":
                sizes = [max(sizes)] * len(sizes)
            costs.append(sum(sample_cost(n, plan.quadratic) for n in sizes))
        ranks.append(costs)
    return sum(max(costs) for costs in zip(*ranks, strict=True))


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="measured optimizer steps; the first is not counted")
    parser.add_argument("--batch", type=int, default=32, help="samples a step")
    parser.add_argument("--micro-batch", type=int, default=16, help="padded samples a forward pass (LLaVA-1.5: 16)")
    parser.add_argument("--width", type=int, help="hidden size of the small model")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.steps = args.steps or args.repeats or (4 if args.quick else 12)
    args.width = args.width or (64 if args.quick else 256)
    measured = measure(args)
    common.report("Training a small Llama with MoLE on one process (measured)", measured)
    computed = simulate(5 if args.quick else 40)
    common.report("Vicuna-7B's costs, lengths to 4096 (computed from the plans of steps)", computed)
    common.save([*measured, *computed], args.json)


if __name__ == "__main__":
    main()

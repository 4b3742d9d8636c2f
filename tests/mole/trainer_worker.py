"""One rank of `test_mole_trainer_ranks.py`: transformers' Trainer on two ranks against all batches in one process.

Rank 0 writes, for each case, the largest difference of a trained tensor or counter, how far the router that moved least
has moved, and whether both ranks hold the same.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

sys.path.insert(0, str(Path(__file__).parents[1]))

from worlds.mole_training import (
    adapted,
    batches,
    by_hand,
    equal,
    per_token,
    routers,
    shares,
    tiny_llama,
    toy_rows,
    train,
)

COUPLED = {"expert_scale": "straight_through", "balance_scale": "switch", "balance_group": "global_batch"}
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "global load": {"gradient_accumulation_steps": 2, "mole": {**COUPLED, "bias_update_rate": 0.1}},
    "recomputed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "bfloat16": {"bf16": True},
}


def smoothed(logits: Tensor, labels: Tensor, targets_of_step: int) -> Tensor:
    return LabelSmoother(epsilon=0.2)({"logits": logits}, labels, shift_labels=True, num_items_in_batch=targets_of_step)


def run_case(case: dict[str, Any], out: str) -> dict[str, Any]:
    options = dict(case)
    mole = options.pop("mole", {})
    model, reference = adapted(tiny_llama(), **mole), adapted(tiny_llama(), add_balance_loss=False, **mole)
    before = routers(model)
    train(model, toy_rows(24), Path(out), **options)
    # accelerate deals the batches to the ranks in turn, so a step has the next two batches, or four.
    steps = 2 * options.get("gradient_accumulation_steps", 1)
    loss, weights = (smoothed, equal) if "label_smoothing_factor" in options else (per_token, shares)
    by_hand(reference, batches(24), steps, loss, weights)
    found, expected = ({n: p for n, p in m.state_dict().items() if "mole_" in n} for m in (model, reference))
    for name, value in expected.items():
        if name.endswith(".load"):  # each rank has trained the reference on everything, and has summed over the ranks
            value //= 2
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, found)
    return {
        "difference": max((found[name] - value).abs().max().item() for name, value in expected.items()),
        "moved": min((value - before[name]).abs().max().item() for name, value in routers(model).items()),
        "ranks agree": all(torch.equal(gathered[0][name], gathered[1][name]) for name in found),
    }


def main() -> None:
    torch.set_num_threads(1)
    results = {name: run_case(case, sys.argv[2]) for name, case in CASES.items()}
    assert dist.get_world_size() == 2
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

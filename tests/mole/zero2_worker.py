"""One rank of `test_mole_zero2.py`: gradients of two ZeRO-2 ranks against all samples in one process.

Every rank holds one of two samples. Rank 0 writes, for each case, the largest gradient difference, the experts each
rank used, and which parameters had a gradient.
"""

import copy
import json
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava_mole.mole import (
    MoleConfig,
    MoleMlp,
    collect_routing,
    mole_after_step,
    mole_auxiliary_loss,
    set_routing_inputs,
)

CASES: dict[str, dict[str, Any]] = {
    "disjoint": {"granularity": "given"},
    "disjoint_recompute": {"granularity": "given", "recompute": True},
    "token": {"expert_scale": "straight_through", "balance_coef": 1.0},
    "token_masked_recompute": {"expert_scale": "prob", "balance_coef": 1.0, "backend": "masked", "recompute": True},
    "text_only_rank": {"expert_scale": "straight_through", "balance_coef": 1.0, "balance_tokens": "stratified"},
    "released_pooled": {"router_bias": True, "balance_layers": "pooled", "balance_coef": 1.0},
    "global_batch": {"expert_scale": "straight_through", "balance_coef": 1.0, "balance_group": "global_batch"},
    "dense": {"mode": "dense", "balance_coef": 1.0},
}
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}


def build(options: dict[str, Any]) -> nn.Module:
    options = dict(options)
    recompute = options.pop("recompute", False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = get_peft_model(LlamaForCausalLM(config), MoleConfig(r=4, num_experts=3, add_balance_loss=False, **options))
    for name, parameter in model.named_parameters():
        if "mole_" in name and name.endswith("B"):
            nn.init.normal_(parameter, std=0.3)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def samples() -> tuple[Tensor, Tensor]:
    """Token ids and image positions `[2, S]`; the second sample is text only."""
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 1:7] = True
    return ids, image


def loss(model: nn.Module, rows: slice, weight: float) -> Tensor:
    """LM loss and auxiliary loss of some samples, each sample counting `weight`."""
    ids, image = samples()
    set_routing_inputs(model, experts=torch.tensor([0, 2])[rows])
    ids, image = ids[rows], image[rows]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    by_sample = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)
    weights = torch.full((len(ids),), weight)
    mask = torch.ones_like(image)
    return (by_sample * weights).sum() + mole_auxiliary_loss(
        model, token_mask=mask, image_mask=image, sample_weights=weights
    )


def run_case(options: dict[str, Any]) -> dict[str, Any]:
    rank = dist.get_rank()
    model = build(options)
    whole, accumulated = copy.deepcopy(model), copy.deepcopy(model)
    own = slice(rank, rank + 1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trainable, optimizer=torch.optim.AdamW(trainable, lr=0.0), config=SETTINGS
    )
    assert type(engine).__name__ == "DeepSpeedEngine"
    assert engine.zero_optimization_stage() == 2
    steps = 2 if options.get("balance_group") == "global_batch" else 1  # the second step weighs by the first's load
    for step in range(steps):
        last = step == steps - 1
        # ZeRO averages over ranks, so a rank's weights add up to 1; those of one process to the same mean.
        engine.backward(loss(engine.module, own, 1.0))
        gradients = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
        engine.step()
        loss(whole, slice(0, 2), 0.5).backward()
        for row in (slice(0, 1), slice(1, 2)):
            loss(accumulated, row, 0.5).backward()
        for each in (model, whole, accumulated):
            mole_after_step(each)
            if not last and each is not model:
                each.zero_grad()
    difference, largest, missing = 0.0, 0.0, []
    for reference in (whole, accumulated):
        for name, parameter in reference.named_parameters():
            if not parameter.requires_grad:
                continue
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            got = gradients[name]
            if got is None:
                missing.append(name)
                continue
            difference = max(difference, (got - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    used: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        used, sorted({int(i) for layer in collect_routing(engine.module).index for i in layer.unique()})
    )
    loads = [
        m.current_state().load.tolist() for m in engine.module.modules() if isinstance(m, MoleMlp) and m.current_state()
    ]
    return {"difference": difference, "largest": largest, "missing": missing, "used": used, "loads": loads}


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    assert dist.get_world_size() == 2
    results = {name: run_case(options) for name, options in CASES.items()}
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

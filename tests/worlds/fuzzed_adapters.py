"""A tiny model and its logits, for the process that trains random adapters and the one that loads them."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava_mole.mole import active_config, set_routing_inputs

IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 8, 6, 2, 10, 11]])
MASK = torch.ones_like(IDS, dtype=torch.bool)
PROMPT = MASK & (torch.arange(6) < 3)


def tiny() -> LlamaForCausalLM:
    """A random two-layer Llama, the same one each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def inform(model: nn.Module) -> None:
    """Give the routers of the active adapter whatever they need."""
    config = active_config(model)
    needed: dict[str, Any] = {"prompt_mask": PROMPT, "image_mask": PROMPT & (torch.arange(6) > 0)}
    if config is not None and config.required_input is not None:
        count = config.num_tasks if config.required_input == "task" else config.num_experts
        needed[config.required_input] = torch.tensor([0, count - 1])
    if config is not None and config.balance_kind == "groups":
        needed["source"] = torch.tensor([0, 1])
    if config is not None and config.source_coef > 0 and "source" not in needed:
        needed["source"] = torch.tensor([0, config.num_experts - 1])
    set_routing_inputs(model, **needed)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """The logits in evaluation, with the same random numbers each time."""
    model.eval()
    inform(model)
    torch.manual_seed(7)
    return model(IDS, use_cache=False).logits


def main(directory: Path) -> None:
    """Print, as JSON, the names of the adapters below `directory` whose logits are not those of training."""
    from peft import PeftModel

    import llava_mole.mole  # noqa: F401

    torch.set_num_threads(1)
    wrong = {}
    for adapter in sorted(directory.iterdir()):
        expected = torch.load(adapter / "logits.pt")
        found = logits(PeftModel.from_pretrained(tiny(), adapter, strict_base=True))
        if not torch.equal(found, expected):
            wrong[adapter.name] = f"{(found - expected).abs().max().item()}: {(adapter / 'options.txt').read_text()}"
    print(json.dumps(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

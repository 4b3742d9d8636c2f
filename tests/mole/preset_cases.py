"""Every preset of a related method at a size for tests, and models that use it."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llava_mole.mole import ExpertLayer, MoleConfig, set_routing_inputs

Make = Callable[[], LlamaForCausalLM]
Randomize = Callable[[nn.Module], nn.Module]

IDS = torch.tensor([[5, 9, 2, 33, 60, 7, 8], [1, 4, 4, 20, 11, 3, 2]])
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
ONES = torch.ones_like(IDS)
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
TASKS = torch.tensor([2, 0])
KINDS = torch.tensor([1, 0])
OWN = ("paper", "released", "coupled", "best")
"""Presets of ours that any causal LM can use."""
NOT_RELATED = (*OWN, "by-image", "by-source")
SMALL: dict[str, dict[str, Any]] = {
    "hydralora": {},
    "asymlora": {},
    "asymlora sparse": {"mode": "sparse"},
    "coin-moelora": {},
    "moelora-task": {"num_tasks": 3},
    "loramoe": {"balance_coef": 0.3, "group_delta": 0.2},
    "mocle": {"num_tasks": 3, "task_dim": 6, "shared_r": 2, "temperature": 0.5},
    "octavius": {},
    "mixlora": {},
    "mola": {"experts_by_layer": [3, 5]},
    "molora": {},
}
"""Every preset at a size for tests."""


def config_of(case: str, **options: Any) -> MoleConfig:
    name = case.split()[0]
    experts = {} if name == "mola" else {"num_experts": 4}
    return MoleConfig.from_preset(name, **{"r": 3, **experts, "dropout": 0.0, **SMALL[case], **options})


def make(config: MoleConfig, tiny_llama: Make, randomized: Randomize) -> PeftModel:
    """A model in float64 whose experts differ, and whose inputs are set."""
    model = get_peft_model(tiny_llama().double(), config, autocast_adapter_dtype=False)
    model = randomized(model).double().eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # routers whose decisions are far from ties
            if "mole_router" in name and not name.endswith("embedding"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    set_routing_inputs(model, task=TASKS, prompt_mask=PROMPT, source=KINDS)
    return model


def run(model: nn.Module, mask: Tensor = ONES) -> dict[str, tuple[Tensor, Tensor]]:
    """One forward pass; input and output of every layer with experts, with their graph."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, layer in model.named_modules()
        if isinstance(layer, ExpertLayer)
    ]
    model(input_ids=IDS, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return seen

"""Small models for the tests of `llava_mole.mole`."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from worlds.mole_training import tiny_llama

from llava_mole.mole import MoleMlp


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(name="tiny_llama")
def make_tiny_llama() -> Callable[[], LlamaForCausalLM]:
    """Makes a random two-layer Llama, the same one each time."""
    return tiny_llama


def randomize(model: nn.Module, scale: float = 0.3) -> None:
    """Give every LoRA B random values, so that adapters change the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mole_" in name and name.endswith("B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture
def randomized() -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        randomize(model)
        return model

    return apply


@pytest.fixture
def first_mlp() -> Callable[[nn.Module], MoleMlp]:
    return lambda model: next(m for m in model.modules() if isinstance(m, MoleMlp))

"""What takes the place of PEFT's own lists of configurations: the variants of `MoleConfig`, and custom models.

Each function returns fresh `pytest.param`s, because some of PEFT's tests change the options they are given. Every param
carries the mark `variant`, by which the report is grouped and tests without any of our configurations are recognised.
"""

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from llava_mole.mole import PRESETS, MoleConfig

CONTROL = "lora"
"""PEFT's own LoRA. It is run on demand only: what it fails is the fault of this suite, not of MoLE."""

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"r": 4, "num_experts": 3, "dropout": 0.05},
    "coupled": {**PRESETS["coupled"], "r": 4, "num_experts": 3},
    "dense": {"r": 4, "num_experts": 3, "mode": "dense"},
    "top2": {"r": 4, "num_experts": 4, "top_k": 2, "expert_scale": "topk_renorm"},
    "one_expert": {"r": 4, "num_experts": 1, "dropout": 0.05},
    "shared": {"r": 4, "num_experts": 3, "shared_r": 2},
}

_TOKENS = {"target_modules": ["conv1d", "lin0"], "trainable_token_indices": {"emb": [0, 10]}}
_EXPERT_MODEL = {"ffn_modules": ["mlp"], "attention_modules": ["lin0"]}
CUSTOM_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one linear": ("MLP", {"target_modules": ["lin0"]}),
    "a regular expression": ("MLP", {"target_modules": "lin0"}),
    "another linear": ("MLP", {"target_modules": ["lin1"]}),
    "two linears": ("MLP", {"target_modules": ["lin0", "lin1"]}),
    "modules_to_save": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "attention_modules": ("MLP", {"attention_modules": ["lin0"], "ffn_modules": []}),
    "conv1d": ("EmbConv1D", {"target_modules": ["conv1d"]}),
    "conv1d and linear": ("EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    "saved embedding": ("EmbConv1D", {"target_modules": ["conv1d", "lin0"], "modules_to_save": ["emb"]}),
    "trainable tokens": ("EmbConv1D", _TOKENS),
    "experts": ("WithFfn", _EXPERT_MODEL),
    "experts only": ("WithFfn", {"ffn_modules": ["mlp"], "attention_modules": []}),
    "experts and modules_to_save": ("WithFfn", {**_EXPERT_MODEL, "modules_to_save": ["lin1"]}),
}
"""Custom models and their options, by the name of the case. The two models from PEFT's tests have no FFN that could
carry experts, so they test plain LoRA; `WithFfn` is `ExpertModel`."""


class Ffn(nn.Module):
    """`fc2(act(fc1(x)))`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    """An FFN with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Ffn()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class ExpertModel(nn.Module):
    """A model with the inputs and outputs of PEFT's `MLP`, and two FFNs."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lin1 = nn.Linear(20, 2)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float

    def forward(self, X: Tensor) -> Tensor:
        # PEFT's inputs count up to 89. They are scaled down, so that GELU is not just the identity.
        x = self.lin0(X.to(self.dtype) / 30)
        for layer in self.layers:
            x = layer(x)
        return self.sm(self.lin1(x))


def _params(rows: list[tuple[str, str, list[Any]]]) -> list[Any]:
    """`pytest.param`s from (variant, rest of the id, values)."""
    return [
        pytest.param(*deepcopy(values), id=f"{variant}{rest}", marks=pytest.mark.variant(variant))
        for variant, rest, values in rows
    ]


def task_params(variants: list[str], task_type: str) -> list[Any]:
    """(config_cls, config_kwargs) of each variant, for models of transformers."""
    rows: list[tuple[str, str, list[Any]]] = []
    for variant in variants:
        if variant == CONTROL:
            options = {"task_type": task_type, "target_modules": "all-linear", "r": 4, "lora_dropout": 0.05}
            rows.append((variant, "", [LoraConfig, options]))
        else:
            rows.append((variant, "", [MoleConfig, {"task_type": task_type, **VARIANTS[variant]}]))
    return _params(rows)


def custom_params(variants: list[str]) -> list[Any]:
    """(test_name, model_id, config_cls, config_kwargs) of each variant and custom model."""
    rows: list[tuple[str, str, list[Any]]] = []
    for variant in variants:
        if variant == CONTROL:
            rows.append((variant, ": one linear", ["one linear", "MLP", LoraConfig, {"target_modules": ["lin0"]}]))
            options = {"target_modules": ["lin0", "fc1", "fc2"]}
            rows.append((variant, ": FFN", ["FFN", "WithFfn", LoraConfig, options]))
            continue
        for name, (model, options) in CUSTOM_CASES.items():
            values = [name, model, MoleConfig, {**VARIANTS[variant], **options}]
            rows.append((variant, f": {name}", values))
    return _params(rows)


def class_params(variants: list[str]) -> list[Any]:
    """(config_cls,) for tests that bring their own options: the class's defaults, which are the variant `paper`."""
    rows = [(variant, "", [LoraConfig if variant == CONTROL else MoleConfig]) for variant in ("paper", CONTROL)]
    return _params([row for row in rows if row[0] in variants])

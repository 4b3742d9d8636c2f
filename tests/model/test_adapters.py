"""Adapters on the language model: the part that a parameter belongs to, and mistakes, which end in one line."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from torch import nn
from worlds.eval_models import make_checkpoint

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.config import ROUTED_BY_TASK, Preset
from llava_mole.inference.predictor import Predictor
from llava_mole.model import builder
from llava_mole.model.adapters import adapter_config, add_adapter, parameter_part
from llava_mole.model.builder import ADAPTER_DIR
from llava_mole.model.language_model import load_language_model
from llava_mole.mole import PRESETS, MoleConfig, set_routing_inputs

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
FAMILIES = {
    "Llama": {**SIZES, "intermediate_size": 48},
    "GPTNeoX": {**SIZES, "intermediate_size": 48},
    "Falcon": SIZES,
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4},
}


def adapted(family: str, method: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model_class = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    base = getattr(transformers, model_class)(config).requires_grad_(False)
    return add_adapter(base, method, rank=2, alpha=None, dropout=None, num_experts=3, preset="paper", options={})


@pytest.mark.parametrize("method", ["mole", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_ffn_are_told_apart_in_every_family(family: str, method: str) -> None:
    model = adapted(family, method)
    parts: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside_ffn = ".mlp." in name
            part = parameter_part(f"language_model.{name}")
            assert (part in ("experts", "router", "FFN LoRA")) == inside_ffn, f"{name} counts as {part}"
            parts.setdefault(part, set()).add(name)
    expected = {"experts", "router", "attention LoRA"} if method == "mole" else {"FFN LoRA", "attention LoRA"}
    assert set(parts) == expected


def test_every_preset_is_known_to_the_configuration_of_a_run() -> None:
    assert list(get_args(Preset)) == list(PRESETS)
    by_task = {name for name, changes in PRESETS.items() if changes.get("granularity") == "task"}
    assert set(ROUTED_BY_TASK) == by_task
    for name in PRESETS:
        options = {"num_tasks": 2} if name == "moelora-task" else {}
        fields = {"rank": 8, "dropout": None, "num_experts": 6, "preset": name, "options": options}
        config: Any = adapter_config("mole", alpha=None, **fields)
        own = MoleConfig.from_preset(name, **options)
        assert (config.r, config.scaling, config.dropout) == (8, own.scaling, own.dropout)
        assert config.num_experts == (8 if name == "mola" else 6)
        assert adapter_config("mole", alpha=4.0, **fields).scaling == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "gather"}, "backend is 'gather'; it must be one of auto, masked, grouped, loop"),
        ({"expert_scale": "topk_renorm"}, "the router's gradient exactly 0"),
        ({"ffn_modules": ["feed"]}, "ffn_modules names 'feed'"),
        ({"lora_alpha": 4}, r"adapter.options \['lora_alpha'\]: set adapter.rank, alpha, dropout and num_experts"),
        ({"use_dora": True}, "use_dora is True: MoLE has no weight-decomposed variant"),
        ({"expertscale": "prob"}, "unknown MoLE option 'expertscale'.*did you mean 'expert_scale'"),
    ],
)
def test_a_mistake_in_adapter_options_is_a_config_error(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_checkpoint(tmp_path, options=options)


def test_names_of_lora_work_in_adapter_options(tmp_path: Path) -> None:
    options = {"target_modules": "all-linear", "init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 1}}
    run = make_checkpoint(tmp_path, options=options)
    saved = json.loads((run / "checkpoint-1" / ADAPTER_DIR / "adapter_config.json").read_text())
    assert (saved["init_weights"], saved["rank_pattern"]) == ("gaussian", {"q_proj": 1})
    assert Predictor.from_pretrained(run, device="cpu").generate([None], ["What?"], max_new_tokens=1)


def test_an_adapter_of_another_base_is_refused_by_the_commands(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path) / "checkpoint-1"
    language_model, _ = load_language_model(str(tmp_path / "language_model"))
    with torch.no_grad():
        language_model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(WeightsError, match="trained on another base model"):
        builder._load_adapter(language_model, checkpoint / ADAPTER_DIR)


def test_an_adapter_that_does_not_fit_is_a_weights_error(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path) / "checkpoint-1"
    file = checkpoint / ADAPTER_DIR / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts": 4}))
    language_model, _ = load_language_model(str(tmp_path / "language_model"))
    with pytest.raises(WeightsError, match="hidden size, rank or number of experts differ"):
        builder._load_adapter(language_model, checkpoint / ADAPTER_DIR)


def test_a_router_that_needs_the_source_is_refused_for_prompts(tmp_path: Path) -> None:
    run = make_checkpoint(tmp_path, options={"router": "oracle", "expert_scale": "none"})
    predictor = Predictor.from_pretrained(run, device="cpu")
    with pytest.raises(ConfigError, match="routes by the routing input 'source', which prompts do not have"):
        predictor.generate([None], ["What?"], max_new_tokens=1)
    set_routing_inputs(predictor.loaded.model.language_model, source=torch.tensor([1]))
    assert len(predictor.generate([None], ["What?"], max_new_tokens=1)) == 1

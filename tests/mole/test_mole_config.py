"""Options, presets, refusals, and the errors of wrong files and inputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from llava_mole.mole import PRESETS, MoleConfig, register_mole, set_routing_inputs

Make = Callable[[], LlamaForCausalLM]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"top_k": 4}, "top_k is 4 but num_experts is 3"),
        ({"mode": "spares"}, "must be one of sparse, dense"),
        ({"expert_scale": "topk_renorm"}, "gradient exactly 0"),
        ({"balance_coef": 0}, "nothing gives the router a gradient"),
        ({"mode": "dense", "expert_scale": "straight_through"}, "no meaning in mode 'dense'"),
        ({"mode": "dense", "top_k": 2}, "uses all experts"),
        ({"granularity": "task"}, "needs num_tasks"),
        ({"granularity": "sequence"}, "only flattens the router"),
        ({"granularity": "given", "expert_scale": "prob"}, "brings its own weights"),
        ({"sequence_tokens": "image"}, "set granularity 'sequence'"),
        ({"source_coef": 0.1, "train_router": False}, "no router that trains"),
        ({"source_coef": 0.1, "experts_by_layer": [2, 4]}, "numbers the experts alike"),
        ({"router": "random", "granularity": "sequence"}, "granularity must be 'token'"),
        ({"router": "random", "expert_scale": "prob"}, "has no probabilities"),
        ({"router": "oracle", "top_k": 2}, "chooses one expert"),
        ({"shared_scale": "complement"}, "needs a shared expert"),
        ({"shared_r": 4, "shared_scale": "complement", "mode": "dense"}, "sparse top-1"),
        ({"router": "random", "bias_update_rate": 0.1}, "has none"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"balance_coef": -1}, "not negative"),
        ({"attention_r": 0}, "attention_r is 0"),
        ({"backend": "gather"}, "backend is 'gather'; it must be one of auto, masked, grouped, loop"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoleConfig(**options)


def test_presets_and_their_names() -> None:
    assert list(PRESETS)[:4] == ["paper", "released", "coupled", "best"]
    assert MoleConfig() == MoleConfig.from_preset("paper")
    paper = MoleConfig.from_preset("paper", r=8)
    assert (paper.alpha, paper.scaling, paper.expert_scale, paper.router_bias) == (16, 2, "none", False)
    released = MoleConfig.from_preset("released")
    assert (released.router_bias, released.dropout, released.balance_layers) == (True, 0.05, "pooled")
    assert MoleConfig.from_preset("coupled").counts_load
    assert MoleConfig.from_preset("best") == MoleConfig(shared_r=8)
    by_image = MoleConfig.from_preset("by-image")
    assert (by_image.granularity, by_image.sequence_tokens, by_image.top_k) == ("sequence", "image", 1)
    assert by_image.counts_load
    assert MoleConfig.from_preset("by-source") == MoleConfig.from_preset("by-image", source_coef=1.0)
    with pytest.raises(ValueError, match="unknown MoLE preset 'nature'; there are paper, released, coupled, best"):
        MoleConfig.from_preset("nature")
    with pytest.raises(ValueError, match="unknown MoLE option 'rang'"):
        MoleConfig.from_preset("paper", rang=3)


def test_registering_twice_changes_nothing_and_a_changed_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.mapping

    before = dict(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    register_mole()
    assert before == peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    monkeypatch.delattr(peft.mapping, "PEFT_TYPE_TO_TUNER_MAPPING")
    with pytest.raises(ImportError, match="has no table"):
        register_mole()


def test_modules_that_are_not_there_are_named(tiny_llama: Make) -> None:
    with pytest.raises(ValueError, match="attention_modules names 'wq'"):
        get_peft_model(tiny_llama(), MoleConfig(attention_modules=["wq"]))
    with pytest.raises(ValueError, match="ffn_modules names 'feed'"):
        get_peft_model(tiny_llama(), MoleConfig(ffn_modules=["feed"]))
    with pytest.raises(ValueError, match="is not an FFN of a known structure"):
        get_peft_model(tiny_llama(), MoleConfig(ffn_modules=["self_attn"]))
    with pytest.raises(ValueError, match="is a LlamaRMSNorm, not a linear"):
        get_peft_model(tiny_llama(), MoleConfig(attention_modules=["input_layernorm"]))


def test_an_ffn_that_computes_something_else_than_its_named_parts_is_refused(tiny_llama: Make) -> None:
    model = tiny_llama()
    layer = model.model.layers[0].mlp

    class Clipped(type(layer)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1e-4, 1e-4)

    layer.__class__ = Clipped
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "activation": "act_fn"}
    with pytest.raises(ValueError, match=r"does not compute down\(act\(gate\(x\)\) \* up\(x\)\)"):
        get_peft_model(model, MoleConfig(r=4, ffn_modules=["mlp"], ffn_projections=names))


@pytest.fixture
def saved(tiny_llama: Make, randomized: Callable[[nn.Module], nn.Module], tmp_path: Path) -> Path:
    randomized(get_peft_model(tiny_llama(), MoleConfig(r=4))).save_pretrained(tmp_path)
    return tmp_path


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("values", [{"num_experts": 4}, {"r": 5}])
def test_a_changed_config_does_not_load(saved: Path, tiny_llama: Make, values: dict[str, int]) -> None:
    change_config(saved, **values)
    with pytest.raises(ValueError, match="hidden size, rank or number of experts differ"):
        PeftModel.from_pretrained(tiny_llama(), saved)


def test_an_adapter_of_another_base_is_noticed(saved: Path, tiny_llama: Make) -> None:
    other = tiny_llama()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    with pytest.raises(ValueError, match="trained on another base model"):
        PeftModel.from_pretrained(other, saved, strict_base=True)
    with pytest.warns(UserWarning, match="trained on another base model"):
        PeftModel.from_pretrained(other, saved)
    loaded = PeftModel.from_pretrained(tiny_llama().to(torch.bfloat16), saved)
    assert loaded.peft_config["default"].base_fingerprint is not None


def test_missing_and_surplus_tensors_do_not_load(saved: Path, tiny_llama: Make) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "mole_router" in key)
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(ValueError, match="files are incomplete"):
        PeftModel.from_pretrained(tiny_llama(), saved)
    save_file({**tensors, name.replace("layers.0", "layers.7"): tensors[name].clone()}, file)
    with pytest.raises(ValueError, match="but this model does not"):
        PeftModel.from_pretrained(tiny_llama(), saved)


def test_nan_in_the_router_input_is_an_error(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4))
    embeds = torch.zeros(1, 3, 32)
    embeds[0, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        model(inputs_embeds=embeds)


def test_ids_out_of_range_are_refused(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, router="oracle"))
    with pytest.raises(ValueError, match="source holds 3; this adapter knows 0 to 2"):
        set_routing_inputs(model, source=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="unknown routing input 'sources'"):
        set_routing_inputs(model, sources=torch.tensor([0]))
    with pytest.raises(ValueError, match="set_routing_inputs"):
        model(torch.arange(4).view(1, 4))

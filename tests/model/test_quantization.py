"""The language model's linears in 4 and 8 bits: what becomes of them, what passes through them, what is refused."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from worlds.tiny_models import make_language_model, make_world

from llava_mole.common.errors import EXIT_USER_ERROR, ConfigError, WeightsError
from llava_mole.config import load_config, parse_run_config
from llava_mole.model.adapters import add_adapter, parameter_report
from llava_mole.model.builder import build_parts
from llava_mole.model.language_model import load_language_model
from llava_mole.model.quantization import BYTES_PER_WEIGHT, quantize_linears
from llava_mole.model.trainable import cast_for_training
from llava_mole.train import preflight
from llava_mole.train.train import train

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes (extra quant) is not installed"
)
CPU = torch.device("cpu")
IDS = torch.tensor([[1, 300, 301, 302, 303, 304]])
BOTH = pytest.mark.parametrize("quantization", ["4bit", "8bit"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=4)
    make_language_model(directory / "language_model", hidden_size=64, ffn_size=192)
    return directory


def language_model(world: Path, quantization: Any) -> Any:
    model, _ = load_language_model(str(world / "language_model"))
    quantize_linears(model, quantization, CPU, torch.float32)
    return model


def weight_of(linear: Any) -> torch.Tensor:
    """What a quantised linear multiplies by."""
    import bitsandbytes as bnb

    if isinstance(linear, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    scale = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
    return linear.weight.data.float() * scale.unsqueeze(1) / 127


def test_none_changes_nothing(world: Path) -> None:
    model = language_model(world, "none")
    assert {type(m) for m in model.modules() if "Linear" in type(m).__name__} == {nn.Linear}


@needs_bitsandbytes
@BOTH
def test_all_linears_but_the_head_are_quantised(world: Path, quantization: str) -> None:
    stored, model = language_model(world, "none"), language_model(world, quantization)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("lm_head") == "Linear"
    assert len(kinds) == 2 * 7
    assert set(kinds.values()) == {{"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization]}
    for name in kinds:
        linear, original = model.get_submodule(name), stored.get_submodule(name).weight
        assert not linear.weight.is_floating_point()
        error = (weight_of(linear) - original).norm() / original.norm()
        # NF4 on normally distributed weights: 0.092. Rounding to 255 steps: about 3 sigma / 127 / sqrt(12).
        assert 0 < error < {"4bit": 0.1, "8bit": 0.01}[quantization], name
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in kinds:
            assert torch.equal(parameter, stored.get_parameter(name)), name
    assert parameter_report(model) == parameter_report(stored), "two 4-bit weights in a byte count as two"


@needs_bitsandbytes
@BOTH
def test_bytes_of_a_weight(quantization: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1024, 2048, bias=False)

        def get_output_embeddings(self) -> None:
            return None

    model = Model()
    quantize_linears(model, quantization, CPU, torch.float32)
    tables = ("quant_map", "quant_state")  # of a few hundred bytes, whatever the size of the weight
    stored = sum(t.nbytes for key, t in model.state_dict().items() if not any(table in key for table in tables))
    assert stored / (1024 * 2048) == pytest.approx(BYTES_PER_WEIGHT[quantization], rel=0.005)


@needs_bitsandbytes
@BOTH
def test_gradients_pass_also_after_an_evaluation(world: Path, quantization: str) -> None:
    linear = language_model(world, quantization).train().model.layers[0].mlp.up_proj
    weight = weight_of(linear)
    for _ in range(2):
        x = torch.randn(3, 64, requires_grad=True)
        y = linear(x)
        torch.testing.assert_close(y, x @ weight.T, atol=1e-4, rtol=1e-4)
        gradient = torch.randn_like(y)
        y.backward(gradient)
        torch.testing.assert_close(x.grad, gradient @ weight, atol=1e-4, rtol=1e-4)
        linear.eval()
        with torch.no_grad():
            seen = linear(x.detach())
        # In evaluation 8 bits round the input, too.
        torch.testing.assert_close(seen, y, atol=1e-4 if quantization == "4bit" else 0.05, rtol=1e-4)
        linear.train()


@needs_bitsandbytes
@BOTH
@pytest.mark.parametrize("method", ["lora", "mole"])
def test_adapters_learn_and_the_base_stays(world: Path, quantization: str, method: str) -> None:
    base = language_model(world, quantization)
    expected = base.eval()(IDS).logits
    options = {"expert_scale": "straight_through"} if method == "mole" else {}
    model: Any = add_adapter(
        base, method, rank=2, alpha=None, dropout=None, num_experts=2, preset="paper", options=options
    )
    cast_for_training(model, "fp32")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) >= 2 * 7 * 2
    assert [name for name, p in trainable.items() if p.grad is None] == []
    assert not torch.equal(model(IDS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    # PEFT's own layers know that these weights cannot simply be added to.
    kinds = {type(m).__module__ for m in model.modules() if isinstance(m, LoraLayer)}
    assert kinds == ({"peft.tuners.lora.bnb"} if method == "lora" else set())


@needs_bitsandbytes
@BOTH
def test_a_base_model_has_one_fingerprint(world: Path, quantization: Any) -> None:
    config = load_config(world / "config.yaml").model
    _, _, stored = build_parts(config)
    config.quantization = quantization
    model, _, fingerprints = build_parts(config)
    assert fingerprints == stored
    quantize_linears(model.causal_lm, quantization, CPU, torch.float32)
    assert all(p.is_floating_point() for part in (model.vision_tower, model.projector) for p in part.parameters())


@needs_bitsandbytes
def test_widths_that_a_cpu_gets_wrong_are_refused(tmp_path: Path) -> None:
    make_language_model(tmp_path / "language_model", hidden_size=64, ffn_size=48)
    assert language_model(tmp_path, "8bit")(IDS).logits.isfinite().all()
    with pytest.raises(ConfigError, match=r"multiple of 64 \(model.layers.0.mlp.down_proj: 48\); use '8bit' or a GPU"):
        language_model(tmp_path, "4bit")


@needs_bitsandbytes
def test_a_model_without_linears_and_a_library_that_fails_are_one_line(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes as bnb
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no torch linears"):
        quantize_linears(gpt2, "4bit", CPU, torch.float32)

    def fail(*args: Any) -> None:
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(bnb.nn.Params4bit, "to", fail)
    with pytest.raises(ConfigError, match="does not work on cpu: no kernel for this device; `python -m bitsandbytes`"):
        language_model(world, "4bit")


@BOTH
def test_without_bitsandbytes_nothing_is_loaded_or_written(
    world: Path, quantization: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    arguments = [str(world / "config.yaml"), "--model.quantization", quantization]
    config = parse_run_config([*arguments, "--train.output_dir", str(world / "absent")])
    wanted = rf"in {quantization} .* needs the package bitsandbytes, .*pip install 'llava_mole\[quant\]'.*none"
    with pytest.raises(ConfigError, match=wanted):
        train(config)
    with pytest.raises(ConfigError, match=wanted):
        build_parts(config.model)
    assert not (world / "absent").exists()
    assert preflight.main(["1", *arguments]) == EXIT_USER_ERROR
    assert "pip install" in capsys.readouterr().err


def test_another_number_of_bits_is_no_setting(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization|quantization"):
        parse_run_config([str(world / "config.yaml"), "--model.quantization", "3bit"])


def test_a_directory_that_is_stored_quantised_is_refused(world: Path, tmp_path: Path) -> None:
    directory = tmp_path / "stored"
    directory.mkdir()
    settings = json.loads((world / "language_model" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=r"stored quantised \(bitsandbytes\).*--model.quantization 4bit or 8bit"):
        load_language_model(str(directory))

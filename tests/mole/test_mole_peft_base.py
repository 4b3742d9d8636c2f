"""The check that an adapter is loaded on the base model it was trained on."""

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from llava_mole.mole import MoleConfig
from llava_mole.mole.fingerprint import base_fingerprint, same_base

Make = Callable[[], LlamaForCausalLM]
IDS = torch.arange(1, 19).view(2, 9)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANTISED = [
    pytest.param(kind, marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs quant"))
    for kind in ("4bit", "8bit")
]


def large() -> LlamaForCausalLM:
    """A Llama whose linears are wide enough to be quantised in blocks."""
    torch.manual_seed(0)
    from transformers import LlamaConfig

    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))


def quantised(kind: str, model: nn.Module) -> nn.Module:
    from llava_mole.model.quantization import quantize_linears

    quantize_linears(model, kind, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    return model


def refuses(adapter: Path, base: nn.Module) -> bool:
    """Whether the base is another one, for `strict_base` and for the warning alike."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(copy.deepcopy(base), adapter)
    warned = any("another base model" in str(warning.message) for warning in caught)
    with pytest.raises(ValueError, match="trained on another base model") if warned else nullcontext():
        PeftModel.from_pretrained(base, adapter, strict_base=True)
    return warned


@pytest.mark.parametrize("there", DTYPES)
@pytest.mark.parametrize("here", DTYPES)
def test_precisions_of_one_base_are_the_same_base(there: str, here: str, tmp_path: Path) -> None:
    get_peft_model(large().to(DTYPES[there]), MoleConfig(r=4)).save_pretrained(tmp_path)
    assert not refuses(tmp_path, large().to(DTYPES[here]))
    other = large().to(DTYPES[here])
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.add_(0.001)
    assert refuses(tmp_path, other)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_copy_is_the_same_base(kind: str, tmp_path: Path) -> None:
    get_peft_model(large(), MoleConfig(r=4)).save_pretrained(tmp_path / "plain")
    model = get_peft_model(quantised(kind, large()), MoleConfig(r=4))
    before = model(IDS).logits
    recorded = base_fingerprint(model.get_base_model())
    assert torch.equal(model(IDS).logits, before), "reading the weights changes nothing"
    model.save_pretrained(tmp_path / "quantised")
    assert model.peft_config["default"].base_fingerprint == recorded
    (model(IDS, labels=IDS).loss).backward()
    assert not refuses(tmp_path / "plain", quantised(kind, large()))
    assert not refuses(tmp_path / "quantised", large())
    assert not refuses(tmp_path / "quantised", large().to(torch.float16))
    assert not refuses(tmp_path / "quantised", quantised(kind, large()))
    torch.manual_seed(9)
    other = large()
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.02)
    assert refuses(tmp_path / "quantised", other)
    assert refuses(tmp_path / "plain", quantised(kind, other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_a_base_with_a_merged_lora_is_another_base(dtype: str, targets: list[str] | str, tmp_path: Path) -> None:
    get_peft_model(large(), MoleConfig(r=4)).save_pretrained(tmp_path)
    lora = get_peft_model(large(), LoraConfig(r=4, target_modules=targets, init_lora_weights=True))
    with torch.no_grad():  # a small update: about a fiftieth of the weights
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=5e-4)
    merged = lora.merge_and_unload()
    relative = [
        (a - b).norm() / b.norm()
        for a, b in zip(merged.parameters(), large().parameters(), strict=True)
        if a.dim() == 2
    ]
    assert 0 < max(relative) < 0.1
    assert refuses(tmp_path, merged.to(DTYPES[dtype]))


def test_only_the_base_counts(tmp_path: Path) -> None:
    """Not adapters, not trained copies of modules, not embeddings of tokens, not the wrappers around them."""
    expected = base_fingerprint(large())
    assert expected is not None
    config = MoleConfig(r=4, modules_to_save=["norm", "lm_head"], init_weights=False, trainable_token_indices=[1])
    model = get_peft_model(large(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert base_fingerprint(model.get_base_model()) == expected
    model.save_pretrained(tmp_path)
    assert not refuses(tmp_path, large())
    loaded = PeftModel.from_pretrained(large(), tmp_path, strict_base=True).eval()
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    assert base_fingerprint(torch.compile(large(), backend="eager")) == expected
    inner = large()
    inner.model.layers[0] = torch.compile(inner.model.layers[0], backend="eager")
    assert base_fingerprint(inner) == expected
    plain = get_peft_model(large(), LoraConfig(target_modules="all-linear"))
    assert base_fingerprint(plain.get_base_model()) == expected
    one = get_peft_model(large(), MoleConfig(r=4, num_experts=1, init_weights=False))
    one.merge_adapter()
    assert same_base(expected, one.get_base_model())
    one.unmerge_adapter()
    assert base_fingerprint(one.get_base_model()) == expected


def test_more_rows_for_more_tokens_change_nothing(tmp_path: Path) -> None:
    get_peft_model(large(), MoleConfig(r=4)).save_pretrained(tmp_path)
    resized = large()
    resized.resize_token_embeddings(70)
    assert not refuses(tmp_path, resized)


def test_what_cannot_be_read_is_not_compared(tmp_path: Path) -> None:
    assert base_fingerprint(large().to("meta")) is None
    recorded = base_fingerprint(large())
    assert recorded is not None
    assert same_base(recorded, large().to("meta"))
    get_peft_model(large(), MoleConfig(r=4)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["base_fingerprint"] == recorded
    assert len(recorded) < 4096
    file.write_text(json.dumps({**saved, "base_fingerprint": "rubbish"}))
    with pytest.raises(ValueError, match="base_fingerprint holds 'rubbish'"):
        PeftModel.from_pretrained(large(), tmp_path)
    file.write_text(json.dumps({**saved, "base_fingerprint": None}))
    assert not refuses(tmp_path, large().to(torch.bfloat16))


def fixed(make: Make) -> LlamaForCausalLM:
    """A base whose fingerprint by the earlier rule does not depend on the random generator."""
    model = make()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.arange(64 * 32).view(64, 32) / 1000)
        model.model.norm.weight.copy_(torch.arange(32) / 7)
    return model


def test_the_fingerprints_of_earlier_versions_are_compared_by_their_rule(tiny_llama: Make, tmp_path: Path) -> None:
    get_peft_model(fixed(tiny_llama), MoleConfig(r=4, modules_to_save=["norm"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    earlier = {**json.loads(file.read_text()), "base_fingerprint": "645e82d7d5b50440"}
    for key in ("strict_base", "rank_pattern", "alpha_pattern", "use_rslora", "init_weights"):
        del earlier[key]  # newer than such a file
    file.write_text(json.dumps(earlier))
    assert not refuses(tmp_path, fixed(tiny_llama))
    assert refuses(tmp_path, tiny_llama())
    model = PeftModel.from_pretrained(fixed(tiny_llama), tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert not refuses(tmp_path / "again", fixed(tiny_llama))


def test_a_strict_adapter_is_strict_for_whoever_loads_it(tiny_llama: Make, tmp_path: Path) -> None:
    base = fixed(tiny_llama)
    model = get_peft_model(base, MoleConfig(r=4, strict_base=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="set strict_base=False if the two are the same"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    other = tiny_llama()
    before = repr(other)
    with pytest.raises(ValueError, match="another base"):
        other.load_adapter(str(tmp_path))
    assert repr(other) == before
    with pytest.warns(UserWarning, match="another base"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, strict_base=False)
    later = get_peft_model(tiny_llama(), MoleConfig(r=2))
    with pytest.raises(ValueError, match="another base"):
        later.load_adapter(tmp_path, "second")
    assert list(later.peft_config) == ["default"]
    config = model.peft_config["default"]  # saving has set its base_fingerprint; it may still start new adapters
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_llama(), config)

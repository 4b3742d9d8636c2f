"""FFNs in parts: their linears, wrapped one by one, compute what the wrapper of a whole FFN computes."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from llava_mole.mole import MoleConfig, MoleMlp, collect_routing, mole_auxiliary_loss, set_routing_inputs
from llava_mole.mole.split import MolePart, MoleSplitMlp

Make = Callable[[], LlamaForCausalLM]
Randomize = Callable[[nn.Module], nn.Module]
IDS = torch.arange(1, 17).view(2, 8)
MASK = torch.ones(2, 8).bool()


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, dropout=0.0))


def bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2))


CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "coupled": {"expert_scale": "straight_through", "balance_scale": "switch", "balance_group": "global_batch"},
    "best": {"shared_r": 2},
    "complement": {"shared_r": 2, "shared_scale": "complement"},
    "top 2": {"top_k": 2, "expert_scale": "topk_renorm"},
    "dense": {"mode": "dense"},
    "one expert": {"num_experts": 1},
    "loop": {"backend": "loop"},
    "hash": {"router": "hash"},
    "bias": {"bias_update_rate": 0.1, "router_bias": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_parts_equal_the_whole(case: str, tiny_llama: Make, randomized: Randomize) -> None:
    results = []
    for ffn in ("mlp", "gate_proj"):
        torch.manual_seed(0)
        model: Any = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4, ffn_modules=[ffn], **CASES[case])))
        out = model(input_ids=IDS, labels=IDS)
        (out.loss + mole_auxiliary_loss(model, token_mask=MASK)).backward()
        trained = [p for p in model.named_parameters() if p[1].requires_grad]
        gradients = {key.replace(".mlp.gate_proj.", ".mlp."): p.grad for key, p in trained}
        results.append((out.logits, collect_routing(model).logits, gradients))
    assert isinstance(collect_routing(model).layers[0], MoleSplitMlp)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_dropout_falls_on_the_input_of_each_linear(tiny_llama: Make, randomized: Randomize) -> None:
    config = MoleConfig(r=4, ffn_modules=["gate_proj"], dropout=0.5)
    model = randomized(get_peft_model(tiny_llama(), config))
    first, second = model(IDS).logits, model(IDS).logits
    assert not torch.allclose(first, second, atol=1e-4)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_an_ffn_that_cannot_be_composed_keeps_its_forward_pass(tiny_llama: Make, randomized: Randomize) -> None:
    def clip(model: LlamaForCausalLM) -> LlamaForCausalLM:
        layer = type(model.model.layers[0].mlp)

        class Clipped(layer):  # type: ignore[misc, valid-type]
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).clamp(-1e-4, 1e-4)

        for block in model.model.layers:
            block.mlp.__class__ = Clipped
        return model

    model = randomized(get_peft_model(clip(tiny_llama()), MoleConfig(r=4)))
    assert model.peft_config["default"].ffn_modules == ["gate_proj"]
    x = torch.randn(1, 5, 32)
    assert model.base_model.model.model.layers[0].mlp(x).abs().max() == 1e-4
    assert [x.shape for x in collect_routing(model).logits] == [(1, 5, 3)]


@pytest.mark.parametrize("make", [opt, bloom])
def test_the_life_of_several_adapters(make: Callable[[], Any], randomized: Randomize, tmp_path: Path) -> None:
    base = make().eval()
    expected = base(IDS).logits.detach()
    model: Any = get_peft_model(base, MoleConfig(r=4), adapter_name="one")
    model.add_adapter("two", MoleConfig.from_preset("best", r=2, num_experts=5))
    randomized(model).eval()
    results = {}
    for name, experts in (("one", 3), ("two", 5)):
        model.set_adapter(name)
        results[name] = model(IDS).logits.detach()
        assert collect_routing(model).logits[0].shape == (2, 8, experts)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(make(), tmp_path / "two", adapter_name="b", low_cpu_mem_usage=True).eval()
    fresh.load_adapter(tmp_path / "one", adapter_name="a")
    assert torch.equal(fresh(IDS).logits, results["two"])
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert torch.equal(model(IDS).logits, results["two"]), "a copy shares nothing with its original"
    assert torch.equal(unpickled(IDS).logits, results["two"])
    assert not copied(IDS).logits.any()
    model.delete_adapter("two")
    assert torch.equal(model(IDS).logits, results["one"])
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
        assert collect_routing(model).logits == ()
    plain = model.unload()
    assert torch.equal(plain(IDS).logits, expected)
    assert not any(isinstance(m, MoleMlp | MolePart) or m._forward_pre_hooks for m in plain.modules())


def test_an_ffn_module_may_be_named_instead_of_its_first_linear(randomized: Randomize, tmp_path: Path) -> None:
    model = randomized(get_peft_model(bloom(), MoleConfig(r=4, ffn_modules=["mlp"]))).eval()
    model.add_adapter("second", MoleConfig(r=2, ffn_modules=["mlp"]))
    assert sum(isinstance(m, MoleSplitMlp) for m in model.modules()) == 2
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(bloom(), tmp_path).eval()(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="fc2 .* is not an FFN of a known structure: name its first linear"):
        get_peft_model(opt(), MoleConfig(ffn_modules=["fc2"]))


def test_flattened_tokens_keep_their_samples(randomized: Randomize) -> None:
    """OPT's FFN reads all tokens of a batch in one row; experts given by sample still reach their own sample."""
    model = randomized(get_peft_model(opt(), MoleConfig(r=4, granularity="given"))).eval()
    set_routing_inputs(model, experts=torch.tensor([2, 0]))
    both = model(IDS).logits
    for row, expert in enumerate((2, 0)):
        set_routing_inputs(model, experts=torch.tensor([expert]))
        torch.testing.assert_close(model(IDS[row : row + 1]).logits, both[row : row + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [opt, bloom])
def test_it_compiles_in_one_graph(make: Callable[[], Any], randomized: Randomize) -> None:
    model = randomized(get_peft_model(make(), MoleConfig(r=4))).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=IDS).logits, model(IDS).logits)

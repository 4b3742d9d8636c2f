"""The life cycle as users of PEFT and transformers know it: other loaders, status, merging, checkpointing, cards."""

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import check_if_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.integrations.peft import PeftAdapterMixin

from llava_mole.mole import (
    MoleConfig,
    MoleLinear,
    MoleMlp,
    collect_routing,
    mole_after_step,
    mole_auxiliary_loss,
    register_mole,
    set_routing_inputs,
)
from llava_mole.mole.layer import ExpertLayer
from llava_mole.mole.surgery import prune, to_lora

Make = Callable[[], LlamaForCausalLM]
IDS = torch.arange(1, 19).view(2, 9)
MASK = torch.ones(2, 9).bool()


@pytest.fixture
def base(tiny_llama: Make, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"balance_group": "global_batch", "bias_update_rate": 0.01},
        {"modules_to_save": ["norm"], "shared_r": 2},
        {"trainable_token_indices": [1, 2]},
        {"num_experts": 1},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3}},
    ],
    ids=str,
)
def test_transformers_loads_switches_and_deletes(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(base), MoleConfig(r=4, init_weights=False, task_type="CAUSAL_LM", **options)).train()
    (model(IDS, labels=IDS).loss + mole_auxiliary_loss(model, token_mask=MASK)).backward()
    mole_after_step(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted, plain = model.eval()(IDS).logits, load(base)(IDS).logits
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    assert torch.equal(load(adapter)(IDS).logits, adapted), "AutoModelForCausalLM.from_pretrained(adapter)"
    native: PeftAdapterMixin | Any = load(base)
    report = native.load_adapter(str(adapter))
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(native(IDS).logits, adapted)
    native.load_adapter(str(adapter), adapter_name="second")
    native.set_adapter("second")
    assert torch.equal(native(IDS).logits, adapted)
    native.disable_adapters()
    if "modules_to_save" not in options:  # transformers enables only tuner layers again
        assert torch.equal(native(IDS).logits, plain)
        native.enable_adapters()
    native.delete_adapter("second")
    assert native.active_adapters() == ["default"]
    if "modules_to_save" not in options:
        assert torch.equal(native(IDS).logits, adapted)
    native.save_pretrained(tmp_path / "again")
    assert torch.equal(PeftModel.from_pretrained(load(base), tmp_path / "again")(IDS).logits, adapted)
    native.delete_adapter("default")
    assert torch.equal(native(IDS).logits, plain)
    assert not hasattr(native, "peft_config")


def test_adapters_that_transformers_adds_share_their_routing_inputs(base: Path) -> None:
    model = load(base)
    model.add_adapter(MoleConfig(r=2, attention_modules=[], layers_to_transform=[0]), "one")
    model.add_adapter(MoleConfig(r=2), "two")
    layers = [m for m in model.modules() if isinstance(m, MoleMlp)]
    assert len(layers) == 2
    assert layers[0].inputs is layers[1].inputs
    assert [sorted(layer.configs) for layer in layers] == [["one", "two"], ["two"]]
    broken = load(base)
    with pytest.raises(ValueError, match="names 'wq'"):
        broken.add_adapter(MoleConfig(r=2, attention_modules=["wq"]))
    assert not any(isinstance(m, MoleMlp | MoleLinear) for m in broken.modules())


def test_an_adapter_is_not_put_on_twice(tiny_llama: Make) -> None:
    first = MoleConfig(r=4, init_weights=False)
    model = get_peft_model(tiny_llama(), first).eval()
    before, expected = repr(model), model(IDS).logits
    for again in (model, model.get_base_model()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="has an adapter 'default' already; give the new one another"):
                get_peft_model(again, MoleConfig(r=2, attention_modules=["q_proj"]))
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", MoleConfig(r=2))
    assert repr(model) == before
    assert model.peft_config == {"default": first}
    assert model.peft_config["default"] is first
    assert torch.equal(model(IDS).logits, expected)
    model.delete_adapter("default")
    model.add_adapter("default", MoleConfig(r=2))
    model.set_adapter("default")
    assert model.peft_config["default"].r == 2


def test_status_and_type(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(base), MoleConfig(r=4))
    assert model.peft_type.value == model.peft_type == "MOLE"
    status = model.get_model_status()
    assert (status.peft_types, status.adapter_model_type) == ({"default": "MOLE"}, "MoleModel")
    assert (status.num_adapter_layers, status.requires_grad) == (10, {"default": True})
    assert {layer.module_type for layer in model.get_layer_status()} == {"MoleLinear", "MoleMlp"}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOLE"
    assert check_if_peft_model(str(tmp_path))
    for config in (PeftConfig.from_pretrained(tmp_path), copy.deepcopy(model.peft_config["default"])):
        assert isinstance(config, MoleConfig)
        assert config.peft_type.value == "MOLE"
    register_mole()
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("lora", LoraConfig())


def test_layers_look_like_what_they_wrap(tiny_llama: Make) -> None:
    plain = tiny_llama()
    model = get_peft_model(tiny_llama(), MoleConfig(r=4)).get_base_model()
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert torch.equal(getattr(layer.mlp, name).weight, getattr(other.mlp, name).weight)
        assert layer.mlp.hidden_size == other.mlp.hidden_size
        assert layer.mlp.act_fn is layer.mlp.base_layer.act_fn
        assert (layer.mlp.in_features, layer.mlp.out_features) == (32, 32)
        q = layer.self_attn.k_proj
        assert (q.in_features, q.out_features) == (32, 16)
        assert torch.equal(q.weight, other.self_attn.k_proj.weight)
    with pytest.raises(AttributeError, match="no attribute 'wq'"):
        model.model.layers[0].mlp.wq  # noqa: B018
    layer = model.model.layers[0].mlp
    layer.base_layer._hf_hook = "of the base"  # as accelerate sets it
    assert not hasattr(layer, "_hf_hook")
    assert copy.deepcopy(model).model.layers[0].mlp.up_proj.out_features == 48


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("shared_r", [0, 2])
def test_one_expert_merges_and_unmerges(family: str, shared_r: int, dtype: torch.dtype, tiny_llama: Make) -> None:
    make = {"llama": tiny_llama, "gpt2": gpt2}[family]
    plain = make().to(dtype).eval()
    config = MoleConfig(r=4, num_experts=1, shared_r=shared_r, init_weights=False, dropout=0.1, use_rslora=True)
    model = get_peft_model(make().to(dtype), config).eval()
    expected, original = model(IDS).logits, plain(IDS).logits
    weights = {n: p.clone() for n, p in model.get_base_model().named_parameters()}
    tolerance: dict[str, float] = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-7}
    )
    assert not torch.allclose(expected, original, atol=1e-2)
    model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == ["default"]
    merged = model(IDS).logits
    torch.testing.assert_close(merged, expected, **tolerance)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert torch.equal(model(IDS).logits, merged)
    with pytest.raises(ValueError, match="Cannot delete adapter"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    for name, parameter in model.get_base_model().named_parameters():
        assert torch.equal(parameter, weights[name]), f"{name} is restored bit for bit"
    assert torch.equal(model(IDS).logits, expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, original)
    assert torch.equal(model(IDS).logits, expected)
    whole = model.merge_and_unload()
    assert type(whole) is type(plain)
    assert [n for n, _ in whole.named_modules()] == [n for n, _ in plain.named_modules()]
    torch.testing.assert_close(whole(IDS).logits, expected, **tolerance)


def test_attention_alone_merges_and_mixtures_do_not(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, ffn_modules=[], init_weights=False)).eval()
    expected = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    mixture = get_peft_model(tiny_llama(), MoleConfig(r=4, init_weights=False)).eval()
    mixture.add_adapter("one", MoleConfig(r=2, num_experts=1, init_weights=False))
    weights = [p.clone() for p in mixture.parameters()]
    for call in (mixture.merge_adapter, mixture.merge_and_unload, lambda: mixture.merge_adapter(["one", "default"])):
        with pytest.raises(ValueError, match="to_lora"):
            call()
    assert all(torch.equal(a, b) for a, b in zip(weights, mixture.parameters(), strict=True)), "nothing was merged"
    mixture.set_adapter("one")
    alone = mixture(IDS).logits
    mixture.merge_adapter(adapter_names=["one"])
    torch.testing.assert_close(mixture(IDS).logits, alone, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        mixture.set_adapter("default")
    assert len(collect_routing(mixture).names) == 0
    mixture(IDS)
    assert len(collect_routing(mixture).names) == 2


def test_two_adapters_merged_one_after_the_other_are_both_taken_back(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, num_experts=1, init_weights=False)).eval()
    model.add_adapter("two", MoleConfig(r=2, num_experts=1, init_weights=False))
    weights = {n: p.clone() for n, p in model.get_base_model().named_parameters()}
    one = model(IDS).logits
    model.merge_adapter()
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(adapter_names=["two"])
    both = model(IDS).logits
    assert not torch.allclose(both, one, atol=1e-3)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.get_base_model().named_parameters())


def test_a_merge_that_would_spoil_the_weights_is_refused(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, num_experts=1, init_weights=False))
    layer = next(m for m in model.modules() if isinstance(m, MoleLinear))
    with torch.no_grad():
        layer.pair("default").B.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert layer.base_layer.weight.isfinite().all()
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="cannot be merged into the quantised weights"):
        model.merge_adapter()


FREE = [
    {"num_experts": 1},
    {"balance_coef": 0.0, "expert_scale": "straight_through"},
    {"balance_coef": 0.0, "expert_scale": "prob", "top_k": 2, "bias_update_rate": 0.01},
    {"balance_coef": 0.0, "mode": "dense"},
    {"train_router": False, "router_detach_input": True},
    {"router": "hash"},
    {"router": "random"},
    {"granularity": "given"},
]


@pytest.mark.parametrize("options", FREE, ids=str)
def test_reentrant_checkpointing_is_allowed_where_nothing_is_lost(options: dict[str, Any], tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, init_weights=False, **options)).train()
    set_routing_inputs(model, experts=torch.tensor([0, 2]) if "granularity" in options else None)

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        out = model(input_ids=IDS, labels=IDS, use_cache=False)
        (out.loss + mole_auxiliary_loss(model, token_mask=MASK)).backward()
        mole_after_step(model)
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    state = copy.deepcopy(model.state_dict())
    expected = gradients()
    model.load_state_dict(state)
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    if "granularity" not in options:
        index = collect_routing(model).index
        assert all(i.shape[:2] == (2, 9) for i in index)


def test_a_classification_head_is_trained_as_in_lora() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    base = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0))
    model = get_peft_model(base, MoleConfig(r=4, task_type="SEQ_CLS"))
    trained = {n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n}
    assert model(IDS).logits.shape == (2, 2)
    assert any("score.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad), trained


def header(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text().split("---\n")[1])


def test_the_card_says_how_to_load_and_what_it_is(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# Base\n")
    model = get_peft_model(load(base), MoleConfig.from_preset("best", r=4, num_experts=5, dropout=0.1))
    model.add_adapter("two", MoleConfig(r=2, num_experts=1))
    model.save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "README.md"
    data, text = header(file), file.read_text()
    assert {"mole", "mixture-of-experts", "lora", "transformers"} <= set(data["tags"])
    assert (data["library_name"], data["base_model"], data["license"]) == ("peft", str(base), "llama2")
    for expected in (
        "import llava_mole.mole", f"LlamaForCausalLM.from_pretrained({str(base)!r})", "(K) | 5 |", "(r) | 4 |",
        "| preset | best |", "`dropout=0.1`", "| licence | llama2 |",
    ):  # fmt: skip
        assert expected in text
    second = tmp_path / "out" / "two" / "README.md"
    assert "(K) | 1 |" in second.read_text()
    assert "mole" in header(second)["tags"]
    file.write_text(text.replace("# Model Card for Model ID", "# Ours").replace("license: llama2", "license: mit"))
    model.save_pretrained(tmp_path / "out")
    assert "# Ours" in file.read_text()
    assert header(file)["license"] == "mit"
    assert file.read_text().count("import llava_mole.mole") == 1
    code = text.split("```python\n")[1].split("```")[0].replace("DIRECTORY", str(tmp_path / "out"))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert torch.equal(scope["model"](IDS).logits, model.eval()(IDS).logits)


def test_the_card_of_a_base_without_a_name(tiny_llama: Make, tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), MoleConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    data = header(tmp_path / "README.md")
    assert "base_model" not in data
    assert not any(tag.endswith(":") for tag in data["tags"])
    assert (data["license"], data["license_name"]) == ("other", "license-of-the-base-model")
    assert "AutoModelForCausalLM.from_pretrained('BASE_MODEL')" in (tmp_path / "README.md").read_text()
    MoleConfig(r=4).save_pretrained(str(tmp_path / "config"))
    assert [file.name for file in (tmp_path / "config").iterdir()] == ["adapter_config.json"]


def test_a_fresh_process_without_the_import_ends_with_a_key_error_that_the_card_explains(
    base: Path, tmp_path: Path
) -> None:
    get_peft_model(load(base), MoleConfig(r=4)).save_pretrained(tmp_path / "out")
    code = (
        "import sys; from transformers import LlamaForCausalLM; from peft import PeftModel; "
        f"PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained({str(base)!r}), {str(tmp_path / 'out')!r})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert "KeyError: 'MOLE'" in ended.stderr
    assert "KeyError: 'MOLE'" in (tmp_path / "out" / "README.md").read_text()


def test_a_refused_sequence_adapter_leaves_decoding_to_the_next_one(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=2))
    sequence = {"r": 2, "granularity": "sequence", "balance_group": "micro_batch"}
    with pytest.raises(ValueError):
        model.add_adapter("refused", MoleConfig(**sequence, layers_to_transform=[99]))
    model.add_adapter("accepted", MoleConfig(**sequence))
    hooks = model.base_model.model._forward_pre_hooks.values()
    assert sum(hook == model.base_model._note_decoding for hook in hooks) == 1


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "sequence", "balance_group": "micro_batch"}, {"num_experts": 1}]
)
def test_unloading_removes_every_hook(tiny_llama: Make, options: dict[str, Any]) -> None:
    base = get_peft_model(tiny_llama(), MoleConfig(r=2, **options)).unload()
    left = [
        hook
        for module in base.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert not left


def test_plain_lora_inside_a_wrapped_ffn_is_refused(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=2))
    with pytest.raises(ValueError, match="mlp carries the experts of another adapter .* cannot get plain LoRA"):
        model.add_adapter("plain", MoleConfig(r=2, attention_modules=["q_proj", "up_proj"], ffn_modules=[]))


def test_trained_token_embeddings_are_not_lost_in_an_export(tiny_llama: Make, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=2, trainable_token_indices=[1, 2]))
    with pytest.raises(ValueError, match=r"trainable_token_indices \[1, 2\], which a LoRA would lose"):
        to_lora(model, tmp_path / "lora", expert=0)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("options", "kept", "message"),
    [
        ({"top_k": 3, "num_experts": 4, "expert_scale": "topk_renorm"}, 2, "top_k is 3 but num_experts is 2"),
        (
            {
                "num_experts": 4,
                "mode": "dense",
                "balance_kind": "groups",
                "group_delta": 0.1,
                "balance_group": "micro_batch",
            },
            3,
            "groups",
        ),
    ],
)
def test_surgery_refuses_what_the_other_options_contradict(
    tiny_llama: Make, options: dict[str, Any], kept: int, message: str
) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=2, **options))
    with pytest.raises(ValueError, match=message):
        prune(model, kept, torch.rand(2, 4))
    assert model.peft_config["default"].num_experts == 4


def test_layers_that_a_pass_skips_are_no_part_of_its_loss() -> None:
    """OPT with LayerDrop: the logits of a skipped layer belong to an earlier pass, whose graph is gone."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=24, layerdrop=0.5,
        word_embed_proj_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    model = get_peft_model(OPTForCausalLM(config), MoleConfig(r=2)).train()
    ids = torch.arange(1, 9).view(1, 8)
    seen = set()
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        seen.add(len(collect_routing(model).logits))
        loss.backward()
    assert len(seen) > 1, "some passes have skipped a layer"


@pytest.mark.parametrize("automatic", [True, False])
def test_load_is_counted_while_passes_skip_layers(automatic: bool) -> None:
    torch.manual_seed(0)
    base = OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=24, layerdrop=0.5,
        word_embed_proj_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    options = {"balance_group": "global_batch", "expert_scale": "straight_through", "bias_update_rate": 0.1}
    config = MoleConfig(r=2, experts_by_layer=[2, 3, 4], add_balance_loss=automatic, **options)
    model = get_peft_model(OPTForCausalLM(base), config).train()
    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(1, 9).view(1, 8)
    skipped = 0
    for _ in range(6):
        before = [layer.current_state().load.clone() for layer in layers]
        expected = [torch.zeros_like(load) for load in before]
        for _ in range(2):  # accumulated passes, which skip different layers
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            ran = collect_routing(model).layers
            if not automatic:
                loss = loss + mole_auxiliary_loss(model, token_mask=torch.ones_like(ids).bool())
            loss.backward()
            for layer in ran:
                row = next(row for row, other in enumerate(layers) if other is layer)
                expected[row] += torch.bincount(layer.routing.index.flatten(), minlength=expected[row].shape[-1])
        optimizer.step()
        if not automatic:
            mole_after_step(model)
        skipped += sum(not counts.any() for counts in expected)
        for layer, counts, load in zip(layers, expected, before, strict=True):
            assert torch.equal(layer.current_state().load, counts if counts.any() else load)
    assert skipped, "some steps have skipped a layer altogether"


def test_the_balance_loss_counts_once_if_the_caller_adds_it_in_evaluation_mode(tiny_llama: Make) -> None:
    ids = torch.arange(1, 9).view(1, 8)

    def router_gradient(add: bool) -> torch.Tensor:
        model = get_peft_model(tiny_llama(), MoleConfig(r=2)).eval()
        loss = model(input_ids=ids, labels=ids).loss
        if add:
            with pytest.warns(UserWarning, match="already holds the balance loss"):
                loss = loss + mole_auxiliary_loss(model, token_mask=torch.ones_like(ids).bool())
        loss.backward()
        return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "mole_router" in n])

    torch.manual_seed(0)
    alone = router_gradient(False)
    torch.manual_seed(0)
    torch.testing.assert_close(router_gradient(True), alone)

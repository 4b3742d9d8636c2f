"""Every family of language models that docs/support-matrix.md lists: each cell of its table is one test here."""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from llava_mole.model.quantization import quantize_linears
from llava_mole.mole import (
    MoleConfig,
    MoleLinear,
    MoleMlp,
    Routing,
    collect_routing,
    mole_after_step,
    mole_auxiliary_loss,
)
from llava_mole.mole.split import MoleSplitMlp
from llava_mole.mole.surgery import to_lora

IDS = torch.arange(1, 17).view(2, 8)
"""8 is no multiple of K = 3: a perfectly even load would give the router no gradient."""
MASK = torch.ones(2, 8).bool()
COMMON = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT = {
    "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_group": 2, "topk_group": 1, "num_key_value_heads": 2,
}  # fmt: skip
GEMMA_SHARED = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 32, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "global_head_dim": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip
ENCODER_DECODER = {
    "vocab_size": 32, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 32, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip

WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Family:
    """A row of the table: where adapters are found, and how a tiny model is made."""

    ffns: list[str]
    attention: list[str] = field(default_factory=lambda: QKVO)
    options: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=lambda: COMMON)
    config: str | None = None
    """The configuration's class, if it is not the name and `Config`."""
    model: str | None = None
    """The model's class, if it is not the name and `ForCausalLM`."""
    layers: int = 2
    """FFNs with experts in the tiny model."""
    wide: dict[str, int] | None = None
    """Options with which the input widths of all linears are multiples of 64, as 4 bits need them on a CPU."""
    exported: bool = True
    """Whether PEFT can load a LoRA of its FFNs."""
    dtype: torch.dtype = torch.float64
    """In which the reference is compared; float32 if the family does not run in float64."""


FAMILIES = {
    **{
        name: Family(["mlp"], wide=WIDE)
        for name in (
            "Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "StableLm", "Cohere", "Cohere2",
            "Olmo", "Olmo2", "Olmo3", "SmolLM3", "Granite", "Glm", "Glm4", "Nemotron", "Exaone4", "Helium", "Arcee",
            "Ernie4_5", "HunYuanDenseV1", "Starcoder2",
        )
    },
    "Gemma3": Family(["mlp"], config="Gemma3TextConfig", wide=WIDE),
    "Phi": Family(["mlp"], ["q_proj", "k_proj", "v_proj", "dense"], wide=WIDE),
    "Phi3": Family(["mlp"], ["o_proj", "qkv_proj"], wide=WIDE),
    "GPTNeoX": Family(["mlp"], ["query_key_value", "dense"], wide=WIDE),
    "Persimmon": Family(["mlp"], ["query_key_value", "dense"], wide=WIDE),
    "Falcon": Family(
        ["mlp"],
        ["query_key_value", "dense"],
        common={k: v for k, v in COMMON.items() if k != "head_dim"},
    ),
    "GPT2": Family(["mlp"], ["c_attn", "attn.c_proj"], common=GPT, model="GPT2LMHeadModel"),
    "GPTBigCode": Family(["mlp"], ["c_attn", "attn.c_proj"], common=GPT),
    "GPTJ": Family(["mlp"], ["k_proj", "v_proj", "q_proj", "out_proj"], {"rotary_dim": 4}, GPT),
    "CodeGen": Family(["mlp"], ["qkv_proj", "out_proj"], {"rotary_dim": 4, "n_head": 4}, GPT),
    "GPTNeo": Family(
        ["mlp"],
        ["k_proj", "v_proj", "q_proj", "out_proj"],
        {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    "SeedOss": Family(["gate_proj"], wide=WIDE),
    "BitNet": Family(["gate_proj"]),
    "Lfm2": Family(["w1"], ["q_proj", "k_proj", "v_proj", "out_proj"]),
    "Bloom": Family(
        ["dense_h_to_4h"], ["query_key_value", "dense"], {"n_layer": 2, "n_head": 2}, wide={"hidden_size": 64}
    ),
    "Mpt": Family(
        ["up_proj"], ["Wqkv", "out_proj"], {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}
    ),
    "OPT": Family(
        ["fc1"],
        ["k_proj", "v_proj", "q_proj", "out_proj"],
        {"ffn_dim": 24, "word_embed_proj_dim": 16},
        wide={"hidden_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 64},
    ),
    "XGLM": Family(
        ["fc1"],
        ["k_proj", "v_proj", "q_proj", "out_proj"],
        {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2},
        dtype=torch.float32,
    ),
    "BioGpt": Family(["fc1"], ["k_proj", "v_proj", "q_proj", "out_proj"]),
    "DiffLlama": Family(["mlp"], options={"num_key_value_heads": 2}),
    "ModernBertDecoder": Family(
        ["Wi"],
        ["q_proj", "k_proj", "v_proj", "attn.Wo"],
        {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "Gemma3n": Family(["mlp"], options=GEMMA_SHARED, config="Gemma3nTextConfig", layers=4),
    "Gemma4": Family(["mlp"], options=GEMMA_SHARED, config="Gemma4TextConfig", layers=4),
    "Qwen2Moe": Family(
        ["layers.0.mlp", "shared_expert"],
        options={**SPARSE, "shared_expert_intermediate_size": 8, "mlp_only_layers": [0]},
        wide={**WIDE, "shared_expert_intermediate_size": 64},
    ),
    "Qwen3Moe": Family(["layers.0.mlp"], options={**SPARSE, "mlp_only_layers": [0]}, layers=1, exported=False),
    "DeepseekV2": Family(
        ["layers.0.mlp", "shared_experts"],
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        DEEPSEEK,
        exported=False,
    ),
    "DeepseekV3": Family(
        ["layers.0.mlp", "shared_experts"],
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        DEEPSEEK,
        exported=False,
    ),
    "Glm4Moe": Family(
        ["layers.0.mlp", "shared_experts"],
        options={k: v for k, v in DEEPSEEK.items() if "rank" not in k},
        exported=False,
    ),
    "Llama4": Family(
        ["layers.0.feed_forward", "shared_expert"],
        config="Llama4TextConfig",
        options={"num_local_experts": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
    ),
    "GraniteMoeShared": Family(
        ["input_linear"], options={"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 8}
    ),
    "Qwen3Next": Family(
        ["shared_expert"],
        ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"],
        {
            **SPARSE, "shared_expert_intermediate_size": 8, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        exported=False,
    ),
    "Jamba": Family(
        ["layers.0.feed_forward", "layers.2.feed_forward"],
        options={
            "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
            "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
        },
    ),
    "GraniteMoeHybrid": Family(
        ["input_linear"],
        options={
            "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 8, "num_local_experts": 0,
            "shared_intermediate_size": 8,
        },
    ),
    "Phimoe": Family([], options={"num_local_experts": 4}, layers=0),
    "Mixtral": Family([], options={"num_local_experts": 4}, layers=0),
    "Olmoe": Family([], options={"num_experts": 4, "num_experts_per_tok": 2}, layers=0),
    "GptOss": Family([], options={"num_local_experts": 4}, layers=0),
    "T5": Family(["wi"], ["q", "k", "v", "o"], {}, ENCODER_DECODER, model="T5ForConditionalGeneration", layers=4),
    "MT5": Family(["wi_0"], ["q", "k", "v", "o"], {}, ENCODER_DECODER, model="MT5ForConditionalGeneration", layers=4),
    "Bart": Family(
        ["fc1"], ["k_proj", "v_proj", "q_proj", "out_proj"], {}, BART, model="BartForConditionalGeneration", layers=4
    ),
    "MBart": Family(
        ["fc1"], ["k_proj", "v_proj", "q_proj", "out_proj"], {}, BART, model="MBartForConditionalGeneration", layers=4
    ),
    "Pegasus": Family(
        ["fc1"], ["k_proj", "v_proj", "q_proj", "out_proj"], {}, BART, model="PegasusForConditionalGeneration", layers=4
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", FAMILIES)


def make(name: str, **options: Any) -> Any:
    """A random tiny model of the family, the same one each time."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config or f"{name}Config")(**{**family.common, **family.options, **options})
    if family.dtype == torch.float64:  # what the routed experts use by default on a CPU has no float64
        config._experts_implementation = "eager"
    return getattr(transformers, family.model or f"{name}ForCausalLM")(config)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return run(model).logits


def run(model: Any) -> Any:
    # `labels` make an encoder-decoder model build its decoder's input.
    return model(input_ids=IDS, attention_mask=MASK.long(), labels=IDS)


def routings(model: Any) -> Iterator[Routing]:
    """Of a decoder the whole routing; of an encoder-decoder model each stack by itself."""
    parts = ("encoder", "decoder") if model.config.is_encoder_decoder else (None,)
    return (collect_routing(model, part) for part in parts)


def backward(model: Any) -> None:
    loss = run(model).loss
    for routing in routings(model):
        loss = loss + mole_auxiliary_loss(model, token_mask=MASK, routing=routing)
    loss.backward()


@EVERY
def test_it_trains_saves_loads_and_generates(
    name: str, randomized: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    family, base = FAMILIES[name], make(name).eval()
    expected = logits(base)
    model: Any = get_peft_model(base, MoleConfig(r=2)).eval()
    config = model.peft_config["default"]
    assert (config.ffn_modules, config.attention_modules) == (family.ffns, family.attention)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert [tuple(x.shape) for r in routings(model) for x in r.logits] == [(2, 8, 3)] * family.layers

    randomized(model).train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert any("mole_router" in key for key in trained) == (family.layers > 0)
    before = {key: p.detach().clone() for key, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        backward(model)
        assert [key for key, p in trained.items() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
        optimizer.zero_grad()
    assert [key for key, p in trained.items() if torch.equal(p, before[key])] == []

    model.eval()
    adapted = logits(model)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(name), tmp_path).eval()
    assert torch.equal(logits(loaded), adapted)
    greedy = {"input_ids": IDS, "attention_mask": MASK.long(), "max_new_tokens": 4, "do_sample": False}
    generated = model.generate(**greedy, pad_token_id=0)
    assert torch.equal(generated, model.generate(**greedy, pad_token_id=0, use_cache=False))
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    plain = model.unload()
    assert torch.equal(logits(plain), expected)
    assert not any(m._forward_pre_hooks for m in plain.modules())


@EVERY
def test_it_equals_a_naive_float64_reference(name: str, randomized: Callable[[nn.Module], nn.Module]) -> None:
    dtype = FAMILIES[name].dtype
    model: Any = randomized(get_peft_model(make(name).to(dtype), MoleConfig(r=2, shared_r=2))).eval()
    reference = make(name).to(dtype).eval()
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, MoleMlp):
            add_naive_experts(reference, path, layer)
        elif isinstance(layer, MoleLinear):
            pair = layer.pair("default")
            hook = naive_delta(pair.A, pair.B)
            reference.get_submodule(path).register_forward_hook(lambda m, x, y, hook=hook: y + hook(x[0]))
    # Many families normalise in float32 whatever the dtype, which rounds what the two add in another order.
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(reference), logits(make(name).to(dtype).eval()), atol=1e-3)


def naive_delta(a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: 2 * (x @ a.T) @ b


def add_naive_experts(reference: nn.Module, path: str, layer: MoleMlp) -> None:
    """Add the experts to the FFN's linears, token by token, as Eq. 3-5 say. The first linear's input is routed."""
    experts, router = layer.experts("default"), layer.router("default")
    assert router is not None
    chosen: list[int] = []

    def make_hook(projection: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            (x,) = args
            if projection != layer.layout.down:
                chosen[:] = (x @ router.weight.T).flatten(0, -2).argmax(dim=-1).tolist()
            (a, b), (shared_a, shared_b) = experts.pair(projection), experts.shared_pair(projection)
            tokens = zip(x.flatten(0, -2), y.flatten(0, -2), chosen, strict=True)
            rows = [y_t + naive_delta(a[k], b[k])(x_t) + naive_delta(shared_a, shared_b)(x_t) for x_t, y_t, k in tokens]
            return torch.stack(rows).view(y.shape)

        return hook

    for projection in layer.layout.projections:
        linear = reference.get_submodule(layer.linear_path(path, projection))
        linear.register_forward_hook(make_hook(projection))


@EVERY
def test_gradient_checkpointing_changes_nothing(name: str, randomized: Callable[[nn.Module], nn.Module]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model: Any = randomized(get_peft_model(make(name), MoleConfig(r=2, expert_scale="straight_through"))).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)
        backward(model)
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[0], gradients[1])


@EVERY
def test_one_expert_is_exported_and_merged(
    name: str, randomized: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model: Any = randomized(get_peft_model(make(name), MoleConfig(r=2, num_experts=1))).eval()
    if not FAMILIES[name].exported:
        with pytest.raises(ValueError, match="PEFT takes these names for the routed experts"):
            to_lora(model, tmp_path, expert=0)
        return
    to_lora(model, tmp_path, expert=0)
    merged: Any = PeftModel.from_pretrained(make(name), tmp_path).eval().merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes (extra quant) is missing")
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.wide])
def test_it_trains_saves_and_loads_in_4_bits(
    name: str, randomized: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    def quantised() -> Any:
        base = make(name, **(FAMILIES[name].wide or {})).eval()
        quantize_linears(base, "4bit", torch.device("cpu"), torch.float32)
        return base

    base = quantised()
    expected = logits(base)
    model: Any = get_peft_model(base, MoleConfig(r=2)).eval()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    backward(randomized(model).train())
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert [key for key, p in trained.items() if p.grad is None or not p.grad.any()] == []
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert not torch.allclose(logits(model), expected, atol=1e-3)


COLUMNS = {
    "trains, saves, loads, generates": test_it_trains_saves_loads_and_generates,
    "equals a float64 reference": test_it_equals_a_naive_float64_reference,
    "gradient checkpointing": test_gradient_checkpointing_changes_nothing,
    "K = 1 as plain LoRA, merged": test_one_expert_is_exported_and_merged,
    "4 bits": test_it_trains_saves_and_loads_in_4_bits,
}
"""The columns of the table, and the test behind each of their cells."""


def table() -> str:
    """The table of docs/support-matrix.md. Families with equal cells share a row."""
    rows: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        ffns, attention = (", ".join(f"`{x}`" for x in names) for names in (family.ffns, family.attention))
        cells = {
            **dict.fromkeys(COLUMNS, "yes"),
            "equals a float64 reference": "yes" if family.dtype == torch.float64 else "in float32",
            "K = 1 as plain LoRA, merged": "yes" if family.exported else "refused",
            "4 bits": "yes" if family.wide else "-",
        }
        key = f"| {ffns or 'none'} | {attention} | {' | '.join(cells.values())} |"
        rows.setdefault(key, []).append(name.removesuffix("Text"))
    lines = [f"| family | FFNs with experts | plain LoRA on | {' | '.join(COLUMNS)} |", "|---|---|---|" + "---|" * 5]
    return "\n".join([*lines, *(f"| {', '.join(names)} {key}" for key, names in rows.items())]) + "\n"


def test_the_support_matrix_lists_what_is_tested_here() -> None:
    matrix = (Path(__file__).parents[2] / "docs" / "support-matrix.md").read_text(encoding="utf-8")
    assert table() in matrix, f"the table should be:\n{table()}"
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"{len(FAMILIES)} families of\nlanguage models" in readme
    *every, in_4_bits = (test.pytestmark[0] for test in COLUMNS.values())  # type: ignore[attr-defined]
    assert every == [EVERY.mark] * 4
    assert list(in_4_bits.args[1]) == [name for name, family in FAMILIES.items() if family.wide]


def test_routed_experts_are_left_alone_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="llava_mole.mole.model"):
        model = get_peft_model(make("DeepseekV3", num_hidden_layers=3), MoleConfig(r=2))
        get_peft_model(make("Mixtral"), MoleConfig(r=2))
        get_peft_model(make("Llama"), MoleConfig(r=2))
    assert [record.getMessage() for record in caplog.records] == [
        "DeepseekV3ForCausalLM has 8 routed experts of its own (2 sparse FFNs), which are not adapted. The experts of "
        "this adapter go to the FFNs outside them: layers.0.mlp, shared_experts",
        "MixtralForCausalLM has 8 routed experts of its own (2 sparse FFNs), which are not adapted. There is no FFN "
        "outside them, so this adapter is plain LoRA on the attention, without experts and a router",
    ]
    assert not any("mole_" in name for name, _ in model.named_parameters() if ".mlp.experts." in name)


@pytest.mark.parametrize("named", ["experts", "mlp"])
def test_routed_experts_that_are_named_are_refused(named: str) -> None:
    with pytest.raises(ValueError, match=r"mlp.* holds routed experts as stacked parameters, which cannot be adapted"):
        get_peft_model(make("DeepseekV3"), MoleConfig(r=2, ffn_modules=[named]))


def test_a_dropout_inside_the_ffn_decides_how_it_is_wrapped() -> None:
    """SeedOss drops out the FFN's output by a function. Earlier adapters wrap its module, so that name still does."""
    found = get_peft_model(make("SeedOss"), MoleConfig(r=2))
    named = get_peft_model(make("SeedOss"), MoleConfig(r=2, ffn_modules=["mlp"]))
    kinds = [{type(m) for m in model.modules() if isinstance(m, MoleMlp)} for model in (found, named)]
    assert kinds == [{MoleSplitMlp}, {MoleMlp}]
    without = get_peft_model(make("SeedOss", residual_dropout=0.0), MoleConfig(r=2))
    assert without.peft_config["default"].ffn_modules == ["mlp"]


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "FalconMamba"])
def test_state_space_models_are_refused_by_name(name: str) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    modules = [type(module) for module in model.modules()]
    with pytest.raises(
        ValueError, match=rf"{name}ForCausalLM \({config.model_type}\) has neither an FFN nor attention"
    ):
        get_peft_model(model, MoleConfig(r=2))
    assert [type(module) for module in model.modules()] == modules


def test_the_stacks_of_an_encoder_decoder_model_are_balanced_each_by_itself() -> None:
    model: Any = get_peft_model(make("T5"), MoleConfig(r=2)).eval()
    model(input_ids=IDS, labels=IDS[:, :5].contiguous())
    encoder, decoder = routings(model)
    assert [x.shape for x in (*encoder.logits, *decoder.logits)] == [(2, 8, 3)] * 2 + [(2, 5, 3)] * 2
    assert mole_auxiliary_loss(model, token_mask=MASK[:, :5], routing=decoder) > 0
    with pytest.raises(ValueError, match="token_mask has shape"):
        mole_auxiliary_loss(model, token_mask=MASK, routing=decoder)
    with pytest.raises(ValueError, match=r"routing=collect_routing\(model, 'encoder'\)"):
        mole_auxiliary_loss(model, token_mask=MASK)
    counting: Any = get_peft_model(make("T5"), MoleConfig.from_preset("coupled", r=2, add_balance_loss=False))
    counting(input_ids=IDS, labels=IDS[:, :5].contiguous())
    for stack, routing in zip(("encoder", "decoder"), routings(counting), strict=True):
        mask = MASK if stack == "encoder" else MASK[:, :5]
        mole_auxiliary_loss(counting, token_mask=mask, routing=routing)
    mole_after_step(counting)
    loads = [layer.current_state().load.sum().item() for stack in routings(counting) for layer in stack.layers]
    assert loads == [16, 16, 10, 10], "tokens of the encoder's two layers, then of the decoder's"

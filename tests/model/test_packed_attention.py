"""Packed rows: every sample comes out as alone, forward and backward, for every family; leaks are found."""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llava_mole.common.errors import ConfigError
from llava_mole.model import packed_attention as packing

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
}
LENGTHS = (3, 7, 1, 6)


def _model(name: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[name]().float().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert model.config._attn_implementation == "sdpa"
    return model


def _hidden(model: Any, x: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    arguments = packing.packed_arguments(model.config._attn_implementation, lengths, x.device)
    return model.get_decoder()(inputs_embeds=x, **arguments).last_hidden_state


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_alone_with_all_gradients(name: str) -> None:
    model, reference = _model(name), _model(name)
    packing.enable_packing(model)
    x = torch.randn(1, sum(LENGTHS), 32)
    packed_x = x.clone().requires_grad_()
    packed = _hidden(model, packed_x, LENGTHS)
    probe = torch.randn_like(packed)
    (packed * probe).sum().backward()

    alone_x = x.clone().requires_grad_()
    alone = torch.cat(
        [
            reference.get_decoder()(inputs_embeds=part, use_cache=False).last_hidden_state
            for part in alone_x.split(LENGTHS, dim=1)
        ],
        dim=1,
    )
    (alone * probe).sum().backward()
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)
    torch.testing.assert_close(packed_x.grad, alone_x.grad, rtol=1e-4, atol=2e-5)
    for (key, own), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=5e-5, msg=key)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_to_the_block_mask_of_transformers(checkpointing: bool) -> None:
    model, reference = _model("llama"), _model("llama")
    packing.enable_packing(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    x = torch.randn(1, sum(LENGTHS), 32)
    own_x, other_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    own = _hidden(model, own_x, LENGTHS)
    other = _hidden(reference, other_x, LENGTHS)  # sdpa: positions that restart become a block mask
    torch.testing.assert_close(own, other, rtol=0, atol=2e-5)
    own.square().sum().backward()
    other.square().sum().backward()
    torch.testing.assert_close(own_x.grad, other_x.grad, rtol=1e-4, atol=2e-5)


def test_padded_batches_and_generation_still_work_with_the_packed_kernel() -> None:
    model, reference = _model("llama").eval(), _model("llama").eval()
    packing.enable_packing(model)
    ids = torch.randint(1, 60, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    own = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(own, reference.generate(ids, attention_mask=mask, **options))


def test_a_model_whose_samples_see_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama")
    original = packing.packed_attention

    def leaking(*args: Any, row_layout: Any = None, **kwargs: Any) -> Any:
        layout = row_layout and packing.RowLayout((sum(row_layout.sample_lengths),))
        return original(*args, row_layout=layout, **kwargs)

    monkeypatch.setattr(packing, "packed_attention", leaking)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot train on packed rows \(a sample changes by"):
        packing.enable_packing(model)
    assert model.config._attn_implementation == "sdpa"


def test_kernels_that_cannot_keep_samples_apart_are_refused() -> None:
    softcapped = Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_implementation="eager"))
    with pytest.raises(ConfigError, match="attn_implementation 'eager' cannot keep packed samples apart"):
        packing.enable_packing(softcapped)

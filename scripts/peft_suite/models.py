"""Tiny random models under the names that PEFT's tests look for: `python -m peft_suite.models DIRECTORY`.

PEFT's tests download such models from the Hub and tell families apart by parts of their names. Here they are made from
configurations, with one seed, so that the suite needs no network. A name is a path relative to DIRECTORY. None has
dropout, because some tests compare the gradients of two passes.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
_GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

DECODERS: dict[str, dict[str, Any]] = {
    "OPT": {**_SIZES, "dropout": 0.0, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "GPT2LMHead": _GPT,
    "GPTJ": {**_GPT, "rotary_dim": 4},
    "Llama": _HEADS,
    "Qwen2": _GROUPED,
    "Gemma3": {**_HEADS, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "Mistral": _HEADS,
    "Bloom": {**_SIZES, "n_layer": 2, "n_head": 4},
    "GPTNeoX": {**_SIZES, "intermediate_size": 48},
    "GPTBigCode": _GPT,
    "Gemma": _HEADS,
    "Gemma2": {**_HEADS, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "Phi": {**_SIZES, "intermediate_size": 48},
    "Phi3": _GROUPED,
    "Qwen3": _HEADS,
    "Falcon": {**_SIZES, "ffn_hidden_size": 48},
    "Mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {**_HEADS, **_EXPERTS, "mlp_only_layers": [0]},
    "DeepseekV3": {**_GROUPED, **_MLA, "num_key_value_heads": 4},
}
"""Decoder families, by the prefix of their classes in transformers."""

ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "T5": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    },
    "Bart": {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "init_std": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
}
"""Encoder-decoder families."""

DECODER_NAMES = [f"tiny-random-{name}{'Model' if name == 'GPT2LMHead' else 'ForCausalLM'}" for name in DECODERS]
ENCODER_DECODER_NAMES = [f"tiny-random-{name}ForConditionalGeneration" for name in ENCODER_DECODERS]


def make(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """The model called `name`, the same one each time."""
    model_class = getattr(transformers, name.removeprefix("tiny-random-"))
    torch.manual_seed(0)
    return model_class(model_class.config_class(**options)).eval()


def main(directory: Path) -> None:
    """Save every model below `directory`."""
    for names, families in ((DECODER_NAMES, DECODERS), (ENCODER_DECODER_NAMES, ENCODER_DECODERS)):
        for name, options in zip(names, families.values(), strict=True):
            make(name, options).save_pretrained(directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Miniature checkpoints in the layouts of others, with random weights, made in a second without network."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from worlds.tiny_models import IMAGE_SIZE, PATCH_SIZE, make_language_model, make_tokenizer

WIDTH, HIDDEN, FFN, VOCABULARY = 24, 32, 48, 400
MM_KEYS: dict[str, Any] = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": WIDTH,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
    "image_aspect_ratio": "pad",
    "tune_mm_mlp_adapter": False,
    "tokenizer_model_max_length": 256,
    "tokenizer_padding_side": "right",
}


def vision_config() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=16,
        hidden_act="quick_gelu",
    )


def make_clip(directory: Path, seed: int = 5) -> Any:
    """A CLIPVisionModel in `directory`. Returns the model."""
    from transformers import CLIPVisionModel

    torch.manual_seed(seed)
    model = CLIPVisionModel(vision_config()).eval()
    randomize(model)
    model.save_pretrained(directory)
    return model


def randomize(model: torch.nn.Module, std: float = 0.2) -> None:
    """Biases and norms too, so that nothing is left out unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (std if parameter.dim() > 1 else 0.3))
            if "norm" in name and name.endswith("weight"):
                parameter.abs_().add_(0.5)


def make_llava_hf(directory: Path, names: str, seed: int = 1) -> Any:
    """A LlavaForConditionalGeneration whose files have `old` or `new` names. Returns the model."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=VOCABULARY + 8,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision_config(), text_config=text, image_token_index=VOCABULARY, image_seq_length=4
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    randomize(model)
    directory.mkdir(parents=True)
    make_tokenizer(directory)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(directory)
    state = {}
    for name, value in model.state_dict().items():
        if names == "old":
            name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
            name = name.replace("model.language_model.", "language_model.model.")
            name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
            name = name.replace("lm_head.", "language_model.lm_head.") if name.startswith("lm_head.") else name
        state[name] = value.contiguous()
    half = len(state) // 2
    shards = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return model


def projector_state(seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (HIDDEN, WIDTH), "0.bias": (HIDDEN,), "2.weight": (HIDDEN, HIDDEN), "2.bias": (HIDDEN,)}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def make_llava(directory: Path, *, tower: Any = None, binary: bool = False) -> dict[str, Tensor]:
    """A full LLaVA-1.5 checkpoint, in one `.safetensors` or in two `.bin` shards. Returns its tensors."""
    make_language_model(directory)
    state = load_file(directory / "model.safetensors")
    state |= {f"model.mm_projector.{name}": value for name, value in projector_state().items()}
    if tower is not None:
        state |= {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in tower.state_dict().items()}
    config = json.loads((directory / "config.json").read_text())
    config |= {**MM_KEYS, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    if not binary:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return state
    (directory / "model.safetensors").unlink()
    # What old versions of transformers stored besides.
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    names = list(state)
    shards = [{n: state[n] for n in names[::2]} | extra, {n: state[n] for n in names[1::2]}]
    index = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(shard, directory / file)
        index |= dict.fromkeys(shard, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return state


def make_llava_lora(directory: Path, base: Path) -> dict[str, Tensor]:
    """LLaVA's LoRA layout as at the end of its training. Returns adapter and non-LoRA tensors together."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(9)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    adapter = load_file(directory / "adapter_model.safetensors")
    others = {f"base_model.model.model.mm_projector.{name}": value for name, value in projector_state().items()}
    torch.save(others, directory / "non_lora_trainables.bin")
    config = json.loads((base / "config.json").read_text())
    config |= {**MM_KEYS, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    return adapter | others

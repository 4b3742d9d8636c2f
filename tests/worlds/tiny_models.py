"""Random miniature models and data for tests: built in a second, no training, no network."""

import json
from pathlib import Path

import torch
import yaml
from PIL import Image

IMAGE_SIZE, PATCH_SIZE = 16, 8
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What color is this? ASSISTANT: It is red.",
    "Is it blue? yes no one two three four five six seven eight nine ten green circle square",
]


def make_tokenizer(directory: Path) -> None:
    """A Llama-like byte-fallback BPE tokenizer of 400 pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import LlamaTokenizer

    special = ["<unk>", "<s>", "</s>"]
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    trainer_model = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer_model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer_model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    trainer_model.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special + byte_pieces, show_progress=False)
    )
    trained = json.loads(trainer_model.to_str())["model"]
    tokenizer = LlamaTokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]], legacy=False)
    tokenizer.save_pretrained(directory)


def make_language_model(
    directory: Path, hidden_size: int = 32, layers: int = 2, seed: int = 0, ffn_size: int = 48
) -> None:
    """A random Llama with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=hidden_size,
        intermediate_size=ffn_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def make_vision_tower(directory: Path, seed: int = 0) -> None:
    """A random open_clip ViT: `config.json` and `model.safetensors` with the visual part."""
    import open_clip
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": 3,
            "width": 24,
            "head_width": 12,
            "patch_size": PATCH_SIZE,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**config)
    state = {f"visual.{key}": value.contiguous() for key, value in clip.visual.state_dict().items()}
    save_file(state, directory / "model.safetensors")


def make_data(directory: Path, name: str, samples: int, seed: int = 0, text_only_every: int = 0) -> Path:
    """A LLaVA JSON with plain-colour images, every `text_only_every`-th sample without one. Returns its path."""
    generator = torch.Generator().manual_seed(seed)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(samples):
        color = tuple(int(v) for v in torch.randint(0, 256, (3,), generator=generator))
        answer = "It is red." if color[0] > 127 else "It is blue, or green, or one of ten."
        record = {
            "id": f"{name}-{index}",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat color is this?"},
                {"from": "gpt", "value": answer},
            ],
        }
        if text_only_every and index % text_only_every == 0:
            record["conversations"][0]["value"] = "What color is this?"
        else:
            record["image"] = f"images/{name}-{index}.png"
            Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), color).save(directory / record["image"])
        records.append(record)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(records))
    return path


def make_world(directory: Path, samples: int = 24, text_only_every: int = 0) -> Path:
    """Models, two data sources and the configuration of a finetune run over them. Returns the configuration's path.

    Override with `--key value`; the run directory is `<directory>/run`.
    """
    make_language_model(directory / "language_model")
    make_vision_tower(directory / "vision_tower")
    sources = {}
    for seed, name in enumerate(("red", "blue")):
        path = make_data(directory / name, name, samples, seed, text_only_every)
        sources[name] = {"annotations": str(path), "image_folder": str(directory / name)}
    config = {
        "stage": "finetune",
        "device": "cpu",
        "model": {
            "language_model": str(directory / "language_model"),
            "vision_tower": {
                "name": str(directory / "vision_tower" / "config.json"),
                "weights": str(directory / "vision_tower" / "model.safetensors"),
            },
        },
        "adapter": {"method": "mole", "rank": 2, "num_experts": 2, "preset": "coupled"},
        "data": {"sources": sources, "mixture": {"red": 1, "blue": 1}, "max_length": 256},
        "train": {
            "output_dir": str(directory / "run"),
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-3,
            "warmup_steps": 2,
            "precision": "fp32",
            "num_workers": 0,
            "deepspeed_config": str(Path(__file__).parents[2] / "scripts" / "zero2.json"),
        },
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path

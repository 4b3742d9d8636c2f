"""Vision-language models of transformers as base: each cell of their table in docs/support-matrix.md is a test here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from llava_mole.mole import (
    MoleConfig,
    MoleMlp,
    RoutingMeter,
    balance_loss,
    collect_routing,
    mole_auxiliary_loss,
)
from llava_mole.mole.layer import AdaptedLayer

IMAGE, START, END = 30, 28, 29
TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MROPE = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16,
}  # fmt: skip
QWEN_VISION = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "intermediate_size": 24}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 31, "vision_start_token_id": START, "vision_end_token_id": END}


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Family:
    """A row of the table, and how a tiny model and its batch of two images are made."""

    projector: str
    """Its name for `modules_to_save`."""
    options: dict[str, Any]
    tokens: int
    """Image tokens of each image."""
    batch: Callable[[], dict[str, Tensor]]
    text: dict[str, Any] = field(default_factory=lambda: {**TEXT, "model_type": "llama"})


def qwen_batch() -> dict[str, Tensor]:
    """Two images of 4 x 4 patches of 4 x 4 pixels, each twice for the two frames; 2 x 2 patches make a token."""
    return {"pixel_values": pixels(2 * 16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}


FAMILIES = {
    "Llava": Family(
        "multi_modal_projector",
        {"vision_config": CLIP, "image_token_index": IMAGE, "image_seq_length": 4},
        4,
        lambda: {"pixel_values": pixels(2, 3, 16, 16)},
    ),
    "LlavaNext": Family(
        "multi_modal_projector",
        {"vision_config": CLIP, "image_token_index": IMAGE, "image_grid_pinpoints": [[16, 16]]},
        10,  # 4 of the whole image, 4 of its one tile, and an end of line for each of the tile's two rows
        lambda: {"pixel_values": pixels(2, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)},
    ),
    "InternVL": Family(
        "multi_modal_projector",
        {
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": [16, 16], "patch_size": [4, 4],
            },
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
        4,
        lambda: {"pixel_values": pixels(2, 3, 16, 16)},
        {**TEXT, "model_type": "qwen2"},
    ),
    "Qwen2VL": Family(
        "visual.merger",
        {"vision_config": {**QWEN_VISION, "embed_dim": 16, "mlp_ratio": 2}, **QWEN_IDS},
        4,
        qwen_batch,
        MROPE,
    ),
    "Qwen2_5_VL": Family(
        "visual.merger",
        {
            "vision_config": {**QWEN_VISION, "out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]},
            **QWEN_IDS,
        },
        4,
        qwen_batch,
        MROPE,
    ),
    "Qwen3VL": Family(
        "visual.merger",
        {
            "vision_config": {
                **QWEN_VISION, "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            },
            **QWEN_IDS,
        },
        4,
        qwen_batch,
        MROPE,
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", FAMILIES)


def make(name: str, **text: Any) -> Any:
    """A random tiny model of the family, the same one each time; `text` are options of its language model."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(text_config={**family.text, **text}, **family.options)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def make_batch(name: str) -> dict[str, Tensor]:
    """Two samples with an image each; the second is padded on the left."""
    family = FAMILIES[name]
    image = [START, *[IMAGE] * family.tokens, END]
    ids = torch.tensor([[1, 3, *image, 4, 5, 6, 7], [0, 0, *image, 1, 8, 9, 10]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), **family.batch()}
    if "image_grid_thw" in batch:
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    return batch


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


@EVERY
def test_experts_are_in_the_language_model_only(name: str) -> None:
    base, batch = make(name).eval(), make_batch(name)
    text = {"input_ids": torch.arange(1, 9).view(2, 4)}
    expected, expected_text = logits(base, batch), logits(base, text)
    model = get_peft_model(base, MoleConfig(r=2))
    adapted = [path for path, module in model.base_model.model.named_modules() if isinstance(module, AdaptedLayer)]
    assert len(adapted) == 2 * 5
    assert all(path.startswith("model.language_model.layers.") for path in adapted), adapted
    assert all(parameter.requires_grad == ("mole_" in key) for key, parameter in model.named_parameters())
    torch.testing.assert_close(logits(model.eval(), batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, text), expected_text, rtol=1e-5, atol=1e-5)
    assert [x.shape for x in collect_routing(model).logits] == [(2, 4, 3)] * 2, "a batch without images"


@EVERY
def test_image_and_text_tokens_are_told_apart(name: str, randomized: Callable[[nn.Module], nn.Module]) -> None:
    batch = make_batch(name)
    mask, losses = batch["attention_mask"].bool(), {}
    for which in ("all", "text", "stratified"):
        model: Any = randomized(get_peft_model(make(name), MoleConfig(r=2, balance_tokens=which))).eval()
        logits(model, batch)
        image = batch["input_ids"] == model.config.image_token_id
        assert image.sum() == 2 * FAMILIES[name].tokens
        losses[which] = mole_auxiliary_loss(model, token_mask=mask, image_mask=image)
    routing = collect_routing(model)
    assert [x.shape[:2] for x in routing.logits] == [batch["input_ids"].shape] * 2
    text, of_image = (0.01 * balance_loss(routing, m) for m in (mask & ~image, mask & image))
    torch.testing.assert_close(losses["text"], text)
    torch.testing.assert_close(losses["stratified"], (text + of_image) / 2)
    assert losses["all"] != losses["text"]
    meter = RoutingMeter()
    meter.update(routing, mask, image)
    assert meter.counts is not None
    assert meter.counts.sum(dim=(1, 3)).tolist() == [[int((mask & ~image).sum())] * 2, [int(image.sum())] * 2]


@EVERY
def test_it_trains_with_its_projector_saves_loads_and_generates(
    name: str, randomized: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    base, batch, projector = make(name).eval(), make_batch(name), FAMILIES[name].projector
    expected = logits(base, batch)
    config = MoleConfig.from_preset("coupled", r=2, balance_tokens="stratified", modules_to_save=[projector])
    model: Any = randomized(get_peft_model(base, config)).train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {key.split(".")[-1] for key in trained if f"{projector}.modules_to_save" in key} >= {"weight", "bias"}
    before = {key: p.detach().clone() for key, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    mask, image = batch["attention_mask"].bool(), batch["input_ids"] == model.config.image_token_id
    labels = batch["input_ids"].masked_fill(image | ~mask, -100)
    for _ in range(2):
        loss = model(**batch, labels=labels).loss
        (loss + mole_auxiliary_loss(model, token_mask=mask, image_mask=image)).backward()
        assert [key for key, p in trained.items() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
        optimizer.zero_grad()
    assert [key for key, p in trained.items() if torch.equal(p, before[key])] == []

    model.eval()
    adapted = logits(model, batch)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(make(name), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), adapted)
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = loaded.generate(**batch, **greedy)
    assert generated.shape[1] > batch["input_ids"].shape[1]
    assert torch.equal(generated, model.generate(**batch, **greedy))
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)


COLUMNS = {
    "experts in the language model only": test_experts_are_in_the_language_model_only,
    "image and text tokens told apart": test_image_and_text_tokens_are_told_apart,
    "trains with its projector, saves, loads, generates": test_it_trains_with_its_projector_saves_loads_and_generates,
}
"""The columns of the table, and the test behind each of their cells."""


def table() -> str:
    """The table of docs/support-matrix.md."""
    lines = [f"| base model | {' | '.join(COLUMNS)} | its projector |", "|---|" + "---|" * len(COLUMNS) + "---|"]
    lines += [
        f'| `{name}ForConditionalGeneration` |{" yes |" * len(COLUMNS)} `modules_to_save=["{family.projector}"]` |'
        for name, family in FAMILIES.items()
    ]
    return "\n".join(lines) + "\n"


def test_the_support_matrix_lists_what_is_tested_here() -> None:
    matrix = (Path(__file__).parents[2] / "docs" / "support-matrix.md").read_text(encoding="utf-8")
    assert table() in matrix, f"the table should be:\n{table()}"
    assert all(test.pytestmark == [EVERY.mark] for test in COLUMNS.values())  # type: ignore[attr-defined]


def test_named_modules_reach_the_tower_too() -> None:
    model = get_peft_model(make("Llava"), MoleConfig(r=2, attention_modules=["q_proj"], ffn_modules=["mlp"]))
    assert sum(isinstance(m, MoleMlp) for m in model.base_model.model.model.vision_tower.modules()) == 2


def test_a_model_of_many_layers_is_saved_and_loaded(
    randomized: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    """PEFT shortens long lists of names: those of the language model must not reach the tower, nor get lost."""
    batch = make_batch("Llava")
    model = randomized(get_peft_model(make("Llava", num_hidden_layers=6), MoleConfig(r=2))).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("Llava", num_hidden_layers=6), tmp_path).eval()
    assert sum(isinstance(m, AdaptedLayer) for m in loaded.modules()) == 6 * 5
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_layers_are_chosen_in_the_language_model() -> None:
    model = get_peft_model(make("Llava"), MoleConfig(r=2, layers_to_transform=[1]))
    adapted = [path for path, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    assert len(adapted) == 5
    assert all(".language_model.layers.1." in path for path in adapted)

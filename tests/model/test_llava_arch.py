"""The composed model: features land on their placeholders, gradients reach the projector, generation is exact."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from worlds.tiny_models import IMAGE_SIZE, NUM_IMAGE_TOKENS, make_language_model, make_vision_tower

from llava_mole.common.errors import DataError
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.model.language_model import load_language_model
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.multimodal_encoder import build_vision_tower
from llava_mole.model.multimodal_projector import build_projector
from llava_mole.model.packed_attention import enable_packing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlavaMole:
    directory: Path = tmp_path_factory.mktemp("model")
    make_language_model(directory / "lm")
    make_vision_tower(directory / "tower")
    tower = build_vision_tower(
        str(directory / "tower/config.json"), str(directory / "tower/model.safetensors"), "quick_gelu"
    )
    torch.manual_seed(3)
    language_model, _ = load_language_model(str(directory / "lm"))
    return LlavaMole(tower, build_projector("mlp2x_gelu", 24, 32), language_model).eval()


def ids(*parts: int | str) -> list[int]:
    """Token ids; "I" is an image."""
    return [i for part in parts for i in ([IMAGE_TOKEN_INDEX] * NUM_IMAGE_TOKENS if part == "I" else [part])]


def test_features_fill_the_placeholders_in_order(model: LlavaMole) -> None:
    input_ids = torch.tensor([ids(1, "I", 5, 6), ids(1, 7, "I", 8)])
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    out = model.embed(input_ids, images)
    features = model.encode_images(images)
    table = model.language_model.get_input_embeddings()
    p = NUM_IMAGE_TOKENS
    assert torch.equal(out[0, 1 : 1 + p], features[0])
    assert torch.equal(out[1, 2 : 2 + p], features[1])
    assert torch.equal(out[0, 1 + p :], table(torch.tensor([5, 6])))
    assert torch.equal(out[1, :2], table(torch.tensor([1, 7])))


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_counts_that_do_not_agree_are_an_error(model: LlavaMole, num_images: int) -> None:
    images = torch.zeros(num_images, 3, IMAGE_SIZE, IMAGE_SIZE) if num_images else None
    with pytest.raises(DataError, match="every <image> needs its own image"):
        model.embed(torch.tensor([ids(1, "I", 5), ids(1, "I", 5)]), images)


def test_losses_at_chosen_positions_equal_those_of_the_logits(model: LlavaMole) -> None:
    input_ids = torch.tensor([ids(1, "I", 5, 6), [9] * (NUM_IMAGE_TOKENS + 3)])
    attention = torch.ones_like(input_ids, dtype=torch.bool)
    attention[1, -2:] = False
    images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    mask = torch.zeros_like(attention)
    mask[0, -2:], mask[1, 1] = True, True
    targets = torch.tensor([6, 2, 9])
    with torch.no_grad():
        full = model(input_ids, attention, images)
        losses = model(input_ids, attention, images, loss_mask=mask, targets=targets)
    torch.testing.assert_close(losses, cross_entropy(full[mask], targets, reduction="none"))


def test_packed_rows_are_refused_unless_samples_are_kept_apart(model: LlavaMole) -> None:
    row = torch.tensor([[1, 5, 6, 1, 7]])
    mask = torch.ones_like(row, dtype=torch.bool)
    with pytest.raises(ValueError, match="the attention kernel 'sdpa' would let packed samples see each other"):
        model(row, mask, sample_lengths=[3, 2])
    with pytest.raises(ValueError, match="do not describe rows of shape"):
        model(row, mask, sample_lengths=[3, 3])


def test_a_packed_row_equals_its_samples_alone(model: LlavaMole) -> None:
    model = copy.deepcopy(model)
    first, second = ids(1, "I", 5, 6), ids(1, 9, "I", 7)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    row = torch.tensor([first + second])
    with torch.no_grad():
        alone = [
            model(torch.tensor([sample]), torch.ones(1, len(sample), dtype=torch.bool), image[None])
            for sample, image in zip((first, second), images, strict=True)
        ]
        enable_packing(model.causal_lm)
        packed = model(row, torch.ones_like(row, dtype=torch.bool), images, sample_lengths=[len(first), len(second)])
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_a_batch_without_images_gives_the_projector_zero_gradients(model: LlavaMole) -> None:
    model.train()
    model.zero_grad()
    text = torch.tensor([[1, 5, 6, 7]])
    model(text, torch.ones_like(text, dtype=torch.bool)).sum().backward()
    model.eval()
    for parameter in model.projector.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0


def test_an_image_gives_the_projector_gradients(model: LlavaMole) -> None:
    model.train()
    model.zero_grad()
    input_ids = torch.tensor([ids(1, "I", 5)])
    images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    model(input_ids, torch.ones_like(input_ids, dtype=torch.bool), images).logsumexp(-1).sum().backward()
    model.eval()
    assert all(torch.count_nonzero(p.grad) for p in model.projector.parameters())
    assert all(p.grad is None for p in model.language_model.parameters())


def test_padding_does_not_change_logits(model: LlavaMole) -> None:
    row = torch.tensor([ids(1, "I", 5, 6)])
    padded = torch.cat([row, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    attention = torch.ones_like(padded, dtype=torch.bool)
    attention[:, row.shape[1] :] = False
    images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        alone = model(row, torch.ones_like(row, dtype=torch.bool), images)
        together = model(padded, attention, images)[:, : row.shape[1]]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_left_padded_batch_generates_what_each_row_alone_and_the_uncached_path_do(model: LlavaMole) -> None:
    rows = [ids(1, "I", 5, 6), ids(1, 7, "I", 8, 9, 10, 11), [1, 12, 13]]
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    longest = max(map(len, rows))
    batch = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    attention = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(batch, attention, images, **settings)
    assert together.shape == (3, 8)
    for index, row in enumerate(rows):
        own = images[index : index + 1] if index < 2 else None
        alone = model.generate(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), own, **settings)
        assert torch.equal(alone[0], together[index])
        sequence = list(row)
        for _ in range(8):
            current = torch.tensor([sequence])
            with torch.no_grad():
                logits = model(current, torch.ones_like(current, dtype=torch.bool), own)
            sequence.append(int(logits[0, -1].argmax()))
        assert sequence[len(row) :] == together[index].tolist()


def test_right_padding_in_generate_is_an_error(model: LlavaMole) -> None:
    with pytest.raises(DataError, match="padded on the left"):
        model.generate(torch.tensor([[1, 5, 0]]), torch.tensor([[True, True, False]]))

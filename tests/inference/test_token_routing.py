"""The routing of a prompt and its answer is what the routers decide, for every patch and every token."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from worlds.eval_models import make_checkpoint

from llava_mole.common.errors import ConfigError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Turn, render
from llava_mole.inference.batching import place_images
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.token_routing import TokenRouting, route_answer
from llava_mole.mole import force_expert
from llava_mole.mole.router import Router

PHOTO, OTHER = Image.new("RGB", (40, 30), (200, 30, 60)), Image.linear_gradient("L").convert("RGB")
TURNS = [Turn("user", "<image>\nWhat?"), Turn("assistant", "red"), Turn("user", "And <image> this?")]


@pytest.fixture(scope="module")
def options_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"top_k": 2, "temperature": 0.5}
    return make_checkpoint(
        tmp_path_factory.mktemp("options"), options=options, overrides=["--adapter.num_experts", "4"]
    )


def test_every_token_has_what_its_router_decides(predictor: Predictor) -> None:
    """Hooks read the logits of each router; expert and gate are worked out from them in float64."""
    seen: dict[str, torch.Tensor] = {}
    model = predictor.loaded.model.language_model
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.detach().double()}))
        for name, module in model.named_modules()
        if isinstance(module, Router)
    ]
    routing = route_answer(predictor, [PHOTO, OTHER], TURNS, "blue and green")
    for hook in hooks:
        hook.remove()
    assert len(hooks) == len(routing.layers) == len(routing.experts) > 1
    for layer, (name, own) in enumerate(zip(seen, routing.layers, strict=True)):
        assert name.startswith(own)
        (logits,) = seen[name]
        assert routing.experts[layer].tolist() == logits.argmax(dim=-1).tolist()
        torch.testing.assert_close(routing.probs[layer].double(), logits.softmax(dim=-1), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            routing.gates[layer].double(), logits.softmax(dim=-1).amax(dim=-1), atol=1e-6, rtol=0
        )


def test_tokens_are_patches_prompt_and_answer(predictor: Predictor) -> None:
    routing = route_answer(predictor, [PHOTO, OTHER], TURNS, "blue")
    count = predictor.loaded.model.num_image_tokens
    assert routing.num_images == 2
    first_view, second_view = routing.views()
    assert [routing.of_view(view).roles for view in (first_view, second_view)] == [("image",) * count] * 2
    text = render(predictor.template, place_images(TURNS, 2, 0), add_generation_prompt=True).text
    assert "".join(routing.part("prompt").pieces) == text.replace(DEFAULT_IMAGE_TOKEN, "")
    assert "".join(routing.part("answer").pieces) == "blue"
    parts = [routing.part(role) for role in ("image", "prompt", "answer")]
    assert sum(len(part.roles) for part in parts) == len(routing.roles)
    assert first_view.rows * first_view.columns == count
    second = [n for n, own in enumerate(routing.images.tolist()) if own == 1]
    assert second == list(range(second[0], second[0] + count))
    assert torch.equal(routing.of_view(second_view).experts, routing.experts[:, second])
    without = route_answer(predictor, None, "What?", "red")
    assert without.num_images == 0
    assert without.part("image").load(0) == [0.0] * without.num_experts


def test_load_and_the_vote_of_the_layers(predictor: Predictor) -> None:
    routing = route_answer(predictor, PHOTO, "What?", "red")
    chosen, layers = routing.experts.tolist(), len(routing.layers)
    for n, (expert, share) in enumerate(zip(routing.of_layer(None), routing.certainty(None), strict=True)):
        votes = [sum(layer[n] == k for layer in chosen) for k in range(routing.num_experts)]
        assert (expert, share) == (votes.index(max(votes)), pytest.approx(max(votes) / layers))
    assert routing.load(1) == pytest.approx([chosen[1].count(k) / len(chosen[1]) for k in range(routing.num_experts)])
    assert routing.load(None) == pytest.approx(torch.tensor([routing.load(n) for n in range(layers)]).mean(0).tolist())
    assert routing.certainty(1) == routing.gates[1].tolist()


def test_a_forced_expert_is_shown_with_the_routers_own_probabilities(predictor: Predictor) -> None:
    free = route_answer(predictor, PHOTO, "What?", "red")
    with force_expert(predictor.loaded.model.language_model, 1):
        forced = route_answer(predictor, PHOTO, "What?", "red")
    assert set(forced.experts.flatten().tolist()) == {1}
    first = forced.probs[0]  # the first router sees the same input
    assert torch.equal(first, free.probs[0])
    assert torch.equal(forced.gates[0], first[:, 1])


def test_several_experts_a_token(options_run: Path) -> None:
    routing = route_answer(Predictor.from_pretrained(options_run, device="cpu"), PHOTO, "What?", "red")
    assert routing.num_experts == 4
    assert torch.equal(routing.experts, routing.probs.argmax(dim=-1))
    torch.testing.assert_close(routing.probs.sum(dim=-1), torch.ones_like(routing.gates))


def test_patches_that_are_no_square_cannot_be_drawn(predictor: Predictor) -> None:
    routing = route_answer(predictor, PHOTO, "What?", "red")
    places = [n for n, own in enumerate(routing.images.tolist()) if own == 0][:3]
    broken: TokenRouting = routing._at(places)
    with pytest.raises(ConfigError, match="3 tokens, which are no grid of 2 x 2"):
        broken.views()

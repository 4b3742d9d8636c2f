"""Likelihoods of answers, against a plain forward pass of one prompt at a time and against greedy decoding."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.constants import IGNORE_INDEX
from llava_mole.conversation import Turn, place_image_first, render
from llava_mole.data.images import open_image
from llava_mole.data.tokenization import encode
from llava_mole.inference.predictor import Predictor

RED = Image.new("RGB", (20, 16), (250, 10, 10))
ANSWERS = ["red", "a dark blue circle", "yes", "It is green, I think."]


def by_hand(predictor: Predictor, image: Path | None, prompt: str, answer: str) -> tuple[list[float], bool]:
    """Log probabilities of the tokens of the answer with its end marker, from the training text of the conversation."""
    question = f"<image>\n{prompt}" if image else prompt
    turns = place_image_first([Turn("user", question), Turn("assistant", answer)])
    model, tokenizer = predictor.loaded.model, predictor.loaded.tokenizer
    encoded = encode(
        render(predictor.template, turns), tokenizer, num_image_tokens=model.num_image_tokens, max_length=None
    )
    ids, labels = torch.tensor([encoded.input_ids]), torch.tensor(encoded.labels)
    pixels = predictor.loaded.image_processor(open_image(image))[None] if image else None
    with torch.no_grad():
        logits = model(ids, torch.ones_like(ids, dtype=torch.bool), pixels)[0, :-1]
    wanted = labels[1:] != IGNORE_INDEX
    scores = logits.double().log_softmax(dim=-1)[wanted]
    return scores.gather(1, labels[1:][wanted][:, None])[:, 0].tolist(), bool(
        (scores.argmax(dim=-1) == labels[1:][wanted]).all()
    )


def asked_about(asked: Path) -> tuple[list[Path | None], list[str]]:
    images = [asked.parent / "images/0.png", None, asked.parent / "images/1.png", asked.parent / "images/0.png"]
    return images, [
        "What is it?",
        "Say something about colors, please.",
        "What color is this? Is it blue?",
        "What is it?",
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("with_end", [False, True])
def test_equals_a_plain_forward_pass(predictor: Predictor, asked: Path, batch_size: int, with_end: bool) -> None:
    images, prompts = asked_about(asked)
    given = predictor.score(images, prompts, ANSWERS, with_end=with_end, batch_size=batch_size)
    for likelihood, image, prompt, answer in zip(given, images, prompts, ANSWERS, strict=True):
        tokens, greedy = by_hand(predictor, image, prompt, answer)
        tokens = tokens if with_end else tokens[:-1]  # vicuna's end marker is one token
        assert likelihood.tokens == len(tokens)
        assert likelihood.logprob == pytest.approx(sum(tokens), abs=1e-4)
        assert likelihood.logprob < -1
        if with_end:
            assert likelihood.is_greedy == greedy


def test_what_greedy_decoding_writes_is_greedy_and_the_likeliest(predictor: Predictor, asked: Path) -> None:
    images, prompts = asked_about(asked)
    written = predictor.generate(images, prompts, max_new_tokens=4)
    assert all(written)
    ours = predictor.score(images, prompts, written)
    other = predictor.score(images, prompts, ANSWERS)
    for prompt_ours, prompt_other, text in zip(ours, other, written, strict=True):
        ids, _ = predictor.loaded.tokenizer.encode_with_offsets(" " + text)
        # A random model may write pieces that the tokenizer would not choose for the same text.
        if prompt_ours.tokens == len(ids) == 4:
            assert prompt_ours.is_greedy
        assert not prompt_other.is_greedy


def test_conversations_and_two_images(predictor: Predictor, asked: Path) -> None:
    turns = [Turn("user", "<image>\n<image>\nSame?"), Turn("assistant", "no"), Turn("user", "Sure?")]
    pair = [asked.parent / "images/0.png", asked.parent / "images/1.png"]
    one, swapped = predictor.score([pair, pair[::-1]], [turns, turns], ["yes", "yes"])
    assert one.tokens == swapped.tokens
    assert one.logprob != swapped.logprob
    assert predictor.score([], [], []) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([None], ["a"], []), ConfigError, "0 continuations for 1 prompts"),
        (([], ["a"], ["b"]), ConfigError, "0 images for 1 prompts"),
        (([None], ["a"], [" "]), DataError, "prompt 0: its continuation is empty"),
        (([None], ["<image>\na"], ["b"]), DataError, "prompt 0: 1 <image> in the text, but no image given"),
        (([None, None], ["a", "a"], ["b", "b " * 4000]), DataError, "prompt 1: .* leave no room"),
        (([[RED, RED], RED], ["a", "a"], ["b", "b"], "plain"), DataError, "prompt 0: template 'plain' shows 1 of 2"),
    ],
)
def test_errors(predictor: Predictor, arguments, error: type[Exception], message: str) -> None:
    template = arguments[3] if len(arguments) > 3 else None
    with pytest.raises(error, match=message):
        Predictor(predictor.loaded, template=template).score(*arguments[:3])

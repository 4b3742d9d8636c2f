"""A batch, a single prompt, a stream and a loop without KV cache all give the same greedy answer."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from worlds.eval_models import colors, make_checkpoint
from worlds.tiny_models import NUM_IMAGE_TOKENS

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.conversation import Turn, get_template, place_image_first, render
from llava_mole.data.tokenization import encode
from llava_mole.inference.predictor import Predictor

RED, BLUE, GREEN = (Image.new("RGB", (16, 16), color) for color in colors())
IMAGES = [RED, None, BLUE, RED, GREEN, BLUE]
PROMPTS = [
    "Is it blue? yes or no? " * 4,
    "What?",
    "What color is this?",
    "What color is this?",
    "Is it red?",
    [Turn("user", "What color is this?"), Turn("assistant", "It is red."), Turn("user", "Is it blue?")],
]
NEW = 12


def one_by_one(predictor: Predictor, **options) -> list[str]:
    return [predictor.generate([i], [p], **options)[0] for i, p in zip(IMAGES, PROMPTS, strict=True)]


def test_batched_equals_single_in_the_callers_order(predictor: Predictor) -> None:
    single = one_by_one(predictor, max_new_tokens=NEW)
    assert len(set(single)) > 4  # the answers do depend on image and prompt
    for batch_size in (1, 2, 4, 16):
        assert predictor.generate(IMAGES, PROMPTS, max_new_tokens=NEW, batch_size=batch_size) == single


def test_cached_equals_recomputed(predictor: Predictor) -> None:
    model = predictor.loaded.model
    answers = predictor.generate(IMAGES, PROMPTS, max_new_tokens=NEW)
    for image, prompt, answer in zip(IMAGES, PROMPTS, answers, strict=True):
        (batch,) = predictor.batches([image], [prompt], batch_size=1)
        ids, new = batch.input_ids, []
        with torch.no_grad():
            for _ in range(NEW):
                inputs = model.embed(ids, image_index=batch.image_index, features=batch.features)
                logits = model.causal_lm(inputs_embeds=inputs, use_cache=False).logits
                new.append(int(logits[0, -1].argmax()))
                if new[-1] == predictor.loaded.tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
        assert answer == predictor.loaded.tokenizer.decode(new).strip()


def test_stream_joins_to_the_answer(predictor: Predictor) -> None:
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        pieces = list(predictor.stream(image, prompt, max_new_tokens=NEW))
        assert "".join(pieces) == predictor.generate([image], [prompt], max_new_tokens=NEW)[0]
        assert len(pieces) > 1


def test_closing_a_stream_ends_the_generation(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def is_done(self: object, ids: list[int]) -> bool:
        steps.append(len(ids))
        return False

    monkeypatch.setattr("llava_mole.inference.decoding.AnswerDecoder.is_done", is_done)
    stream = predictor.stream(RED, "What?", max_new_tokens=400)
    next(stream)
    stream.close()
    assert len(steps) < 390


def test_errors_of_the_generating_thread_reach_the_caller(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise DataError("broken inside")

    monkeypatch.setattr(predictor, "embed", broken)
    with pytest.raises(DataError, match="broken inside"):
        list(predictor.stream(RED, "What?"))


def test_prompt_is_the_training_prompt_padded_on_the_left(predictor: Predictor) -> None:
    turns = place_image_first([Turn("user", f"<image>\n{PROMPTS[2]}")])
    rendered = render(get_template("vicuna_v1"), turns, add_generation_prompt=True)
    expected = encode(rendered, predictor.loaded.tokenizer, num_image_tokens=NUM_IMAGE_TOKENS, max_length=None)
    (batch,) = predictor.batches([BLUE, RED], [PROMPTS[2], PROMPTS[0]], batch_size=2)
    assert batch.members == (0, 1)
    length = len(expected.input_ids)
    assert batch.input_ids[0, -length:].tolist() == expected.input_ids
    assert batch.input_ids[0].tolist().count(IMAGE_TOKEN_INDEX) == NUM_IMAGE_TOKENS
    assert batch.attention_mask[0].tolist() == [False] * (batch.input_ids.shape[1] - length) + [True] * length
    assert bool(batch.attention_mask[1].all())


def test_history_ends_every_answer_once(predictor: Predictor) -> None:
    eos = predictor.loaded.tokenizer.eos_token_id
    answer = "".join(predictor.stream(RED, "What?", max_new_tokens=NEW))
    turns = [Turn("user", "What?"), Turn("assistant", answer), Turn("user", "Is it blue?")]
    (batch,) = predictor.batches([RED], [turns], batch_size=1)
    assert batch.input_ids[0].tolist().count(eos) == 1


def test_each_distinct_image_is_encoded_once(predictor: Predictor, asked: Path) -> None:
    sizes: list[int] = []
    hook = predictor.loaded.model.vision_tower.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    path = asked.parent / "images" / "0.png"
    images = [RED, RED, BLUE, None, path, str(path), RED]
    try:
        predictor.generate(images, ["What?"] * len(images), max_new_tokens=2)
        assert sizes == [3]
        sizes.clear()
        predictor.generate(images, ["What?"] * len(images), max_new_tokens=2, batch_size=2)
        assert sum(sizes) == 3
        assert len(sizes) > 1  # when its first batch comes, not all at the start
    finally:
        hook.remove()


def test_a_prompt_may_show_several_images(predictor: Predictor) -> None:
    asked = [([RED, BLUE], "Is <image> like <image>?"), ([BLUE, RED, RED], "What?"), (GREEN, "What?"), (None, "What?")]
    images, prompts = zip(*asked, strict=True)
    model, tokenizer = predictor.loaded.model, predictor.loaded.tokenizer
    answers = predictor.generate(images, prompts, max_new_tokens=NEW)
    for (shown, prompt), answer in zip(asked, answers, strict=True):
        assert predictor.generate([shown], [prompt], max_new_tokens=NEW) == [answer]
        own = list(shown) if isinstance(shown, list) else [] if shown is None else [shown]
        text = prompt if "<image>" in prompt else "<image>\n" * len(own) + prompt
        rendered = render(get_template("vicuna_v1"), [Turn("user", text)], add_generation_prompt=True)
        ids = encode(rendered, tokenizer, num_image_tokens=NUM_IMAGE_TOKENS, max_length=None).input_ids
        assert ids.count(IMAGE_TOKEN_INDEX) == len(own) * NUM_IMAGE_TOKENS
        (batch,) = predictor.batches([shown], [prompt], batch_size=1)
        assert batch.input_ids[0].tolist() == ids
        pixels = torch.stack([predictor.loaded.image_processor(image) for image in own]) if own else None
        assert torch.allclose(predictor.embed(batch), model.embed(torch.tensor([ids]), pixels), atol=1e-6)


def test_greedy_ignores_the_language_models_own_sampling_values(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predictor.generate(IMAGES, PROMPTS, max_new_tokens=NEW)
    own = predictor.loaded.model.causal_lm.generation_config
    first = predictor.loaded.tokenizer.encode_with_offsets(expected[0])[0][0]
    bent = {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "repetition_penalty": 5.0, "min_p": 0.5}
    bent |= {"suppress_tokens": [first], "min_new_tokens": NEW, "no_repeat_ngram_size": 1, "max_length": 2}
    for key, value in (bent | {"return_dict_in_generate": True}).items():
        monkeypatch.setattr(own, key, value)
    assert predictor.generate(IMAGES, PROMPTS, max_new_tokens=NEW) == expected


def test_sampling_follows_temperature_and_seed(predictor: Predictor) -> None:
    def sample(seed: int, **options: float) -> list[str]:
        torch.manual_seed(seed)
        return predictor.generate(IMAGES, PROMPTS, max_new_tokens=NEW, **options)

    greedy = predictor.generate(IMAGES, PROMPTS, max_new_tokens=NEW)
    assert sample(1, temperature=1e-4) == greedy
    assert sample(1, temperature=5.0, top_p=1e-6) == greedy
    assert sample(1, temperature=5.0) == sample(1, temperature=5.0) != sample(2, temperature=5.0)


def test_sampled_answers_do_not_depend_on_the_batch(predictor: Predictor) -> None:
    options = {"max_new_tokens": NEW, "temperature": 2.0, "top_p": 0.95}
    seeds = list(range(len(PROMPTS)))
    single = [
        predictor.generate([i], [p], seeds=[s], **options)[0] for i, p, s in zip(IMAGES, PROMPTS, seeds, strict=True)
    ]
    assert predictor.generate(IMAGES, PROMPTS, seeds=seeds, **options) == single
    assert predictor.generate(IMAGES, PROMPTS, seeds=seeds[::-1], batch_size=2, **options) != single
    same = predictor.generate([RED] * 8, ["What?"] * 8, seeds=range(8), **options)
    assert len(set(same)) > 4


def test_beams_batched_equal_single(predictor: Predictor) -> None:
    batched = predictor.generate(IMAGES, PROMPTS, max_new_tokens=NEW, num_beams=3)
    assert batched == one_by_one(predictor, max_new_tokens=NEW, num_beams=3)
    assert batched != predictor.generate(IMAGES, PROMPTS, max_new_tokens=NEW)


def test_stop_texts_end_the_answer(predictor: Predictor) -> None:
    full = predictor.generate(IMAGES, PROMPTS, max_new_tokens=NEW)
    stops = [answer[len(answer) // 2 :][:2] for answer in full]
    for image, prompt, answer, stop in zip(IMAGES, PROMPTS, full, stops, strict=True):
        (stopped,) = predictor.generate([image], [prompt], max_new_tokens=NEW, stop=[stop])
        assert stopped == answer[: answer.index(stop)].strip()
        assert "".join(predictor.stream(image, prompt, max_new_tokens=NEW, stop=[stop])) == stopped
    assert predictor.generate(IMAGES, PROMPTS, max_new_tokens=NEW, stop=stops) == one_by_one(
        predictor, max_new_tokens=NEW, stop=stops
    )


def test_template_ends_the_answer(predictor: Predictor) -> None:
    plain = Predictor(predictor.loaded, template="plain")
    (batch,) = plain.batches([RED], ["What?"], batch_size=1)
    assert batch.input_ids.shape[1] < 20  # no system text
    assert all("\n" not in answer for answer in plain.generate([RED, BLUE], ["What?", "Is it?"], max_new_tokens=60))


def test_answers_end_where_the_context_does(predictor: Predictor) -> None:
    context = predictor.loaded.context_length
    word = "one "
    (batch,) = predictor.batches([None], [word * 100], batch_size=1)
    (longer,) = predictor.batches([None], [word * 101], batch_size=1)
    per_word = longer.input_ids.shape[1] - batch.input_ids.shape[1]
    words = 100 + (context - 3 - batch.input_ids.shape[1]) // per_word
    (full,) = predictor.batches([None], [word * words], batch_size=1)
    room = context - full.input_ids.shape[1]
    assert 0 < room < 10
    short, cut = predictor.generate([None, None], ["What?", word * words], max_new_tokens=40)
    assert short == predictor.generate([None], ["What?"], max_new_tokens=40)[0]
    assert cut == predictor.generate([None], [word * words], max_new_tokens=room)[0]
    with pytest.raises(DataError, match=rf"prompt 1: \d+ tokens .* model's context of {context}; shorten it"):
        predictor.generate([None, None], ["What?", word * (words + 10)])


@pytest.mark.parametrize(
    ("images", "prompts", "options", "error", "message"),
    [
        ([RED], ["a", "b"], {}, ConfigError, "1 images for 2 prompts; give one image"),
        ([RED], ["a"], {"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0; it must be at least 1"),
        ([RED], ["a"], {"temperature": -0.1}, ConfigError, "temperature is -0.1; it must be 0"),
        ([RED], ["a"], {"top_p": 1.5}, ConfigError, "top_p is 1.5; it must be above 0"),
        ([RED], ["a"], {"num_beams": 0}, ConfigError, "num_beams is 0"),
        ([RED], ["a"], {"batch_size": 0}, ConfigError, "batch_size is 0"),
        ([None], ["<image> a"], {}, DataError, "prompt 0: 1 <image> in the text, but no image given"),
        ([RED], ["<image> <image>"], {}, DataError, "prompt 0: 2 <image> in the text, but one image given"),
        ([[RED, BLUE]], ["<image> a"], {}, DataError, "prompt 0: 1 <image> in the text, but 2 images given"),
        ([[]], ["<image> a"], {}, DataError, "prompt 0: 1 <image> in the text, but no image given"),
        ([RED], [[]], {}, DataError, "prompt 0: a conversation to be answered must end with a user turn"),
        ([RED], [[Turn("assistant", "a")]], {}, DataError, "must end with a user turn"),
        (["no/such.png"], ["a"], {}, DataError, r"such\.png"),
    ],
)
def test_errors(predictor: Predictor, images, prompts, options, error, message) -> None:
    with pytest.raises(error, match=message):
        predictor.generate(images, prompts, **options)


def test_unknown_template_is_refused_before_loading() -> None:
    with pytest.raises(ConfigError, match="template 'nope' does not exist"):
        Predictor.from_pretrained("no/such/run", template="nope")


def test_the_tokenizers_own_template_comes_back_with_the_checkpoint(tmp_path: Path) -> None:
    own = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    run = make_checkpoint(tmp_path, chat_template=own)
    (tmp_path / "language_model" / "chat_template.jinja").unlink()  # what counts is the checkpoint's tokenizer
    predictor = Predictor.from_pretrained(run, device="cpu")
    (batch,) = predictor.batches([None], ["What?"], batch_size=1)
    assert predictor.loaded.tokenizer.hf.decode(batch.input_ids[0].tolist()).endswith("user: What?</s>assistant: ")
    assert predictor.template.stop == "</s>"
    assert len(predictor.generate([RED], ["What?"], max_new_tokens=3)) == 1
    with pytest.raises(ConfigError, match="the language model's tokenizer has no chat template"):
        Predictor.from_pretrained(make_checkpoint(tmp_path / "other"), device="cpu", template="tokenizer")


def test_nothing_to_answer(predictor: Predictor) -> None:
    assert predictor.generate([], []) == []


@pytest.mark.parametrize("tokens", ["prompt", "image"])
@pytest.mark.parametrize("beams", [1, 2])
def test_padding_does_not_change_routing_by_sequence(tmp_path: Path, beams: int, tokens: str) -> None:
    run = make_checkpoint(tmp_path, "mole", options={"granularity": "sequence", "sequence_tokens": tokens})
    by_sequence = Predictor.from_pretrained(run, device="cpu")
    single = one_by_one(by_sequence, max_new_tokens=NEW, num_beams=beams)
    assert by_sequence.generate(IMAGES, PROMPTS, max_new_tokens=NEW, num_beams=beams) == single

"""`Predictor` takes what people pass, and refuses everything else in one line that says what is allowed."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from worlds.eval_models import colors

from llava_mole.common.errors import ConfigError, PromptError, UserError
from llava_mole.conversation import Turn
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import Predictor

RED = Image.new("RGB", (20, 16), colors()[0])
QUESTION = "What color is this?"
NEW = {"max_new_tokens": 4}


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def red_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "red.png"
    RED.save(path)
    return path


@pytest.fixture(scope="module")
def answer(predictor: Predictor) -> str:
    return predictor.generate([RED], [QUESTION], **NEW)[0]


FORMS = {
    "path": lambda path: path,
    "text": str,
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "BytesIO, read to its end": lambda path: (lambda f: (f.read(), f)[1])(io.BytesIO(path.read_bytes())),
    "open file": lambda path: path.open("rb"),
    "lazy Pillow": Image.open,
    "array": lambda path: np.asarray(RED),
    "array with alpha": lambda path: np.asarray(RED.convert("RGBA")),
    "read-only array from the end": lambda path: np.asarray(RED)[::-1],
}


@pytest.mark.parametrize("form", FORMS)
def test_images_may_be_given_in_many_forms(predictor: Predictor, red_file: Path, answer: str, form: str) -> None:
    image = FORMS[form](red_file)
    assert predictor.generate([image], [QUESTION], **NEW) == [answer]
    assert predictor.generate(image, QUESTION, **NEW) == answer
    assert predictor.generate([[image]], [QUESTION], **NEW) == [answer]
    assert "".join(predictor.stream(image, QUESTION, **NEW)) == answer
    assert predictor.score(image, QUESTION, "red") == predictor.score([RED], [QUESTION], ["red"])


def test_grey_arrays_are_images(predictor: Predictor) -> None:
    grey = RED.convert("L")
    assert [predictor.generate(np.asarray(grey), QUESTION, **NEW)] == predictor.generate([grey], [QUESTION], **NEW)


def test_one_image_goes_with_every_prompt_and_one_prompt_with_all_images(predictor: Predictor, answer: str) -> None:
    assert predictor.generate(RED, [QUESTION] * 3, **NEW) == [answer] * 3
    both = predictor.generate([[RED, RED]], ["Do <image> and <image> differ?"], **NEW)
    assert predictor.generate([RED, RED], "Do <image> and <image> differ?", **NEW) == both[0]
    assert [predictor.generate(None, "Say hello.", **NEW)] == predictor.generate([None], ["Say hello."], **NEW)
    assert predictor.generate(None, ["a", "b"], **NEW) == predictor.generate([None, None], ["a", "b"], **NEW)


CONVERSATIONS = {
    "messages": [("role", "content"), ("user", "assistant")],
    "LLaVA": [("from", "value"), ("human", "gpt")],
    "mixed": [("role", "value"), ("human", "assistant")],
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_turns_may_be_dicts(predictor: Predictor, form: str) -> None:
    texts = [QUESTION, "It is red.", "Is it blue?"]
    turns = [Turn(role, text) for role, text in zip(["user", "assistant", "user"], texts, strict=True)]
    (who, what), (user, model) = CONVERSATIONS[form]
    dicts = [{who: role, what: text} for role, text in zip([user, model, user], texts, strict=True)]
    expected = predictor.generate([RED], [turns], **NEW)
    for given in (dicts, tuple(dicts), [turns[0], *dicts[1:]]):
        assert predictor.generate([RED], [given], **NEW) == expected
        assert predictor.generate(RED, given, **NEW) == expected[0]
    parts = [{"type": "image"}, {"type": "text", "text": texts[0]}]
    assert predictor.generate(RED, [{"role": "user", "content": parts}, *dicts[1:]], **NEW) == expected[0]


def test_a_single_stop_text_is_one(predictor: Predictor) -> None:
    full = predictor.generate([RED], [QUESTION], max_new_tokens=12)[0]
    stop = full[3:7]
    stopped = predictor.generate([RED], [QUESTION], max_new_tokens=12, stop=stop)
    assert stopped == predictor.generate([RED], [QUESTION], max_new_tokens=12, stop=[stop])
    assert stopped == [full[: full.index(stop)].strip()]
    assert "".join(predictor.stream(RED, QUESTION, max_new_tokens=12, stop=stop)) == stopped[0]


def test_seeds_of_other_libraries_are_whole_numbers(predictor: Predictor) -> None:
    options = {"temperature": 2.0, **NEW}
    expected = predictor.generate([RED] * 2, [QUESTION] * 2, seeds=[3, 4], **options)
    for seeds in (np.array([3, 4]), torch.tensor([3, 4]), (3, 4), range(3, 5)):
        assert predictor.generate([RED] * 2, [QUESTION] * 2, seeds=seeds, **options) == expected


class Silent:
    def read(self, *_: int) -> bytes:
        return b""


TRUNCATED = Image.open(io.BytesIO(encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:900]))
CLOSED = Image.new("RGB", (4, 4))
CLOSED.close()
BAD_IMAGES = [
    (TRUNCATED, "prompt 1: image 'given as JpegImageFile' cannot be decoded: image file is truncated"),
    (CLOSED, "prompt 1: image 'given as Image' cannot be decoded: Operation on closed image"),
    (b"", "prompt 1: image 'given as bytes' cannot be decoded: it has none of the formats JPEG, PNG"),
    (b"GIF89a", "prompt 1: image 'given as bytes' cannot be decoded"),
    (encoded(RED)[:60], "prompt 1: image 'given as bytes' cannot be decoded"),
    (Silent(), "prompt 1: image 'given as Silent' cannot be decoded"),
    ("no/such.png", "prompt 1: image 'no/such.png' does not exist"),
    ("", "prompt 1: image '' "),
    ("a\0b", "prompt 1: image "),
    (".", r"prompt 1: image '\.' cannot be decoded: .*directory"),
    (Image.new("RGB", (0, 5)), "prompt 1: its image has no pixels: its size is 0 x 5"),
    (Image.new("L", (5, 0)), "prompt 1: its image has no pixels: its size is 5 x 0"),
    (np.zeros((0, 5, 3), np.uint8), "prompt 1: its image has no pixels: its size is 0 x 5 x 3"),
    (np.zeros((5, 5, 3)), r"prompt 1: an array float64 \[5, 5, 3\] was given as an image; it must be uint8"),
    (np.zeros((3, 8, 8), np.uint8), r"prompt 1: an array uint8 \[3, 8, 8\] was given"),
    (np.zeros((1, 8, 8, 3), np.uint8), r"prompt 1: an array uint8 \[1, 8, 8, 3\] was given"),
    (np.array("x.png"), r"prompt 1: an array <U5 \[\] was given"),
    (torch.zeros(3, 8, 8), "prompt 1: an object of type Tensor was given as an image; allowed are a path"),
    (7, "prompt 1: 7 was given as an image"),
    ({"path": "x"}, "prompt 1: {'path': 'x'} was given as an image"),
    ([RED, None], "prompt 1: None was given as an image"),
    ([[RED]], "prompt 1: .* was given as an image"),
]


@pytest.mark.parametrize(("image", "message"), BAD_IMAGES)
def test_unusable_images_are_refused(predictor: Predictor, image: Any, message: str) -> None:
    prompt = "<image> <image>" if isinstance(image, list) and len(image) == 2 else QUESTION
    for call in (predictor.generate, lambda *a: predictor.score(*a, ["x", "y"])):
        with pytest.raises(PromptError, match=message):
            call([None, image], ["Hello.", prompt])


WRONG_ARGUMENTS = [
    ({"prompts": None}, "prompts is None; give a text"),
    ({"prompts": 3}, "prompts is 3; give a text"),
    ({"prompts": b"What?"}, "prompts is b'What.'; give a text"),
    ({"prompts": {"role": "user", "content": "a"}}, "prompts is {'role'"),
    ({"prompts": [None]}, "prompt 0: None was given; a prompt is a text or a list of turns"),
    ({"prompts": [b"What?"]}, "prompt 0: b'What.' was given"),
    ({"prompts": [[["user", "What?"]]]}, r"prompt 0: \['user', 'What.'\] was given as a turn"),
    ({"prompts": [{"role": "user"}]}, "prompt 0: {'role': 'user'} was given as a turn; a turn is {'role'"),
    ({"prompts": [{"role": "system", "content": "x"}]}, "prompt 0: a turn has the role 'system'; allowed are user"),
    ({"prompts": [Turn("USER", "x")]}, "prompt 0: a turn has the role 'USER'"),  # type: ignore[arg-type]
    ({"prompts": [Turn("user", None)]}, "prompt 0: .*None.* was given as a turn"),  # type: ignore[arg-type]
    (
        {"prompts": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
        "prompt 0: {'type': 'image_url', .* was given as a part of a turn; allowed are",
    ),
    ({"images": 5}, "images is 5; give a list with one image"),
    ({"images": [RED, RED]}, "2 images for 1 prompts; give one image"),
    ({"images": {"a.png"}}, "images is .*; give a list"),
    ({"stop": 5}, "stop is 5; give a text or a list of texts"),
    ({"stop": ["a", 5]}, r"stop is \['a', 5\]; give"),
    ({"stop": b"a"}, "stop is b'a'; give"),
    ({"seeds": [1, 2]}, "2 seeds for 1 prompts; give one whole number"),
    ({"seeds": []}, "0 seeds for 1 prompts"),
    ({"seeds": 1}, "seeds is 1; give a list with one whole number for every prompt"),
    ({"seeds": ["1"]}, r"seeds is \['1'\]; give"),
    ({"seeds": [0.5]}, r"seeds is \[0.5\]; give"),
    ({"max_new_tokens": "5"}, "max_new_tokens is '5'; it must be a whole number"),
    ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be a whole number"),
    ({"max_new_tokens": None}, "max_new_tokens is None"),
    ({"num_beams": True}, "num_beams is True; it must be a whole number"),
    ({"temperature": "0.2"}, "temperature is '0.2'; it must be a number"),
    ({"temperature": None}, "temperature is None"),
    ({"top_p": "1"}, "top_p is '1'; it must be a number"),
    ({"batch_size": "4"}, "batch_size is '4'; it must be a whole number"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_refused(predictor: Predictor, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        predictor.generate(**({"images": [RED], "prompts": [QUESTION], "max_new_tokens": 2} | change))


@pytest.mark.parametrize("continuations", [None, 3, [3], ["a", None], ["a", "b", "c"], []])
def test_wrong_continuations_are_refused(predictor: Predictor, continuations: Any) -> None:
    with pytest.raises(ConfigError, match="continuations"):
        predictor.score([RED, RED], [QUESTION] * 2, continuations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; allowed are auto, cpu, cuda"),
        ({"device": 0}, "device is '0'; allowed are"),
        ({"device": "cuda:99"}, r"device is 'cuda:99', but PyTorch finds \d+ GPUs? here; give another device, or cpu"),
        ({"device": "cuda:x"}, "device is 'cuda:x', but"),
        ({"dtype": "float8"}, "dtype is 'float8'; allowed are float32, bfloat16"),
        ({"dtype": torch.float32}, "dtype is torch.float32; allowed"),
        ({"quantization": "2bit"}, "quantization is '2bit'; allowed are None, none, 8bit, 4bit"),
        ({"model_path": None}, "model_path is None; give the path"),
    ],
)
def test_a_place_that_does_not_exist_is_refused_before_loading(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Predictor.from_pretrained(**({"model_path": "no/such/run"} | change))


def test_whatever_is_passed_raises_only_our_errors(predictor: Predictor) -> None:
    junk = [
        None,
        0,
        -1,
        2.5,
        True,
        "",
        "x",
        b"x",
        [],
        [None],
        ["x"],
        [1],
        {},
        {"a": 1},
        object(),
        RED,
        [RED],
        (),
        np.zeros(3),
    ]
    junk += [[{"role": "user", "content": "hi"}], [[Turn("user", "hi")]], torch.zeros(2), float("nan"), range(3)]
    given, refused = 0, 0
    for images, prompts in itertools.product(junk, junk):
        try:
            list(predictor.batches(images, prompts, batch_size=2))
            given += 1
        except UserError:
            refused += 1
    assert (given + refused, given > 30) == (len(junk) ** 2, True)
    for name, value in itertools.product(("max_new_tokens", "temperature", "top_p", "num_beams"), junk):
        try:
            Decoding(**{name: value})
        except UserError:
            refused += 1
    for name, value in itertools.product(("stop", "seeds", "batch_size"), junk):
        try:
            predictor.generate([None], ["Hi."], max_new_tokens=1, **{name: value})
        except UserError:
            refused += 1
    assert refused > 400

"""NaN or infinity in a model is one error that names the prompt and the module where it begins, never an answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from worlds.eval_models import colors

from llava_mole import cli
from llava_mole.common.errors import DataError, PromptError
from llava_mole.eval import model_vqa
from llava_mole.eval.questions import read_questions
from llava_mole.eval.routing_stats import collect_routing_stats
from llava_mole.inference import finite
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import Predictor
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole import disable_finite_check

RED, BLUE, _ = (Image.new("RGB", (16, 16), color) for color in colors())
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def fresh(mole_run: Path) -> Predictor:
    """A model of its own, to be damaged."""
    return Predictor.from_pretrained(mole_run, device="cpu")


def layer(model: LlavaMole, number: int) -> nn.Module:
    return model.causal_lm.get_decoder().layers[number]


def expert(model: LlavaMole, number: int) -> torch.Tensor:
    return next(
        p for name, p in layer(model, number).named_parameters() if "mole_experts" in name and name.endswith("_B")
    )


DAMAGE: dict[str, tuple[Callable[[LlavaMole], torch.Tensor], str]] = {
    "base": (
        lambda m: layer(m, 1).self_attn.o_proj.weight,
        r"layers\.1\.self_attn\.o_proj\.base_layer, whose weight holds",
    ),
    "norm": (
        lambda m: layer(m, 0).post_attention_layernorm.weight,
        r"layers\.0\.post_attention_layernorm, whose weight",
    ),
    "last norm": (lambda m: m.causal_lm.get_decoder().norm.weight, r"model\.norm, whose weight holds NaN or infinity"),
    "router": (
        lambda m: layer(m, 0).mlp.mole_router["default"].weight,
        r"layers\.0\.mlp\.mole_router\.default, whose weight",
    ),
    "experts": (lambda m: expert(m, 1), r"layers\.1\.mlp, whose mole_experts\.default\.\w+_B holds NaN"),
    "head": (lambda m: m.causal_lm.lm_head.weight, r"lm_head, whose weight holds NaN"),
    "embedding": (lambda m: m.causal_lm.get_input_embeddings().weight, r"embed_tokens, whose weight holds NaN"),
}
WITH_IMAGES = {
    "tower": (lambda m: next(m.vision_tower.parameters()), r"vision_tower\S*, whose \S+ holds NaN or infinity"),
    "projector": (lambda m: m.projector[0].weight, r"projector\.0, whose weight holds NaN"),
}


def ways(predictor: Predictor, images: list, prompts: list[str]) -> dict[str, Callable[[], Any]]:
    """Everything that computes with a model."""
    options: dict[str, Any] = {"max_new_tokens": 4}
    return {
        "greedy": lambda: predictor.generate(images, prompts, **options),
        "sampled": lambda: predictor.generate(images, prompts, temperature=0.8, top_p=0.9, **options),
        "beams": lambda: predictor.generate(images, prompts, num_beams=2, **options),
        "sampled beams": lambda: predictor.generate(images, prompts, num_beams=2, temperature=0.5, **options),
        "stream": lambda: list(predictor.stream(images[0], prompts[0], **options)),
        "score": lambda: predictor.score(images, prompts, ["red"] * len(prompts)),
    }


@pytest.fixture(params=[True, False], ids=["at once", "once per batch"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU flags are read once per batch, and MoLE's routers do not check."""
    if not request.param:
        monkeypatch.setattr(finite, "_reads_every_step", lambda device: False)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", [*DAMAGE, *WITH_IMAGES])
def test_the_module_is_named(fresh: Predictor, name: str, value: float, request: pytest.FixtureRequest) -> None:
    if "once per batch" in request.node.name:
        disable_finite_check(fresh.loaded.model.language_model)
    parameter, message = (DAMAGE | WITH_IMAGES)[name]
    images, prompts = [RED, BLUE], ["What color is this?", "Is it blue or green?"]
    expected = {way: call() for way, call in ways(fresh, images, prompts).items()}
    with torch.no_grad():
        parameter(fresh.loaded.model).fill_(value)
    for way, call in ways(fresh, images, prompts).items():
        with pytest.raises(PromptError, match=rf"^prompt [01]: .* NaN or infinity for it, first in .*{message}"):
            pytest.fail(f"{way} gave {call()} and not {expected[way]}")


def test_a_fault_of_one_image_is_that_of_its_prompt(fresh: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = LlavaMole.encode_images

    def overflow(self: LlavaMole, images: torch.Tensor, grids: torch.Tensor | None = None) -> torch.Tensor:
        features = encode(self, images, grids)
        features[images.float().mean(dim=(2, 3))[:, 2] > 200] = NAN  # blue ones
        return features

    monkeypatch.setattr(LlavaMole, "encode_images", overflow)
    disable_finite_check(fresh.loaded.model.language_model)
    prompts = ["What?", "What?", "What color is this?"]
    assert len(fresh.generate([RED, None, RED], prompts, max_new_tokens=2)) == 3
    for way, call in ways(fresh, [RED, None, BLUE], prompts).items():
        if way != "stream":
            with pytest.raises(
                PromptError, match=r"^prompt 2: the model computes NaN .*, whose parameters are finite; with"
            ):
                call()


def test_a_fault_that_begins_with_a_generated_token(fresh: Predictor) -> None:
    (batch,) = fresh.batches([RED], ["What color is this?"], batch_size=1)
    (ids,) = fresh._decode(batch, Decoding(max_new_tokens=12), fresh.answer_decoder(None), [0])
    token = next(token for token in ids if token not in batch.input_ids)
    with torch.no_grad():
        fresh.loaded.model.causal_lm.get_input_embeddings().weight[token] = NAN
    pieces = []
    with pytest.raises(PromptError, match="prompt 0: .*embed_tokens, whose weight holds NaN"):
        pieces += list(fresh.stream(RED, "What color is this?", max_new_tokens=12))
    with pytest.raises(PromptError, match="prompt 1: .*embed_tokens, whose weight holds NaN"):
        fresh.generate([None, RED], ["What?", "What color is this?"], max_new_tokens=12)


def test_a_fault_that_does_not_come_back_is_one_too(fresh: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_first_module", lambda *args: None)
    with torch.no_grad():
        fresh.loaded.model.causal_lm.lm_head.weight.fill_(NAN)
    with pytest.raises(PromptError, match="prompt 0: the model computed NaN or infinity for it, but not again"):
        fresh.generate([None], ["What?"])


@pytest.fixture
def damaged(fresh: Predictor, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """Commands take this model."""
    with torch.no_grad():
        layer(fresh.loaded.model, 1).mlp.mole_router["default"].weight.fill_(NAN)
    for module in ("eval.model_vqa", "eval.evaluate", "serve.cli"):
        monkeypatch.setattr(f"llava_mole.{module}.load_predictor", lambda path, args: fresh)
    return fresh


def test_counting_the_routing_names_the_question(damaged: Predictor, asked: Path) -> None:
    with pytest.raises(
        DataError, match=r"q\.jsonl:\d+: the model computes NaN or infinity for it, first in .*mole_router"
    ):
        collect_routing_stats(damaged, read_questions([str(asked)]), asked.parent)


def test_commands_end_with_one_line(
    damaged: Predictor, mole_run: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [f"--image-folder={asked.parent}", f"--answers-file={tmp_path / 'a.jsonl'}"]
    commands = [
        (model_vqa.main, [f"--model-path={mole_run}", f"--question-file={asked}", *own]),
        (cli.main, ["eval", str(mole_run), f"--questions={asked}", *own]),
        (cli.main, ["chat", f"--model-path={mole_run}", f"--image-file={asked.parent}/images/0.png", "--prompt=What?"]),
    ]
    for main, arguments in commands:
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("llava-mole: error: ")
        assert "the model computes NaN or infinity for it, first in language_model" in error
        assert ("q.jsonl:" in error) is (arguments[0] != "chat")
    assert not (tmp_path / "a.jsonl").exists()

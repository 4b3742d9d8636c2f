"""The lmms-eval adapter's logic, without lmms-eval: its base class is replaced by what the adapter uses of it.

`scripts/test_lmms_eval.sh` runs the real one.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.inference.predictor import Predictor

NAME = "llava_mole.eval.lmms_eval.plugin"


class FakeBase:
    """The part of `lmms_eval.api.model.lmms` that subclasses rely on."""

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cached: list[tuple] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.cached.append(entry))

    @property
    def rank(self) -> int:
        return self._rank


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    modules = {name: ModuleType(name) for name in names}
    modules["lmms_eval.api.model"].lmms = FakeBase  # type: ignore[attr-defined]
    modules["lmms_eval.models.registry_v2"].ModelManifest = SimpleNamespace  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module(NAME)
    del sys.modules[NAME]


@pytest.fixture
def model(plugin: Any, predictor: Predictor, mole_run: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Predictor, "from_pretrained", lambda path, **options: Predictor(predictor.loaded))
    model = plugin.LlavaMoleModel(pretrained=str(mole_run), batch_size="2", device="cpu")
    colors = [(250, 10, 10), (10, 10, 250), (10, 250, 10), (10, 10, 250)]
    documents = [
        {"image": Image.new("RGB", (24, 16), color), "target": f"answer {n}"} for n, color in enumerate(colors)
    ]
    model.task_dict["colors"] = {"test": documents}
    return model


def image_of(document: dict) -> list[Image.Image]:
    return [document["image"]]


def request(second: Any, doc_id: int, context: str = "What is it?", visual: Any = image_of) -> SimpleNamespace:
    return SimpleNamespace(args=(context, second, visual, doc_id, "colors", "test"))


def test_manifest_names_the_class(plugin: Any) -> None:
    manifest = plugin.manifest()
    assert manifest.model_id == "llava_mole"
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is plugin.LlavaMoleModel
    assert plugin.LlavaMoleModel.is_simple


def test_answers_are_the_predictors_in_the_order_of_the_requests(model: Any, predictor: Predictor) -> None:
    short, long = {"max_new_tokens": 3, "until": ["\n"]}, {"max_new_tokens": 6, "temperature": 0, "do_sample": False}
    requests = [
        request(long, 0),
        request(short, 1, "What color is this, please?"),
        request(long, 2, "Hm?", lambda document: None),
        request(short, 3),
        request(long, 1, "Same? <image>\n<image>", lambda document: [document["image"]] * 2),
    ]
    answers = model.generate_until(requests)
    images = [document["image"] for document in model.task_dict["colors"]["test"]]
    expected = [
        *predictor.generate([images[0]], ["What is it?"], max_new_tokens=6),
        *predictor.generate([images[1]], ["What color is this, please?"], max_new_tokens=3, stop=["\n"]),
        *predictor.generate([None], ["Hm?"], max_new_tokens=6),
        *predictor.generate([images[3]], ["What is it?"], max_new_tokens=3, stop=["\n"]),
        *predictor.generate([[images[1], images[1]]], ["Same? <image>\n<image>"], max_new_tokens=6),
    ]
    assert answers == expected
    assert len(set(answers)) > 2
    assert {entry[2] for entry in model.cached} == set(answers)


def test_errors_name_the_document(model: Any) -> None:
    requests = [request({}, 0), request({}, 2, "one " * 5000)]
    with pytest.raises(DataError, match=r"^task colors, split test, document 2: \d+ tokens .* leave no room"):
        model.generate_until(requests)
    with pytest.raises(DataError, match=r"^task colors, split test, document 1: its continuation is empty"):
        model.loglikelihood([request("red", 0), request("", 1)])


def test_loglikelihood_takes_texts_and_functions_of_the_document(model: Any, predictor: Predictor) -> None:
    requests = [request("red", 0), request(lambda document: document["target"], 1), request("red", 2)]
    images = [document["image"] for document in model.task_dict["colors"]["test"]]
    expected = predictor.score(images[:3], ["What is it?"] * 3, ["red", "answer 1", "red"])
    for (logprob, greedy), likelihood in zip(model.loglikelihood(requests), expected, strict=True):
        assert logprob == pytest.approx(likelihood.logprob, abs=1e-4)
        assert greedy == likelihood.is_greedy


def test_generation_arguments(plugin: Any, caplog: pytest.LogCaptureFixture) -> None:
    greedy = {"max_new_tokens": 128, "temperature": 0.0, "top_p": None, "num_beams": 1}
    assert plugin.decoding_options({}) == (greedy, [])
    assert plugin.decoding_options({"until": None}) == (greedy, [])
    assert plugin.decoding_options({"until": "\n\n", "top_p": None, "num_beams": None}) == (greedy, ["\n\n"])
    assert plugin.decoding_options({"temperature": 0.7, "do_sample": False})[0]["temperature"] == 0
    sampled, stop = plugin.decoding_options({"temperature": 0.7, "top_p": 0.9, "until": ["a", ""], "num_beams": 2})
    assert (sampled["temperature"], sampled["top_p"], sampled["num_beams"], stop) == (0.7, 0.9, 2, ["a"])
    with pytest.raises(ConfigError, match="top_p is 2"):
        plugin.decoding_options({"top_p": 2})
    plugin.decoding_options({"repetition_penalty": 1.2, "top_k": 5})
    assert "ignored: repetition_penalty, top_k" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conv_template": "v1"}, "--model_args conv_template: unknown; allowed are pretrained"),
        ({"batch_size": "auto"}, "batch_size is 'auto'; it must be a number"),
        ({"batch_size": 0}, "batch_size is 0; it must be a number"),
    ],
)
def test_bad_model_arguments(plugin: Any, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plugin.LlavaMoleModel(pretrained="nowhere", **arguments)


def test_multi_round_tasks_are_refused(model: Any) -> None:
    with pytest.raises(NotImplementedError, match="multi-round"):
        model.generate_until_multi_round([])


def test_moved_parts_reach_the_loader(plugin: Any, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(path: str, **options: Any) -> Predictor:
        seen.update(options)
        return Predictor(predictor.loaded)

    monkeypatch.setattr(Predictor, "from_pretrained", spy)
    plugin.LlavaMoleModel(pretrained="run", model_base="language model", vision_tower="tower")
    assert (seen["model_base"], seen["vision_tower"]) == ("language model", "tower")

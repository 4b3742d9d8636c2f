"""The code of docs/frameworks.md runs: against this package, and against what VLMEvalKit's interface is."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from llava_mole.inference.predictor import Predictor

PAGE = Path(__file__).parents[3] / "docs" / "frameworks.md"
PYTHON = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def here(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the page's images; runs are the one that is loaded."""
    for name, color in (("chart", "red"), ("left", "green"), ("right", "blue")):
        Image.new("RGB", (24, 16), color).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Predictor, "from_pretrained", lambda path: Predictor(predictor.loaded))
    return tmp_path


def test_python_interface(here: Path) -> None:
    names: dict = {}
    exec(PYTHON[0], names)
    assert len(names["answers"]) == 3
    assert names["best"] is max(names["found"], key=lambda likelihood: likelihood.logprob)
    assert names["found"][0].logprob != names["found"][1].logprob


def test_vlmevalkit_adapter(here: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vlmeval", "vlmeval.config", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vlmeval.config"].supported_VLM = {}  # type: ignore[attr-defined]
    sys.modules["vlmeval.vlm.base"].BaseModel = type("BaseModel", (), {})  # type: ignore[attr-defined]
    names: dict = {}
    exec(PYTHON[1], names)
    model = names["supported_VLM"]["llava_mole"]()
    message = [{"type": "image", "value": str(here / "left.png")}, {"type": "text", "value": "What is it?"}]
    (expected,) = predictor.generate([here / "left.png"], ["What is it?"], max_new_tokens=128)
    assert model.generate_inner(message) == expected
    two = [
        message[0],
        {"type": "text", "value": "and"},
        {"type": "image", "value": str(here / "right.png")},
        message[1],
    ]
    pair = [here / "left.png", here / "right.png"]
    (expected,) = predictor.generate([pair], ["<image>\nand\n<image>\nWhat is it?"], max_new_tokens=128)
    assert model.generate_inner(two, dataset="MMStar") == expected
    (expected,) = predictor.generate([None], ["Hello"], max_new_tokens=128)
    assert model.generate_inner([{"type": "text", "value": "Hello"}]) == expected

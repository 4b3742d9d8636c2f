"""`llava-mole routing RUN --prompt ...` writes what the routers decide, as data and as a figure."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava_mole.inference.predictor import Predictor
from llava_mole.inference.token_routing import route_answer
from llava_mole.serve.overlay.cli import main
from llava_mole.serve.overlay.files import FAINTEST, STRONGEST, shown_images, spread, strength


def test_data_and_figure(mole_run: Path, predictor: Predictor, photo: str, tmp_path: Path, capsys) -> None:
    other = str(Path(photo).with_name("1.png"))
    command = [str(mole_run), "--image", photo, "--image", other, "--prompt", "What $is <b>?", "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), "--max-new-tokens", "6"]
    assert main(command) == 0
    data = json.loads((tmp_path / "out" / "routing_overlay.json").read_text())
    answer = predictor.generate([[photo, other]], ["What $is <b>?"], max_new_tokens=6)[0]
    routing = route_answer(predictor, [photo, other], "What $is <b>?", answer)
    assert data["answer"] == answer
    assert data["expert"] == routing.experts.tolist()
    assert data["gate"] == [pytest.approx(layer, abs=1e-6) for layer in routing.gates.tolist()]
    assert data["overall"]["expert"] == routing.of_layer(None)
    assert data["layers"] == list(routing.layers)
    assert [token["role"] for token in data["tokens"]] == list(routing.roles)
    patches = [(t["image"], t["row"], t["column"]) for t in data["tokens"] if t["role"] == "image"]
    assert patches == [(n, row, column) for n in (0, 1) for row in (0, 1) for column in (0, 1)]
    assert data["load"]["answer"]["by_layer"] == [routing.part("answer").load(n) for n in (0, 1)]
    with Image.open(tmp_path / "out" / "routing_overlay.png") as figure:
        assert min(figure.size) > 500
    assert f"answer: {answer}" in capsys.readouterr().out
    assert main(command) == 2
    assert "routing_overlay.json exists; give --overwrite" in capsys.readouterr().err
    forced = [*command, "--overwrite", "--expert", "1", "--answer", "red", "--layers", "1"]
    assert main(forced) == 0
    data = json.loads((tmp_path / "out" / "routing_overlay.json").read_text())
    assert {expert for layer in data["expert"] for expert in layer} == {1}
    assert (data["answer"], data["answer_is_given"], data["forced_expert"]) == ("red", True, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "a.png"], "--image needs --prompt TEXT"),
        (["--expert", "1"], "--expert needs --prompt TEXT"),
        (["--prompt", "x", "--data.sources.a.annotations", "b"], "--data.sources.a.annotations has no meaning"),
        (["--prompt", "x", "--image", "no/such.png"], "does not exist"),
        (["--prompt", "x", "--expert", "9"], "expert 9 cannot be forced"),
        (["--prompt", "x", "--answer", "y", "--layers", "5"], "--layers 5: the layers with experts are 0 to 1"),
        (["--prompt", "x", "--answer", " "], "its continuation is empty"),
    ],
)
def test_mistakes_write_nothing(options: list[str], message: str, mole_run: Path, tmp_path: Path, capsys) -> None:
    assert main([str(mole_run), "--device", "cpu", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_without_experts(chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(chat_run), "--device", "cpu", "--prompt", "x", "--answer", "y", "--out", str(tmp_path / "o")]) == 2
    assert "has no experts" in capsys.readouterr().err


def test_the_shown_image_is_the_models_square(predictor: Predictor) -> None:
    wide = Image.new("RGB", (400, 100), (250, 0, 0))
    (shown,) = shown_images(predictor.loaded.image_processor, wide)
    assert shown.size[0] == shown.size[1]
    assert shown.getpixel((10, shown.height // 2)) == (250, 0, 0)
    assert shown.getpixel((10, 5)) == tuple(int(255 * mean) for mean in predictor.loaded.image_processor.mean)


def test_strength_and_the_choice_of_layers() -> None:
    assert strength(1 / 4, 4) == FAINTEST
    assert strength(1.0, 4) == STRONGEST
    assert spread(5) == [0, 1, 2, 3, 4]
    assert spread(32) == [0, 4, 9, 13, 18, 22, 27, 31]

"""A question about two images that stand in the middle of its text: every entry gives the answer of a direct generate.

The turns of the direct one are those of the training record, and its pixels those of the tower's processor.
"""

import base64
import importlib
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from worlds import raw_sets
from worlds.eval_models import colors

from llava_mole import cli
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.conversation import Turn, render
from llava_mole.data.records import parse_record
from llava_mole.data.tokenization import encode
from llava_mole.eval import model_vqa
from llava_mole.eval.model_vqa import main as ask_files
from llava_mole.inference.batching import place_images
from llava_mole.inference.predictor import Predictor
from llava_mole.serve.api.cli import build, parse_arguments
from llava_mole.serve.cli import main as chat

NEW = 8
GREEDY = ["--temperature", "0", "--device", "cpu"]
Shown = tuple[str, tuple[int, ...]]
ASKED: dict[str, Shown] = {
    "in the middle": ("Is <image> like <image>?", (0, 1)),
    "the other way round": ("Is <image> like <image>?", (1, 0)),
    "one first, one last": ("<image>\nand what is this? <image>", (2, 1)),
    "without places": ("Which is red?", (0, 1)),
    "the same one twice": ("<image> and <image>: one picture?", (1, 1)),
    "three": ("<image>, <image> or <image>?", (2, 0, 1)),
    "one": ("What color is <image> this?", (1,)),
    "none": ("What is red?", ()),
}


def files(folder: Path, numbers: tuple[int, ...]) -> list[str]:
    return [str(folder / f"{n}.png") for n in numbers]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    for n, color in enumerate(colors()):
        Image.new("RGB", (24 + 8 * n, 16), color).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def direct(predictor: Predictor, shown: Path) -> dict[str, str]:
    """The answers of the model to the ids of training, one prompt at a time."""
    loaded, answers = predictor.loaded, {}
    for name, (text, numbers) in ASKED.items():
        marked = text if "<image>" in text else "<image>\n" * len(numbers) + text
        turns = [{"from": "human", "value": marked}, {"from": "gpt", "value": "red"}]
        images = {"image": files(shown, numbers)} if numbers else {}
        record, _ = parse_record({"id": name, **images, "conversations": turns}, "test", "here")
        prompt = render(predictor.template, record.turns[:1], add_generation_prompt=True)
        tokens = loaded.model.num_image_tokens
        ids = torch.tensor([encode(prompt, loaded.tokenizer, num_image_tokens=tokens, max_length=None).input_ids])
        assert ids.eq(IMAGE_TOKEN_INDEX).sum() == tokens * len(numbers)
        pixels = [loaded.image_processor.pixels(Image.open(file)) for file in record.images]
        new = loaded.model.generate(
            ids, torch.ones_like(ids, dtype=torch.bool), torch.stack(pixels) if pixels else None, max_new_tokens=NEW,
            do_sample=False, eos_token_id=list(predictor.eos_ids), pad_token_id=loaded.tokenizer.pad_token_id,
        )  # fmt: skip
        answers[name] = predictor.answer_decoder(None).final(new[0].tolist())
    assert len(set(answers.values())) >= 6, answers
    assert answers["in the middle"] != answers["the other way round"]
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_predictor(predictor: Predictor, direct: dict[str, str], shown: Path, batch_size: int) -> None:
    images = [files(shown, numbers) for _, numbers in ASKED.values()]
    prompts = [text for text, _ in ASKED.values()]
    found = predictor.generate(images, prompts, max_new_tokens=NEW, batch_size=batch_size)
    assert found == list(direct.values())
    for name, own, prompt in zip(ASKED, images, prompts, strict=True):
        assert "".join(predictor.stream(own, prompt, max_new_tokens=NEW)) == direct[name]


@pytest.fixture
def asked(shown: Path, tmp_path: Path) -> Path:
    """The questions as a file, their images under every allowed key."""
    lines = []
    for n, (text, numbers) in enumerate(ASKED.values()):
        names = [f"{number}.png" for number in numbers]
        images: dict[str, Any] = {("image", "images")[n % 2]: names}
        lines.append(json.dumps({"question_id": n, "text": text, "answer": "red", **images}) + "\n")
    path = tmp_path / "q.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("batch_size", ["1", "16"])
def test_question_files(
    mole_run: Path,
    predictor: Predictor,
    direct: dict[str, str],
    asked: Path,
    shown: Path,
    batch_size: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(model_vqa, "load_predictor", lambda path, args: predictor)
    monkeypatch.setattr("llava_mole.eval.evaluate.load_predictor", lambda path, args: predictor)
    common = ["--image-folder", str(shown), "--max_new_tokens", str(NEW), "--device", "cpu", "--batch-size", batch_size]
    answers = asked.parent / "a.jsonl"
    assert ask_files(
        ["--model-path", str(mole_run), "--question-file", str(asked), "--answers-file", str(answers), *common]
    ) == 0  # fmt: skip
    scored = asked.parent / "scored.jsonl"
    assert cli.main(["eval", str(mole_run), "--questions", str(asked), "--answers-file", str(scored), *common]) == 0
    for path in (answers, scored):
        assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == list(direct.values())
    (routed,) = json.loads((asked.parent / "scored.routing.json").read_text())["groups"].values()
    tokens = predictor.loaded.model.num_image_tokens
    assert routed["image"]["tokens"] == tokens * sum(len(numbers) for _, numbers in ASKED.values())

    capsys.readouterr()
    report = ["report", f"run={scored.with_suffix('.score.json')}", "--out", str(asked.parent / "report")]
    assert cli.main(report) == 0
    assert f"{shown / '0.png'}, {shown / '1.png'}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["model_vqa", "eval"])
def test_wrong_counts_are_found_before_the_model_is_loaded(
    command: str, shown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mole_run: Path
) -> None:
    path, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    good = {"question_id": 1, "text": "a", "answer": "a"}
    path.write_text(f"{json.dumps(good)}\n{json.dumps({**good, 'question_id': 2, 'text': 'Is <image> red?', 'images': ['0.png', '1.png']})}\n")  # fmt: skip # noqa: E501
    own = ["--image-folder", str(shown), "--answers-file", str(answers)]
    if command == "eval":
        code = cli.main(["eval", str(mole_run), "--questions", str(path), *own])
    else:
        code = ask_files(["--model-path", str(mole_run), "--question-file", str(path), *own])
    assert code == 2
    assert capsys.readouterr().err == f"llava-mole: error: {path}:2: 1 <image> in the text, but 2 images given\n"
    assert not list(tmp_path.glob("a.*"))


def test_the_chat(
    mole_run: Path,
    direct: dict[str, str],
    shown: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The images come with `/image` before each question; `\\n` cannot be typed."""
    names = [name for name, (text, _) in ASKED.items() if "\n" not in text]
    lines = []
    for name in names:
        text, numbers = ASKED[name]
        lines += ["/reset", *(f"/image {file}" for file in files(shown, numbers)), text]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert chat(["--model-path", str(mole_run), "--max-new-tokens", str(NEW), *GREEDY]) == 0
    assert re.findall("ASSISTANT: (.*)", capsys.readouterr().out) == [direct[name] for name in names]


def parts(text: str, urls: list[str]) -> list[dict[str, Any]]:
    """A message in OpenAI's form. Its parts become lines, as in training on chat messages."""
    lines = text.split("\n") if "<image>" in text else [*["<image>"] * len(urls), text]
    left = iter(urls)
    return [
        {"type": "image_url", "image_url": {"url": next(left)}} if line == "<image>" else {"type": "text", "text": line}
        for line in lines
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_the_server(predictor: Predictor, direct: dict[str, str], shown: Path, stream: bool) -> None:
    from fastapi.testclient import TestClient

    answers, expected = [], []
    with TestClient(build(parse_arguments(["run", *GREEDY]), {"run": predictor}, [])) as client:
        for name, (text, numbers) in ASKED.items():
            lines = re.sub(" ?<image> ?", "\n<image>\n", text).strip("\n").replace("\n\n", "\n")
            raw = [Path(file).read_bytes() for file in files(shown, numbers)]
            urls = [f"data:image/png;base64,{base64.b64encode(content).decode()}" for content in raw]
            message = {"role": "user", "content": parts(lines, urls)}
            body = {"model": "run", "messages": [message], "max_tokens": NEW, "stream": stream}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            pieces = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
            answers.append("".join(pieces) if stream else answer.json()["choices"][0]["message"]["content"])
            own = predictor.generate(files(shown, numbers), lines, max_new_tokens=NEW)
            expected.append(direct[name] if lines == text else own)
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
        message = {"role": "user", "content": [{"type": "text", "text": "<image>"}, image]}
        refused = client.post("/v1/chat/completions", json={"model": "run", "messages": [message]})
        assert refused.status_code == 400
        assert "2 <image> in the text, but one image given" in refused.json()["error"]["message"]
    assert answers == expected
    assert answers[list(ASKED).index("without places")] == direct["without places"]


def test_parts_are_the_lines_of_training(tmp_path: Path) -> None:
    """A message with images in the middle gives the prompt of the record that `prepare messages` makes of it."""
    for n in range(2):
        raw_sets.write_image(tmp_path / f"raw/{n}.jpg", n)
    pictures: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": f"{n}.jpg"}} for n in range(2)]
    texts = [{"type": "text", "text": text} for text in ("Is", "like", "?")]
    content = [texts[0], pictures[0], texts[1], pictures[1], texts[2]]
    answer = {"role": "assistant", "content": "no"}
    raw_sets.write_lines(tmp_path / "raw/a.jsonl", [{"messages": [{"role": "user", "content": content}, answer]}])
    (row,) = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out").rows
    asked = [{"type": "image"} if part in pictures else part for part in content]
    assert place_images([{"role": "user", "content": asked}], 2, 0) == [row.turns[0]]
    alone = [{"type": "image"} if part in pictures else part for part in content[:3]]
    assert place_images([{"role": "user", "content": alone}], 1, 0) == [Turn("user", "<image>\nIs\n\nlike")]


def test_lmms_eval(
    predictor: Predictor, direct: dict[str, str], shown: Path, mole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "llava_mole.eval.lmms_eval.plugin"
    for part in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    hook = SimpleNamespace(add_partial=lambda *entry: None)
    base = type("lmms", (), {"__init__": lambda self: None, "rank": 0, "cache_hook": hook, "task_dict": {}})
    sys.modules["lmms_eval.api.model"].lmms = base  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, name, raising=False)
    plugin = importlib.import_module(name)
    monkeypatch.setattr(Predictor, "from_pretrained", lambda path, **options: predictor)
    model = plugin.LlavaMoleModel(pretrained=str(mole_run), batch_size=4, device="cpu")
    model.task_dict["pairs"] = {"test": [numbers for _, numbers in ASKED.values()]}

    def visual(numbers: tuple[int, ...]) -> list[Image.Image]:
        return [Image.open(file) for file in files(shown, numbers)]

    options = {"max_new_tokens": NEW, "temperature": 0}
    requests = [
        SimpleNamespace(args=(text, options, visual, n, "pairs", "test")) for n, (text, _) in enumerate(ASKED.values())
    ]
    assert model.generate_until(requests) == list(direct.values())
    monkeypatch.delitem(sys.modules, name)

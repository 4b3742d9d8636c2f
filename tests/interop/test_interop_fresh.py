"""Exports answer in plain transformers, in a process of its own, as they do here, whatever the batch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from worlds.eval_models import make_checkpoint
from worlds.interop_tools import convert, load
from worlds.tiny_models import make_tokenizer

from llava_mole.data.tokenization import HFTextTokenizer, load_tokenizer
from llava_mole.inference.predictor import Predictor

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""Pads on the right unless its files say otherwise."""
KINDS: dict[str, dict[str, Any]] = {
    "right": {"tokenizer": {**FAST, "padding_side": "right"}},
    "fast": {"tokenizer": FAST},
    "padded": {"tokenizer": {**FAST, "pad_token": "</s>"}},
    "legacy": {"tokenizer": {"legacy": True, "padding_side": "right"}},
    "several-ends": {"tokenizer": FAST, "generation": {"eos_token_id": [2, *range(340, 370)]}},
    "mixture": {"method": "mole", "tokenizer": FAST},
}
QUESTIONS = ["Is it blue?", "two", "What color is this? one two three four five six", "ten", "Is it red? yes or no"]
COLORS = [(250, 10, 10), (10, 10, 250), (10, 250, 10)]
PROGRAM = """
import json, sys
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

assert not any(name.startswith("llava_mole") for name in sys.modules)
found = {}
for path in sys.argv[2:]:
    processor = AutoProcessor.from_pretrained(path)
    model = LlavaForConditionalGeneration.from_pretrained(path).eval()
    found[path] = {}
    for size in (1, 5, 16):
        answers = []
        asked = json.loads(sys.argv[1])
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            prompts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                    add_generation_prompt=True,
                )
                for _, text in part
            ]
            images = [Image.new("RGB", (24, 24), tuple(color)) for color, _ in part]
            inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            ends = model.generation_config.eos_token_id
            new = [[n for n in row if n not in ends] for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
            answers += processor.batch_decode(new, skip_special_tokens=True)
        found[path][size] = answers
print("ANSWERS" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], dict[str, list[str]]]]:
    """By kind: our answers, and those of the export by batch size."""
    asked = [(COLORS[n % 3], QUESTIONS[n % 5] + " Is it blue?" * (n % 4)) for n in range(16)]
    ours, paths = {}, {}
    for kind, options in KINDS.items():
        world = tmp_path_factory.mktemp(kind)
        run = make_checkpoint(world, **{"method": "lora", "std": 0.1, **options})
        merge = ("--expert", "0") if options.get("method") == "mole" else ()
        assert convert(run, "--to", "llava-hf", "--out", world / "hf", *merge) == 0
        paths[kind] = str(world / "hf")
        if not merge:
            predictor = Predictor(load(run))
            images = [Image.new("RGB", (24, 24), color) for color, _ in asked]
            ours[kind] = predictor.generate(images, [text for _, text in asked], max_new_tokens=12)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked), *paths.values()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.rpartition("ANSWERS")[2])
    return {kind: (ours.get(kind, []), found[path]) for kind, path in paths.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_answers_alike_in_every_batch_and_as_here(
    kind: str, answers: dict[str, tuple[list[str], dict[str, list[str]]]]
) -> None:
    ours, found = answers[kind]
    assert len(set(found["1"])) > 3, "the answers differ from question to question"
    assert found["5"] == found["1"]
    assert found["16"] == found["1"]
    if ours:
        assert [text.strip() for text in found["1"]] == ours


@pytest.mark.parametrize(
    "changes",
    [
        {"legacy": True},
        {"legacy": False},
        {"padding_side": "right"},
        {"truncation_side": "left"},
        {"add_prefix_space": False},
        {**FAST, "pad_token": "</s>"},
    ],
    ids=str,
)
def test_a_tokenizer_loads_back_as_it_was_saved(changes: dict[str, Any], tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    first = load_tokenizer(str(tmp_path))
    first.save_pretrained(tmp_path / "same")
    again = load_tokenizer(str(tmp_path / "same"))
    assert HFTextTokenizer(again).fingerprint == HFTextTokenizer(first).fingerprint
    text = "two</s>one two"
    assert again(text).input_ids == first(text).input_ids
    assert (again.padding_side, again.truncation_side) == (first.padding_side, first.truncation_side)
    other = {"left": "right", "right": "left"}[first.padding_side]
    first.padding_side = other
    first.save_pretrained(tmp_path / "changed")
    assert load_tokenizer(str(tmp_path / "changed")).padding_side == other


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_ends_an_answer_comes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = [2, 300, 301]
    run = make_checkpoint(tmp_path, "lora", std=0.1, chat_template=CHATML, generation={"eos_token_id": ends})

    def exported(name: str, *command: object) -> list[int]:
        assert convert(*command, "--out", tmp_path / name) == 0
        file = next((tmp_path / name).rglob("generation_config.json"))
        return json.loads(file.read_text())["eos_token_id"]

    assert exported("hf", run, "--to", "llava-hf") == ends
    advice = "answers end with '<|im_end|>', which is not one token: call generate with stop_strings=['<|im_end|>']"
    assert advice in capsys.readouterr().out
    assert advice in (tmp_path / "hf" / "README.md").read_text()
    assert exported("llava", run, "--to", "llava") == ends
    assert exported("hf-run", tmp_path / "hf", "--to", "checkpoint") == ends
    tower = ("--vision-tower", tmp_path / "llava" / "vision_tower")
    assert exported("llava-run", tmp_path / "llava", "--to", "checkpoint", *tower) == ends
    for back in ("hf-run", "llava-run"):
        assert load(tmp_path / back).model.causal_lm.generation_config.eos_token_id == ends


@pytest.mark.parametrize("layout", ["llava", "llava-lora", "llava-hf"])
def test_what_other_programs_do_otherwise_is_said(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = ["--data.image_modes", "rescale", "--data.special_tokens", "escape"]
    run = make_checkpoint(tmp_path, "lora", std=0.1, overrides=ours)
    assert convert(run, "--to", layout, "--out", tmp_path / "out") == 0
    printed, readme = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    for said in ("data.image_modes 'rescale'; other programs only", "data.special_tokens 'escape'; other programs"):
        assert said in printed
        assert said in readme

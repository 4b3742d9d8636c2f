"""`llava-mole compose`: a planted combination is found, the result is an ordinary LoRA, and what cannot be composed
is refused."""

import json
import random
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds.eval_models import make_checkpoint, mute_byte_pieces
from worlds.foreign_models import make_clip
from worlds.interop_tools import load
from worlds.tiny_models import make_data, make_language_model

from llava_mole import cli
from llava_mole.constants import IGNORE_INDEX
from llava_mole.data.collator import Example, collate
from llava_mole.interop.compose.cli import _parser
from llava_mole.interop.compose.compose import Options, check_names, compose, read_loras
from llava_mole.interop.compose.composition import METHODS, Composition
from llava_mole.interop.compose.examples import Base, open_causal_lm
from llava_mole.interop.compose.search import search

pytest.importorskip("cma")


def make_lora(base: Path, directory: Path, seed: int, std: float = 0.25, **options: Any) -> Path:
    """A random LoRA for the language model in `base`, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    model.save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model, two LoRAs of one shape and one of another rank; treat as read-only."""
    root = tmp_path_factory.mktemp("compose")
    make_language_model(root / "base", layers=3)  # 21 linears: PEFT shortens lists of 20 names and more
    mute_byte_pieces(root / "base" / "model.safetensors")  # what the model draws is valid text
    return {
        "base": root / "base",
        "a": make_lora(root / "base", root / "a", 1),
        "b": make_lora(root / "base", root / "b", 2),
        "wide": make_lora(root / "base", root / "wide", 3, r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"]),
    }


@pytest.fixture(scope="module")
def texts(places: dict[str, Path]) -> Path:
    """Prompts, and what the base with 0.8 a - 0.5 b writes after them."""
    file = places["base"].parent / "examples.jsonl"
    base = open_causal_lm(places["base"], device="cpu", dtype="float32")
    teacher, tokenizer = plant(base, places, [0.8, -0.5], "sum"), base.tokenizer
    values = []
    for word in ("red", "blue", "green", "circle"):
        prompt = f"Is it {word}?"
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        ids = teacher.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        values.append({"prompt": prompt, "completion": tokenizer.decode(ids, skip_special_tokens=True)})
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return file


def run(*arguments: object) -> int:
    return cli.main(["compose", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: object) -> None:
    capsys.readouterr()
    assert run(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert message in line


def sampled(base: Base, model: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """A batch of `count` sequences: 4 random tokens, and 28 that the model draws from its own distribution."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 400, (count, 4), generator=generator)
    for _ in range(28):
        with torch.no_grad():
            probabilities = model(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    labels = ids.clone()
    labels[:, :4] = IGNORE_INDEX
    rows = zip(ids.tolist(), labels.tolist(), strict=True)
    return [collate([Example("", "", 0, row, label, None) for row, label in rows], pad_token_id=0)]


def plant(base: Base, places: dict[str, Path], planted: Sequence[float], method: str) -> Any:
    """The base with a LoRA whose update was put together by hand from the files of two LoRAs."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(places["base"])
    files = [load_file(places[name] / "adapter_model.safetensors") for name in "ab"]
    for key in files[0]:
        if key.endswith("lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            if method == "sum":
                update = sum(w * 2.0 * file[other] @ file[key] for w, file in zip(planted, files, strict=True))
            else:
                b, a = (sum(w * file[k] for w, file in zip(planted, files, strict=True)) for k in (other, key))
                update = 2.0 * b @ a
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(path).weight.data += update
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_combination_is_recovered(places: dict[str, Path], method: Any) -> None:
    planted = [0.8, -0.5]
    base = open_causal_lm(places["base"], device="cpu", dtype="float32")
    loras = read_loras([places["a"], places["b"]], base, any_base=False)
    composition = Composition(loras, method, ["a", "b"])
    teacher = plant(base, places, planted, method)
    examples, held_out = sampled(base, teacher, 48, 0), sampled(base, teacher, 48, 1)
    rows = compose(composition, ["a", "b"], base, examples, held_out, Options(method, 120, 0.0, 0))
    found = rows[-1].coefficients
    if method == "product" and found[0] < 0:  # the product is the same for -w
        found = [-value for value in found]
    assert found == pytest.approx(planted, abs=0.06)
    assert [row.name for row in rows] == ["no LoRA (zero-shot)", "a", "b", "uniform, 1 / N", "composed"]
    assert rows[-1].loss < min(row.loss for row in rows[:-1]) - 0.1
    assert rows[-1].held_out < min(row.held_out for row in rows[:-1]) - 0.1
    with torch.no_grad():
        expected = float(base.losses(teacher, held_out[0]).mean())
    assert rows[-1].held_out == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_loads_and_merges_in_peft(
    places: dict[str, Path], texts: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    base = ("--model-base", places["base"], "--examples", texts, "--held-out", texts, "--evaluations", 20, "--l1", 0)
    assert run(places["a"], places["b"], *base, "--method", method, "--output-dir", out) == 0
    printed = capsys.readouterr().out
    label = json.loads((out / "llava_mole.json").read_text())
    coefficients = label["coefficients"]
    assert " ".join(f"{value:.3f}" for value in coefficients) in printed
    assert label["losses"]["composed"]["held_out"] == label["losses"]["composed"]["examples"]
    ids = torch.arange(5, 25).view(2, 10)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(places["base"]), str(out)).eval()
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == ((4, 4) if method == "sum" else (2, 2))
    planted = plant(open_causal_lm(places["base"], device="cpu", dtype="float32"), places, coefficients, method)
    with torch.no_grad():
        expected = planted(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=0, atol=1e-4)


def test_lora_alone_is_itself(places: dict[str, Path]) -> None:
    """Coefficient 1 for one LoRA and 0 for the others is that LoRA, by either method."""
    base = open_causal_lm(places["base"], device="cpu", dtype="float32")
    loras = read_loras([places["a"], places["b"]], base, any_base=False)
    for method in METHODS:
        composed = Composition(loras, method, ["a", "b"]).lora([0.0, 1.0])
        for path, (a_RI, b_OR) in loras[1].pairs.items():
            ours = composed.pairs[path]
            torch.testing.assert_close(ours[1] @ ours[0], 2.0 * b_OR @ a_RI)
            assert ours[0].shape == a_RI.shape


def test_ranks_and_modules_may_differ_in_a_sum(places: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    base = ("--model-base", places["base"], "--examples", texts, "--evaluations", 10, "--l1", 0)
    assert run(places["a"], places["wide"], *base, "--output-dir", out) == 0
    first, second = json.loads((out / "llava_mole.json").read_text())["coefficients"]
    assert first
    assert second
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(places["base"]), str(out))
    files = [load_file(places[name] / "adapter_model.safetensors") for name in ("a", "wide")]
    for path, rank in (("model.layers.1.mlp.up_proj", 5), ("model.layers.1.mlp.down_proj", 2)):
        key = f"base_model.model.{path}.lora_"
        parts = [w * s * f[f"{key}B.weight"] @ f[f"{key}A.weight"]
                 for w, s, f in ((first, 2, files[0]), (second, 1, files[1])) if f"{key}A.weight" in f]  # fmt: skip
        layer = model.get_base_model().get_submodule(path)
        assert layer.r["default"] == rank
        assert len(parts) == (2 if rank == 5 else 1)
        torch.testing.assert_close(layer.get_delta_weight("default"), sum(parts), rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_file(places: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        np.random.seed(len(found))  # no global generator may matter, nor change
        before = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()
        base = ("--model-base", places["base"], "--examples", texts, "--evaluations", 15, "--seed", seed, "--l1", 0)
        assert run(places["a"], places["b"], *base, "--output-dir", tmp_path / name) == 0
        assert np.random.get_state()[1].tolist() == before[0]
        assert random.getstate() == before[1]
        found.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_runs_of_ours_with_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's LoRA and one saved by PEFT, on records with images; the result is a checkpoint that answers."""
    lora_run = make_checkpoint(tmp_path / "world", "lora", std=0.05)
    language_model = tmp_path / "world" / "language_model"
    other = make_lora(language_model, tmp_path / "other", 4, std=0.05, r=3)
    records = make_data(tmp_path / "examples", "few", 5, text_only_every=3)
    out = tmp_path / "out"
    command = (lora_run, other, "--examples", records, "--model-path", lora_run, "--evaluations", 12, "--l1", 0)
    assert run(*command, "--output-dir", out) == 0
    label = json.loads((out / "llava_mole.json").read_text())
    rows = {name: losses["examples"] for name, losses in label["losses"].items()}
    assert rows["composed"] <= min(rows.values())
    loaded = load(out)
    assert loaded.adapter == "lora"
    images = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    ids = torch.full((1, 12), 7)
    ids[0, 2 : 2 + loaded.model.num_image_tokens] = -200
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        ours = loaded.model(ids, mask, images.to(torch.uint8))
        model = load(lora_run).model
        causal_lm = model.language_model.unload()
        from peft import PeftModel

        model.language_model = PeftModel.from_pretrained(causal_lm, str(out / "adapter")).eval()
        torch.testing.assert_close(model(ids, mask, images.to(torch.uint8)), ours, rtol=0, atol=1e-5)
    assert cli.main(["inspect", str(out)]) == 0
    assert run(*command, "--output-dir", out) == 2
    assert "exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert run(*command, "--output-dir", out, "--overwrite") == 0


def test_what_cannot_be_composed_is_refused(
    places: dict[str, Path],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b, wide, base = (places[name] for name in ("a", "b", "wide", "base"))
    out = tmp_path / "out"
    command = ("--model-base", base, "--examples", texts, "--evaluations", 1, "--output-dir", out)
    refused(capsys, "no base model: give --model-path RUN", a, "--examples", texts, "--output-dir", out)
    refused(capsys, "is given twice", a, b, a, *command)
    refused(capsys, "take --method sum", a, wide, *command, "--method", "product")
    dora = make_lora(base, tmp_path / "dora", 1, use_dora=True)
    refused(capsys, "use_dora True; only plain LoRA pairs can be", a, dora, *command)
    monkeypatch.setitem(sys.modules, "cma", None)
    refused(capsys, "pip install 'llava_mole[compose]'", a, b, *command)
    monkeypatch.undo()
    make_language_model(tmp_path / "base2", seed=1)
    elsewhere = make_lora(tmp_path / "base2", tmp_path / "elsewhere", 1)
    refused(capsys, "was trained on another language model", a, elsewhere, *command)
    make_language_model(tmp_path / "base3", hidden_size=16)
    refused(capsys, "of another shape", make_lora(tmp_path / "base3", tmp_path / "narrow", 1), *command, "--any-base")
    named = make_lora(base, tmp_path / "named", 1), make_lora(base, tmp_path / "named2", 2)
    for path, name in zip(named, ("org/one", "org/two"), strict=True):
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    refused(capsys, "the LoRAs name different bases", *named, *command)
    make_clip(tmp_path / "clip")
    refused(capsys, "is a CLIP vision tower", tmp_path / "clip", *command)
    mixture = make_checkpoint(tmp_path / "world", "mole")
    refused(capsys, "has adapter.method 'mole'; plain LoRAs are composed", a, mixture, *command)
    refused(capsys, "--evaluations is -1", a, b, *command, "--evaluations", -1)
    refused(capsys, "--image-folder need --model-path", a, b, *command, "--image-folder", tmp_path)
    bad = tmp_path / "bad.jsonl"
    for line, message in (
        ('{"prompt": "a"}', "bad.jsonl:1: an example is"),
        ('{"prompt": "a", "completion": ""}', "a completion that is not empty"),
        (json.dumps({"prompt": "a", "completion": "b " * 600}), "the model has 512 positions"),
        ("", "holds no example"),
    ):
        bad.write_text(line + "\n")
        refused(capsys, message, a, b, "--model-base", base, "--examples", bad, "--output-dir", out)
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")) == []
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(capsys, "no conversion has written", a, b, *command, "--overwrite")
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_loras_that_do_not_help_are_not_written(
    places: dict[str, Path], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = ("--model-base", places["base"], "--examples", texts, "--evaluations", 8, "--l1", 1e6)
    for method in METHODS:
        command = (places["a"], places["b"], *base, "--output-dir", out, "--method", method)
        refused(capsys, "the LoRAs do not help", *command)
    assert not out.exists()


@pytest.mark.parametrize("target", [[0.7], [0.3, -1.2], [1.5, 0.0, -0.4]])
def test_the_search_alone(target: list[float]) -> None:
    """A quadratic with a minimum inside or on the bounds, where it is not finite for a part of the space."""

    def objective(point: Sequence[float]) -> float:
        if sum(point) > 1.45:
            return float("nan")
        return sum((x - t) ** 2 for x, t in zip(point, target, strict=True))

    zero = [0.0] * len(target)
    found, value = search(objective, [zero], evaluations=300, seed=1)
    assert found == pytest.approx(target, abs=0.02)
    assert value == objective(found) < objective(zero)
    assert search(objective, [zero, target], evaluations=0, seed=1) == (target, 0.0)


def test_commands_and_options_of_the_documentation_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "related-methods.md").read_text(encoding="utf-8")
    commands = re.findall(r"^llava-mole compose (.+)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        _parser().parse_args(shlex.split(command))
    known = _parser().format_help()
    assert not [option for option in re.findall(r"--[a-z][a-z0-9-]*", text) if option not in known]


def test_a_lora_named_like_a_row_of_the_result_keeps_a_row_of_its_own(tmp_path: Path) -> None:
    paths = [tmp_path / "composed", tmp_path / "other", tmp_path / "deep" / "other"]
    assert check_names(paths) == [str(path) for path in paths]
    assert check_names([tmp_path / "one", tmp_path / "two"]) == ["one", "two"]

"""The examples of docs/mole.md and of the README run as printed, and the page's option table is complete."""

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import LlamaForCausalLM
from worlds.mole_training import routers, tokenizer

from llava_mole.mole import MoleConfig, MoleMlp
from llava_mole.mole.lora_names import REASONS, SPELLINGS

ROOT = Path(__file__).parents[2]
DOCS, README = ((ROOT / page).read_text(encoding="utf-8") for page in ("docs/mole.md", "README.md"))
TEXTS = [" ".join(f"w{(i * j) % 62 + 1}" for j in range(1, 20)) for i in range(1, 17)]


def example(marker: str, page: str = DOCS) -> str:
    """The Python block of the page that contains `marker`."""
    (block,) = (found for found in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if marker in found)
    return block


def loop_names(model: LlamaForCausalLM) -> dict[str, object]:
    ids = torch.arange(1, 9).view(1, 8)
    return {
        "any_hf_causal_lm": model,
        "batches": [SimpleNamespace(ids=ids, labels=ids, mask=torch.ones_like(ids))] * 2,
        "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]),
    }


def test_the_first_example_runs(
    tiny_llama: Callable[[], LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = loop_names(tiny_llama())
    before, after = example("PeftModel, get_peft_model").split("model = PeftModel")
    exec(before, names)
    router = names["model"].base_model.model.model.layers[0].mlp.router("default")
    assert router.weight.grad.abs().max() > 0
    names["any_hf_causal_lm"] = tiny_llama()
    exec("model = PeftModel" + after, names)
    assert any(isinstance(m, MoleMlp) for m in names["model"].modules())


def test_the_loop_by_hand_runs(tiny_llama: Callable[[], LlamaForCausalLM]) -> None:
    names = loop_names(tiny_llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(example("add_balance_loss=False"), names)
    router = names["model"].base_model.model.model.layers[0].mlp.router("default")
    assert router.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("marker", "page"),
    [("trainer = Trainer(", DOCS), ("trainer = SFTTrainer(", DOCS), ("trainer = Trainer(", README)],
    ids=["Trainer", "SFTTrainer", "README"],
)
def test_the_examples_of_trainers_train_the_router(
    tiny_llama: Callable[[], LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str, page: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    torch.manual_seed(0)
    base = tiny_llama()
    names = {"any_hf_causal_lm": base, "tokenizer": tokenizer(), "texts": TEXTS}
    code = example(marker, page).replace('SFTConfig("out"', 'SFTConfig("out", use_cpu=True, bf16=False')
    code = code.replace("trainer.train()", "before = routers(trainer.model)\ntrainer.train()")
    exec(code, {**names, "routers": routers}, names)
    after = routers(names["trainer"].model)
    assert len(after) == 2
    assert all((value - names["before"][name]).abs().max() > 1e-4 for name, value in after.items())
    loaded = PeftModel.from_pretrained(tiny_llama(), "adapter")
    for name, value in routers(loaded).items():
        assert torch.equal(value, after[name])


def test_the_option_table_names_every_option() -> None:
    inherited = {f.name for f in dataclasses.fields(PeftConfig)}
    written = {"base_fingerprint"}  # filled in, not chosen
    options = {f.name for f in dataclasses.fields(MoleConfig)} - inherited - written
    table = DOCS.split("## Options")[1].split("What gives the router")[0]
    assert options <= set(re.findall(r"`(\w+)`", table))


def test_the_table_for_lora_users_says_what_becomes_of_every_option() -> None:
    table = DOCS.split("## For users of LoRA")[1].split("What changes against LoRA")[0]
    named = set(re.findall(r"`(\w+)`", table))
    own = {f.name for f in dataclasses.fields(MoleConfig)} | set(SPELLINGS)
    lora = {f.name for f in dataclasses.fields(LoraConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert lora & own <= named
    assert set(REASONS) <= named
    for key in lora - own:
        with pytest.raises(ValueError, match=f"{key} is 'x'"):
            MoleConfig(**{key: "x"})

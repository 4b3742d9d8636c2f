"""The example of docs/mole.md runs as printed, and its option table is complete."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftConfig
from transformers import LlamaForCausalLM

from llava_mole.mole import MoleConfig, MoleMlp
from llava_mole.mole.lora_names import REASONS, SPELLINGS

DOCS = (Path(__file__).parents[2] / "docs" / "mole.md").read_text(encoding="utf-8")


def test_the_example_runs(
    tiny_llama: Callable[[], LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL)
    assert code is not None
    ids = torch.arange(1, 9).view(1, 8)
    names = {
        "any_hf_causal_lm": tiny_llama(),
        "batches": [SimpleNamespace(ids=ids, labels=ids, mask=torch.ones_like(ids))] * 2,
        "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]),
    }
    before, after = code.group(1).split("model = PeftModel")
    exec(before, names)
    names["any_hf_causal_lm"] = tiny_llama()
    exec("model = PeftModel" + after, names)
    assert any(isinstance(m, MoleMlp) for m in names["model"].modules())


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

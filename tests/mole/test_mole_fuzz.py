"""Random configurations: each is refused with a reason, or trains, and comes back in a fresh process.

The suite draws a few; `LLAVA_MOLE_CASES=5000 pytest tests/mole/test_mole_fuzz.py -s` draws that many and prints counts.
"""

import collections
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_model
from worlds import fuzzed_adapters
from worlds.fuzzed_adapters import IDS, MASK, inform, logits, tiny

from llava_mole.mole import MoleConfig, mole_after_step, mole_auxiliary_loss
from llava_mole.mole.config import RANGES
from llava_mole.mole.lora_names import SPELLINGS

CASES = int(os.environ.get("LLAVA_MOLE_CASES", "40"))
BATCH = 250
"""Adapters that one fresh process loads."""

EXPERTS = ["0.mlp", "mlp", r"layers\.1.*", "(gate|up|down)_proj"]
LINEARS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "mlp",
    "lm_head",
    "embed_tokens",
]
NAMES = st.lists(
    st.sampled_from([*LINEARS, "norm", "input_layernorm", "layers.0.mlp", "1.self_attn.q_proj", "wq"]), max_size=4
)
EXPRESSION = st.sampled_from(
    [r".*_proj", r".*mlp", "all-linear", r".*layers\.1\..*(q|v)_proj", r".*(gate|up|down)_proj", "(", ""]
)
LAYERS = st.one_of(st.integers(-1, 2), st.lists(st.integers(0, 2), max_size=2))
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2),
    st.sampled_from([0, -1, 0.5, math.nan, math.inf, 2**63, 10**9, "none", [], {}]),
)  # fmt: skip
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "r": st.integers(1, 6),
    "alpha": st.floats(0.1, 64),
    "attention_r": st.one_of(st.none(), st.integers(1, 6)),
    "dropout": st.floats(0, 0.9),
    "num_experts": st.one_of(st.integers(1, 6), st.sampled_from([1, 257])),
    "top_k": st.integers(1, 4),
    "temperature": st.floats(0.1, 10),
    "jitter": st.floats(0, 0.9),
    "num_tasks": st.integers(0, 4),
    "task_dim": st.integers(0, 4),
    "frozen_experts": st.one_of(st.just(0), st.integers(0, 4)),
    "experts_by_layer": st.one_of(st.none(), st.lists(st.integers(1, 4), min_size=1, max_size=3)),
    "logit_noise": st.floats(0, 2),
    "group_delta": st.floats(0, 0.9),
    "init_std": st.one_of(st.none(), st.floats(0.01, 1)),
    "router_init_std": st.one_of(st.none(), st.floats(0.01, 1)),
    "shared_r": st.integers(0, 4),
    "balance_coef": st.one_of(st.just(0.0), st.floats(0, 10)),
    "source_coef": st.one_of(st.just(0.0), st.floats(0, 1)),
    "z_loss_coef": st.floats(0, 1),
    "bias_update_rate": st.one_of(st.just(0.0), st.floats(0, 0.1)),
    "init_weights": st.sampled_from([True, False, "gaussian", "pissa"]),
    "rank_pattern": st.dictionaries(st.sampled_from(LINEARS[:4] + EXPERTS), st.integers(1, 5), max_size=2),
    "alpha_pattern": st.dictionaries(st.sampled_from(LINEARS[:6] + EXPERTS), st.floats(1, 9), max_size=2),
    "target_modules": st.one_of(NAMES, EXPRESSION),
    "attention_modules": NAMES,
    "ffn_modules": st.sampled_from([[], ["mlp"], ["0.mlp"], ["self_attn"]]),
    "ffn_projections": st.sampled_from([
        {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "activation": "act_fn"},
        {"up": "up_proj", "down": "down_proj", "activation": "act_fn"}, {"up": "w1"},
    ]),
    "exclude_modules": st.one_of(NAMES, EXPRESSION),
    "layers_to_transform": LAYERS,
    "layers_pattern": st.sampled_from(["layers", ["layers"], "h"]),
    "modules_to_save": st.lists(st.sampled_from(["norm", "lm_head", "embed_tokens", "mlp", "layers"]), max_size=2),
    "trainable_token_indices": st.one_of(
        st.lists(st.integers(0, 25), max_size=3), st.just({"embed_tokens": [1]}), st.just({"wte": [1]})
    ),
    "base_fingerprint": st.none(),
    "lora_alpha": st.integers(1, 32),
    "lora_dropout": st.floats(0, 0.5),
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "olora"]),
    "use_dora": st.booleans(),
    "bias": st.sampled_from(["none", "all"]),
    "lora_rank": st.integers(1, 4),
}  # fmt: skip
"""Mostly possible values of each option; those with a fixed list of values, or bools, are added below."""
for option in dataclasses.fields(MoleConfig):
    if option.name not in VALUES and option.name not in {o.name for o in dataclasses.fields(PeftConfig)}:
        VALUES[option.name] = st.booleans() if option.type is bool else st.sampled_from(option.type.__args__)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """A few options, one in fifteen of them with an odd value."""
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=6))
    if draw(st.booleans()):  # most places contradict each other, so half of the cases leave them alone
        names = [name for name in names if "modules" not in name and "layers" not in name and "pattern" not in name]
    return {name: draw(ANYTHING if draw(st.integers(0, 14)) == 0 else VALUES[name]) for name in names}


class Batch:
    """Adapters that wait for a fresh process, and what has happened to all cases."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.counts: collections.Counter[str] = collections.Counter()

    def add(self, model: Any, given_options: dict[str, Any]) -> None:
        self.counts["trained"] += 1
        adapter = self.directory / f"{self.counts['trained']:05d}"
        expected = logits(model)
        assert expected.isfinite().all()
        model.save_pretrained(adapter)
        torch.save(expected, adapter / "logits.pt")
        (adapter / "options.txt").write_text(repr(given_options))
        if self.counts["trained"] % BATCH == 0:
            self.load()

    def load(self) -> None:
        """Load all waiting adapters in a fresh process and compare their logits."""
        waiting = len(list(self.directory.iterdir()))
        command = [sys.executable, str(Path(fuzzed_adapters.__file__)), str(self.directory)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert json.loads(ended.stdout.splitlines()[-1]) == {}
        self.counts["loaded"] += waiting
        shutil.rmtree(self.directory)
        self.directory.mkdir()


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batch]:
    batch = Batch(tmp_path_factory.mktemp("adapters"))
    yield batch
    print(f"\n{dict(batch.counts)}")


def attempt(make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` returns and an empty text, or None and the text of its refusal in small letters."""
    try:
        return make(), ""
    except ValueError as error:
        return None, str(error).lower().replace("target modules", "target_modules")


def names_of(given_options: dict[str, Any]) -> set[str]:
    """The names by which a refusal may call the options."""
    return {*given_options, *(SPELLINGS[name] for name in given_options if name in SPELLINGS)}


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(given_options=options())
@example(given_options={})
@example(given_options={"num_experts": 257, "backend": "masked", "init_weights": False})
@example(given_options={"target_modules": "all-linear", "rank_pattern": {"mlp": 2}, "use_rslora": True})
@example(given_options={"alpha_pattern": {"v_proj": 3.0, r"layers\.1.*": 2.0}, "ffn_modules": []})
@example(given_options={"attention_modules": [], "modules_to_save": ["norm"], "trainable_token_indices": [1]})
def test_a_configuration_is_refused_or_works(given_options: dict[str, Any], batch: Batch) -> None:
    base = tiny()
    before = repr(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, message = attempt(lambda: get_peft_model(base, MoleConfig(**{"r": 2, **given_options})))
        if model is None:
            assert any(name.lower() in message for name in names_of(given_options)), f"{given_options}: {message}"
            assert "\n" not in message
            assert repr(base) == before
            batch.counts["refused"] += 1
            return
        model.train()
        inform(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        for step in range(2):
            torch.manual_seed(step)
            loss = model(IDS, labels=IDS, use_cache=False).loss
            loss = loss + mole_auxiliary_loss(model, token_mask=MASK, supervised_mask=IDS > 4, image_mask=IDS > 7)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mole_after_step(model)
        batch.add(model, given_options)


def test_all_of_them_come_back_in_a_fresh_process(batch: Batch) -> None:
    assert batch.counts["trained"] > 0.2 * CASES
    assert batch.counts["refused"] > 0
    batch.load()
    assert batch.counts["loaded"] == batch.counts["trained"]


@pytest.mark.parametrize("key", RANGES)
@pytest.mark.parametrize("end", [0, 1])
def test_the_ends_of_a_range_work(key: str, end: int) -> None:
    """A number at either end of its range is refused by another rule, or computes something finite."""
    value = RANGES[key][end]
    if value == 2**16:  # sizes this large are allowed, but no test has the memory
        return
    others = {
        "num_tasks": {"granularity": "task", "balance_group": "micro_batch"},
        "balance_coef": {"expert_scale": "prob"},
    }
    config, message = attempt(lambda: MoleConfig(**{"r": 2, **others.get(key, {}), key: value}))
    if config is None:
        assert key in message
        return
    model = get_peft_model(tiny(), config).train()
    inform(model)
    for _ in range(2):
        loss = model(IDS, labels=IDS).loss + mole_auxiliary_loss(model, token_mask=MASK)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    assert parameter.grad.isfinite().all()
                    parameter -= 1e-3 * parameter.grad.sign()
                    parameter.grad = None
        mole_after_step(model)
    assert logits(model).isfinite().all()

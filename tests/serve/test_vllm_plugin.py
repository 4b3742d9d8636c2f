"""The plug-in for vLLM as far as it goes without vLLM: static experts equal ours, an export holds every tensor once.

Not tested here, because it needs vLLM and a GPU: `serve/vllm/model.py` itself.
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from worlds.eval_models import colors, make_checkpoint

from llava_mole import cli
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.mole import MoleConfig, MoleMlp
from llava_mole.mole.static import MODULE, StaticExperts, is_router, merged_linears, static_layout, static_tensors
from llava_mole.serve.vllm import plugin
from llava_mole.serve.vllm.layers import StaticMlp, shard
from llava_mole.serve.vllm.weights import Destinations, local_layout

MODES: dict[str, dict[str, Any]] = {
    "paper": {},
    "one expert": {"num_experts": 1},
    "dense": {"mode": "dense"},
    "dense, times K": {"mode": "dense", "expert_scale": "prob_times_k"},
    **{
        f"top {k}, {scale}": {"top_k": k, "expert_scale": scale, "num_experts": 4}
        for k in (1, 2)
        for scale in ("none", "straight_through", "prob", "prob_squared", "prob_times_k")
    },
    "renormalised": {"top_k": 2, "expert_scale": "topk_renorm"},
    "bias and temperature": {"router_bias": True, "temperature": 0.4, "expert_scale": "prob"},
    "loss-free balancing": {"bias_update_rate": 0.3},
    "hash": {"router": "hash"},
    "shared": {"shared_r": 3},
    "shared, complement": {"shared_r": 3, "shared_scale": "complement"},
    "shared, dense": {"shared_r": 3, "mode": "dense"},
    "one A": {"shared_a": True},
    "one A, top 2": {"shared_a": True, "top_k": 2, "expert_scale": "prob"},
    "rslora": {"use_rslora": True, "alpha": 5},
    "other ranks": {"rank_pattern": {"layers.1.mlp": 2}, "alpha_pattern": {"layers.1.mlp": 7}},
    "experts by layer": {"experts_by_layer": [2, 4]},
    "experts in one layer": {"layers_to_transform": [1]},
    "frozen": {"frozen_experts": 1},
}


class Pair(nn.Module):
    """A linear as vLLM's are: it returns a pair."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x @ self.weight.T, None


class Tokens(nn.Module):
    """A module that reads `[T, D]`, as in vLLM, where transformers gives `[B, S, D]`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(0, 1)).view(x.shape)


class FusedMlp(nn.Module):
    """The parts of vLLM's LlamaMLP, from one of transformers; of rank `rank` of `size`."""

    def __init__(self, mlp: Any, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        gate, up = (linear.weight.chunk(size)[rank] for linear in (mlp.gate_proj, mlp.up_proj))
        self.gate_up_proj = Pair(torch.cat([gate, up]))
        self.act_fn = lambda x: nn.functional.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1]
        self.down_proj = Pair(mlp.down_proj.weight.chunk(size, dim=1)[rank])


def build(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config).to(dtype), MoleConfig(**{"r": 4, "num_experts": 3, **options}))
    for name, parameter in model.named_parameters():
        if "mole_" in name:
            nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, MoleMlp) and "default" in module.mole_state:
            steps = module.mole_state["default"].bias_steps
            steps.copy_(torch.arange(len(steps)) - 1)
    return model.eval()


def fill(experts: StaticExperts, tensors: dict[str, torch.Tensor], rank: int = 0, size: int = 1) -> None:
    for name, tensor in tensors.items():
        experts.get_parameter(name).data.copy_(shard(name, tensor, rank, size))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODES)
def test_a_static_ffn_equals_ours(name: str, dtype: torch.dtype) -> None:
    model = build(MODES[name], dtype)
    precise = 1e-12 if dtype == torch.float64 else 1e-6
    layout, tensors = static_layout(model), dict(static_tensors(model))
    assert layout == json.loads(json.dumps(layout))
    base, seen = model.get_base_model(), 0
    x = torch.randn(2, 7, 16, dtype=dtype)
    for path, own in layout.items():
        ours = base.get_submodule(path)
        parts = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{path}.{MODULE}.")}
        seen += len(parts)
        experts = StaticExperts.of(own, dtype=dtype)
        assert {key: list(value.shape) for key, value in experts.named_parameters()} == own["shapes"]
        fill(experts, parts)
        static = StaticMlp(FusedMlp(ours.base_layer), experts)
        with torch.no_grad():
            expected = ours(x).flatten(0, 1)
            assert (expected - ours.base_layer(x).flatten(0, 1)).abs().max() > 1e-2
            largest = float(expected.abs().max())
            torch.testing.assert_close(static(x.flatten(0, 1)), expected, atol=precise * largest, rtol=0)
            # The shapes do not depend on the routing: one graph serves other tokens.
            graph = torch.export.export(static, (x.flatten(0, 1),)).module()
            other = torch.randn(14, 16, dtype=dtype)
            expected = ours(other[None])[0]
            largest = float(expected.abs().max())
            torch.testing.assert_close(graph(other), expected, atol=precise * largest, rtol=0)
    assert seen == len(tensors)
    assert len(layout) == (1 if name == "experts in one layer" else 2)


@pytest.mark.parametrize("name", ["paper", "dense", "shared, complement", "one A"])
def test_two_ranks_of_tensor_parallelism_are_one(name: str) -> None:
    model = build(MODES[name])
    path, own = next(iter(static_layout(model).items()))
    tensors = {
        key.rpartition(".")[2]: t for key, t in static_tensors(model) if key.startswith(f"{path}.{MODULE}.")
    }  # fmt: skip
    ours: Any = model.get_base_model().get_submodule(path)
    x = torch.randn(9, 16)
    ranks = []
    for rank in range(2):
        experts = StaticExperts.of(local_layout(own, 2))
        fill(experts, tensors, rank, 2)
        ranks.append(StaticMlp(FusedMlp(ours.base_layer, rank, 2), experts))
    with torch.no_grad():
        # Two passes: the first notes what each rank would give to the sums, the second uses the sums.
        given: list[list[torch.Tensor]] = [[], []]
        for rank, part in enumerate(ranks):
            part._reduce = lambda h, rank=rank: _note(given[rank], h)
            down = part.down_proj.forward
            part.down_proj.forward = lambda v, rank=rank, down=down: (_note(given[rank], down(v)[0]), None)
            part(x)
        sums = [one + other for one, other in zip(*given, strict=True)]
        for part in ranks:
            part.down_proj.forward = lambda v: (sums[0], None)
            part._reduce = lambda h: sums[1]
            torch.testing.assert_close(part(x), ours(x[None])[0], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="gate_proj_B has width 24, which 5 ranks cannot share equally"):
        shard("gate_proj_B", tensors["gate_proj_B"], 0, 5)


def _note(kept: list[torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    kept.append(value)
    return value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"granularity": "sequence", "expert_scale": "prob", "balance_group": "global_batch"},
            "granularity 'sequence'",
        ),
        ({"router": "random"}, "router 'random'"),
        ({"router_scope": "linear"}, "router_scope 'linear'"),
        ({"mix": "ffn_output", "top_k": 2, "expert_scale": "topk_renorm"}, "mix 'ffn_output'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_has_no_static_form_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"the adapter has {message}.*for every token by itself"):
        static_layout(build(options))


@pytest.fixture(scope="module")
def exported(mole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vllm") / "export"
    assert cli.main(["convert", str(mole_run), "--to", "vllm", "--out", str(out)]) == 0
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_an_export_holds_every_tensor_once(exported: Path, predictor: Any) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == [plugin.ARCHITECTURE]
    tensors = stored(exported)
    put: dict[str, torch.Tensor] = {}
    destinations = Destinations(config["mole_experts"])
    others = dict(destinations.others(tensors.items(), put.__setitem__))
    destinations.check()
    assert put.keys() | others.keys() == tensors.keys()
    assert not put.keys() & others.keys()
    assert all(tensor.dtype == torch.float32 for name, tensor in put.items() if is_router(name))
    # Every tensor of the adapter is either in an expert, or merged into a weight.
    peft = predictor.loaded.model.language_model
    assert {f"language_model.{name}" for name, _ in static_tensors(peft)} == put.keys()
    merged = dict(merged_linears(peft))
    base = {name: parameter for name, parameter in peft.get_base_model().named_parameters()}
    trained = {name for name in base if "mole_" in name}
    covered = {f"{name.removesuffix('.weight')}.mole_lora.default.{side}" for name in merged for side in "AB"}
    for name in trained - covered:
        assert re.search(r"\.mole_(router|experts)\.default\.", name), name
    for name, weight in merged.items():
        torch.testing.assert_close(others[f"language_model.{name}"], weight, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="comes twice"):
        dict(destinations.others([next(iter(put.items()))], put.__setitem__))
    fresh = Destinations(config["mole_experts"])
    with pytest.raises(ValueError, match=r"\d+ tensors of experts are missing, the first is language_model\.model\."):
        fresh.check()
    with pytest.raises(ValueError, match="no FFN of the model has such a tensor"):
        dict(fresh.others([("language_model.model.layers.9.mlp.mole.router", torch.zeros(1))], put.__setitem__))
    with pytest.raises(ValueError, match=r"has shape \(1,\); config\.json says"):
        dict(fresh.others([(next(iter(put)), torch.zeros(1))], put.__setitem__))


def test_the_exported_model_computes_our_logits(exported: Path, predictor: Any, tmp_path: Path) -> None:
    """The export in transformers' LLaVA with our layer in the place that it has in vLLM."""
    from transformers import LlavaForConditionalGeneration

    config = json.loads((exported / "config.json").read_text())
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(exported).eval()
    put: dict[str, torch.Tensor] = {}
    destinations = Destinations(config["mole_experts"])
    dict(destinations.others(stored(exported).items(), put.__setitem__))
    for path, layout in config["mole_experts"].items():
        number = int(re.findall(r"layers\.(\d+)\.mlp", path)[0])
        experts = StaticExperts.of(layout)
        fill(experts, {name.rpartition(".")[2]: t for name, t in put.items() if name.startswith(f"{path}.")})
        layer = theirs.model.language_model.layers[number]
        layer.mlp = Tokens(StaticMlp(FusedMlp(layer.mlp), experts))
    images = [[], [Image.new("RGB", (24, 16), color) for color in colors()[:2]]]
    for shown, text in zip(images, ["What is red?", "Is <image> like <image>?"], strict=True):
        (own,) = predictor.batches([shown], [text], batch_size=1)
        pixels = torch.stack([predictor.loaded.image_processor(image) for image in shown]) if shown else None
        ids = own.input_ids.masked_fill(own.input_ids == IMAGE_TOKEN_INDEX, config["image_token_index"])
        with torch.no_grad():
            expected = predictor.loaded.model(own.input_ids, own.attention_mask, pixels)
            found = theirs(input_ids=ids, attention_mask=own.attention_mask, pixel_values=pixels).logits
        width = expected.shape[-1]  # the export has a row for <image>
        torch.testing.assert_close(found[..., :width], expected, atol=2e-5, rtol=1e-4)


def test_only_mixtures_are_exported_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_checkpoint(tmp_path / "lora", "lora")
    assert cli.main(["convert", str(run), "--to", "vllm", "--out", str(tmp_path / "out")]) == 2
    assert "is no mixture; vLLM serves what --to llava-hf writes of it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_plugin_says_that_vllm_is_missing() -> None:
    assert importlib.util.find_spec("vllm") is None
    code = "import sys; from llava_mole.serve.vllm import plugin; print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(Exception, match="vLLM is not installed: pip install vllm"):
        plugin.register()


def test_the_entry_point_is_named() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["llava_mole"].partition(":")
    assert getattr(importlib.import_module(module), name) is plugin.register


@pytest.mark.gpu
def test_vllm_serves_an_export(exported: Path) -> None:
    """Needs vLLM and a GPU; it has not run yet."""
    vllm = pytest.importorskip("vllm")
    answers = vllm.LLM(str(exported), dtype="float32").generate(["USER: What is red? ASSISTANT:"])
    assert answers[0].outputs[0].text

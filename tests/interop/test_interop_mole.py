"""Mixtures of experts: the authors' file in, ours out whole or as a labelled approximation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from worlds.eval_models import make_checkpoint
from worlds.foreign_models import WIDTH, make_clip
from worlds.interop_tools import close, convert, example, load, our_logits
from worlds.released_mole import CASES, LAYERS, golden, make_released
from worlds.tiny_models import NUM_IMAGE_TOKENS

from llava_mole.config import load_config
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.interop.own import open_own
from llava_mole.mole import MoleMlp

PAIRS = [*((case, "sparse") for case in CASES), *((case, "dense") for case in CASES[2:8:3])]


def import_released(directory: Path, case: dict[str, Any], *more: object) -> int:
    make_clip(directory / "clip")
    command = ("--to", "checkpoint", "--out", directory / "run", "--model-base", directory / "vicuna")
    alpha = ("--alpha", case["lora_alpha"])
    return convert(directory / "released.pt", *command, "--vision-tower", directory / "clip", *alpha, *more)


@pytest.mark.parametrize(("case", "mode"), PAIRS, ids=[f"{c['key']}-{c['kind']}-{mode}" for c, mode in PAIRS])
def test_released_experts_give_the_recorded_outputs(case: dict[str, Any], mode: str, tmp_path: Path) -> None:
    data = golden(case)
    make_released(tmp_path, case, data)
    assert import_released(tmp_path, case, "--mode", mode) == 0
    loaded = load(tmp_path / "run")
    mlps = [module for module in loaded.model.modules() if isinstance(module, MoleMlp)]
    assert len(mlps) == LAYERS
    for mlp in mlps:
        with torch.no_grad():
            out = mlp(data["x"].float())
        expected = data[f"{mode}.out"]  # float64, of up to 30 in size
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert load_config(loaded.path / "config.yaml").adapter.preset == "released"
    stored = load_file(tmp_path / "run" / "checkpoint-0" / "adapter" / "adapter_model.safetensors")
    for k in range(case["num_experts"]):
        for projection in ("gate", "up", "down"):
            name = f"base_model.model.model.layers.1.mlp.mole_experts.{projection}_proj"
            assert torch.equal(stored[f"{name}_A"][k], data[f"weight.moe_{projection}.{k}.lora_A"])
            assert torch.equal(stored[f"{name}_B"][k], data[f"weight.moe_{projection}.{k}.lora_B"].T)


def test_released_vectors_around_the_image_are_in_the_sequence(tmp_path: Path) -> None:
    case = CASES[2]
    make_released(tmp_path, case, golden(case))
    assert import_released(tmp_path, case) == 0
    loaded = load(tmp_path / "run")
    assert loaded.model.num_image_tokens == NUM_IMAGE_TOKENS + 2
    assert load_config(loaded.path / "config.yaml").model.vision_tower.select_layer == -1
    ids = torch.full((1, 9), 5)
    ids[:, 1 : 1 + NUM_IMAGE_TOKENS + 2] = IMAGE_TOKEN_INDEX
    with torch.no_grad():
        embedded = loaded.model.embed(ids, example()[1][:1])[0]
        tower = loaded.model.vision_tower(example()[1][:1])
        features = loaded.model.projector[:3](tower)[0]
    released = torch.load(tmp_path / "released.pt", weights_only=True)["state_dict"]
    assert torch.equal(embedded[1], released["in_adaptor.visual_start_token"][0, 0])
    assert torch.equal(embedded[2 + NUM_IMAGE_TOKENS], released["in_adaptor.visual_end_token"][0, 0])
    assert torch.equal(embedded[2 : 2 + NUM_IMAGE_TOKENS], features)
    assert tower.shape[-1] == WIDTH


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drop mlp.router.bias", "2 missing: model.layers.0.mlp.mole_router.bias"),
        ("drop mlp.moe_up.1.lora_B", "2 experts missing: model.layers.0.mlp.mole_experts.up_proj_B, expert 1"),
        ("drop self_attn.k_proj.lora_A.default.weight", "2 missing: model.layers.0.self_attn.k_proj.mole_lora.A"),
        ("add optimizer.step", "1 unexpected tensor: optimizer.step"),
        ("other base", "differs from model.layers.0.mlp"),
    ],
)
def test_a_released_file_that_does_not_fit_is_refused(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[2]
    make_released(tmp_path, case, golden(case))
    checkpoint = torch.load(tmp_path / "released.pt", weights_only=True)
    state = checkpoint["state_dict"]
    what, _, name = change.partition(" ")
    if what == "drop":
        checkpoint["state_dict"] = {n: v for n, v in state.items() if not n.endswith(name)}
    elif what == "add":
        state[name] = torch.zeros(1)
    else:
        for key in state:
            if "original_module" in key:
                state[key] = state[key] * 1.5
    torch.save(checkpoint, tmp_path / "released.pt")
    assert import_released(tmp_path, case) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def mole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mole"), "mole", std=0.1)


def text_logits(model: Any) -> Tensor:
    ids, _ = example()
    with torch.no_grad():
        return model(input_ids=ids.masked_fill(ids == IMAGE_TOKEN_INDEX, 7)).logits


def test_a_mixture_goes_out_as_a_peft_adapter(mole_run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert convert(mole_run, "--to", "peft", "--out", tmp_path / "peft") == 0
    base = AutoModelForCausalLM.from_pretrained(mole_run.parent / "language_model")
    loaded = load(mole_run)
    assert torch.equal(
        text_logits(PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()), our_logits(loaded)[1]
    )
    state = torch.load(tmp_path / "peft" / "mm_projector.bin", weights_only=True)
    for name, value in loaded.model.projector.state_dict().items():
        assert torch.equal(state[f"model.mm_projector.{name}"], value)
    assert "import llava_mole.mole" in (tmp_path / "peft" / "README.md").read_text()


@pytest.mark.parametrize("expert", ["0", "1", "uniform"])
def test_an_approximation_says_so_and_equals_the_surgery(expert: str, mole_run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llava_mole.mole.surgery import to_lora

    own = open_own(mole_run, None)
    base = AutoModelForCausalLM.from_pretrained(own.language_model)
    to_lora(
        PeftModel.from_pretrained(base, str(own.adapter_dir)),
        tmp_path / "surgery",
        expert=int(expert) if expert.isdecimal() else expert,
    )
    base = AutoModelForCausalLM.from_pretrained(own.language_model)
    expected = text_logits(PeftModel.from_pretrained(base, str(tmp_path / "surgery")).eval())
    assert (expected - our_logits(load(mole_run))[1]).abs().max() > 1e-3, "an approximation, not the mixture"

    assert convert(mole_run, "--to", "llava-hf", "--expert", expert, "--out", tmp_path / "hf") == 0
    from transformers import LlavaForConditionalGeneration

    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    close(text_logits(merged)[..., : expected.shape[-1]], expected)
    for file in ("README.md", "llava_mole.json", "config.json"):
        assert "APPROXIMATION: a mixture of 2 LoRA experts" in (tmp_path / "hf" / file).read_text(), file
    assert not json.loads((tmp_path / "hf" / "llava_mole.json").read_text())["exact"]
    assert convert(mole_run, "--to", "llava-lora", "--expert", expert, "--out", tmp_path / "lora") == 0
    base = AutoModelForCausalLM.from_pretrained(own.language_model)
    close(text_logits(PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()), expected)
    for file in ("README.md", "llava_mole.json", "config.json"):
        assert "APPROXIMATION" in (tmp_path / "lora" / file).read_text(), file


def test_usage_comes_from_a_routing_file(mole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(mole_run, "--to", "peft", "--expert", "usage", "--out", tmp_path / "lora") == 2
    assert "this adapter has counted no tokens" in capsys.readouterr().err
    domains = {
        "a": {"all": {"tokens": 30, "share": [[1.0, 0.0], [0.5, 0.5]]}},
        "b": {"all": {"tokens": 10, "share": [[0.0, 1.0], [0.5, 0.5]]}},
    }
    (tmp_path / "routing.json").write_text(json.dumps({"domains": domains}))
    command = ("--to", "peft", "--expert", "usage", "--usage", tmp_path / "routing.json", "--out", tmp_path / "lora")
    assert convert(mole_run, *command) == 0
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    mixture = load_file(open_own(mole_run, None).adapter_dir / "adapter_model.safetensors")
    experts = mixture["base_model.model.model.layers.0.mlp.mole_experts.gate_proj_B"]
    expected = torch.cat([experts[0] * 0.75, experts[1] * 0.25]).T
    torch.testing.assert_close(stored["base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight"], expected)


def test_a_mixture_is_never_merged_silently(mole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layout in ("llava", "llava-lora", "llava-hf"):
        assert convert(mole_run, "--to", layout, "--out", tmp_path / "out") == 2
        assert "--expert k, uniform or usage writes an approximation" in capsys.readouterr().err
    assert convert(mole_run, "--to", "peft", "--expert", "7", "--out", tmp_path / "out") == 2
    assert "it must be 0 to 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

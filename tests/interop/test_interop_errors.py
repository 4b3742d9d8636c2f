"""Files that lie, lack something or hold code: one clear line, exit code 2, nothing written, nothing executed."""

import json
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds.foreign_models import make_clip, make_llava, make_llava_hf, make_llava_lora, projector_state
from worlds.interop_tools import close, convert, load, our_logits, refused
from worlds.tiny_models import make_language_model

from llava_mole import cli
from llava_mole.interop import tensors
from llava_mole.interop.causal_lm import fingerprint_language_model
from llava_mole.interop.tensors import open_weights
from llava_mole.model.language_model import load_language_model


class Malicious:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("original")
    tower = make_clip(tmp_path / "clip")
    make_language_model(tmp_path / "vicuna")
    make_llava(tmp_path / "llava", tower=tower)
    make_llava_lora(tmp_path / "lora", tmp_path / "vicuna")
    torch.save({f"model.mm_projector.{k}": v for k, v in projector_state().items()}, tmp_path / "p.bin")
    return tmp_path


@pytest.fixture
def world(original: Path, tmp_path: Path) -> Path:
    """A copy of a tower, a language model and LLaVA's three layouts."""
    return shutil.copytree(original, tmp_path / "world")


@pytest.mark.parametrize("name", ["p.bin", "released.pt", "lora/non_lora_trainables.bin", "legacy.bin"])
def test_code_in_a_pickle_is_never_run(name: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = world / "executed"
    state = {"model.mm_projector.0.weight": torch.zeros(1), "x": Malicious(marker)}
    if name == "legacy.bin":
        (world / name).write_bytes(pickle.dumps(state))
    else:
        torch.save(state, world / name)
    source = world / name if name.endswith((".pt", "p.bin", "legacy.bin")) else world / "lora"
    options = ("--model-base", world / "vicuna", "--vision-tower", world / "clip", "--out", world / "out")
    refused(
        capsys, "is damaged or holds more than tensors, which is never executed", source, "--to", "checkpoint", *options
    )
    assert cli.main(["inspect", str(source)]) == 2
    assert not marker.exists()
    assert not (world / "out").exists()


def change(file: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a file, or remove them (None)."""
    binary = file.suffix == ".bin"
    state = torch.load(file, weights_only=True) if binary else load_file(file)
    state = {name: value for name, value in {**state, **changes}.items() if value is not None}
    torch.save(state, file) if binary else save_file(state, file, metadata={"format": "pt"})


PROJECTOR = "model.mm_projector.2.bias"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("llava/model.safetensors", {NORM: None}, f"1 missing: {NORM}"),
        ("llava/model.safetensors", {"model.layers.9.x": torch.ones(1)}, "1 unexpected: model.layers.9.x"),
        (
            "llava/model.safetensors",
            {"model.image_newline": torch.ones(1)},
            "1 unexpected tensor: model.image_newline",
        ),
        ("llava/model.safetensors", {NORM: torch.ones(7)}, f"{NORM} is (7,), needed is (32,)"),
        ("llava/model.safetensors", {NORM: torch.full((32,), torch.nan)}, f"{NORM} has values that are not finite"),
        ("llava/model.safetensors", {PROJECTOR: None}, "no linear or mlp<N>x_gelu projector"),
        ("llava/model.safetensors", {PROJECTOR: torch.ones(5)}, "2.bias is (5,), needed is (32,)"),
        ("p.bin", {"model.embed_tokens.weight": torch.ones(3, 2)}, "1 unexpected tensor beside the projector"),
        (
            "lora/non_lora_trainables.bin",
            {"base_model.model.lm_head.weight": torch.ones(3, 2)},
            "1 unexpected tensor beside the projector: base_model.model.lm_head.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(
    file: str, changes: dict[str, torch.Tensor], message: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(world / file, **changes)
    source = world / file if file == "p.bin" else (world / file).parent
    base = () if file.startswith("llava") else ("--model-base", world / "vicuna")
    before = sorted(world.iterdir())
    refused(
        capsys, message, source, "--to", "checkpoint", *base, "--vision-tower", world / "clip", "--out", world / "out"
    )
    assert sorted(world.iterdir()) == before, "nothing half-written is left"


def test_a_list_of_many_is_shortened(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"model.extra.{n}": torch.ones(1) for n in range(12)}
    change(world / "llava" / "model.safetensors", **state)
    options = ("--vision-tower", world / "clip", "--out", world / "out")
    refused(
        capsys,
        "12 unexpected: model.extra.0, model.extra.1, model.extra.10, model.extra.11, model.extra.2 and 7 more",
        world / "llava",
        "--to",
        "checkpoint",
        *options,
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mm_projector_type", "linear", "mm_projector_type 'linear', but"),
        ("mm_vision_select_feature", "cls_patch", "needed is 'patch'"),
        ("image_aspect_ratio", "anyres", "supported are 'pad' and 'square'"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end True"),
        ("mm_vision_select_layer", 99, "vision tower layer 99; allowed are -3..-1 and 1..3"),
        ("mm_vision_select_layer", [-2, -5], "vision tower layer [-2, -5]; allowed are"),
        ("hidden_size", "wide", "not a causal LM"),
        ("mm_patch_merge_type", "spatial_unpad", "mm_patch_merge_type 'spatial_unpad'"),
    ],
)
def test_other_architectures_are_refused(
    key: str, value: object, message: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = world / "llava" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    options = ("--vision-tower", world / "clip", "--out", world / "out")
    refused(capsys, message, world / "llava", "--to", "checkpoint", *options)


def test_adapters_of_another_shape_or_place_are_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--to", "checkpoint", "--model-base", world / "vicuna", "--vision-tower", world / "clip")
    file = world / "lora" / "adapter_model.safetensors"
    good = load_file(file)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    for changes, message in (
        ({name: None}, "1 missing: model.layers.0.mlp.up_proj.lora_A"),
        ({name: torch.zeros(4, 9)}, "model.layers.0.mlp.up_proj.lora_A is (4, 9), needed is (4, 32)"),
        (
            {"base_model.model.model.vision_tower.vision_tower.x.q_proj.lora_A.weight": torch.zeros(4, 9)},
            "the language model has no linear for 1 tensor",
        ),
    ):
        save_file({n: v for n, v in {**good, **changes}.items() if v is not None}, file)
        refused(capsys, message, world / "lora", *options, "--out", world / "out")
    save_file(good, file)
    # Old names: PEFT's `.default.`, and a doubled `model.`.
    save_file({n.replace(".lora_A.", ".lora_A.default.").replace("model.model.", "model.model.model."): v
               for n, v in good.items()}, file)  # fmt: skip
    assert convert(world / "lora", *options, "--out", world / "old") == 0
    save_file(good, file)
    assert convert(world / "lora", *options, "--out", world / "new") == 0
    close(our_logits(load(world / "old"))[0], our_logits(load(world / "new"))[0])
    (world / "lora" / "non_lora_trainables.bin").unlink()
    refused(
        capsys,
        "no non_lora_trainables.bin, which LLaVA writes only at the end",
        world / "lora",
        *options,
        "--out",
        "x",
    )


def test_a_missing_part_is_named(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ("--to", "checkpoint", "--out", world / "out")
    refused(capsys, "name the directory of the one it was trained on with --model-base", world / "lora", *to)
    base = ("--model-base", world / "vicuna")
    refused(capsys, "names 'openai/clip-vit-large-patch14-336'", world / "lora", *to, *base)
    refused(capsys, "give the directory of the tower it started from with --vision-tower", world / "llava", *to)
    refused(capsys, "holds its own language model; leave --model-base out", world / "llava", *to, *base)
    refused(capsys, "it needs no conversion: name it as model.language_model", world / "vicuna", *to)
    refused(capsys, "there are checkpoint, projector,", world / "llava", "--to", "onnx", "--out", world / "out")
    refused(capsys, "make it a checkpoint first", world / "llava", "--to", "llava-hf", "--out", world / "out")
    refused(capsys, "template 'nope' does not exist", world / "llava", *to, "--template", "nope")
    refused(capsys, "does not exist", world / "nowhere", *to)


def test_nothing_is_overwritten_without_being_told(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (world / "p.bin", "--to", "projector")
    assert convert(*command, "--out", world / "q.bin") == 0
    refused(capsys, "exists; give another --out, or --overwrite", *command, "--out", world / "q.bin")
    assert convert(*command, "--out", world / "q.bin", "--overwrite") == 0
    tower = (world / "clip", "--to", "open-clip")
    precious = world / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    refused(capsys, "no conversion has written", *tower, "--out", precious, "--overwrite")
    assert (precious / "thesis.tex").exists()
    assert convert(*tower, "--out", world / "tower") == 0
    (world / "tower" / "old").touch()
    assert convert(*tower, "--out", world / "tower", "--overwrite") == 0
    assert not (world / "tower" / "old").exists()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("llava", "checkpoint"), ("p.bin", "out.bin"), ("p.bin", "out.safetensors"), ("clip", "open-clip"),
        ("run", "llava-lora"), ("run", "llava-hf"),
    ],
)  # fmt: skip
def test_a_full_disk_leaves_nothing(source: str, target: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if source == "run":
        to_run = ("--to", "checkpoint", "--model-base", world / "vicuna", "--vision-tower", world / "clip")
        assert convert(world / "lora", *to_run, "--out", world / "run") == 0
    tower = ("--vision-tower", world / "clip") if target == "checkpoint" else ()
    to = ("--to", "projector" if target.startswith("out") else target, "--out", world / target)
    before = sorted(world.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # what a full disk is to whoever writes more
    try:
        refused(capsys, "could not be written", world / source, *to, *tower)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(world.iterdir()) == before


def test_many_shards_keep_every_tensor(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--to", "checkpoint", "--vision-tower", world / "clip")
    assert convert(world / "llava", *options, "--out", world / "one") == 0
    monkeypatch.setattr(tensors, "SHARD_BYTES", 40_000)
    assert convert(world / "llava", *options, "--out", world / "many") == 0
    names = sorted(path.name for path in (world / "many" / "language_model").glob("*.safetensors"))
    assert len(names) >= 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    one, many = (open_weights(world / run / "language_model") for run in ("one", "many"))
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert torch.equal(our_logits(load(world / "one"))[0], our_logits(load(world / "many"))[0])
    os.remove(world / "many" / "language_model" / names[1])
    assert cli.main(["inspect", str(world / "many" / "language_model")]) == 2


def test_fingerprints_read_from_files_are_those_of_loaded_models(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    make_language_model(tmp_path / "llama")
    small = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    tied = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        **small,  # type: ignore[arg-type]
    )
    LlamaForCausalLM(tied).bfloat16().save_pretrained(tmp_path / "tied")
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, **small)).save_pretrained(tmp_path / "gpt2")  # type: ignore[arg-type]
    for name in ("llama", "tied", "gpt2"):
        assert fingerprint_language_model(tmp_path / name) == load_language_model(str(tmp_path / name))[1], name


def test_an_incomplete_llava_hf_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_llava_hf(tmp_path / "hf", "new")
    to = ("--to", "checkpoint", "--out", tmp_path / "out")
    shutil.copytree(tmp_path / "hf", tmp_path / "cut")
    (tmp_path / "cut" / "model-00002-of-00002.safetensors").unlink()
    refused(capsys, "lacks 1 of 2 shards: model-00002-of-00002.safetensors", tmp_path / "cut", *to)
    file = tmp_path / "hf" / "model-00001-of-00002.safetensors"
    removed = next(iter(load_file(file)))
    change(file, **{removed: None})
    refused(capsys, f"1 missing: {removed}", tmp_path / "hf", *to)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key, value, message in (
        ("text_config", {"model_type": "no-such"}, "is not a LLaVA configuration"),
        ("vision_feature_select_strategy", "full", "needed are one layer and 'default'"),
        ("projector_hidden_act", "relu", "needed is 'gelu' with bias"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, key: value}))
        refused(capsys, message, tmp_path / "hf", *to)

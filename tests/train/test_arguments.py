"""The command line of training: LLaVA's flags are answered, mistyped keys are recognised, every key has a meaning."""

import re
from pathlib import Path

import pytest

from llava_mole.cli import main
from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.config import RunConfig, options, parse_run_config
from llava_mole.train.arguments import LLAVA_FLAGS, parse_arguments
from llava_mole.train.preflight import check_inputs

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny" / "finetune_mole.yaml")
PAGE = (ROOT / "docs" / "from_llava.md").read_text(encoding="utf-8")
KEYS = {option.key for option in options(RunConfig)}
LLAVA_SCRIPTS = """
bf16 bits data_path dataloader_num_workers deepspeed evaluation_strategy gradient_accumulation_steps
gradient_checkpointing group_by_modality_length image_aspect_ratio image_folder lazy_preprocess learning_rate
logging_steps lora_alpha lora_enable lora_r lr_scheduler_type mm_projector_lr mm_projector_type mm_use_im_patch_token
mm_use_im_start_end mm_vision_select_layer model_max_length model_name_or_path num_train_epochs output_dir
per_device_eval_batch_size per_device_train_batch_size pretrain_mm_mlp_adapter report_to save_steps save_strategy
save_total_limit tf32 tune_mm_mlp_adapter version vision_tower warmup_ratio weight_decay
""".split()
"""Every flag of pretrain.sh, finetune.sh, finetune_lora.sh, finetune_qlora.sh and finetune_task_lora.sh."""
LLAVA_ARGUMENTS = """
model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer
pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_vision_select_feature data_path
lazy_preprocess is_multimodal image_folder image_aspect_ratio cache_dir optim remove_unused_columns
freeze_mm_mlp_adapter mpt_attn_impl
model_max_length double_quant quant_type bits lora_enable lora_r lora_alpha lora_dropout lora_weight_path
lora_bias mm_projector_lr group_by_modality_length
""".split()
"""Every field of ModelArguments, DataArguments and TrainingArguments of its train.py."""


# Flags of LLaVA


def test_every_flag_of_llava_has_an_answer() -> None:
    assert not [flag for flag in (*LLAVA_SCRIPTS, *LLAVA_ARGUMENTS) if flag not in LLAVA_FLAGS]


@pytest.mark.parametrize("flag", LLAVA_FLAGS)
def test_an_answer_names_a_key_of_ours_or_a_reason(flag: str) -> None:
    answer = LLAVA_FLAGS[flag]
    assert answer.ours or answer.note
    named = re.findall(r"`([a-z_]+(?:\.[a-zA-Z_]+)+|stage)\b", f"`{answer.ours}` {answer.note}")
    for key in named:
        assert key.replace("NAME", "*") in KEYS, f"{flag}: {key}"
    if value := answer.ours.partition(": ")[2]:
        parse_run_config([TINY, "--adapter.method=none", f"--{answer.ours.partition(':')[0]}", value])


def test_flags_of_llava_are_answered_one_a_line() -> None:
    given = ["--mm_projector_lr", "2e-5", "--lora-r=128", "--bf16", "True", "--mm_use_im_start_end", "False"]
    with pytest.raises(ConfigError) as refused:
        parse_arguments([TINY, *given])
    first, *lines, last = str(refused.value).splitlines()
    assert "flags of LLaVA's scripts" in first
    assert "docs/from_llava.md" in last
    assert [line.split()[:2] for line in lines] == [
        ["--mm_projector_lr", "train.projector_learning_rate"],
        ["--lora-r", "adapter.rank"],
        ["--bf16", "train.precision:"],
        ["--mm_use_im_start_end", "(leave"],
    ]


def test_the_page_shows_the_table() -> None:
    rows = {}
    for line in PAGE.splitlines():
        if match := re.match(r"\| `--(\w+)` \| (.*?) \| (.*?) \|$", line):
            rows[match[1]] = (match[2].strip("` "), match[3])
    expected = {flag: (answer.ours or "none", answer.note) for flag, answer in LLAVA_FLAGS.items()}
    assert rows == expected


# Mistyped keys


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--train.learningrate", "1e-3"], "--train.learningrate is unknown; did you mean --train.learning_rate?"),
        (["--learning_rate", "1e-3"], "--learning_rate is unknown; did you mean --train.learning_rate?"),
        (["--model.vision_tower.nme", "x"], "did you mean --model.vision_tower.name?"),
        (["train.epochs=3"], "train.epochs=3 is unknown; did you mean --train.epochs?"),
        (["--zzz", "1", "--train.epoch", "1"], "--zzz is unknown; --train.epoch is unknown; did you mean"),
        (["--train.batching", "paked"], "--train.batching must be one of 'packed', 'padded', 'grouped', not 'paked'"),
        (["--train.max_steps", "ten"], "--train.max_steps must be a whole number or null, not 'ten'"),
    ],
)
def test_a_mistyped_option_suggests_the_nearest(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_run_config([TINY, *given])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: finetune\ntrain:\n  output_dir: x\n  learningrate: 1\n", "a.yaml:4: train.learningrate is unknown; "
         "did you mean train.learning_rate?"),
        ("stage: finetune\ntrian: {output_dir: x}\n", "a.yaml:2: trian.output_dir is unknown; did you mean "
         "train.output_dir?"),
        ("stage: finetune\ntrain: {output_dir: x}\ndata:\n  sources:\n    a:\n      anotations: a.json\n",
         "a.yaml:6: data.sources.a.anotations is unknown; did you mean data.sources.a.annotations?"),
        ("stage: finetune\ntrain: {output_dir: x}\ndata: b.yaml\n", "b.yaml:2: data.max_lenght is unknown; did you "
         "mean data.max_length?"),
        ("stage: finetune\ntrain:\n  output_dir: x\n  epochs: many\n", "a.yaml:4: train.epochs must be a whole number, "
         "not 'many'"),
    ],
)  # fmt: skip
def test_a_mistyped_key_of_a_file_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("template: plain\nmax_lenght: 2\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_run_config([str(tmp_path / "a.yaml")])


# Missing inputs


def test_missing_inputs_come_one_a_line(tmp_path: Path) -> None:
    places = [f"--model.language_model={tmp_path}/lm", f"--model.vision_tower.weights={tmp_path}/tower"]
    config = parse_run_config([TINY, *places])
    with pytest.raises(WeightsError) as refused:
        check_inputs(config.model, config.data, projector_weights=None, init_from=None)
    first, *lines = str(refused.value).splitlines()
    assert re.fullmatch(r"this run lacks \d+ inputs:", first)
    assert f"  model.language_model = {tmp_path}/lm" in lines
    assert f"  model.vision_tower.weights = {tmp_path}/tower" in lines
    assert all(len(line) <= 120 for line in lines if " = " not in line)


# The help


def test_every_key_has_a_meaning_in_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    words = " ".join(printed.split())
    for option in options(RunConfig):
        assert option.meaning, f"{option.key} has no text below it in its dataclass"
        assert f"--{option.key.replace('*', 'NAME')}" in words, option.key
        assert "".join(option.meaning.split()) in "".join(words.split()), option.key  # lines break at hyphens, too
    assert "--dry-run" in words
    assert printed.splitlines()[0] == "usage: llava-mole train CONFIG.yaml [--key.sub VALUE ...]"

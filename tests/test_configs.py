"""Every shipped configuration loads; every mistake in one is named; the package passes on sections, not all of it."""

import ast
import dataclasses
import logging
from pathlib import Path

import pytest
import yaml

from llava_mole.common.errors import ConfigError
from llava_mole.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    check_batch,
    config_to_dict,
    load_config,
    parse_run_config,
    save_config,
)

ROOT = Path(__file__).parent.parent
RUNS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "stage:" in p.read_text(encoding="utf-8"))
PARTS = sorted(p for folder in ("models", "mixtures") for p in (ROOT / "configs" / folder).rglob("*.yaml"))
MINIMAL = ["--stage", "finetune", "--train.output_dir", "x", "--data.sources.a.annotations", "a.json"]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(ROOT)))
def test_run_configurations_load(path: Path) -> None:
    config = parse_run_config([str(path)])
    assert config.data.sources
    assert config == load_config(path)
    assert path.read_text(encoding="utf-8").startswith("#"), "a configuration opens with what it reproduces"
    assert "bash scripts/" in path.read_text(encoding="utf-8"), "and with the command that runs it"


@pytest.mark.parametrize("path", PARTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_parts_load(path: Path) -> None:
    kind = {"models": ModelConfig, "mixtures": DataConfig}[path.parent.name]
    key = {"models": "model", "mixtures": "data"}[path.parent.name]
    # Tiles need a key of each section.
    other = {"model": ["--data.image_aspect_ratio", "anyres"], "data": ["--model.projector", "mlp2x_gelu+newline"]}
    config = parse_run_config([*MINIMAL, f"--{key}", str(path), *(other[key] if "anyres" in path.stem else [])])
    assert isinstance(getattr(config, key), kind)


def test_paper_recipe() -> None:
    pretrain, mole = load_config(ROOT / "configs/pretrain.yaml"), load_config(ROOT / "configs/finetune_mole.yaml")
    assert (pretrain.train.global_batch_size, pretrain.train.warmup_steps) == (256, 500)
    assert pretrain.train.min_learning_rate == 2e-5
    assert (mole.train.global_batch_size, mole.train.warmup_steps, mole.train.epochs) == (64, 500, 1)
    assert (mole.train.learning_rate, mole.train.min_learning_rate) == (2e-5, 2e-6)
    assert (mole.adapter.rank, mole.adapter.num_experts, mole.data.max_length) == (32, 3, 4096)


def test_lora_and_mole_differ_in_the_adapter_only() -> None:
    for folder in ("configs", "configs/tiny"):
        mole, lora = (config_to_dict(load_config(ROOT / folder / f"finetune_{m}.yaml")) for m in ("mole", "lora"))
        assert mole["adapter"]["rank"] == lora["adapter"]["rank"]
        assert mole["adapter"]["alpha"] == lora["adapter"]["alpha"]
        for config in (mole, lora):
            config.pop("adapter")
            config["train"].pop("output_dir")
            config["train"].pop("router_learning_rate")
        assert mole == lora


def test_overrides_and_round_trip(tmp_path: Path) -> None:
    config = parse_run_config(
        [str(ROOT / "configs/finetune_mole.yaml"), "--data.mixture.pathvqa", "0.5", "--train.learning_rate", "3e-4"]
    )
    assert config.data.mixture["pathvqa"] == 0.5
    assert config.data.mixture["ureader"] == 1
    assert config.train.learning_rate == 3e-4
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


MERGED = {
    "both name all": ("{sources: {a: {annotations: a}}}", ""),
    "CONFIG has more": (
        "{max_length: 9, mixture: {a: 2}, sources: {a: {annotations: a}}}",
        "data.max_length, data.mixture",
    ),
    "CONFIG names a file": ("parts/old.yaml", "data.image_draft"),
    "FILE has more": ("{}", ""),
}


@pytest.mark.parametrize("form", ["{option} {file}", "{option}={file}"])
@pytest.mark.parametrize("name", MERGED)
def test_a_section_from_a_file_says_what_it_leaves(
    name: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section, kept = MERGED[name]
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "old.yaml").write_text("sources: {b: {annotations: b}}\nimage_draft: true\n")
    config, file = tmp_path / "run.yaml", tmp_path / "new.yaml"
    config.write_text(f"stage: finetune\ntrain: {{output_dir: x}}\ndata: {section}\n")
    file.write_text("sources: {a: {annotations: c.json}}\nvalidation_samples: 0\n")
    with caplog.at_level(logging.INFO, "llava_mole"):
        data = parse_run_config([str(config), *form.format(option="--data", file=file).split()]).data
    assert data.sources["a"].annotations == "c.json"
    assert list(data.sources) == ["a"]
    said = [record.message for record in caplog.records]
    assert said == ([f"--data {file} is merged into {config}, which still gives {kept}"] if kept else [])


SECTIONS = [f.name for f in dataclasses.fields(RunConfig) if f.name in ("train", "model") or "Config" in str(f.type)]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_says_it(section: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = config_to_dict(parse_run_config(MINIMAL))
    save_config(values, tmp_path / "run.yaml")
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(dict(list(values[section].items())[:1])))
    with caplog.at_level(logging.INFO, "llava_mole"):
        parse_run_config([str(tmp_path / "run.yaml"), f"--{section}", str(tmp_path / "part.yaml")])
    (record,) = caplog.records
    assert all(f"{section}.{key}" in record.message for key in list(values[section])[1:])


MISTAKES = {
    "unknown key": (["--train.learning_rat", "1"], "learning_rat"),
    "unknown nested key": (["--model.vision_tower.nme", "x"], "nme"),
    "wrong type": (["--train.warmup_steps", "many"], "train.warmup_steps.*many"),
    "wrong choice": (["--adapter.method", "moe"], "adapter.method.*none.*lora.*mole.*moe"),
    "negative lambda": (["--data.mixture.a", "-1"], "data.mixture.a is -1.0; lambda must be a finite number >= 0"),
    "unknown source": (["--data.mixture.b", "1"], "data.mixture.b: no such source"),
    "empty mixture": (["--data.mixture.a", "0"], "data.mixture is empty"),
    "zero batch": (["--train.global_batch_size", "0"], "train.global_batch_size is 0"),
    "negative rate": (["--train.learning_rate", "-1"], "train.learning_rate is -1"),
    "floor above peak": (["--train.min_learning_rate", "1"], "train.min_learning_rate 1.0 is above"),
    "rank zero": (["--adapter.rank", "0"], "adapter.rank is 0"),
    "no experts": (["--adapter.num_experts", "0"], "adapter.num_experts is 0"),
    "adapter in stage 1": (["--stage", "pretrain", "--adapter.method", "lora"], "stage 'pretrain'.*use 'none'"),
    "nothing to train": (["--stage", "pretrain", "--train_projector", "false"], "nothing would train"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    arguments, message = MISTAKES[name]
    with pytest.raises(ConfigError, match=message) as error:
        parse_run_config([*MINIMAL, *arguments])
    assert "\n" not in str(error.value)


def test_mistakes_in_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"stage": "finetune", "train": {"output_dir": "x", "lr": 1}}))
    with pytest.raises(ConfigError, match=r"bad\.yaml.*lr"):
        load_config(path)
    path.write_text("stage: [finetune")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"none\.yaml' does not exist"):
        load_config(tmp_path / "none.yaml")


def test_a_batch_that_cannot_be_spread_over_the_ranks_is_refused() -> None:
    check_batch("padded", 64, 2, 8)
    check_batch("packed", 65, 3, 8)
    for batching in ("padded", "grouped"):
        with pytest.raises(ConfigError, match=r"global_batch_size 64 is not a multiple .* 3 x 8 ranks = 24"):
            check_batch(batching, 64, 3, 8)
    with pytest.raises(ConfigError, match="global_batch_size 4 is smaller than the 8 ranks"):
        check_batch("packed", 4, 1, 8)


def test_only_doors_see_the_whole_configuration() -> None:
    """Everything else takes its own section or plain values."""
    doors = {
        "config.py",
        "train/arguments.py",
        "train/train.py",
        "train/dry_run.py",
        "model/builder.py",
        "analysis/opening.py",
    }
    doors |= {"analysis/check/cli.py", "analysis/plan/cli.py"}
    checkpoints = {"interop/importing.py", "interop/own.py"}  # which write and read a checkpoint's config.yaml
    studies = {"study/cells.py", "study/continual.py"}  # which write the configurations of the runs that they start
    seen = set()
    for path in (ROOT / "llava_mole").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if "RunConfig" in (getattr(node, "name", None), getattr(node, "id", None), getattr(node, "attr", None)):
                seen.add(path.relative_to(ROOT / "llava_mole").as_posix())
    assert not sorted(seen - doors - checkpoints - studies)

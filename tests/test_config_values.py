"""Every number of a configuration has its range, and every path may use `~` and environment variables."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mole import config as configuration
from llava_mole.common.errors import ConfigError
from llava_mole.config import PATHS, RANGES, RunConfig, load_config, parse_run_config, save_config
from llava_mole.mole import config as mole
from llava_mole.mole.config import MoleConfig

MINIMAL = ["--stage", "finetune", "--train.output_dir", "x", "--data.sources.a.annotations", "a.json"]
NEEDED = {
    "RunConfig": {"stage": "finetune", "train": configuration.TrainConfig(output_dir="x")},
    "TrainConfig": {"output_dir": "x"},
    "SourceConfig": {"annotations": "a.json"},
}


def options(section: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
    """Key, section and field of every option below a section."""
    for option in dataclasses.fields(section):
        kinds = get_args(option.type) or (option.type,)
        nested = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if nested is None:
            yield f"{prefix}{option.name}", section, option
        else:
            yield from options(nested, f"{prefix}{option.name}.{'*.' * (get_origin(option.type) is dict)}")


def is_number(option: dataclasses.Field[Any]) -> bool:
    kinds = get_args(option.type) or (option.type,)
    return bool({int, float} & set(kinds)) and not str(option.type).startswith("dict")


def attempt(make: Callable[[], Any], refusal: type[Exception]) -> tuple[Any, str]:
    """What `make` returns and an empty text, or None and its refusal."""
    try:
        return make(), ""
    except refusal as error:
        return None, str(error)


NUMBERS = {key: (section, option) for key, section, option in options(RunConfig) if is_number(option)}
ANYTHING = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 1, 0.0, -0.0, 0.5, 1.0, math.inf, -math.inf, math.nan, 2**63]),
    st.booleans(), st.none(), st.text(max_size=3), st.lists(st.integers(), max_size=1),
)  # fmt: skip


def test_every_number_has_a_range() -> None:
    assert set(NUMBERS) == set(RANGES)
    assert {option.name for option in dataclasses.fields(MoleConfig) if is_number(option)} == {
        *mole.RANGES, "layers_to_transform",  # PEFT's, with its own meaning
    }  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
def test_a_section_takes_numbers_of_their_range_only(key: str) -> None:
    section, option = NUMBERS[key]
    kinds = get_args(option.type) or (option.type,)

    @settings(max_examples=150, deadline=None)
    @given(value=ANYTHING)
    def one(value: Any) -> None:
        made, refusal = attempt(
            lambda: section(**NEEDED.get(section.__name__, {}), **{option.name: value}), ConfigError
        )
        assert key in refusal or made is not None
        assert "\n" not in refusal
        if made is None:
            return
        taken = getattr(made, option.name)
        if value is None:
            assert NoneType in kinds
            return
        assert type(value) in kinds or (type(value) is int and float in kinds)
        assert taken == value
        assert RANGES[key].low <= value <= RANGES[key].high
        assert math.isfinite(value)

    one()


@pytest.mark.parametrize("key", mole.RANGES)
def test_mole_takes_numbers_of_their_range_only(key: str) -> None:
    @settings(max_examples=100, deadline=None)
    @given(value=ANYTHING)
    def one(value: Any) -> None:
        made, refusal = attempt(lambda: MoleConfig(**{"num_experts": 3, "r": 4, key: value}), ValueError)
        assert key in refusal or made is not None
        if made is None:
            return
        low, high, _ = mole.RANGES[key]
        taken = getattr(made, key)
        assert taken is None if value is None and key in mole.NONE_ALLOWED else low <= taken <= high
        assert value is None or taken == value

    one()


@settings(max_examples=250, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(NUMBERS)), ANYTHING, min_size=1, max_size=3))
def test_the_command_line_refuses_what_a_section_refuses(changes: dict[str, Any]) -> None:
    arguments = [word for key, value in changes.items() for word in (f"--{key}", yaml.safe_dump(value).split("\n")[0])]
    parsed, refusal = attempt(lambda: parse_run_config([*MINIMAL, *arguments]), ConfigError)
    assert "\n" not in refusal
    for key in changes if parsed else ():
        value: Any = parsed
        for name in key.split("."):
            value = getattr(value, name)
        assert value is None or (RANGES[key].low <= value <= RANGES[key].high and math.isfinite(value))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train.max_steps", "-1", "must be at least 1"),
        ("train.max_steps", "0", "must be at least 1"),
        ("tracker.log_every", "0", "must be at least 1"),
        ("train.seed", "-1", "must not be negative"),
        ("train.num_workers", "-1", "must not be negative"),
        ("train.projector_learning_rate", "-1e-4", "must not be negative"),
        ("train.router_learning_rate", "-0.1", "must not be negative"),
        ("train.validate_every", "-5", "must not be negative"),
        ("train.save_every", "0", "must be at least 1"),
        ("train.pack_length", "0", "must be at least 1"),
        ("train.learning_rate", "1e300", "must be a finite number below 2"),
        ("train.learning_rate", ".inf", "must be a finite number|Expected a"),
        ("train.weight_decay", ".nan", "must be a finite number|Expected a"),
        ("train.warmup_ratio", "1.5", "is a share, 0 to 1"),
        ("adapter.alpha", "0", "must be above 0"),
        ("adapter.dropout", "1", "must be at least 0 and below 1"),
        ("check.huge_pixels", "-1", "must be at least 1"),
        ("data.max_length", "0", "must be at least 1"),
    ],
)
def test_numbers_that_mean_something_else_elsewhere_are_refused(key: str, value: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.*({rule})"):
        parse_run_config([*MINIMAL, f"--{key}={value}"])


def test_warm_up_is_a_count_or_a_share() -> None:
    assert parse_run_config(MINIMAL).train.warmup_steps == 500
    share = parse_run_config([*MINIMAL, "--train.warmup_ratio", "0.03"]).train
    assert (share.warmup_steps, share.warmup_ratio) == (None, 0.03)
    with pytest.raises(ConfigError, match=r"warmup_steps is 5 and train.warmup_ratio is 0.03: give one"):
        parse_run_config([*MINIMAL, "--train.warmup_ratio", "0.03", "--train.warmup_steps", "5"])


# Paths


def set_path(values: dict[str, Any], key: str, path: str) -> None:
    """Set a key of PATHS in a nested configuration."""
    *parents, last = key.replace("*", "a").split(".")
    for name in parents:
        values = values.setdefault(name, {})
    values[last] = [path] if key == "check.evaluation_images" else path


def get_path(config: RunConfig, key: str) -> str:
    value: Any = config
    for name in key.replace("*", "a").split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value[0] if isinstance(value, list) else value


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


def written(home: Path, key: str, path: str) -> Path:
    values: dict[str, Any] = {
        "stage": "finetune", "train": {"output_dir": "x"}, "data": {"sources": {"a": {"annotations": "a.json"}}},
    }  # fmt: skip
    set_path(values, key, path)
    file = home / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("key", PATHS)
def test_every_path_is_expanded(key: str, home: Path) -> None:
    for given_, expected in (
        ("~/a", f"{home}/a"), ("$WHERE/b", f"{home}/scratch/b"), ("${WHERE}/c", f"{home}/scratch/c"),
        ("~/$$/d", f"{home}/$$/d"), ("e~/f", "e~/f"),
    ):  # fmt: skip
        config = parse_run_config([str(written(home, key, given_))])
        assert get_path(config, key) == expected
        save_config(config, home / "saved.yaml")
        assert load_config(home / "saved.yaml") == config


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("path", ["$NOWHERE/a", "x/${NOWHERE}", "${}/a", "~no-such-user-here/a", "", "a\0b"])
def test_a_path_that_cannot_be_expanded_is_refused(key: str, path: str, home: Path) -> None:
    with pytest.raises(ConfigError, match=key.replace("*", "a") + " is .*(not set|no such user|must be a path)"):
        parse_run_config([str(written(home, key, path))])


def test_the_configuration_file_itself_is_expanded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(home, "init_from", "$WHERE/run")
    for name in ("~/run.yaml", "$HOME/run.yaml", "${HOME}/run.yaml", str(file)):
        assert parse_run_config([name]).init_from == f"{home}/scratch/run"
    with pytest.raises(ConfigError, match="the config file is .*'NOWHERE' is not set"):
        parse_run_config(["$NOWHERE/run.yaml"])


def test_every_text_that_names_a_file_is_a_path() -> None:
    """A new text option is a path or is listed here."""
    texts = {key for key, _, option in options(RunConfig) if str in (get_args(option.type) or (option.type,))}
    assert texts - set(PATHS) == {
        "model.projector", "data.template", "tracker.wandb_project", "train.accept_changed", "adapter.options",
        "data.mixture",
    }  # fmt: skip
    assert set(PATHS) <= texts


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_steps", 0), ("seed", -1), ("validate_every", -1), ("router_learning_rate", -0.5), ("output_dir", "$GONE/x")],
)
def test_what_an_earlier_version_ran_still_loads(key: str, value: Any, tmp_path: Path) -> None:
    """The saved configuration of a checkpoint is read as it is; a new run with it is refused."""
    save_config(parse_run_config(MINIMAL), tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    saved["train"][key] = value
    del saved["train"]["warmup_ratio"], saved["data"]["special_tokens"]  # newer than that version
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    loaded = load_config(tmp_path / "config.yaml")
    assert getattr(loaded.train, key) == value
    assert (loaded.train.warmup_steps, loaded.data.special_tokens) == (500, "keep")
    with pytest.raises(ConfigError, match=f"train.{key}"):
        parse_run_config([str(tmp_path / "config.yaml")])
    with pytest.raises(ConfigError, match="train.epochs"):
        parse_run_config([*MINIMAL, "--train.epochs", "0"])  # checks are on again

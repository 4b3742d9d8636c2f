"""Study files: what they may say, grids, and the message for everything else."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from worlds.study_world import write_study

from llava_mole.common.errors import ConfigError
from llava_mole.study.cells import arm_config
from llava_mole.study.cli import main
from llava_mole.study.definition import expand_grid, matching, read_study

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
STUDIES = [path for path in SHIPPED if path.stem != "paper"]


def test_a_grid_makes_every_combination_but_the_excluded_ones() -> None:
    arms = expand_grid(
        {
            "method": "mole",
            "name": "{preset}-r{rank}",
            "preset": ["paper", "coupled"],
            "rank": ["1x", "2x"],
            "exclude": [{"preset": "coupled", "rank": "2x"}],
            "include": [{"name": "extra", "preset": "best", "rank": 3, "experts": 4}],
        },
        "here",
    )
    assert {name: (arm.method, arm.preset, arm.rank) for name, arm in arms.items()} == {
        "paper-r1x": ("mole", "paper", "1x"),
        "paper-r2x": ("mole", "paper", "2x"),
        "coupled-r1x": ("mole", "coupled", "1x"),
        "extra": ("mole", "best", 3),
    }
    assert arms["extra"].experts == 4


def test_a_grid_over_mixtures_gates_modes_and_bases_names_its_arms() -> None:
    arms = expand_grid({"mixture": [[1, 0], [1, 1]], "method": "mole", "gate": ["none", "prob"]}, "here")
    assert list(arms) == [
        "mixture=10,gate=none", "mixture=10,gate=prob", "mixture=11,gate=none", "mixture=11,gate=prob"
    ]  # fmt: skip
    assert arms["mixture=11,gate=prob"].mixture == [1, 1]
    single = expand_grid({"mixture": [1, 0], "rank": [1, 2]}, "here")
    assert [arm.mixture for arm in single.values()] == [[1, 0], [1, 0]]
    bases = expand_grid({"base": ["bases/a.yaml", "bases/b.yaml"], "mode": "dense"}, "here")
    assert list(bases) == ["base=a", "base=b"]


GRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "no axis": ({"rank": 1}, "no key has a list of values"),
    "unknown key": ({"rnk": [1, 2]}, "arm 'rnk=1': unknown key rnk"),
    "same name": ({"rank": [1, 2], "name": "x"}, "two combinations are called 'x'"),
    "bad name": ({"rank": [1, 2], "name": "{alpha}"}, "name is '{alpha}', which cannot be filled in"),
    "exclude of an unknown key": (
        {"rank": [1, 2], "exclude": [{"rnk": 2}]},
        "exclude has .*'rnk': 2.*leaves nothing out: an arm has no 'rnk'",
    ),
    "exclude of another value": ({"rank": [1, 2], "exclude": [{"rank": "2x"}]}, "no combination of the grid has these"),
    "bad exclude": ({"rank": [1, 2], "exclude": ["a"]}, "exclude and include are lists of settings"),
}


@pytest.mark.parametrize("name", GRIDS)
def test_mistakes_in_a_grid_are_named(name: str) -> None:
    entry, message = GRIDS[name]
    with pytest.raises(ConfigError, match=message):
        expand_grid(entry, "here")


STUDY_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"arm": {}}, "unknown key arm; allowed are title, base"),
    "no arms": ({"arms": {}}, "it has no arm"),
    "unknown arm key": ({"arms": {"a": {"lr": 1}}}, "unknown key arms.a.lr"),
    "mixture": ({"arms": {"a": {"mixture": [1]}}}, r"arm 'a': mixture is \[1.0\]; give a lambda .* red, blue"),
    "all 0": ({"arms": {"a": {"mixture": [0, 0]}}}, "not all 0"),
    "rank": ({"arms": {"a": {"rank": "0.3x"}}}, r"rank is '0.3x' = 0.6; it must be a whole number"),
    "rank of nothing": ({"arms": {"a": {"rank": {"parameters_of": "b"}}}}, "with the name of another arm of"),
    "rank of itself": ({"arms": {"a": {"rank": {"parameters_of": "a"}}}}, "whose rank is a number"),
    "preset of lora": ({"arms": {"a": {"preset": "coupled"}}}, "need method 'mole', not 'lora'"),
    "steps": ({"arms": {"a": {"steps": "twice"}}}, "arm 'a': steps is 'twice'; give a multiple of the base's"),
    "no steps": ({"arms": {"a": {"steps": "0x"}}}, "steps is '0x'"),
    "experts": ({"arms": {"a": {"method": "mole", "experts": "many"}}}, "experts is 'many'"),
    "seeds": ({"seeds": [1, 1]}, "give at least one, each once"),
    "split": ({"split": "train"}, "split is 'train'; .* has benchmarks for test, validation"),
    "layout": ({"layout": ["lambda"]}, "layout has 'lambda'; it may have mixture, rank, experts"),
    "compare": ({"compare": [["mix"]]}, r"compare has \['mix'\]; give two different arms"),
    "compare unknown": ({"compare": [["mix", "max"]]}, "compare names 'max'; arms are red, mix, mole"),
    "figure": ({"figure3": ["max"]}, "figure3 names 'max'"),
    "paper": ({"arms": {"a": {"paper": "t.9"}}}, "paper is 't.9', and the file of published numbers has no such"),
    "paper table": ({"paper_table": "u"}, "paper_table is 'u'; there are t"),
    "arm name": ({"arms": {"a b": {}}}, "the arm 'a b': use letters"),
    "grid meets arm": ({"grid": [{"rank": [1, 2], "name": "mix"}]}, "two combinations are called 'mix'"),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDY_MISTAKES)
def test_mistakes_in_a_study_are_named(folder: Path, name: str) -> None:
    change, message = STUDY_MISTAKES[name]
    path = write_study(folder, **change)
    with pytest.raises(ConfigError, match=message) as error:
        read_study(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_multiple_is_exact(folder: Path) -> None:
    """1.15 times 100 is 115, which it is not in binary floating-point numbers."""
    base = yaml.safe_load((folder / "base.yaml").read_text())
    (folder / "base.yaml").write_text(yaml.safe_dump(base | {"rank": 100}))
    study = read_study(write_study(folder, arms={"a": {"rank": "1.15x", "steps": "1.15x"}}),
                       settings={"train.max_steps": 100})  # fmt: skip
    assert arm_config(study, "a").adapter.rank == 115
    assert arm_config(study, "a").train.max_steps == 115


OTHER_BASES: dict[str, tuple[dict[str, Any], str]] = {
    "no such split": ({"benchmarks": {"validation": {"colors": "x"}}}, "has other benchmarks for the split 'test'"),
    "other names": (
        {"benchmarks": {"test": {"colours": "x"}}, "routing": {},
         "columns": {c: {"domain": c, "number": f"colours.{c}"} for c in ("red", "blue")}},
        "has other columns",
    ),
    "other domains": ({"domains": {"blue": ["blue"], "red": ["red"]}}, "has other domains"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_BASES)
def test_an_arm_on_another_base_fits_into_the_same_table(folder: Path, name: str) -> None:
    change, message = OTHER_BASES[name]
    base = yaml.safe_load((folder / "base.yaml").read_text())
    (folder / "other.yaml").write_text(yaml.safe_dump(base | change, sort_keys=False))
    with pytest.raises(ConfigError, match=f"arm 'b': .*other.yaml {message}"):
        read_study(write_study(folder, arms={"a": {}, "b": {"base": "other.yaml"}}))


BASE_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "two starts": ({"projector": "x"}, "give either stage1, a run configuration, or projector"),
    "no start": ({"stage1": None}, "give either stage1"),
    "split": ({"benchmarks": {"dev": {}}}, "benchmarks.dev: no such split; there are test, validation"),
    "column domain": ({"columns": {"c": {"domain": "green", "number": "colors.red"}}}, "domains are blue, red"),
    "column number": ({"columns": {"c": {"domain": "red", "number": "colors"}}}, "write BENCHMARK.NUMBER"),
    "routing": ({"routing": {"c": "other.red"}}, "routing.c is 'other.red'"),
    "threads": ({"threads": 0}, "threads is 0"),
    "rank": ({"rank": 0}, "rank must be at least 1"),
}


@pytest.mark.parametrize("name", BASE_MISTAKES)
def test_mistakes_in_a_base_are_named(folder: Path, name: str) -> None:
    change, message = BASE_MISTAKES[name]
    values = yaml.safe_load((folder / "base.yaml").read_text()) | change
    (folder / "base.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(ConfigError, match=message):
        read_study(write_study(folder))


ARM_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "option": ({"method": "mole", "options": {"rooter": "x"}}, "arm 'a': .*rooter"),
    "cannot learn": ({"method": "mole", "options": {"balance_coef": 0.0}}, "arm 'a': .*nothing gives the router"),
    "key": ({"set": {"train.lr": 1}}, "arm 'a': .*train.lr"),
    "preset": ({"method": "mole", "preset": "none"}, "arm 'a': .*preset"),
}


@pytest.mark.parametrize("name", ARM_MISTAKES)
def test_an_arm_that_its_run_would_refuse_is_refused_before(folder: Path, name: str) -> None:
    settings, message = ARM_MISTAKES[name]
    study = read_study(write_study(folder, arms={"a": settings}))
    with pytest.raises(ConfigError, match=message):
        arm_config(study, "a")


COMMANDS = {
    "no file": (["none.yaml"], "none.yaml: no such file"),
    "base": (["STUDY", "--base", "9b"], "--base '9b': no such file"),
    "set": (["STUDY", "--set", "x"], "write KEY=VALUE"),
    "set what varies": (["STUDY", "--set", "adapter.rank=3"], "adapter.rank is what the study varies"),
    "set a wrong key": (["STUDY", "--set", "train.lr=3"], "arm 'red': .*train.lr"),
    "only": (["STUDY", "--only", "max"], "--only max: nothing has such a name; arms are red, mix, mole"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_mistakes_in_the_command_are_named(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    arguments, message = COMMANDS[name]
    path = write_study(folder)
    monkeypatch.chdir(folder)
    assert main([str(path) if a == "STUDY" else a for a in arguments] + ["--cells", str(folder / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_patterns_choose_arms_and_seeds(folder: Path) -> None:
    study = read_study(write_study(folder))
    assert matching(study, ["m*"]) == [("mix", 0), ("mix", 1), ("mole", 0), ("mole", 1)]
    assert matching(study, ["*/1"]) == [("red", 1), ("mix", 1), ("mole", 1)]
    assert len(matching(study, [])) == 6


@pytest.mark.parametrize("base", ["tiny", "tiny-facts", "7b"])
@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_shipped_study_has_runs_on_every_base(path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(path, base=base)
    for arm in study.arms:
        config = arm_config(study, arm)
        lambdas = study.lambdas(arm)
        assert set(config.data.sources) == {s for d, own in study.base.domains.items() if lambdas[d] for s in own}
        assert config.adapter.rank >= 1
    text = path.read_text(encoding="utf-8")
    assert f"llava-mole study configs/studies/{path.name}" in text


def test_the_papers_numbers_are_those_of_the_benchmarks() -> None:
    """Copied twice, by table here and by benchmark there: both copies agree."""
    from llava_mole.eval.benchmarks.registry import get_benchmark

    tables = yaml.safe_load((ROOT / "configs/studies/paper.yaml").read_text())["tables"]
    base = yaml.safe_load((ROOT / "configs/studies/bases/7b.yaml").read_text())
    compared = 0
    for column, place in base["columns"].items():
        own, _, number = place["number"].partition(".")
        for row in get_benchmark(base["benchmarks"]["test"][own]).published:
            source = row.source.split(", ")
            if not source[-1].startswith("Table") or number not in row.values or "#" not in row.source:
                continue
            table, _, line = source[-1].removeprefix("Table ").partition(" #")
            values = tables[f"table{table}"]["rows"][line]["values"]
            assert values[column] == row.values[number], (column, row.source)
            compared += 1
    assert compared > 150

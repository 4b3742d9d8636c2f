"""The cells of a study: what they share, and which of them a changed input makes new."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image
from worlds.study_world import write_questions, write_study

from llava_mole.common.errors import ConfigError
from llava_mole.config import SourceConfig
from llava_mole.study.cells import Plan, arm_config, plan_study
from llava_mole.study.definition import Study, read_study
from llava_mole.study.inputs import Inputs

KINDS = ("pretrain", "finetune", "eval")


def plan(path: Path, **options: object) -> Plan:
    study = read_study(path, **options)  # type: ignore[arg-type]
    found = plan_study(study, path.parent / "out", Inputs(path.parent / "digests.json"))
    assert not found.missing()
    return found


def read(path: Path) -> Study:
    return read_study(path)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def changed_image(folder: Path, name: str) -> None:
    Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / name)


def reword(file: str) -> Callable[[Path], object]:
    return lambda world: edit(world / file, "What color", "Which color")


def copy_again(world: Path) -> None:
    shutil.copy(world / "red/red.json", world / "x")
    os.replace(world / "x", world / "red/red.json")


WITH_BLUE = {"mix", "mole", "mix/e", "mole/e"}
EVALUATIONS = {"red/e", "mix/e", "mole/e"}
STAGE_2 = {"red", "mix", "mole"} | EVALUATIONS
ALL = {"stage1"} | STAGE_2
CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    # What is changed -> the cells that are new: of stage 1, and of each arm the run and its evaluation.
    "nothing, but written again": (copy_again, set()),
    "a record of blue": (reword("blue/blue.json"), WITH_BLUE),
    "an image of blue": (lambda w: changed_image(w, "blue/images/blue-11.png"), WITH_BLUE),
    "an image that is asked about": (lambda w: changed_image(w, "red/images/red-1.png"), STAGE_2),
    "a caption of stage 1": (reword("captions/captions.json"), ALL),
    "a test question": (reword("red_test.jsonl"), EVALUATIONS),
    "a gold answer": (lambda w: edit(w / "blue_test.jsonl", "answer 1", "answer 7"), EVALUATIONS),
    "a validation question": (reword("red_val.jsonl"), set()),
    "the benchmark's title": (lambda w: edit(w / "colors_test.yaml", "Colours, test", "Colors"), set()),
    "the benchmark's prompt": (lambda w: edit(w / "colors_test.yaml", "new_tokens: 4", "new_tokens: 5"), EVALUATIONS),
    "files of the language model": (lambda w: (w / "language_model/note.txt").write_text("new"), ALL),
    "the learning rate": (lambda w: edit(w / "stage2.yaml", "learning_rate: 0.01", "learning_rate: 0.02"), STAGE_2),
    "how it loads data": (lambda w: edit(w / "stage2.yaml", "num_workers: 0", "num_workers: 1"), set()),
    "options of one arm": (
        lambda w: edit(w / "study.yaml", "method: mole", "method: mole\n    preset: coupled"), {"mole", "mole/e"}
    ),
    "labels": (lambda w: edit(w / "study.yaml", "label: Mix", "label: Other"), set()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_input_makes_exactly_the_cells_new_that_depend_on_it(own_world: Path, change: str) -> None:
    path = write_study(own_world, seeds=[0])
    before = plan(path)
    act, expected = CHANGES[change]
    act(own_world)
    after = plan(path)

    def named(found: Plan) -> dict[str, str]:
        names = {"stage1": next(n for n, cell in found.cells.items() if cell.kind == "pretrain")}
        for arm in ("red", "mix", "mole"):
            names[arm], names[f"{arm}/e"] = found.runs[arm, 0], found.evaluations[arm, 0]["colors"]
        return {key: found.cells[name].digest for key, name in names.items()}

    one, two = named(before), named(after)
    assert {key for key in one if one[key] != two[key]} == expected
    folders = [{cell.folder for cell in found.cells.values()} for found in (before, after)]
    assert len(folders[1] - folders[0]) == len(expected)


def test_arms_and_studies_share_cells(folder: Path) -> None:
    arms = {"mix": {"label": "Mix"}, "same": {"mixture": [1, 1], "rank": 2}, "other": {"rank": "2x"}}
    path = write_study(folder, arms=arms)
    found = plan(path)
    assert found.runs["mix", 0] == found.runs["same", 0] != found.runs["other", 0]
    kinds = [cell.kind for cell in found.cells.values()]
    assert [kinds.count(kind) for kind in KINDS] == [1, 4, 4]  # two different arms, two seeds
    second = plan(write_study(folder, "second", arms={"again": {}}))
    assert set(second.cells) < set(found.cells)


def test_cells_stand_after_what_they_need(folder: Path) -> None:
    found = plan(write_study(folder))
    seen: set[str] = set()
    for name, cell in found.cells.items():
        assert set(cell.needs) <= seen
        seen.add(name)


def test_an_arm_becomes_an_ordinary_configuration(folder: Path) -> None:
    arms = {
        "m": {
            "method": "mole", "mixture": [0, 2], "rank": "3x", "experts": 4, "gate": "straight_through",
            "options": {"balance_coef": 0.5}, "set": {"train.learning_rate": 0.005}, "seeds": [7],
        },
        "d": {"method": "mole", "mode": "dense"},
        "o": {"method": "mole", "experts": "sources", "options": {"router": "oracle", "balance_coef": 0.0}},
    }  # fmt: skip
    path = write_study(folder, arms=arms)
    study = read_study(path, settings={"train.max_steps": 5})
    config = arm_config(study, "m")
    assert (config.adapter.method, config.adapter.rank, config.adapter.num_experts) == ("mole", 6, 4)
    assert config.adapter.options == {"balance_coef": 0.5, "expert_scale": "straight_through"}
    assert (list(config.data.sources), config.data.mixture) == (["blue"], {"blue": 2})
    assert (config.train.learning_rate, config.train.max_steps) == (0.005, 5)
    assert arm_config(study, "d").adapter.options == {"mode": "dense"}
    found = plan(path)
    written = found.cells[found.runs["m", 7]].config
    assert written is not None
    assert (written.train.seed, written.train.resume) == (7, "auto")
    assert str(written.projector_weights).endswith("/run")
    (stage1,) = found.cells[found.runs["m", 7]].needs
    assert written.projector_weights == str(found.cells[stage1].folder / "run")
    oracle = found.cells[found.evaluations["o", 0]["colors"]]
    assert "--source-of" not in oracle.command  # the base names no sources: groups are called like them
    base = yaml.safe_load((folder / "base.yaml").read_text())
    (folder / "base.yaml").write_text(yaml.safe_dump(base | {"source_of": {"colors": "red"}}))
    found = plan(path)
    assert found.cells[found.evaluations["o", 0]["colors"]].command[-2:] == ("--source-of", "colors=red")
    assert "--source-of" not in found.cells[found.evaluations["d", 0]["colors"]].command


def test_ranks_of_equal_parameters_and_equal_compute(folder: Path) -> None:
    """Against the sizes of the model: width 32, FFN 48, two layers of q, k, v, o, gate, up and down."""
    arms = {
        "mole": {"method": "mole", "rank": "2x", "experts": 3},
        "shared": {"method": "mole", "rank": "2x", "experts": 3, "options": {"shared_r": 8}},
        "same": {"rank": {"parameters_of": "mole"}},
        "cheap": {"rank": {"compute_of": "mole"}},
        "shared-cheap": {"rank": {"compute_of": "shared"}},
    }
    study = read(write_study(folder, arms=arms))
    ffn, attention, router = 3 * (32 + 48), 4 * (32 + 32), 3 * 32
    per_rank = ffn + attention
    ranks = {arm: arm_config(study, arm).adapter.rank for arm in ("same", "cheap", "shared-cheap")}
    assert ranks["same"] == round((4 * (3 * ffn + attention) + router) / per_rank)
    assert ranks["cheap"] == round((4 * (ffn + attention) + router) / per_rank)
    assert ranks["shared-cheap"] == round((4 * (ffn + attention) + 8 * ffn + router) / per_rank)


def test_steps_of_an_arm_multiply_those_of_the_base(folder: Path) -> None:
    """Of `train.max_steps` if it is set, else the epochs."""
    path = write_study(folder, arms={"a": {}, "b": {"steps": "2x"}, "half": {"steps": "0.5x"}, "c": {"steps": "1.0x"}})
    study = read_study(path, settings={"train.max_steps": 6})
    assert [arm_config(study, arm).train.max_steps for arm in study.arms] == [6, 12, 3, 6]
    study = read_study(path, settings={"train.max_steps": None, "train.epochs": 2})
    assert [arm_config(study, arm).train.epochs for arm in study.arms] == [2, 4, 1, 2]
    study = read_study(path, settings={"train.max_steps": 5})
    with pytest.raises(ConfigError, match=r"arm 'half': steps is '0.5x', which makes train.max_steps 2.5; it must be"):
        arm_config(study, "half")


def test_mixtures_that_only_the_steps_would_tell_apart_are_pointed_out(folder: Path) -> None:
    arms = {"mix": {}, "twice": {"mixture": [2, 2]}, "other": {"mixture": [1, 2]}, "again": {"mixture": [1, 1]},
            "longer": {"mixture": [2, 2], "steps": "2x"}, "mole": {"method": "mole", "mixture": [3, 3]}}  # fmt: skip
    path = write_study(folder, arms=arms)
    (remark,) = plan(path, settings={"train.max_steps": 4}).remarks
    assert "'mix' and 'twice' train alike" in remark
    assert "[1, 1] and [2, 2], and train.max_steps 4" in remark
    assert not plan(path, settings={"train.max_steps": None}).remarks  # twice the samples are twice the steps


def test_validation_and_test_are_different_cells_of_the_same_run(folder: Path) -> None:
    path = write_study(folder)
    one, two = plan(path), plan(path, split="validation")
    assert one.runs == two.runs
    assert not {n for n in one.cells if "eval" in one.cells[n].kind} & {
        n for n in two.cells if "eval" in two.cells[n].kind
    }
    assert all("colors_test" not in " ".join(cell.command) for cell in two.cells.values())


def test_missing_inputs_are_collected(folder: Path) -> None:
    base = yaml.safe_load((folder / "base.yaml").read_text())
    (folder / "base.yaml").write_text(yaml.safe_dump(base | {"data_root": str(folder / "none")}))
    study = read(write_study(folder, seeds=[0]))
    inputs = Inputs()
    found = plan_study(study, folder / "out", inputs)
    assert len(found.missing()) == 1
    assert "red_test.jsonl: no such file" in found.missing()[0]


def test_contents_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_study(folder)
    first = plan_study(read(path), folder / "out", inputs := Inputs(folder / "digests.json"))
    inputs.save()
    read_files: list[Path] = []
    monkeypatch.setattr("llava_mole.study.inputs.sha256_of", lambda file: read_files.append(file) or "x")
    second = plan_study(read(path), folder / "out", Inputs(folder / "digests.json"))
    assert not read_files
    assert list(first.cells) == list(second.cells)


def test_what_is_missing_is_known_by_cell(folder: Path) -> None:
    """An arm that does not need it can run."""
    stage2 = yaml.safe_load((folder / "stage2.yaml").read_text())
    stage2["data"]["sources"]["blue"]["annotations"] = str(folder / "nowhere.json")
    (folder / "stage2.yaml").write_text(yaml.safe_dump(stage2))
    found = plan_study(read(write_study(folder, seeds=[0])), folder / "out", Inputs())
    assert not found.missing(found.with_needs([found.runs["red", 0]]))
    for arm in ("mix", "mole"):
        assert found.missing([found.runs[arm, 0]]) == [str(folder / "nowhere.json")]
    assert found.missing() == [str(folder / "nowhere.json")]


def test_a_prepared_set_made_again_is_the_same_input(tmp_path: Path) -> None:
    digests = []
    for name, words in (("a", "red"), ("b", "red"), ("c", "blue")):
        path = prepared_set(tmp_path / name, words)
        digests.append(Inputs().source("x", SourceConfig(annotations=str(path), image_folder=""), images=False))
    assert json.loads((tmp_path / "a/set/train/manifest.json").read_text())["made_by"]["time"]
    assert digests[0] == digests[1] != digests[2]


def prepared_set(folder: Path, words: str) -> Path:
    """A prepared set of one record, converted at another time than the one before."""
    from llava_mole.data.prepare.cli import main as prepare

    folder.mkdir()
    record = {"id": "1", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": words}]}
    (folder / "raw").mkdir()
    (folder / "raw" / "all.json").write_text(json.dumps([record]))
    time.sleep(1.01)
    assert prepare(["llava-json", "--raw", str(folder / "raw"), "--out", str(folder / "set")]) == 0
    return folder / "set" / "train"


def test_a_digest_knows_where_names_begin(tmp_path: Path) -> None:
    """The same file seen from two roots has two names; a cache does not confuse them."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    inputs = Inputs()
    one = inputs.files(tmp_path, [tmp_path / "a" / "x"])
    assert one != inputs.files(tmp_path / "a", [tmp_path / "a" / "x"])
    assert one == Inputs().files(tmp_path, [tmp_path / "a" / "x"])


def test_a_benchmark_is_known_by_where_its_data_are(folder: Path, tmp_path: Path) -> None:
    """Two bases may have the same benchmark with data of their own."""
    root = Path(yaml.safe_load((folder / "base.yaml").read_text())["data_root"])
    other = tmp_path / "other"
    shutil.copytree(root, other, ignore=shutil.ignore_patterns("out", "language_model"))
    write_questions(other, "test", 3)
    inputs, benchmark = Inputs(), str(folder / "colors_test.yaml")
    digests = [inputs.benchmark(benchmark, place, images=images) for place in (root, other) for images in (True, False)]
    assert len(set(digests)) == 4

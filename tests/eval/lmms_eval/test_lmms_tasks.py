"""The lmms-eval task files name functions that exist, and these score as our own benchmarks do."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from PIL import Image

from llava_mole.eval.benchmarks.registry import get_benchmark

TASKS = Path(__file__).parents[3] / "llava_mole" / "eval" / "lmms_eval"
FILES = sorted(TASKS.glob("*.yaml"))


@pytest.fixture
def utils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The functions as lmms-eval loads them, in a directory with two small benchmarks."""
    monkeypatch.chdir(tmp_path)
    sets = {
        "pathvqa": [
            {"question_id": "a", "image": "images/0.png", "text": "Where?", "category": "open", "answer": "the liver"},
            {"question_id": "b", "image": "images/0.png", "text": "Is it?", "category": "closed", "answer": "no"},
        ],
        "tiny_ehub": [
            {"question_id": n, "image": "images/0.png", "text": "?", "category": group, "answers": ["two", "2"]}
            for n, group in enumerate(["VR", "VR", "OH"])
        ],
    }
    for name, lines in sets.items():
        folder = tmp_path / "playground" / "data" / "eval" / name
        (folder / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8), (9, 99, 200)).save(folder / "images" / "0.png")
        (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = importlib.util.spec_from_file_location("task_utils", TASKS / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_task_file_fits_its_benchmark(path: Path, utils: ModuleType) -> None:
    text = path.read_text()
    names = re.findall(r"!function utils\.(\w+)", text)
    assert len(names) >= 5
    assert all(callable(getattr(utils, name)) for name in names)
    task = yaml.safe_load(text.replace("!function ", ""))
    assert task["task"] == path.stem
    benchmark = get_benchmark(path.stem.removeprefix("llava_mole_"))
    assert task["generation_kwargs"]["max_new_tokens"] == benchmark.prompt.max_new_tokens
    assert {metric["metric"] for metric in task["metric_list"]} - {"all"} == set(benchmark.groups)
    files = task["dataset_kwargs"]["data_files"]["test"]
    own = [f"playground/data/{benchmark.data.folder}/{name.rpartition('=')[2]}" for name in benchmark.data.questions]
    assert ([files] if isinstance(files, str) else files) == own


def test_scores_are_the_benchmarks(utils: ModuleType) -> None:
    open_doc = {"question_id": "a", "image": "images/0.png", "text": "Where?", "answer": "the liver", "answers": None}
    assert utils.path_vqa_results(open_doc, ["Liver."]) == {"open": 1.0}
    assert utils.path_vqa_results(open_doc, ["in the liver"]) == {"open": 0.0}
    closed = {"question_id": "b", "image": "images/0.png", "text": "Is it?", "answer": "no"}
    assert utils.path_vqa_results(closed, ["No, it is not"]) == {"closed": 1.0}
    assert utils.path_vqa_results(closed, ["yes"]) == {"closed": 0.0}
    (image,) = utils.path_vqa_visual(closed)
    assert image.getpixel((0, 0)) == (9, 99, 200)
    assert utils.path_vqa_visual({"question_id": "b", "image": None}) == []
    assert utils.doc_to_text(closed, {"post_prompt": " Short."}) == "Is it? Short."
    assert utils.doc_to_text(closed) == "Is it?"

    results = [utils.tiny_ehub_results({"question_id": n, "answers": ["two", "2"]}, [t]) for n, t in enumerate("2x2")]
    assert [result.get("VR", result.get("OH")) for result in results] == [1.0, 0.0, 1.0]
    assert utils.sum_of_percents([result["all"] for result in results]) == 150.0
    assert utils.percent([1.0, 0.0]) == 50.0

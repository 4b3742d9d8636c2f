"""A small study on random miniature models: two sources, a benchmark with a test and a validation split."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from worlds.tiny_models import make_data, make_world

FAKE = Path(__file__).with_name("fake_run.py")
QUESTIONS = 6


def write_questions(folder: Path, split: str, count: int = QUESTIONS) -> None:
    for name in ("red", "blue"):
        lines = [
            {"question_id": f"{name}-{split}-{n}", "image": f"{name}/images/{name}-{n}.png", "text": f"What color {n}?",
             "answer": f"answer {n % 3}"}
            for n in range(count)
        ]  # fmt: skip
        (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_study_world(folder: Path, *, fake: bool = True, samples: int = 12) -> Path:
    """Models, data, configurations and a base below `folder`. Returns the folder."""
    config = make_world(folder, samples=samples)
    values = yaml.safe_load(config.read_text())
    values["train"] |= {"epochs": 1, "warmup_steps": 1, "output_dir": "unused"}
    values["adapter"] = {"method": "lora", "rank": 2}
    (folder / "stage2.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    captions = make_data(folder / "captions", "captions", samples, seed=7)
    values["stage"], values["adapter"] = "pretrain", {"method": "none"}
    values["data"] = {
        "sources": {"captions": {"annotations": str(captions), "image_folder": str(folder / "captions")}},
        "template": "plain",
        "image_aspect_ratio": "square",
        "max_length": 256,
    }
    (folder / "stage1.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for split in ("test", "val"):
        write_questions(folder, split)
        (folder / f"colors_{split}.yaml").write_text(yaml.safe_dump(benchmark(split), sort_keys=False))
    base: dict[str, Any] = {
        "name": "small",
        "stage1": "stage1.yaml",
        "stage2": "stage2.yaml",
        "domains": {"red": ["red"], "blue": ["blue"]},
        "rank": 2,
        "seeds": [0, 1],
        "benchmarks": {"test": {"colors": "colors_test.yaml"}, "validation": {"colors": "colors_val.yaml"}},
        "columns": {
            "red": {"domain": "red", "number": "colors.red"},
            "blue": {"domain": "blue", "number": "colors.blue"},
        },
        "routing": {"red": "colors.red", "blue": "colors.blue", "both": "colors"},
        "data_root": str(folder),
        "evaluate": ["--device", "cpu"],
        "threads": 1,
    }
    if fake:
        base["launch"] = [sys.executable, str(FAKE)]
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    return folder


def benchmark(split: str) -> dict[str, Any]:
    return {
        "name": f"colors_{split}",
        "title": f"Colours, {split}",
        "data": {"folder": ".", "questions": [f"{name}={name}_{split}.jsonl" for name in ("red", "blue")]},
        "prompt": {"max_new_tokens": 4},
        "groups": ["red", "blue"],
        "metrics": {"*": ["plain_exact"]},
        "numbers": {"{group}": {"value": "plain_exact.hit"}, "mean": {"mean": ["red", "blue"]}},
        "primary": "mean",
    }


ARMS: dict[str, Any] = {
    "red": {"mixture": [1, 0]},
    "mix": {"label": "Mix", "paper": "t.1"},
    "mole": {"label": "MoLE", "method": "mole", "paper": "t.2"},
}
PAPER: dict[str, Any] = {
    "source": "A paper",
    "columns": ["Red", "Blue", "Green"],
    "domains": {"Red": "red", "Blue": "blue", "Green": "red"},
    "tables": {
        "t": {
            "title": "T",
            "rows": {
                "0": {"model": "Other", "values": {"Red": 12.5}},
                "1": {"model": "Mix", "mixture": [1, 1], "experts": "no", "values": {"Red": 40.0, "Blue": 50.25}},
                "2": {"model": "MoLE", "mixture": [1, 1], "experts": "2", "values": {"Red": 45.0, "Blue": "OOM"}},
            },
        }
    },
}


def write_study(folder: Path, name: str = "study", arms: dict[str, Any] | None = None, **more: Any) -> Path:
    """Write `name`.yaml in a folder of `make_study_world`. Returns its path."""
    (folder / "paper.yaml").write_text(yaml.safe_dump(PAPER, sort_keys=False))
    value = {"title": "A study", "base": "base.yaml", "paper": "paper.yaml", "arms": ARMS if arms is None else arms}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(value | more, sort_keys=False))
    return path

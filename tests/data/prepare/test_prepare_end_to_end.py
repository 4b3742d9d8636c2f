"""Miniature raw copies of the four sets of the paper are prepared, checked, and trained on by the scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from worlds import published_sets, raw_sets, tiny_models

ROOT = Path(__file__).parents[3]
MIXTURES = ROOT / "configs" / "mixtures"


def run(*command: str) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GPUS_PER_NODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "VIRTUAL_ENV": str(Path(sys.executable).parent.parent),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_both_stages_on_the_four_sets(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for source, write in {
        "sharegpt4v-pt": published_sets.write_sharegpt4v_pt,
        "m3it": published_sets.write_m3it,
        "sharegpt4v-instruct": published_sets.write_sharegpt4v_instruct,
        "ureader": published_sets.write_ureader,
        "pathvqa": published_sets.write_pathvqa,
    }.items():
        write(tmp_path / "raw" / source)
        raw_sets.prepare(source, tmp_path / "raw" / source, data / source, "--check-images", "decode")

    tiny_models.make_world(tmp_path / "world", samples=1)
    settings = yaml.safe_load((tmp_path / "world" / "config.yaml").read_text())
    settings["train"] |= {"global_batch_size": 4, "max_steps": 3, "epochs": 3, "output_dir": str(tmp_path / "pretrain")}
    settings |= {"stage": "pretrain", "adapter": {"method": "none"}}
    settings["data"] = str(MIXTURES / "sharegpt4v-pt.yaml")
    pretrain = tmp_path / "pretrain.yaml"
    pretrain.write_text(yaml.safe_dump(settings))
    settings["train"]["output_dir"] = str(tmp_path / "finetune")
    settings |= {
        "stage": "finetune",
        "projector_weights": str(tmp_path / "pretrain"),
        "adapter": {"method": "mole", "rank": 2, "num_experts": 3, "preset": "paper"},
        "data": str(MIXTURES / "general-document2-biomedicine.yaml"),
    }
    finetune = tmp_path / "finetune.yaml"
    finetune.write_text(yaml.safe_dump(settings))

    def places(*sources: str) -> list[str]:
        """The shipped mixtures name playground/data/; here the sets are elsewhere."""
        overrides = ["--data.max_length", "256"]
        for source in sources:
            overrides += [f"--data.sources.{source}.annotations", str(data / source / "train")]
            overrides += [f"--data.sources.{source}.image_folder", str(data / source / "images")]
        return overrides

    printed = run("bash", "scripts/pretrain.sh", str(pretrain), *places("sharegpt4v-pt"))
    assert "sharegpt4v-pt: 7 records" in printed
    four = places("m3it", "sharegpt4v-instruct", "ureader", "pathvqa")
    printed = run("bash", "scripts/finetune_mole.sh", str(finetune), *four)
    for line in ("m3it: 10 records", "sharegpt4v-instruct: 6 records", "ureader: 6 records", "pathvqa: 4 records"):
        assert line in printed
    assert "ureader: 6 records, lambda 2, 12 samples per epoch" in printed
    steps = [json.loads(line) for line in (tmp_path / "finetune" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    assert (tmp_path / "finetune" / "checkpoint-3" / "manifest.json").is_file()

    from llava_mole.cli import main

    checked = main(["check-data", str(finetune), "--workers", "1", "--out", str(tmp_path / "check"), *four])
    assert checked == 0, "what prepare lets through, training takes"

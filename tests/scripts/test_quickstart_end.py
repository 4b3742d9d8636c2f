"""What the quickstart prints last: one table, one sentence, and commands that exist."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_mole import cli
from scripts.quickstart_summary import SEEDS, sentence

ROOT = Path(__file__).parents[2]


def entry(low: float, high: float, first: str = "LLaVA-Mix") -> dict[str, Any]:
    second = "LLaVA-MoLE" if first == "LLaVA-Mix" else "LLaVA-Mix"
    numbers = {"LLaVA-Doc": (20.0, 61.0), "LLaVA-Mix": (50.0, 60.0), "LLaVA-MoLE": (52.0, 61.0)}
    return {
        "primary": "mean",
        "groups": {"general": {}, "document": {}},
        "runs": {
            run: {
                "total": 1234,
                "numbers": {
                    "general": {"value": one},
                    "document": {"value": other},
                    "mean": {"value": (one + other) / 2},
                },
            }
            for run, (one, other) in numbers.items()
        },
        "comparisons": [
            {"first": "LLaVA-Doc", "second": second, "number": "mean", "difference": 1.0, "low": 0.0, "high": 2.0},
            {
                "first": "LLaVA-Doc",
                "second": "LLaVA-Mix",
                "number": "document",
                "difference": -1.0,
                "low": -2.0,
                "high": 0.5,
            },
            {"first": first, "second": second, "number": "general", "difference": 9.0, "low": 8.0, "high": 10.0},
            {"first": first, "second": second, "number": "mean", "difference": 1.5, "low": low, "high": high},
        ],
    }


@pytest.mark.parametrize(
    ("low", "high", "first", "said"),
    [
        (0.5, 2.5, "LLaVA-Mix", "is better (+1.5 points, 95% interval +0.5 to +2.5) than plain LoRA"),
        (
            -0.5,
            3.5,
            "LLaVA-Mix",
            "is neither better nor worse (+1.5 points, 95% interval -0.5 to +3.5) than plain LoRA",
        ),
        (
            0.5,
            2.5,
            "LLaVA-MoLE",
            "is worse (-1.5 points, 95% interval -2.5 to -0.5) than plain LoRA",
        ),
    ],
)
def test_the_sentence_follows_from_the_test(low: float, high: float, first: str, said: str) -> None:
    text = sentence(entry(low, high, first))
    assert text.startswith(
        "On 1,234 test questions about facts that the domains answer differently: with the other domains mixed in,"
    )
    assert "neither better nor worse (-1.0 points, 95% interval -2.0 to +0.5) on documents than" in text
    assert said in text


def test_what_is_printed_last(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"benchmarks": {"tiny": entry(0.5, 2.5)}}))
    command = [sys.executable, str(ROOT / "scripts" / "quickstart_summary.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["general", "document", "mean"]
    assert lines[2].split() == ["LLaVA-Doc", "20.0", "61.0", "40.5"]
    assert lines[4].split() == ["LLaVA-MoLE", "52.0", "61.0", "56.5"]
    study = json.loads(SEEDS.read_text())["arms"]
    alone, mixed = study["single-document"]["numbers"]["document"], study["mix"]["numbers"]["general"]
    (first, second) = (line for line in lines[6:] if line.startswith(("LLaVA-Doc", "LLaVA-Mix")))
    assert first.split()[-3:] == [f"{alone['mean']:.1f}", "±", f"{alone['half_interval']:.1f}"]
    assert second.split()[1:4] == [f"{mixed['mean']:.1f}", "±", f"{mixed['half_interval']:.1f}"]
    assert f"picture: {tmp_path / 'benchmarks.png'}" in lines
    assert lines[-1] == f"details, with all intervals and tests: {tmp_path / 'report.txt'}"


def test_the_next_commands_exist() -> None:
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    ending = script.split("Next:")[1]
    assert ending.count("\necho ") == 3
    assert set(re.findall(r"llava-mole (\w+)", ending)) <= set(cli.SUBCOMMANDS)
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / "quickstart.sh")], check=True)

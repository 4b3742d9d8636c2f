"""scripts/gpu_check.sh: its parts on a CPU in small, what becomes of a part that fails or hangs, the page."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from worlds.processes import fork_python

from scripts.docs import gpu_page

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
import gpu_check
import gpu_parts
import mole_common

ROOT = Path(__file__).parents[2]
ARGS = argparse.Namespace(device="cpu", quick=True, threads=1)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_random_weights_are_complete() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    made = mole_common.random_llama(LlamaForCausalLM, config, "cpu")
    usual = LlamaForCausalLM(config)
    assert not any(tensor.is_meta for tensor in (*made.parameters(), *made.buffers()))
    assert dict(made.named_buffers()).keys() == dict(usual.named_buffers()).keys()
    for name, buffer in usual.named_buffers():
        torch.testing.assert_close(made.get_buffer(name), buffer, msg=name)
    made.load_state_dict(usual.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(made(ids).logits, usual(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    ["step: NeMo", "decoding", "packing: sdpa", "profile", "resume", "compile", "quantised bases"],
)
def test_a_part_in_small(part: str) -> None:
    rows = gpu_parts.PARTS[part][0](ARGS)
    assert rows
    json.dumps(rows)
    columns = gpu_page.TABLES[part]
    assert all(cell(row) or title in ("MFU", "HFU", "peak GiB") for row in rows for title, cell in columns)
    if "variant" in rows[0] and part != "compile":
        assert {row["variant"] for row in rows} >= {"plain_lora", "mole K=3"}


@pytest.mark.parametrize("part", ["packing: flash", "packing: flex", "bf16 and fp32 curves", "tests marked gpu"])
def test_what_needs_a_gpu_says_so(part: str) -> None:
    with pytest.raises(gpu_parts.NotAvailable, match="needs a GPU"):
        gpu_parts.PARTS[part][0](ARGS)


def test_rows_of_the_mixture_are_full() -> None:
    import train_step

    rows = train_step.mixture_rows(4096, 3, 576)
    assert len(rows) == 3
    assert all(4096 - 584 < sum(row) <= 4096 for row in rows)
    assert all(size > 576 for row in rows for size in row)
    assert rows == train_step.mixture_rows(4096, 3, 576)


FAKE = """
import json, os, signal, sys, time
name, out = sys.argv[1], sys.argv[sys.argv.index("--json") + 1]
if name == "good":
    open(out, "w").write(json.dumps([{"value": 1}]))
if name == "absent":
    print("flash-attn is not installed"); sys.exit(3)
if name == "bad":
    print("the loss does not fall"); sys.exit(1)
if name == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "hangs":
    print("step 1", flush=True); time.sleep(60)
"""


def test_a_bad_part_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu_parts.py").write_text(FAKE)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    monkeypatch.setattr(gpu_check, "CPU_SLOWER", 1)
    parts = {"bad": 20, "killed": 20, "hangs": 5, "absent": 20, "good": 20}
    monkeypatch.setattr(gpu_check, "PARTS", {name: (None, limit) for name, limit in parts.items()})
    out = tmp_path / "gpu_check.json"
    given = ["--device", "cpu", "--quick", "--out", str(out)]
    assert gpu_check.main(given) == 1
    results = {part["name"]: part for part in json.loads(out.read_text())["parts"]}
    assert {name: part["status"] for name, part in results.items()} == {
        "bad": "failed", "killed": "failed", "hangs": "timed out", "absent": "not available", "good": "passed",
        "plan and measurement": "not available",
    }  # fmt: skip
    assert "the loss does not fall" in results["bad"]["reason"]
    assert "exit code -9" in results["killed"]["reason"]
    assert "step 1" in results["hangs"]["reason"]
    printed = capsys.readouterr().out
    assert "NOT PASSED: bad, killed, hangs" in printed
    assert len([line for line in printed.splitlines() if "not available" in line]) == 2
    assert gpu_check.main([*given, "--parts", "absent", "good"]) == 0
    monkeypatch.setattr(gpu_check, "BUDGET", 1)
    assert gpu_check.main([*given, "--parts", "good"]) == 1, "a part for which there was no time has not passed"
    assert "not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device", "cpu"], "--device cpu needs --quick"),
        (["--parts", "packing"], "no part is called 'packing'; there are: step,"),
        (["--device", "cpu", "--quick", "--out", "/nowhere/x.json"], "the folder does not exist"),
    ],
)
def test_mistakes(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_plain_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "no GPU found" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_of_the_page(tmp_path: Path) -> None:
    """The orchestrator with a real part, and one that this machine lacks; the script hands its arguments on."""
    out = tmp_path / "gpu_check_cpu.json"
    given = ["--device", "cpu", "--quick", "--threads", "1", "--out", out, "--parts", "packing: sdpa", "packing: flex"]
    done = fork_python(ROOT / "scripts" / "bench" / "gpu_check.py", *given)
    assert done.returncode == 0, done.stderr[-2000:]
    values = json.loads(out.read_text())
    assert [part["status"] for part in values["parts"]] == ["passed", "not available", "not available"]
    assert (values["device"], values["quick"], values["machine"]["gpu"]) == ("cpu", True, "none")
    assert "nothing failed" in done.stdout
    script = subprocess.run(["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--help"], capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    assert "--quick" in script.stdout


def recorded() -> dict[str, Any]:
    """A file as a GPU leaves it, with made-up numbers."""
    step = {
        "variant": "mole K=3", "median_s": 0.25, "ratio_to_plain_lora": 1.01, "low": 1.0, "high": 1.02, "mfu": 0.51,
        "hfu": 0.51, "tokens_per_s": 16384.0, "own_peak_bytes": 40 * 2**30, "predicted_bytes": 38.0 * 2**30,
        "predicted_s": 0.26,
    }  # fmt: skip
    parts = [
        {"name": "step", "status": "passed", "seconds": 60.0, "rows": [step], "reason": ""},
        {"name": "packing: flash", "status": "not available", "seconds": 4.0, "rows": [], "reason": "flash-attn | x"},
        {
            "name": "profile", "status": "passed", "seconds": 9.0, "reason": "",
            "rows": [{"name": "gemm|nt", "calls": 224, "ms": 100.0, "share": 0.5}],
        },
    ]  # fmt: skip
    parts.append(gpu_check.compare_plan(parts))
    machine = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.15.0", "transformers": "5.23.0", "peft": "0.21.2"}
    return {
        "machine": machine,
        "device": "cuda",
        "quick": False,
        "date": "2026-01-01",
        "seconds": 500.0,
        "parts": parts,
    }


def test_the_page_is_written_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{gpu_page.BEGIN}\nold\n{gpu_page.END}\nafter\n")
    monkeypatch.setattr(gpu_page, "PAGE", page)
    file = tmp_path / "gpu_check.json"
    file.write_text(json.dumps(recorded()))
    assert gpu_page.main([str(file)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "NVIDIA H100 80GB HBM3, torch 2.15.0" in text
    assert "| mole K=3 | 250.0 | 1.010 | 1.000 to 1.020 | 16,384 | 51.0% | 51.0% | 40.0 |" in text
    assert "| packing: flash | not available | 4 | flash-attn \\| x |" in text
    assert "| step | mole K=3 | 38.0 | 40.0 | 0.95 | 260.0 | 250.0 |" in text
    assert "| gemm\\|nt | 224 | 100.00 | 50.0% |" in text
    # A run without a GPU writes nothing.
    file.write_text(json.dumps({**recorded(), "device": "cpu", "quick": True}))
    assert gpu_page.main([str(file)]) == 2
    assert "measures no GPU" in capsys.readouterr().err
    assert page.read_text() == text
    assert gpu_page.main([]) == 0
    assert gpu_page.ABSENT in page.read_text()


def test_memory_that_the_plan_misses_is_a_failure() -> None:
    values = recorded()
    (plan,) = [part for part in values["parts"] if part["name"] == "plan and measurement"]
    assert plan["status"] == "passed"
    values["parts"][0]["rows"][0]["own_peak_bytes"] = 20 * 2**30
    plan = gpu_check.compare_plan(values["parts"][:3])
    assert plan["status"] == "failed"
    assert "mole K=3 1.90" in plan["reason"]


def test_every_part_has_a_table() -> None:
    assert gpu_page.TABLES.keys() == gpu_parts.PARTS.keys() | {"plan and measurement"}
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    shown = page.split(gpu_page.BEGIN)[1].split(gpu_page.END)[0]
    assert "Not measured" in shown or "torch" in shown

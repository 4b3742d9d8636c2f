"""`scripts/test_peft_suite.sh` on a miniature of PEFT's test files: what it replaces, excuses and refuses."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

COMMON = """
def hub_online_once(model_id): raise AssertionError("the suite must not ask the Hub")
def _skip_if_conv1d_not_supported(*args): raise AssertionError("GPT-2 is supported")
"""
CUSTOM = """
import pytest
from datasets import load_dataset
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from .testing_common import hub_online_once, _skip_if_conv1d_not_supported

TEST_CASES = [("LoRA", "MLP", LoraConfig, {"target_modules": "lin0"})]
ALL_PEFT_CONFIG_CLASSES = [LoraConfig]

class MockTransformerWrapper:
    @classmethod
    def from_pretrained(cls, model_id, dtype=None):
        return None

@pytest.mark.parametrize("test_name, model_id, config_cls, config_kwargs", TEST_CASES)
def test_builds(test_name, model_id, config_cls, config_kwargs):
    with hub_online_once(model_id):
        _skip_if_conv1d_not_supported()
        model = MockTransformerWrapper.from_pretrained(model_id)
        if model_id == "WithFfn":
            assert get_peft_model(model, config_cls(**config_kwargs)).peft_config["default"].r == 4
        config_kwargs.clear()

@pytest.mark.parametrize("test_name, model_id, config_cls, config_kwargs", TEST_CASES)
def test_options_are_fresh(test_name, model_id, config_cls, config_kwargs):
    assert config_kwargs, "another test has changed the options"

@pytest.mark.parametrize("config_cls", ALL_PEFT_CONFIG_CLASSES)
def test_fails(config_cls):
    raise RuntimeError(f"{config_cls.__name__} cannot do this")

@pytest.mark.parametrize("config_cls", ALL_PEFT_CONFIG_CLASSES)
def test_is_skipped(config_cls):
    pytest.skip("not for this method")

@pytest.mark.parametrize("config_cls", [LoraConfig])
def test_of_another_method(config_cls):
    raise AssertionError("only tests over PEFT's lists of all methods are run")
"""
LISTED = """
- {tests: ^test_fails, message: RuntimeError.*MoleConfig cannot do this, reason: It cannot.}
- {tests: ^test_is_skipped, outcome: skipped, message: not for this method, reason: Another method's test.}
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "tests").mkdir(parents=True)
    (root / "src/peft").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[tool.pytest]\naddopts = ["--cov=src/peft"]\n', encoding="utf-8")
    (root / "src/peft/__init__.py").write_text('__version__ = "0.21.2"\n', encoding="utf-8")
    (root / "tests/__init__.py").touch()
    (root / "tests/testing_common.py").write_text(COMMON, encoding="utf-8")
    (root / "tests/test_custom_models.py").write_text(CUSTOM, encoding="utf-8")
    return root


def suite(checkout: Path, exceptions: str, *options: str) -> tuple[int, str, dict]:
    """Exit code, output and report of a run."""
    listed, report = checkout.parent / "listed.yaml", checkout.parent / "report.json"
    listed.write_text(exceptions, encoding="utf-8")
    report.unlink(missing_ok=True)
    command = ["bash", "scripts/test_peft_suite.sh", str(checkout), "custom", "--exceptions", str(listed)]
    command += ["--report", str(report), *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return run.returncode, run.stdout + run.stderr, json.loads(report.read_text(encoding="utf-8"))


def test_listed_exceptions_pass_and_are_counted(checkout: Path) -> None:
    before = sorted(path for path in checkout.rglob("*"))
    code, output, report = suite(checkout, LISTED)
    assert code == 0, output
    counts = {row.split()[1]: row.split()[2:] for row in report["table"][1:-1]}
    assert set(counts) == {"paper", "coupled", "dense", "top2", "one_expert", "shared"}
    passed = len({r["test"] for r in report["results"] if r["variant"] == "dense" and r["verdict"] == "passed"})
    assert passed > 10
    assert counts["dense"] == [str(passed), "0", "0", "0"]
    assert counts["paper"] == [str(passed), "1", "1", "0"]
    assert not any("test_of_another_method" in r["test"] for r in report["results"])
    assert sorted(path for path in checkout.rglob("*")) == before, "the checkout is only read"


def test_what_is_not_listed_fails_and_so_does_an_entry_that_nothing_needs(checkout: Path) -> None:
    code, output, report = suite(checkout, LISTED.replace("MoleConfig", "LoraConfig"), "--variant", "paper")
    assert code == 1, output
    (failure,) = (r for r in report["results"] if r["verdict"] == "failed")
    assert failure["message"] == "RuntimeError: MoleConfig cannot do this"
    line = next(n for n, text in enumerate(CUSTOM.splitlines(), start=1) if "raise RuntimeError" in text)
    assert failure["where"] == [f"test_custom_models.py:{line}"]
    assert len(report["stale"]) == 1

    needless = "- {tests: ^test_builds, message: anything, reason: None.}\n"
    code, output, report = suite(checkout, LISTED + needless, "--variant", "paper")
    assert code == 1, output
    assert not any(r["verdict"] == "failed" for r in report["results"])
    assert "listed, but does not occur: failed: ^test_builds: anything" in output

    code, output, _ = suite(checkout, LISTED + needless, "--variant", "paper", "-k", "fails")
    assert code == 0, "an entry is only missed where its tests were run"

    code, output, report = suite(checkout, LISTED.splitlines()[1], "--variant", "paper")
    assert code == 1, "a skipped test must be listed too"
    assert [r["test"] for r in report["results"] if r["verdict"] == "failed"] == ["test_is_skipped[paper]"]


def test_a_directory_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    command = ["bash", "scripts/test_peft_suite.sh", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert "is no checkout of PEFT" in run.stderr

"""A pytest plugin that runs PEFT's test functions, from a checkout, with MoLE's configurations.

PEFT's tests are parametrised over module-level lists of configurations and models. The plugin replaces those lists
while tests are generated, drops every test that then has no configuration of ours, and compares what is left with
`exceptions.yaml`. A test that fails or is skipped must be listed there with its reason, and an entry that nothing needs
is an error too. The checkout is only read.
"""

import contextlib
import importlib.machinery
import importlib.util
import json
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft_suite import cases, models

BLOCKS = {
    "test_decoder_models": "decoder",
    "test_encoder_decoder_models": "encoder-decoder",
    "test_custom_models": "custom",
}
"""PEFT's test files, and the block that the report counts them in."""

EXCEPTIONS = Path(__file__).with_name("exceptions.yaml")


# --- what replaces PEFT's lists ---------------------------------------------------------------------------------------

Make = Callable[[list[str]], list[Any]]
REPLACEMENTS: dict[str, dict[str, Make]] = {
    "test_decoder_models": {
        "PEFT_DECODER_MODELS_TO_TEST": lambda variants: models.DECODER_NAMES,
        "ALL_CONFIGS": lambda variants: cases.task_params(variants, "CAUSAL_LM"),
    },
    "test_encoder_decoder_models": {
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST": lambda variants: models.ENCODER_DECODER_NAMES,
        "ALL_CONFIGS": lambda variants: cases.task_params(variants, "SEQ_2_SEQ_LM"),
    },
    "test_custom_models": {
        "TEST_CASES": cases.custom_params,
        "ALL_PEFT_CONFIG_CLASSES": cases.class_params,
    },
}
"""By test file: the list that its tests are parametrised over, and what takes its place."""


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace PEFT's lists in the parametrisation of a test."""
    stem = metafunc.module.__name__.rpartition(".")[-1]
    variants = metafunc.config.getoption("variant") or list(cases.VARIANTS)
    marks = metafunc.definition.own_markers
    for position, mark in enumerate(marks):
        for name, make in REPLACEMENTS.get(stem, {}).items():
            if mark.name == "parametrize" and mark.args[1] is getattr(metafunc.module, name):
                marks[position] = pytest.mark.parametrize(mark.args[0], make(variants), **mark.kwargs).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the tests that run without a configuration of ours, such as those of prompt tuning."""
    ours = [item for item in items if item.get_closest_marker("variant")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(ours)])
    items[:] = ours


# --- the surroundings that PEFT's tests expect ------------------------------------------------------------------------


_IMPORTED = {"diffusers": ("StableDiffusionPipeline",), "datasets": ("load_dataset",)}
"""Packages that PEFT's test files import, though none of the tests run here needs them."""


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Let test files be imported without those packages."""
    missing = {package: names for package, names in _IMPORTED.items() if importlib.util.find_spec(package) is None}
    transformers.utils.is_datasets_available()  # it remembers the answer, which must be the true one
    for package, names in missing.items():
        module = types.ModuleType(package)
        module.__spec__ = importlib.machinery.ModuleSpec(package, None)
        for name in names:
            setattr(module, name, type(name, (), {}))
        sys.modules[package] = module
    yield
    for package in missing:
        del sys.modules[package]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peft-suite")
    known = [*cases.VARIANTS, cases.CONTROL]
    group.addoption("--variant", action="append", choices=known, help="run only this variant; may be repeated")
    group.addoption("--exceptions", type=Path, default=EXCEPTIONS, help="tests that need not pass, with reasons")
    group.addoption("--report", type=Path, help="write every result to this file, as JSON")


def _version(checkout: Path) -> str:
    """The version of PEFT that a checkout holds."""
    text = (checkout / "src/peft/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    assert found is not None, "a checkout of PEFT names its version in src/peft/__init__.py"
    return found.group(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "variant(name): the configuration of MoLE that a test runs with")
    config.stash[_VERDICTS] = Verdicts(read_exceptions(config.getoption("exceptions"), _version(config.rootpath)))
    config.pluginmanager.register(config.stash[_VERDICTS])


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Iterator[None]:
    """Import a test file of PEFT's and prepare it."""
    collected = yield
    if module_path.stem in BLOCKS:
        with _stand_ins():
            module = collected.obj
        _prepare(module)
    return collected


_REPLACED_HELPERS: dict[str, Callable[..., Any]] = {
    # It would switch the Hub back on. There is no need for it, since all models are local.
    "hub_online_once": lambda model_id: contextlib.nullcontext(),
    # PEFT skips GPT-2 for methods that it does not know, though MoLE supports it.
    "_skip_if_conv1d_not_supported": lambda *args: None,
    # PEFT skips the merging tests of models without biases, for every method.
    "check_beft_config": lambda *args: None,
}


def _prepare(module: types.ModuleType) -> None:
    common = sys.modules[f"{module.__name__.rpartition('.')[0]}.testing_common"]
    for place in (module, common):
        for name in _REPLACED_HELPERS.keys() & vars(place).keys():
            setattr(place, name, _REPLACED_HELPERS[name])
    factory = getattr(module, "MockTransformerWrapper", None)
    if factory is not None:
        factory.from_pretrained = _with_expert_model(factory.from_pretrained)


def _with_expert_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(model_id: str, dtype: torch.dtype | None = None) -> Any:
        if model_id != "WithFfn":
            return original(model_id, dtype=dtype)
        torch.manual_seed(0)
        return cases.ExpertModel().to(dtype or torch.float32)

    return from_pretrained


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers in each run."""
    torch.manual_seed(0)


# --- exceptions and the verdict ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpectedException:
    """An entry of `exceptions.yaml`: tests that may fail or be skipped, and why."""

    tests: re.Pattern[str]
    """Found in the test's name and parameters."""
    message: re.Pattern[str]
    """Found in the error or the reason of the skip. Another error of the same test is not excused."""
    reason: str
    outcome: str = "failed"
    """`failed` or `skipped`."""
    variants: tuple[str, ...] | None = None
    """None: all."""
    blocks: tuple[str, ...] | None = None
    """None: all."""

    def concerns(self, test: str, variant: str, block: str) -> bool:
        """Whether the entry names this test."""
        named = self.variants is None or variant in self.variants
        return named and (self.blocks is None or block in self.blocks) and bool(self.tests.search(test))


def read_exceptions(path: Path, checkout: str) -> list[ExpectedException]:
    """The entries of an exceptions file that apply to tests of the version `checkout`.

    Raises:
        ValueError: a key is unknown or missing.
    """
    entries = []
    for number, raw in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")) or [], start=1):
        unknown = set(raw) - {"tests", "message", "reason", "outcome", "variants", "blocks", "checkouts"}
        missing = {"tests", "message", "reason"} - set(raw)
        if unknown or missing:
            raise ValueError(f"{path}: entry {number} has the unknown keys {unknown} and lacks {missing}")
        if checkout not in raw.get("checkouts", [checkout]):
            continue
        entries.append(
            ExpectedException(
                tests=re.compile(raw["tests"]),
                message=re.compile(raw["message"], re.DOTALL),
                reason=raw["reason"],
                outcome=raw.get("outcome", "failed"),
                variants=tuple(raw["variants"]) if "variants" in raw else None,
                blocks=tuple(raw["blocks"]) if "blocks" in raw else None,
            )
        )
    return entries


class Verdicts:
    """The results of a run, and which exceptions they needed."""

    def __init__(self, exceptions: list[ExpectedException]) -> None:
        self.exceptions = exceptions
        self.results: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect the results where the terminal is, which with several workers is another process."""
        self.results.extend(value for name, value in report.user_properties if name == "peft_suite")

    def find(self, outcome: str, message: str, test: str, variant: str, block: str) -> int | None:
        """The number of the first exception that covers this result."""
        for number, entry in enumerate(self.exceptions):
            if entry.outcome == outcome and entry.concerns(test, variant, block) and entry.message.search(message):
                return number
        return None

    def stale(self) -> list[str]:
        """Exceptions that a test was run for, but that no test needed; each variant on its own."""
        found = []
        for number, entry in enumerate(self.exceptions):
            for variant in entry.variants or (None,):
                concerned = [
                    r
                    for r in self.results
                    if variant in (None, r["variant"]) and entry.concerns(r["test"], r["variant"], r["block"])
                ]
                if concerned and not any(r["exception"] == number for r in concerned):
                    where = "" if variant is None else f" ({variant})"
                    found.append(f"{entry.outcome}: {entry.tests.pattern}{where}: {entry.message.pattern}")
        return found

    def table(self) -> list[str]:
        """Results by block and variant, as lines."""
        columns = ("passed", "listed failure", "listed skip", "failed")
        counts: dict[tuple[str, str], Counter[str]] = {}
        for result in self.results:
            counts.setdefault((result["block"], result["variant"]), Counter())[result["verdict"]] += 1
        order = [*cases.VARIANTS, cases.CONTROL]
        rows = sorted(counts.items(), key=lambda row: (list(BLOCKS.values()).index(row[0][0]), order.index(row[0][1])))
        total = sum(counts.values(), Counter())
        lines = [f"{'block':<17}{'variant':<12}" + "".join(f"{name:>16}" for name in columns)]
        for (block, variant), row in [*rows, (("total", ""), total)]:
            lines.append(f"{block:<17}{variant:<12}" + "".join(f"{row[name]:>16}" for name in columns))
        return lines


_VERDICTS = pytest.StashKey[Verdicts]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Judge a test that did not pass by the list of exceptions."""
    report = yield
    if report.passed and report.when != "call":
        return report
    block, variant = BLOCKS[item.path.stem], item.get_closest_marker("variant").args[0]
    test, message, verdict, number = item.name, "", "passed", None
    if not report.passed:
        message = str(call.excinfo.value) if call.excinfo else str(report.longrepr)
        if call.excinfo and report.failed:
            message = f"{call.excinfo.typename}: {message}"
        number = item.config.stash[_VERDICTS].find(report.outcome, message, test, variant, block)
        if number is None:
            verdict, report.outcome = "failed", "failed"
        else:
            entry = item.config.stash[_VERDICTS].exceptions[number]
            verdict = "listed failure" if entry.outcome == "failed" else "listed skip"
            report.outcome, report.wasxfail = "skipped", entry.reason
    result = {"block": block, "variant": variant, "test": test, "verdict": verdict, "exception": number}
    if verdict != "passed":
        result |= {"message": message, "where": _place(call)}
    report.user_properties.append(("peft_suite", result))
    return report


def _place(call: pytest.CallInfo[None]) -> list[str]:
    """File and line of the innermost calls of an error: those in MoLE, and the last one."""
    if call.excinfo is None:
        return []
    frames = [f"{Path(str(entry.path)).name}:{entry.lineno + 1}" for entry in call.excinfo.traceback]
    ours = [
        f"{Path(str(entry.path)).name}:{entry.lineno + 1}"
        for entry in call.excinfo.traceback
        if "llava_mole" in str(entry.path)
    ]
    return [*ours[-2:], frames[-1]]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A listed exception that nothing needs fails the run."""
    if not hasattr(session.config, "workerinput") and session.config.stash[_VERDICTS].stale():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table and write the report."""
    verdicts = config.stash[_VERDICTS]
    terminalreporter.section("PEFT's tests with MoLE")
    for line in [*verdicts.table(), *(f"listed, but does not occur: {entry}" for entry in verdicts.stale())]:
        terminalreporter.write_line(line)
    target = config.getoption("report")
    if target is not None:
        content = {"table": verdicts.table(), "stale": verdicts.stale(), "results": verdicts.results}
        target.write_text(json.dumps(content, indent=1), encoding="utf-8")

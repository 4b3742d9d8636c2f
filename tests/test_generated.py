"""Generated configurations, records, images and run directories: only our own errors, and nothing of others changes.

The suite draws a sample; `LLAVA_MOLE_CASES=20000 pytest tests/test_generated.py` draws that many in all.
"""

import copy
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_mole.common.errors import UserError
from llava_mole.config import config_to_dict, parse_run_config
from llava_mole.data.images import load_image
from llava_mole.data.records import parse_record
from llava_mole.model import checkpoint
from llava_mole.train.resume import find_start, run_directory

CASES = int(os.environ.get("LLAVA_MOLE_CASES", "800"))


def cases(share: float) -> Callable:
    """Settings for this share of all cases."""
    unchecked = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    number = max(1, round(share * CASES))
    return settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=unchecked,
        derandomize=True,
        phases=[Phase.generate],  # a case of the file system takes minutes to shrink
    )


def digests(folder: Path) -> dict[str, str]:
    """Every file, link and folder: digest, target, or nothing."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of somebody else, which must be the same after all cases."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.bin").write_bytes(b"weights")
    Image.new("RGB", (4, 4)).save(folder / "secret.png")
    before = digests(folder)
    yield folder
    assert digests(folder) == before


# Records

TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["<image>", "<image>\nWhat?", "</s>", "<s>", "USER:", "\ud800", "", " ", "a\0b", "../x.png", "/etc"]
    ),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
TURN = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {"from": st.one_of(st.sampled_from(["human", "gpt", "system", "Human"]), JSON), "value": st.one_of(TEXT, JSON)}
    ),
)
RECORD = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {"conversations": st.one_of(JSON, st.lists(TURN, max_size=5))},
        optional={
            "id": JSON,
            "image": st.one_of(JSON, TEXT, st.lists(TEXT, max_size=3)),
            "images": JSON,
            "image_path": TEXT,
            "messages": JSON,
            "photo": st.sampled_from(["a.png", "b.JPG", "c.txt"]),
        },
    ),
)


@cases(0.4)
@given(value=RECORD)
def test_records(value: Any) -> None:
    try:
        record, _ = parse_record(value, "source", "file.json:7")
    except UserError as error:
        problem = str(error)
    else:
        problem = "file.json:7: none"
        assert [turn.role for turn in record.turns[:2]] == ["user", "assistant"]
        assert sum(turn.text.count("<image>") for turn in record.turns) == len(record.images)
    assert problem.startswith("file.json:7: ")
    assert "\n" not in problem


# Images

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"]


@st.composite
def image_bytes(draw: st.DrawFn) -> bytes:
    """A small image in some mode and format, whole, cut, with changed bytes or with other bytes behind it."""
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    image = Image.new(draw(st.sampled_from(MODES)), size)
    content = io.BytesIO()
    try:
        image.save(content, draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])))
    except (OSError, ValueError, KeyError):  # the format does not have the mode
        Image.new("RGB", size).save(content, "PNG")
    data = bytearray(content.getvalue())
    for position, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=4)):
        data[position] = value
    cut = draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    return bytes(data[:cut]) + draw(st.binary(max_size=4))


@cases(0.25)
@given(content=image_bytes(), path=st.sampled_from(["a.png", "./a.png", "b/../a.png", "../secret.png", "link.png", ""]))
def test_images(content: bytes, path: str, beside: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir(exist_ok=True)
    (root / "a.png").write_bytes(content)
    if not (root / "link.png").is_symlink():
        (root / "link.png").symlink_to(beside / "secret.png")
    before = digests(root)
    try:
        image = load_image(path, root)
    except UserError as error:
        problem = str(error)
    else:
        problem = ""
        assert image.mode == "RGB"
        assert path.endswith("a.png")
    assert "\n" not in problem
    assert digests(root) == before


# Configurations

NUMBERS = st.one_of(
    st.integers(-3, 5), st.sampled_from([10**9, -(10**9), 0.5, -0.1, math.nan, math.inf, -math.inf, 1e-30])
)
VALUES = st.one_of(NUMBERS, st.none(), st.booleans(), TEXT, st.just([]), st.just({}))


MINIMAL = ["--stage=finetune", "--train.output_dir=out", '--data.sources={"x": {"annotations": "x.json"}}']


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(a.b.c, value)` of a nested configuration."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


CONFIG = parse_run_config(MINIMAL)
KEYS = [key for key, _ in leaves(config_to_dict(CONFIG))]


@cases(0.1)
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_configurations(changes: dict[str, Any]) -> None:
    options = [f"--{key}={json.dumps(value)}" for key, value in changes.items()]
    try:
        config = parse_run_config([*MINIMAL, *options])
    except UserError as error:
        problem = str(error)
    else:
        problem = ""
        numbers = [value for _, value in leaves(config_to_dict(config)) if isinstance(value, float)]
        assert all(math.isfinite(value) for value in numbers)
    assert "\n" not in problem


# Run directories

OWN, OTHER = "0123456789abcdef", "fedcba9876543210"


def write_entry(run_dir: Path, name: str, kind: str, config: dict[str, Any]) -> None:
    """One entry of a run directory: a checkpoint of some kind, or something that is not one."""
    path = run_dir / name
    if os.path.lexists(path):
        return
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to(run_dir.parent / "elsewhere")
    elif kind == "tool":
        path.mkdir()
        (path / "model.bin").write_text("mine")
    elif kind == "empty":
        path.mkdir()
    else:
        step = int("".join(filter(str.isdecimal, name)) or 0) + (kind == "renamed")
        fields = {"step": step, "stage": "finetune", "fingerprints": {}, "contents": {}}
        fields |= {
            "format 1": {"format": "llava_mole.checkpoint/1"},
            "newer": {"format": "llava_mole.checkpoint/9"},
        }.get(kind, {})

        def files(folder: Path) -> None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            if kind != "slim":
                (folder / "trainer").mkdir()
                (folder / "trainer" / "state.json").write_text(json.dumps({"step": step, "plan_digest": "p"}))

        owner = None if kind == "format 1" else OTHER if kind == "other run" else OWN
        checkpoint.write_checkpoint(path, files, fields, run=owner)
        if kind == "torn":
            (path / "config.yaml").write_text("")
        elif kind == "no manifest":
            (path / checkpoint.MANIFEST).unlink()
        elif kind == "bad manifest":
            (path / checkpoint.MANIFEST).write_text('{"format": 7, ')
        elif kind == "no owner file" and owner:
            (path / checkpoint.OWNER_FILE).unlink()


OURS = ("own", "torn", "no manifest", "bad manifest", "no owner file", "slim")
KINDS = (*OURS, "renamed", "newer", "format 1", "other run", "tool", "empty", "file", "link")
NAMES = ("checkpoint-0", "checkpoint-2", "checkpoint-4", "checkpoint-10", "checkpoint-007", "checkpoint-",
         "checkpoint-x",
         ".tmp-checkpoint-2-9", ".old-checkpoint-4-9", ".gone-checkpoint-0-9", "checkpoint-notes")  # fmt: skip
OTHER_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "environment.json")


@pytest.fixture(scope="module")
def _fast_disk() -> Iterator[None]:
    """No fsync, which takes most of the time and changes nothing that a case could see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava_mole.common.files.sync", lambda _: None)
        yield


@pytest.mark.usefixtures("_fast_disk")
@cases(0.25)
@given(
    entries=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(KINDS), max_size=5),
    written=st.lists(st.sampled_from(OTHER_FILES), unique=True),
    resume=st.sampled_from([None, "auto", "checkpoint-2", "checkpoint-4", "beside", "nowhere"]),
    rank=st.sampled_from([CONFIG.adapter.rank] * 3 + [4]),
    step=st.sampled_from([1, 2, 4, 5]),
    keep=st.integers(1, 3),
)
def test_run_directories(
    entries: dict[str, str],
    written: list[str],
    resume: str | None,
    rank: int,
    step: int,
    keep: int,
    beside: Path,
) -> None:
    """Start, save and rotate in a directory with anything in it: what the run did not write stays as it was."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        there = config_to_dict(CONFIG)
        for name, kind in entries.items():
            write_entry(run_dir, name, kind, there)
        texts = {"config.yaml": yaml.safe_dump(there), "metrics.jsonl": "", "summary.json": '{"step": 2}'}
        for name in written:
            (run_dir / name).write_text(texts.get(name, "{}"))
        theirs = {
            name: kind for name, kind in entries.items() if kind not in OURS or not name.startswith("checkpoint-")
        }
        before = {name: _entry(run_dir / name) for name in theirs}
        target = {None: None, "auto": "auto", "beside": str(beside)}.get(resume, str(run_dir / str(resume)))
        config = copy.deepcopy(CONFIG)
        config.train.output_dir, config.train.resume = str(run_dir), target
        config.adapter.rank = rank
        run, message = "", ""
        try:
            with run_directory(config.train):
                start = find_start(config.train, config_to_dict(config))
                assert start.checkpoint is None or checkpoint.verify_checkpoint(start.checkpoint)
                assert start.checkpoint is None or rank != 4
                path, run = run_dir / f"checkpoint-{step}", start.run
                try:

                    def write(inner: Path) -> None:
                        (inner / "weights").write_text("new")

                    checkpoint.write_checkpoint(path, write, {"step": step}, run=start.run)
                except FileExistsError:
                    assert entries.get(path.name) not in OURS or run != OWN
                else:
                    checkpoint.rotate_checkpoints(path, keep, start.run)
                    assert checkpoint.verify_checkpoint(path)["run"] == start.run
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        if run == OTHER:  # asked for by name
            theirs = {name: kind for name, kind in theirs.items() if kind != "other run"}
        after = {name: _entry(run_dir / name) for name in theirs}
        unchanged = {name for name in theirs if not name.startswith(".") or theirs[name] in ("file", "link", "tool")}
        assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
        assert not (run_dir / ".lock").exists()


def _entry(path: Path) -> Any:
    if path.is_symlink() or not path.is_dir():
        return (path.is_symlink(), path.read_text() if path.is_file() and not path.is_symlink() else None)
    return digests(path)

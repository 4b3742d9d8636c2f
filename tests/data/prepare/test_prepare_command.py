"""The command line of `llava-mole prepare`: its pages, and mistakes in what is given."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import published_sets, raw_sets

from llava_mole.cli import main
from llava_mole.data.prepare import image_pool
from llava_mole.data.prepare.cli import MODELS, help_text
from llava_mole.data.prepare.defects import KINDS, Defects
from llava_mole.data.prepare.report import published_counts
from llava_mole.data.prepare.sources import MODULES, get_source

PACKAGE = Path(__file__).parents[3] / "llava_mole"
CONVERTED = [name for name in MODULES if name != "tiny"]


def test_the_page_lists_every_source_and_fits_a_screen() -> None:
    text = help_text()
    for name in (*MODULES, *MODELS):
        assert f"\n  {name} " in text
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("arguments", [[], *([name, "--help"] for name in (*MODULES, *MODELS))])
def test_no_page_is_wider_than_100_columns(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with contextlib.suppress(SystemExit):
        main(["prepare", *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert not [line for line in lines if len(line) > 100]


@pytest.mark.parametrize("name", CONVERTED)
def test_every_source_has_its_own_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", name, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "RAW" in printed
    for option in ("--raw", "--out", "--check-images", "--missing-images", "--overwrite"):
        assert option in printed


@pytest.mark.parametrize("name", CONVERTED)
def test_names_lead_to_their_sources(name: str) -> None:
    source = get_source(name)
    assert source.name == name
    assert source.iterate is not None
    assert len(source.summary) <= 77


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagenet"], "no source 'imagenet' to prepare; there are tiny, sharegpt4v-pt"),
        (["llava-json", "--raw", "none", "--out", "x"], "--raw none does not exist"),
        (["llava-json", "--raw", ".", "--out", "x", "--workers", "0"], "--workers is 0"),
        (["llava-json", "--raw", ".", "--out", "x", "--image-root", "none"], "--image-root none is not a directory"),
        (
            ["llava-json", "--raw", ".", "--out", "x", "--train-splits", "dev"],
            "--train-splits 'dev': 'dev' is not one of train, val, test",
        ),
        (["llava-json", "--raw", ".", "--out", "x", "--unpack-archives", "y"], "holds no zip or tar file"),
        (["mix665k", "--raw", ".", "--out", "."], "--out . names no folder of its own"),
        (["mix665k", "--raw", ".", "--out", "/dev/null/x"], "/dev/null/.x.partial: Not a directory; `prepare` must"),
        (
            ["mix665k", "--raw", ".", "--out", "x"],
            "the annotation file does not exist; looked for llava_v1_5_mix665k.json",
        ),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published_sets.write_m3it(tmp_path / "raw")
    monkeypatch.setattr(image_pool, "run_tasks", die)
    given = ["prepare", "m3it", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "2"]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert "a worker process was killed" in error
    assert "Traceback" not in error


def test_preparing_loads_no_torch(tmp_path: Path) -> None:
    published_sets.write_m3it(tmp_path / "raw")
    code = (
        "import sys; from llava_mole.cli import main; "
        "main(sys.argv[1:]); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    given = ["prepare", "m3it", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False False\n")


def test_every_kind_of_defect_has_a_meaning(tmp_path: Path) -> None:
    texts = {
        room: "".join(path.read_text(encoding="utf-8") for path in (PACKAGE / room).rglob("*.py"))
        for room in ("data", "analysis/check")
    }
    used = set(re.findall(r'(?:SkipRecord|Issue|Oddity|efects\.add|self\.add)\(\s*"([a-z0-9-]+)"', texts["data"]))
    assert used <= set(KINDS)
    assert all(f'"{kind}"' in texts["analysis/check"] for kind in set(KINDS) - used)
    with pytest.raises(KeyError):
        Defects().add("unheard-of", "a:1")


def test_published_counts_add_up() -> None:
    counts = published_counts()
    assert set(counts) <= {*CONVERTED, "m3it-parquet", "pathvqa-parquet"}
    for name in ("mix665k", "m3it"):
        train = counts[name]["train"]
        sets = sum(count for key, count in train.items() if key != "total")
        videos = 20_868 if name == "m3it" else 0
        assert sets + videos == train["total"]
    test = counts["pathvqa"]["test"]
    assert test["OPEN"] + test["CLOSED"] == test["total"]


def test_tokens_can_be_counted_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from worlds import tiny_models

    from llava_mole.data.chat_template import resolve_template
    from llava_mole.data.lengths import lengths_path
    from llava_mole.data.store import PreparedRecords
    from llava_mole.data.tokenization import HFTextTokenizer, load_tokenizer

    tiny_models.make_tokenizer(tmp_path / "tokenizer")
    published_sets.write_sharegpt4v_pt(tmp_path / "raw")
    given = ("--tokenizer", str(tmp_path / "tokenizer"), "--template", "plain")
    done = raw_sets.prepare("sharegpt4v-pt", tmp_path / "raw", tmp_path / "out", *given)
    assert "tokens: " in capsys.readouterr().out
    tokenizer = HFTextTokenizer(load_tokenizer(str(tmp_path / "tokenizer")))
    path = lengths_path(PreparedRecords(done.out / "train", "x"), resolve_template("plain", tokenizer), tokenizer)
    assert path is not None
    assert path.is_file()

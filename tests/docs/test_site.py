"""The site builds with warnings as errors, asks nothing of other hosts, and shows every key of the configuration."""

import html
import io
import itertools
import json
import logging
import re
from pathlib import Path

import pytest
from worlds.pages import PAGES, ROOT, blocks

from llava_mole.config import options
from llava_mole.mole import MoleConfig


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Broken links and anchors, pages outside the navigation and bad docstrings are errors."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setLevel(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NO_MKDOCS_2_WARNING", "1")
            patch.chdir(ROOT)
            build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert not said.getvalue()
    return folder


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
    assert (site / "notebooks" / "first_steps.ipynb").is_file()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)")
    for page in site.glob("*.html"):
        assert not loads.findall(page.read_text(encoding="utf-8")), page.name


def test_the_configuration_page_has_every_key(site: Path) -> None:
    text = (site / "configuration.html").read_text(encoding="utf-8")
    for option in options():
        assert f"<code>{option.key.rpartition('.')[2]}</code>" in text, option.key
        assert option.meaning, option.key
    assert "2e-05" in text


def test_the_api_page_shows_signatures_and_docstrings(site: Path) -> None:
    text = text_of(site / "api.html")
    for name in ("from_pretrained", "generate", "MoleConfig", "mole_auxiliary_loss", "load_pretrained_model"):
        assert name in text
    assert "expert_scale" in text
    assert (MoleConfig.__doc__ or "").strip().split("\n")[0].split(".")[0] in text


def test_lists_have_a_blank_line_before_them() -> None:
    """GitHub needs none, Python's Markdown does: it would join the items to the paragraph."""
    for page in PAGES:
        fenced = False
        lines = page.read_text(encoding="utf-8").splitlines()
        for number, (before, line) in enumerate(itertools.pairwise(lines), 2):
            fenced ^= before.lstrip().startswith("```")
            if not fenced and re.match(r"([-*]|\d+\.) ", line) and before and not before.startswith("#"):
                item = re.match(r"([-*]|\d+\.) |\s", before) or _in_item(lines, number - 2)
                assert item, f"{page.name}:{number}: no blank line before the list"


def _in_item(lines: list[str], number: int) -> bool:
    """Whether a line goes on with an item of a list that began above it, without a blank line between."""
    while number >= 0 and lines[number]:
        if re.match(r"\s*([-*]|\d+\.) ", lines[number]):
            return True
        number -= 1
    return False


def test_the_messages_of_the_faq_are_those_of_the_program() -> None:
    """Each part between two … stands in the source, apart from quotes and line breaks."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "llava_mole").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    messages = [text for language, text in blocks(ROOT / "docs" / "faq.md") if language == "text"]
    assert len(messages) >= 10
    for message in messages:
        for part in re.split(r"…|CUDA out of memory; ", message.strip().removeprefix("llava-mole: error: ")):
            for piece in re.split(r"[()]", part):
                assert piece.strip() in joined, piece


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    path = ROOT / "docs" / "notebooks" / "first_steps.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "strip the outputs"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    losses = [float(value) for value in re.findall(r"step \d+: loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0] / 3
    assert "What color is the sky? blue" in printed
    assert "layer 3: expert 0:" in printed
    json.loads(path.read_text(encoding="utf-8"))

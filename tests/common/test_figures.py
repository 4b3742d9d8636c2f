"""All figures share one style, and a legend says what their faint lines are."""

import re
from pathlib import Path

import pytest

from llava_mole.common.figures import add_legend, new_figure, tidy

pytest.importorskip("matplotlib")
PACKAGE = Path(__file__).parents[2] / "llava_mole"


def test_a_legend_explains_faint_lines() -> None:
    axes = new_figure(4, 3).subplots()
    axes.plot([1, 2], [3, 4], alpha=0.25)
    axes.plot([1, 2], [3, 4], label="loss")
    tidy(axes, "Loss")
    add_legend(axes, "pale: single steps")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss", "pale: single steps"]
    axes = new_figure(4, 3).subplots()
    axes.plot([1, 2], [3, 4], label="loss")
    add_legend(axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss"]


def test_every_figure_takes_the_shared_style() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "new_figure(" not in text or path.name == "figures.py":
            continue
        if "check_matplotlib" not in text:
            assert "tidy(" in text or "import bars, map_panel" in text, path  # `analysis/panels.py` tidies its panels
        assert not re.search(r'color=f?"C\d|f"C\{', text), f"{path}: a colour that is not of COLORS"
        assert "set_title(" not in text, f"{path}: `tidy` sets titles"


def test_the_last_bar_of_a_histogram_of_lengths_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from llava_mole.analysis.check import report

    drawn = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure) or path)
    source = report.SourceFindings("a")
    source.tokens = np.arange(1, 1000)
    report.draw_lengths([source], 800, tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert axes.get_xlim()[1] >= max(patch.get_x() + patch.get_width() for patch in axes.patches)

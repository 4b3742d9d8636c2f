"""All figures share one style, and a legend says what their faint lines are."""

import re
from pathlib import Path

import pytest

from llava_mole.common.figures import add_legend, legend_below, new_figure, tidy

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


@pytest.mark.parametrize(
    ("labels", "columns"), [(["a", "b", "c"], 3), ([f"LLaVA-MoLE, variant {n}" for n in range(9)], 2)]
)
def test_a_legend_is_not_wider_than_its_figure(labels: list[str], columns: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patches import Patch

    figure = new_figure(5.0, 3.0)
    figure.subplots()
    legend_below(figure, [Patch(label=label) for label in labels], columns=5)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = legend.get_window_extent(canvas.get_renderer())
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert len({round(text.get_window_extent(canvas.get_renderer()).x0) for text in legend.get_texts()}) == columns

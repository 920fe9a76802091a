"""Figures are drawn without a missing glyph, and show the data that they were given."""

import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import font_manager, pyplot

from kvneox_lib.pages import figures
from kvneox_lib.pages.words import CONTROL
from kvneox_lib.presses.registry import ROWS

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def styled():
    with matplotlib.rc_context():
        figures.use_style()
        yield
    pyplot.close("all")


def draw(figure, tmp_path):
    """As SVG, with missing glyphs as errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph")
        figure.savefig(tmp_path / "figure.svg")


def test_a_missing_glyph_would_be_noticed(tmp_path):
    matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans"]
    with pytest.raises(UserWarning, match="Glyph"):
        draw(figures.note("缺少"), tmp_path)


def test_the_font_comes_from_a_package_where_none_is_installed(monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    assert figures.chinese_font() == "Noto Sans CJK SC"
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    with pytest.raises(ModuleNotFoundError, match="pip install mplfonts"):
        figures.chinese_font()


def test_kept_heat_maps(tmp_path):
    mask = torch.zeros(3, 2, 100, dtype=torch.bool)
    mask[1, 0, 50:] = True
    figure = figures.kept_heat_maps({"one": mask, "two": ~mask, "three": mask, "four": mask}, n_bins=10)
    draw(figure, tmp_path)
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images and axes.get_title()]
    assert len(maps) == 4
    assert np.array_equal(maps[0], [[0] * 10] * 2 + [[0] * 5 + [1] * 5] + [[0] * 10] * 3)
    assert np.array_equal(maps[1], 1 - maps[0])


def measured() -> pd.DataFrame:
    rows = [
        {"press": press, "compression_ratio": ratio, "delta_nll": ratio * i, "depth": depth, "correct": i == 3}
        for i, press in enumerate(["no_press", *(f"press {k}" for k in range(13))])
        for ratio in (0.25, 0.5)
        for depth in (0.1, 0.9)
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(delta_nll_ci95_low=frame["delta_nll"] - 0.1, delta_nll_ci95_high=frame["delta_nll"] + 0.2)


def test_press_lines(tmp_path):
    frame = measured().drop_duplicates(["press", "compression_ratio"])
    figure = figures.press_lines(frame, "compression_ratio", "delta_nll", xlabel="压缩率", ylabel="差", log_x=True)
    draw(figure, tmp_path)
    (axes,) = figure.axes
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    assert list(lines["press 3"].get_ydata()) == [1.0, 2.0]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines.values()}
    assert len(lines) == len(looks) == 14
    (bars,) = axes.containers[4].lines[2]
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([0.9, 1.2])


def looks_of(names: list[str]) -> dict[str, tuple]:
    frame = pd.DataFrame([{"press": name, "ratio": ratio, "loss": ratio} for name in names for ratio in (0.25, 0.5)])
    (axes,) = figures.press_lines(frame, "ratio", "loss", xlabel="压缩率", ylabel="差").axes
    return {line.get_label(): (line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.get_lines()}


def test_a_press_looks_the_same_in_every_figure():
    core = [row.name for row in ROWS if row.core]
    all_core, two = looks_of(["no_press", *core]), looks_of(["snapkv", "random"])
    assert {name: all_core[name] for name in two} == two
    assert looks_of(core[::-1]) == {name: all_core[name] for name in core}
    assert len(set(all_core.values())) == 1 + len(core)
    every = looks_of([row.name for row in ROWS])
    assert len(set(every.values())) == len(ROWS) and every["snapkv"] == two["snapkv"]


def test_lines_that_are_no_presses_have_looks_of_their_own():
    mixed = looks_of(["不压缩", "本库，snapkv 0.75", "4 个汇聚点", CONTROL, *(row.name for row in ROWS)])
    assert len(set(mixed.values())) == len(ROWS) - 1 + 4 and mixed["不压缩"] == mixed["no_press"]
    assert looks_of([CONTROL, "snapkv"])[CONTROL] == mixed[CONTROL]


def test_a_few_windows_give_lines_without_bars(tmp_path):
    """A record has None for the ends of an interval that does not exist."""
    frame = measured().assign(delta_nll_ci95_low=None, delta_nll_ci95_high=None).query("depth < 0.5")
    draw(figures.press_lines(frame, "compression_ratio", "delta_nll", xlabel="压缩率", ylabel="差"), tmp_path)


def test_heat_maps(tmp_path):
    figure = figures.heat_maps(
        measured(), "depth", "compression_ratio", "correct", ylabel="深度", xlabel="压缩率", label="准确率"
    )
    draw(figure, tmp_path)
    panels = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images and axes.get_title()}
    assert len(panels) == 14 and panels["press 2"].mean() == 1 and panels["press 3"].mean() == 0


def test_bars(tmp_path):
    figure = figures.bars(["不压缩", "snapkv 0.75"], [20.0, 5.0], xlabel="毫秒", marks=[12.0, 3.0])
    draw(figure, tmp_path)
    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches] == [20.0, 5.0]
    assert [segment[0, 0] for segment in axes.collections[0].get_segments()] == [12.0, 3.0]


def test_a_note_stands_for_a_figure(tmp_path):
    figure = figures.note("（缺少记录：速度）")
    draw(figure, tmp_path)
    assert figure.axes[0].texts[0].get_text() == "（缺少记录：速度）"


def test_panels_share_legend_and_looks(tmp_path):
    frame = measured().drop_duplicates(["press", "compression_ratio"])
    panels = {"外": frame, "内": frame[frame["press"] != "press 0"]}
    figure = figures.press_line_panels(panels, "compression_ratio", "delta_nll", xlabel="压缩率", ylabel="差")
    draw(figure, tmp_path)
    left, right = ({c.get_label(): c.lines[0] for c in axes.containers} for axes in figure.axes)
    assert list(right["press 3"].get_ydata()) == [1.0, 2.0] and "press 0" not in right
    assert [line.get_label() for line in figure.legends[0].get_lines()] == list(left)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0.25", "0.5"]
    for name in right:  # the same press looks the same in both
        assert (left[name].get_color(), left[name].get_marker()) == (right[name].get_color(), right[name].get_marker())


def test_scatter_panels(tmp_path):
    frame = measured().assign(share=lambda rows: rows["depth"] / 2)
    figure = figures.scatter_panels(frame, {"深度": "depth", "份额": "share"}, "delta_nll", ylabel="差")
    draw(figure, tmp_path)
    one, other = ({line.get_label(): line for line in axes.get_lines()} for axes in figure.axes)
    assert list(other["press 3"].get_xdata()) == [x / 2 for x in one["press 3"].get_xdata()]
    assert list(one["press 3"].get_ydata()) == [1.0, 1.0, 2.0, 2.0] and len(one) == 14

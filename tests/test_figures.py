"""Figures are drawn without a missing glyph, show the data that they were given, and can be read."""

import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import font_manager, pyplot
from matplotlib.colors import to_hex

from kvneox_lib.pages import figures, lines, looks, maps
from kvneox_lib.pages.kinds import kind_of
from kvneox_lib.pages.words import CONTROL, ENGINES
from kvneox_lib.presses.registry import ROWS

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("styled")
CORE = [row.name for row in ROWS if row.core]
EVERY = [row.name for row in ROWS]


def draw(figure, tmp_path):
    """As SVG; missing glyphs are errors, and so is a layout that finds no room."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        figure.savefig(tmp_path / "figure.svg")


def texts_of(figure) -> list:
    """All that is written; ticks outside of the limits are not."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    found += [figure._suptitle, figure._supxlabel, figure._supylabel]
    for axes in figure.axes:
        if axes.axison:
            found += [axes.title, axes.xaxis.label, axes.yaxis.label, *_ticks_of(axes)]
        found += axes.texts
    return [text for text in found if text is not None and text.get_text().strip()]


def _ticks_of(axes) -> list:
    found = []
    for axis, coordinate in ((axes.xaxis, 0), (axes.yaxis, 1)):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick.label1 for tick in axis.get_major_ticks() if tick.label1.get_visible()]
        found += [text for text in ticks if low <= text.get_position()[coordinate] <= high]
    return found


def check_readable(figure, tmp_path):
    """Drawn 390 pixels wide, no letter is smaller than 8.5 pixels, and nothing lies outside of the canvas."""
    draw(figure, tmp_path)
    figure.canvas.draw()
    width, height = figure.bbox.size
    for text in texts_of(figure):
        assert text.get_fontsize() * 390 / (72 * figure.get_size_inches()[0]) >= 8.5, text
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, (text, box)


def boxes_overlap(texts) -> bool:
    boxes = [pyplot.Text.get_window_extent(text) for text in texts]  # without the lines that lead to them
    return any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def names_at_ends(axes) -> list:
    return [text for text in axes.texts if text.get_gid() == "name at an end"]


def losses_of(names, ratios=(0.25, 0.5, 0.75, 0.9, 0.99)) -> pd.DataFrame:
    """Lines that end close together, as those of the study do."""
    rows = [
        {"press": name, "ratio": ratio, "loss": ratio**3 * (1 + 0.02 * i)}
        for i, name in enumerate(names)
        for ratio in ratios
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(loss_ci95_low=frame["loss"] - 0.05, loss_ci95_high=frame["loss"] + 0.1)


def press_figure(names, **how):
    return figures.press_lines(losses_of(names), "ratio", "loss", xlabel="压缩率", ylabel="差", **how)


def look_of_each(axes) -> dict[str, tuple]:
    found = {c.get_label(): c.lines[0] for c in axes.containers} | {line.get_label(): line for line in axes.get_lines()}
    return {
        name: (to_hex(line.get_color()), line.get_marker(), line.get_linestyle())
        for name, line in found.items()
        if not name.startswith("_")
    }


def test_a_missing_glyph_would_be_noticed(tmp_path):
    matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans"]
    with pytest.raises(UserWarning, match="Glyph"):
        draw(figures.note("缺"), tmp_path)


def test_the_font_comes_from_a_package_where_none_is_installed(monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    assert figures.chinese_font() == "Noto Sans CJK SC"
    monkeypatch.setattr(looks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    with pytest.raises(ModuleNotFoundError, match="pip install mplfonts"):
        figures.chinese_font()


# -- looks ------------------------------------------------------------------------------------------------------------


def test_a_press_looks_the_same_in_every_figure():
    many, two = (look_of_each(press_figure(names).axes[0]) for names in (CORE, ["streaming_llm", "snapkv"]))
    assert {name: many[name] for name in two} == two
    marks = figures.scatter_panels(losses_of(CORE), {"压缩率": "ratio"}, "loss", ylabel="差").axes[0]
    for name in two:
        assert look_of_each(marks)[name][:2] == two[name][:2]
    again = look_of_each(press_figure(CORE[::-1]).axes[0])
    assert again == many


def test_looks_follow_the_registry_and_are_a_press_own():
    own = {name: look for name, look in looks.LOOKS.items() if name in EVERY}
    assert set(own) == set(EVERY) and len({(look.colour, look.marker, look.dash) for look in own.values()}) == len(own)
    main = [name for name in EVERY if name in looks.COLOURED]
    assert [own[name].colour for name in main] == list(looks.MAIN_COLOURS)
    core = [name for name in CORE if name not in looks.FIXED and name not in main]
    assert [own[name].colour for name in core] == list(looks.MORE_COLOURS)
    assert own["random"].colour == "black" and own["no_press"].dash == ":"
    others = {own[name].colour for name in EVERY if name not in main}
    assert others.isdisjoint(looks.MAIN_COLOURS)


def test_a_control_looks_the_same_as_a_kind():
    for press in ("random", "random_recent"):
        assert looks.LOOKS[kind_of(press)] == looks.LOOKS[press]


def test_at_most_five_are_coloured():
    shown = looks.looks_of(EVERY)
    coloured = [name for name, look in shown.items() if look is not looks.IN_THE_BACK and name not in looks.FIXED]
    assert set(coloured) == set(looks.COLOURED) and len(coloured) == looks.MOST_COLOURED
    assert set(looks.greys(looks.looks_of(CORE, ["knorm", "tova"]))) == set(CORE) - {"knorm", "tova", *looks.FIXED}
    assert not looks.greys(looks.looks_of(["knorm", "tova", "lagkv", "pyramidkv", "snapkv", "random", "no_press"]))


def test_lines_that_are_no_presses_have_looks_of_their_own():
    mixed = looks.looks_of(["不压缩", "4 个汇聚点", CONTROL, "snapkv", "keydiff"])
    assert len(set(mixed.values())) == 5 and mixed["不压缩"] == looks.LOOKS["no_press"]
    assert mixed["4 个汇聚点"] not in looks.LOOKS.values()
    assert mixed["4 个汇聚点"].colour not in (*looks.MAIN_COLOURS, *looks.MORE_COLOURS)
    free = looks.looks_of([f"方法 {i}" for i in range(9)])
    assert len(set(free.values())) == 6 and len(looks.greys(free)) == 4


def test_an_engine_has_one_colour():
    names = [f"{words}，不压缩" for words in ENGINES.values()]
    axes = figures.bars(names, [1.0] * len(names), xlabel="毫秒").axes[0]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [c.lower() for c in looks.ENGINE_COLOURS.values()]
    rows = pd.DataFrame({"name": names, "of": "float32", "value": 1.0, "low": 0.9, "high": 1.1})
    marks = figures.dots([figures.Dots(rows, "倍")]).axes[0].containers
    drawn = {round(float(bar.lines[0].get_ydata()[0])): to_hex(bar.lines[0].get_color()) for bar in marks}
    assert [drawn[i] for i in range(len(names))] == [c.lower() for c in looks.ENGINE_COLOURS.values()]
    for engine, words in ENGINES.items():
        assert looks.looks_of([words])[words].colour == looks.ENGINE_COLOURS[engine]
    assert len(set(looks.ENGINE_COLOURS.values())) == len(ENGINES)


def test_the_name_of_a_variant_is_short_beside_a_figure():
    assert looks.in_short(f"{ENGINES['static']}，snapkv 0.75") == "StaticCache snapkv 0.75"
    assert looks.in_short_all([f"{ENGINES['ours']}，snapkv 0.75", f"{ENGINES['ours']}，不压缩"]) == [
        "snapkv 0.75",
        "不压缩",
    ]


# -- names at the ends of lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_x", [False, True])
def test_every_line_is_named_at_its_end_and_no_name_covers_another(tmp_path, log_x):
    figure = press_figure([*CORE, "copying_heads", "kvzip"], log_x=log_x)
    check_readable(figure, tmp_path)
    names = names_at_ends(figure.axes[0])
    assert sorted(name.get_text() for name in names) == sorted([*CORE, "copying_heads", "kvzip"])
    assert not boxes_overlap(names) and not figure.legends
    heights = [name.get_window_extent().y0 for name in names]
    values = [name.xy[1] for name in names]
    assert sorted(heights, key=lambda height: values[heights.index(height)]) == sorted(heights)


def test_lines_that_end_as_one_are_named_in_the_order_that_they_had_before(tmp_path):
    frame = losses_of(["tova", "knorm", "snapkv"], (0.5, 0.75))
    frame.loc[frame["ratio"] == 0.75, "loss"] = 0.0
    figure = figures.press_lines(frame[::-1], "ratio", "loss", xlabel="压缩率", ylabel="差")
    draw(figure, tmp_path)
    names = sorted(names_at_ends(figure.axes[0]), key=lambda name: name.get_window_extent().y0)
    assert [name.get_text() for name in names] == ["tova", "knorm", "snapkv"]


def test_names_stay_apart_when_the_scale_is_changed_afterwards(tmp_path):
    figure = press_figure(CORE)
    figure.axes[0].set_yscale("log")
    check_readable(figure, tmp_path)
    assert not boxes_overlap(names_at_ends(figure.axes[0]))


def test_pushed_apart():
    assert lines.pushed_apart([0.5, 0.2], 0.1) == [0.5, 0.2]
    assert lines.pushed_apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.5, 0.6, 0.7])
    assert lines.pushed_apart([1.0, 1.0], 0.2) == pytest.approx([0.7, 0.9])
    crowded = sorted(lines.pushed_apart([0.5] * 21, 0.1))
    assert np.diff(crowded) == pytest.approx(np.full(20, 0.045)) and crowded[-1] <= 1.0


def test_long_names_stand_above(tmp_path):
    names = [f"{ENGINES['ours']}，keydiff 0.90，每块 1024 词元{end}" for end in ("", "，边读边淘汰")]
    figure = press_figure(names)
    check_readable(figure, tmp_path)
    assert not names_at_ends(figure.axes[0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "keydiff 0.90 每块 1024 词元",
        "keydiff 0.90 每块 1024 词元 边读边淘汰",
    ]


# -- lines ------------------------------------------------------------------------------------------------------------


def test_press_lines_show_the_data_and_intervals_of_what_is_coloured(tmp_path):
    frame = losses_of(["no_press", *CORE], (0.25, 0.5))
    figure = figures.press_lines(frame, "ratio", "loss", xlabel="压缩率", ylabel="差", log_x=True)
    check_readable(figure, tmp_path)
    (axes,) = figure.axes
    bars = {container.get_label(): container for container in axes.containers}
    assert set(bars) == {"no_press", *CORE} & {*looks.FIXED, *looks.COLOURED}
    at = frame[frame["press"] == "snapkv"]
    assert list(bars["snapkv"].lines[0].get_ydata()) == list(at["loss"])
    (drawn,) = bars["snapkv"].lines[2]
    assert drawn.get_segments()[0][:, 1].tolist() == pytest.approx(at.iloc[0][["loss_ci95_low", "loss_ci95_high"]])
    grey = {line.get_label(): line for line in axes.get_lines()}["knorm"]
    assert grey.get_color() == looks.GREY and list(grey.get_ydata()) == list(frame[frame["press"] == "knorm"]["loss"])


def test_a_few_windows_give_lines_without_bars(tmp_path):
    """A record has None for the ends of an interval that does not exist."""
    frame = losses_of(["snapkv", "random"]).assign(loss_ci95_low=None, loss_ci95_high=None)
    draw(figures.press_lines(frame, "ratio", "loss", xlabel="压缩率", ylabel="差"), tmp_path)


def test_a_single_point_without_a_mark_is_seen():
    frame = pd.concat([losses_of(["不压缩"], (0.5,)), losses_of(["snapkv"])])
    assert look_of_each(figures.press_lines(frame, "ratio", "loss", xlabel="x", ylabel="y").axes[0])["不压缩"][1] == "x"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_panels_share_one_key(tmp_path, n):
    frame = losses_of([*CORE, "no_press"])
    panels = {f"{i}": frame for i in range(n - 1)} | {"少": frame[frame["press"] != "keydiff"]}
    figure = figures.press_line_panels(panels, "ratio", "loss", xlabel="压缩率", ylabel="差")
    check_readable(figure, tmp_path)
    first, *_, last = (look_of_each(axes) for axes in figure.axes[:n])
    assert "keydiff" not in last and {name: first[name] for name in last} == last
    above = {text.get_text() for text in figure.legends[0].get_texts()}
    below = set(figure.get_supxlabel().split("：")[1].replace("\n", "").split("、"))
    assert above | below == set(CORE) | {"不压缩"} and not above & below
    across = figure.axes[0].get_subplotspec().get_gridspec().ncols
    assert across == (3 if n == 3 else 2)
    shown = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert [label.get_text() for label in shown][:2] == [".25", ".5"] and not boxes_overlap(shown)


def test_multiples_show_each_press_before_all_others(tmp_path):
    names = [name for name in CORE if name not in looks.FIXED]
    figure = figures.press_multiples(losses_of(CORE), "ratio", "loss", xlabel="压缩率", ylabel="差")
    check_readable(figure, tmp_path)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == names
    for axes in panels:
        drawn = look_of_each(axes)
        own = looks.LOOKS[axes.get_title()]
        assert drawn[axes.get_title()][:2] == (own.colour.lower(), own.marker)
        grey = [name for name, look in drawn.items() if look[0] == to_hex(looks.GREY)]
        assert set(grey) == set(names) - {axes.get_title()} and drawn["random"][0] == to_hex("black")
        assert [bars.get_label() for bars in axes.containers] == [axes.get_title()]
    assert len({axes.get_ylim() for axes in panels}) == 1


def test_fronts_are_readable(tmp_path):
    rows = {"press": ["只淘汰", "只淘汰", "只量化"], "share": [0.5, 0.25, 0.125], "loss": [0.1, 0.2, 0.1]}
    panel = figures.Front(pd.DataFrame(rows), "差", 0.0)
    check_readable(
        figures.front_panels({"一": panel, "二": panel}, "share", "loss", xlabel="几分之几", halves=True), tmp_path
    )


# -- maps -------------------------------------------------------------------------------------------------------------


def test_kept_heat_maps(tmp_path):
    mask = torch.zeros(3, 2, 100, dtype=torch.bool)
    mask[1, 0, 50:] = True
    figure = figures.kept_heat_maps({"one": mask, "two": ~mask, "three": mask, "four": mask}, n_bins=10)
    draw(figure, tmp_path)
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images and axes.get_title()]
    assert len(maps) == 4
    assert np.array_equal(maps[0], [[0] * 10] * 2 + [[0] * 5 + [1] * 5] + [[0] * 10] * 3)
    assert np.array_equal(maps[1], 1 - maps[0])


def keys(high=1.0, depths=10) -> pd.DataFrame:
    rows = [
        {"press": press, "depth": depth / depths, "ratio": ratio, "correct": high * (press == "a") * (ratio < 0.5)}
        for press in ("a", "b", "c", "d")
        for depth in range(depths)
        for ratio in (0.25, 0.5, 0.75, 0.9, 0.99)
    ]
    return pd.DataFrame(rows)


def map_of(frame):
    return figures.heat_maps(frame, "depth", "ratio", "correct", ylabel="深度", xlabel="压缩率", label="准确率")


def panels_of(figure) -> dict:
    return {axes.get_title(): axes for axes in figure.axes if axes.images and axes.get_title()}


def test_few_cells_have_their_numbers(tmp_path):
    figure = map_of(keys())
    check_readable(figure, tmp_path)
    panels = panels_of(figure)
    assert list(panels) == ["a", "b", "c", "d"] and panels["a"].images[0].get_array()[:, 0].mean() == 1
    assert [text.get_text() for text in panels["a"].texts[:5]] == ["100", "0", "0", "0", "0"]
    assert "准确率（%）" in figure.get_suptitle() and len(figure.axes) == 6  # two rows of three, no colour bar
    assert [label.get_text() for label in panels["d"].get_xticklabels()] == [".25", ".5", ".75", ".9", ".99"]


def test_many_cells_have_a_colour_bar(tmp_path):
    figure = map_of(keys(depths=30))
    check_readable(figure, tmp_path)
    assert not panels_of(figure)["a"].texts and len(figure.axes) == 7 and not figure.get_suptitle()


def test_colours_reach_as_far_as_the_shares():
    assert [image.get_clim() for axes in map_of(keys(0.95)).axes for image in axes.images] == [(0, 1)] * 4
    faint = map_of(keys(0.004)[lambda frame: frame["ratio"] < 0.6])
    assert [image.get_clim() for axes in faint.axes for image in axes.images] == [(0, 0.004)] * 4
    assert panels_of(faint)["a"].texts[0].get_text() == "0.40"
    assert maps.range_of([pd.DataFrame([[0.0]])]) == 1.0


def test_share_grids_are_readable(tmp_path):
    table = pd.DataFrame(np.eye(6), index=list("abcdef"), columns=["不压缩", *CORE[:5]])
    figure = figures.share_grids({"甲，压缩率 0.5": table, "乙": table}, {"丙": table}, ylabel="说法", label="准确率")
    check_readable(figure, tmp_path)
    assert [text.get_text() for text in figure.axes[0].texts[:7]] == ["100", *["0"] * 6]
    with pytest.raises(ValueError, match="must have a table"):
        figures.share_grids(ylabel="", label="")


def test_score_map(tmp_path):
    table = pd.DataFrame({"口令": [0.98, np.nan], "抄写": [0.5, 0.25]}, index=["no_press", "snapkv"])
    figure = figures.score_map(table, label="得分")
    check_readable(figure, tmp_path)
    assert [text.get_text() for text in figure.axes[0].texts] == ["98", "50", "", "25"]


# -- bars and marks ---------------------------------------------------------------------------------------------------


def test_bars(tmp_path):
    figure = figures.bars(["不压缩", "snapkv 0.75"], [20.0, 5.0], xlabel="毫秒", marks=[12.0, 3.0])
    check_readable(figure, tmp_path)
    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches] == [20.0, 5.0] and not figure.legends
    assert [segment[0, 0] for segment in axes.collections[0].get_segments()] == [12.0, 3.0]


def test_dots_of_engines_have_a_shape_for_each_precision(tmp_path):
    names = [f"{words}，adakv_snapkv 0.75" for words in ENGINES.values()]
    rows = pd.DataFrame([(name, of, 1.0, 0.9, 1.1) for name in names for of in ("float32", "bfloat16")])
    rows.columns = ["name", "of", "value", "low", "high"]
    figure = figures.dots([figures.Dots(rows, "几倍", even=1.0, title=title) for title in ("甲，批 1", "乙")])
    check_readable(figure, tmp_path)
    shapes = {bars.get_label(): bars.lines[0].get_marker() for bars in figure.axes[0].containers}
    assert len(figure.axes[0].containers) == 8 and len(set(shapes.values())) == 2
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == [*ENGINES.values(), "float32", "bfloat16"]
    assert figure.axes[0].bbox.width > 0.25 * figure.bbox.width  # names leave room for two panels


def test_bar_panels(tmp_path):
    frame = pd.DataFrame({"group": ["snapkv 0.9"] * 2, "bar": ["原样", "留住：同样多的别的头"], "value": [0.2, np.nan]})
    frame = frame.assign(low=[0.1, np.nan], high=[0.4, np.nan])
    figure = figures.bar_panels({"必要吗": frame, "充分吗": frame}, xlabel="口令准确率", share=True)
    check_readable(figure, tmp_path)
    first, second = figure.axes
    assert [bar.get_width() for bar in first.patches] == [0.2, 0.0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["snapkv 0.9", *frame["bar"]]
    assert first.patches[0].get_facecolor() == second.patches[0].get_facecolor() != first.patches[1].get_facecolor()


def test_scatter_panels(tmp_path):
    frame = losses_of(CORE).assign(half=lambda rows: rows["ratio"] / 2)
    figure = figures.scatter_panels(frame, {"压缩率": "ratio", "一半": "half"}, "loss", ylabel="差")
    check_readable(figure, tmp_path)
    one, other = ({line.get_label(): line for line in axes.get_lines()} for axes in figure.axes)
    assert list(other["snapkv"].get_xdata()) == [x / 2 for x in one["snapkv"].get_xdata()]
    assert list(one["snapkv"].get_ydata()) == list(frame[frame["press"] == "snapkv"]["loss"]) and len(one) == len(CORE)


def test_against(tmp_path):
    frame = losses_of(CORE).assign(other=0.5)
    figure = figures.against(dict.fromkeys("甲乙丙", frame), "loss", "other", xlabel="外", ylabel="内")
    check_readable(figure, tmp_path)
    diagonal, *marks = figure.axes[0].get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1] and len(marks) == len(CORE)


def test_a_note_stands_for_a_figure(tmp_path):
    figure = figures.note("（缺少记录：速度）")
    check_readable(figure, tmp_path)
    assert figure.axes[0].texts[0].get_text() == "（缺少记录：速度）"

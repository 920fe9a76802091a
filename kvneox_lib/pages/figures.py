"""Pictures for notebooks and report, in one style: readable in print and for the colour-blind, labels in Chinese.

The Chinese font is one that the machine has, else the one that the package mplfonts carries.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn
import torch
from matplotlib import font_manager, pyplot, ticker
from matplotlib.figure import Figure

from kvneox_lib.pages.words import CONTROL
from kvneox_lib.presses.registry import ROWS

CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "Noto Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "SimHei",
)


def use_style() -> str:
    """Set matplotlib up; returns the name of the Chinese font."""
    font = chinese_font()
    seaborn.set_theme(style="whitegrid", palette="colorblind")
    matplotlib.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.sans-serif": [font, "DejaVu Sans"],
            "axes.unicode_minus": False,
            "figure.constrained_layout.use": True,
            "savefig.bbox": "tight",
            "figure.dpi": 110,
        }
    )
    return font


def chinese_font() -> str:
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    for name in CHINESE_FONTS:
        if name in installed:
            return name
    package = importlib.util.find_spec("mplfonts")
    if package is None:
        raise ModuleNotFoundError("no Chinese font is installed; pip install mplfonts brings one (Noto Sans CJK SC)")
    path = Path(package.submodule_search_locations[0]) / "fonts" / "NotoSansCJKsc-Regular.otf"
    font_manager.fontManager.addfont(path)
    return font_manager.FontProperties(fname=path).get_name()


def kept_heat_maps(kept: dict[str, torch.Tensor], n_bins: int = 64) -> Figure:
    """For each press, the share of tokens kept by (layer, head) along the context; `kept` holds (layers, heads, T)."""
    columns = min(3, len(kept))
    rows = -(-len(kept) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 2.3 * rows + 0.4), sharex=True, sharey=True, squeeze=False
    )
    for axes, (name, mask) in zip(grid.flat, kept.items()):
        layers, heads, length = mask.shape
        shares = torch.nn.functional.adaptive_avg_pool1d(mask.float().flatten(0, 1)[None], min(n_bins, length))[0]
        image = axes.imshow(
            shares.numpy(),
            aspect="auto",
            cmap="cividis",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(0, length, layers, 0),
        )
        axes.set_title(name, fontsize=10)
        axes.set_yticks(range(layers + 1) if layers <= 8 else range(0, layers + 1, layers // 6))
        axes.grid(False)
    for axes in list(grid.flat)[len(kept) :]:
        axes.set_axis_off()
    figure.supxlabel("上下文中的位置", fontsize=10)
    figure.supylabel("层（层内每行一个头）", fontsize=10)
    figure.colorbar(image, ax=grid, label="保留比例", shrink=0.8)
    return figure


# -- one line, one panel a press --------------------------------------------------------------------------------------


PLACES = {row.name: place for place, row in enumerate(ROWS[1:])}  # the first row is the baseline
FIXED = {
    **dict.fromkeys(("no_press", "不压缩"), {"color": "0.25", "marker": "", "linestyle": ":"}),
    CONTROL: {"color": "black", "marker": "", "linestyle": "-", "linewidth": 2.5, "alpha": 0.6},
}


def _line_style(name: str, names: list[str]) -> dict:
    """Colour, marker and dash together tell a line, so that grey print and colour-blind eyes do too. Those of a press
    follow from its place in the registry: they are the same in every figure. Other lines are told apart in theirs."""
    if name in FIXED:
        return FIXED[name]
    others = [other for other in names if other not in PLACES and other not in FIXED]
    first_free = len(PLACES) if any(other in PLACES for other in names) else 0
    place = PLACES[name] if name in PLACES else first_free + others.index(name)
    palette, markers, dashes = seaborn.color_palette("colorblind"), "os^DvP*X<>hd", ("-", "--", "-.")
    turn = place // len(palette)
    return {
        "color": palette[place % len(palette)],
        "marker": markers[place % len(markers)],
        "linestyle": dashes[turn % len(dashes)],
        "fillstyle": "full" if turn == 0 else "none",  # where there are only marks
    }


def press_lines(
    frame: pd.DataFrame, x: str, y: str, *, xlabel: str, ylabel: str, title: str = "", log_x: bool = False
) -> Figure:
    """`y` against `x`, one line a press, with bars from <y>_ci95_low to <y>_ci95_high where the frame has them."""
    figure, axes = pyplot.subplots(figsize=(6.0, 3.8))
    names = list(dict.fromkeys(frame["press"]))
    _press_lines_on(axes, frame, x, y, names, log_x)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return figure


def _press_lines_on(axes, frame: pd.DataFrame, x: str, y: str, names: list[str], log_x: bool = False) -> None:
    """A line for each of `names` that the frame has; `names` tells apart the lines that are no presses."""
    for i, name in enumerate(names):
        rows = frame[frame["press"] == name].sort_values(x)
        if rows.empty:
            continue
        style = {"markersize": 5, "linewidth": 1.4, "label": name} | _line_style(name, names)
        if f"{y}_ci95_low" in frame:
            low, high = (pd.to_numeric(rows[f"{y}_ci95_{end}"]) for end in ("low", "high"))  # None from few windows
            bars = [bar.clip(lower=0).to_numpy() for bar in (rows[y] - low, high - rows[y])]
            aside = (i - (len(names) - 1) / 2) / 400  # so that bars do not hide each other
            places = rows[x] * 8**aside if log_x else rows[x] + aside * (frame[x].max() - frame[x].min())
            axes.errorbar(places.to_numpy(), rows[y].to_numpy(), yerr=bars, capsize=2, **style)
        else:
            axes.plot(rows[x], rows[y], **style)
    ticks = {value: f"{value:g}" for value in sorted(frame[x].unique())}
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    elif len(ticks) <= 6 and max(map(len, ticks.values())) <= 5:  # where it was measured
        axes.set_xticks(list(ticks), list(ticks.values()), fontsize=9)


def heat_maps(
    frame: pd.DataFrame,
    rows: str,
    columns: str,
    value: str,
    *,
    ylabel: str,
    xlabel: str,
    label: str,
) -> Figure:
    """For each press a panel of `value`, a share from 0 to 1, averaged, by `rows` and `columns`."""
    names = list(dict.fromkeys(frame["press"]))
    width = min(3, len(names))  # more would be too small in print
    height = -(-len(names) // width)
    figure, grid = pyplot.subplots(
        height, width, figsize=(2.2 * width + 1, 2.1 * height + 0.6), sharex=True, sharey=True, squeeze=False
    )
    for axes, name in zip(grid.flat, names):
        table = frame[frame["press"] == name].pivot_table(index=rows, columns=columns, values=value)
        image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(table.shape[1]), [f"{x:g}" for x in table.columns], fontsize=8)
        shown = range(0, table.shape[0], -(-table.shape[0] // 6))
        axes.set_yticks(shown, [f"{table.index[i]:g}" for i in shown], fontsize=8)
        axes.grid(False)
    for empty in range(len(names), height * width):
        grid.flat[empty].set_axis_off()
        grid.flat[empty - width].tick_params(labelbottom=True)  # the lowest of its column
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    figure.colorbar(image, ax=grid, label=label, shrink=0.8)
    return figure


def share_grids(*rows: dict[str, pd.DataFrame], ylabel: str, label: str) -> Figure:
    """Tables of shares from 0 to 1, those of a row side by side, each cell coloured and its number in it. The tables of
    a row have the same lines."""
    if not rows or not all(rows):
        raise ValueError(f"rows={rows!r}: must have a table each")
    down, across = sum(len(next(iter(row.values()))) for row in rows), max(_columns(row) for row in rows)
    n_across = max(map(len, rows))
    size = (0.3 * across + 2.6, 0.27 * down + 1.6 * len(rows))
    figure, grid = pyplot.subplots(len(rows), n_across, figsize=size, sharey="row", squeeze=False)
    for axes in [axes for cells, row in zip(grid, rows) for axes in cells[len(row) :]]:
        axes.remove()
    cells = [cell for of_row, row in zip(grid, rows) for cell in zip(of_row, row.items())]
    for axes, (title, table) in cells:
        image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=1)
        for row, shares in enumerate(table.to_numpy(dtype=float)):
            for column, share in enumerate(shares):
                colour, text = ("white" if share < 0.5 else "black"), "" if pd.isna(share) else f"{share:.2f}"
                axes.text(column, row, text.lstrip("0"), ha="center", va="center", fontsize=7, color=colour)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(table.shape[1]), list(table.columns), fontsize=7, rotation=90)
        axes.set_yticks(range(table.shape[0]), list(table.index), fontsize=8)
        axes.grid(False)
    figure.supylabel(ylabel, fontsize=10)
    figure.colorbar(image, ax=[axes for axes, _ in cells], label=label, shrink=0.8)
    return figure


def _columns(row: dict[str, pd.DataFrame]) -> int:
    return sum(table.shape[1] for table in row.values())


def bars(names: Sequence[str], values: Sequence[float], *, xlabel: str, marks: Sequence[float] | None = None) -> Figure:
    """A bar for each name, from top to bottom; `marks` are black lines across them."""
    figure, axes = pyplot.subplots(figsize=(7.2, 0.32 * len(names) + 1))
    places = range(len(names))
    axes.barh(places, list(values), color=seaborn.color_palette("colorblind")[0], height=0.7)
    if marks is not None:
        axes.vlines(list(marks), [place - 0.4 for place in places], [place + 0.4 for place in places], color="black")
    axes.set_yticks(places, list(names), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    return figure


@dataclass(frozen=True)
class Dots:
    """A panel of `dots`: a row for each `name`, a mark for each `of`, at `value` with a bar from `low` to `high`, where
    they are known. even: a dotted line; beyond: what is infinite is called, and stands at the right edge."""

    rows: pd.DataFrame
    xlabel: str
    even: float | None = None
    beyond: str = ""
    title: str = ""


def dots(panels: Sequence[Dots]) -> Figure:
    """Multiples on a logarithmic scale, the names once at the left."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.rows["name"]))
    marks = list(dict.fromkeys(of for panel in panels for of in panel.rows["of"]))
    size = (3.1 * len(panels) + 2.2, (0.22 + 0.08 * len(marks)) * len(names) + 1.3)
    figure, grid = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axes, panel in zip(grid[0], panels):
        _dots_on(axes, panel, names, marks)
    grid[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    grid[0, 0].set_ylim(len(names) - 0.4, -0.6)
    figure.legend(*_first_of_each(grid[0]), loc="outside upper center", ncols=len(marks), fontsize=8, frameon=False)
    return figure


def _dots_on(axes, panel: Dots, names: list[str], marks: list[str]) -> None:
    rows = panel.rows[["value", "low", "high"]].astype(float)
    known = rows.to_numpy()[np.isfinite(rows.to_numpy())]
    edge = 2 * known.max() if len(known) else 2.0
    axes.set_xscale("log")
    for i, of in enumerate(marks):
        chosen = panel.rows["of"] == of
        at = rows[chosen].clip(upper=edge)
        places = [names.index(name) + 0.6 * ((i + 0.5) / len(marks) - 0.5) for name in panel.rows.loc[chosen, "name"]]
        style = {**_line_style(of, marks), "linestyle": "none", "markersize": 4.5, "label": of}
        ends = [(at["value"] - at["low"]).fillna(0).clip(lower=0), (at["high"] - at["value"]).fillna(0).clip(lower=0)]
        axes.errorbar(at["value"].to_numpy(), places, xerr=[end.to_numpy() for end in ends], capsize=2, **style)
    if panel.even is not None:
        axes.axvline(panel.even, **FIXED["no_press"], linewidth=1)
    if np.isinf(rows.to_numpy()).any():
        axes.axvline(edge, color="0.6", linewidth=0.8)
        axes.text(edge, 1.01, panel.beyond, ha="center", fontsize=8, transform=axes.get_xaxis_transform())
    if len(known) and known.max() < 100 * known.min():
        steps = ticker.MaxNLocator(5) if known.max() < 4 * known.min() else ticker.LogLocator(subs=(1, 2, 5))
        axes.xaxis.set_major_locator(steps)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(panel.xlabel, fontsize=9)
    axes.set_title(panel.title, fontsize=9)


def _first_of_each(grid) -> tuple[list, list]:
    """Handles and labels of a legend for several panels."""
    found = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels())}
    return list(found.values()), list(found)


def bar_panels(panels: dict[str, pd.DataFrame], *, xlabel: str, share: bool = False) -> Figure:
    """Panels of bars from left to right, with lines from `low` to `high`: under the name of each `group` its bars, each
    named at its side by `bar`, one name in one colour. share: from 0 to 1, on one scale."""
    names = list(dict.fromkeys(name for frame in panels.values() for name in frame["bar"]))
    colours = dict(zip(names, itertools.cycle(seaborn.color_palette("colorblind"))))
    most = max(len(frame) + frame["group"].nunique() for frame in panels.values())
    figure, grid = pyplot.subplots(1, len(panels), figsize=(7.4, 0.2 * most + 0.9), squeeze=False)
    for axes, (title, frame) in zip(grid.flat, panels.items()):
        ticks = []
        for group, rows in frame.groupby("group", sort=False):
            ticks.append(group)
            for row in rows.itertuples():
                value = 0.0 if pd.isna(row.value) else row.value
                ends = [[max(0.0, value - row.low)], [max(0.0, row.high - value)]] if pd.notna(row.low) else None
                error = {"elinewidth": 1, "capsize": 1.5, "ecolor": "0.2"}
                axes.barh(len(ticks), value, height=0.8, color=colours[row.bar], xerr=ends, error_kw=error)
                ticks.append(row.bar)
        axes.set_yticks(range(len(ticks)), ticks, fontsize=7)
        for label in axes.get_yticklabels():
            if label.get_text() in set(frame["group"]):
                label.set(fontsize=8, color="black", backgroundcolor="0.9")
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=9)
        if share:
            axes.set_xlim(-0.02, 1.04)
    return figure


# -- of the report ----------------------------------------------------------------------------------------------------


def note(text: str) -> Figure:
    """What stands where a figure would be."""
    figure, axes = pyplot.subplots(figsize=(7.2, 0.7))
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=10, color="0.25")
    axes.set_axis_off()
    return figure


def _rows_and_columns(n_panels: int) -> tuple[int, int]:
    """Four and more would be too small in print, side by side."""
    across = n_panels if n_panels < 4 else 2
    return -(-n_panels // across), across


def _label_panels(figure: Figure, grid, n_panels: int, xlabel: str, ylabel: str) -> None:
    for axes in grid.flat[n_panels:]:
        axes.set_axis_off()
    figure.supxlabel(xlabel, fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)


def press_line_panels(
    panels: dict[str, pd.DataFrame],
    x: str,
    y: str,
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    own_scale: bool = False,
) -> Figure:
    """`press_lines` side by side, four in two rows, with one legend and one scale, or each with its own."""
    names = list(dict.fromkeys(name for frame in panels.values() for name in frame["press"]))
    down, across = _rows_and_columns(len(panels))
    size = (3.4 * across + 1.6, 3.6 if down == 1 else 2.9 * down)
    figure, grid = pyplot.subplots(down, across, figsize=size, sharey=not own_scale, squeeze=False)
    for axes, (title, frame) in zip(grid.flat, panels.items()):
        _press_lines_on(axes, frame, x, y, names, log_x)
        axes.set_title(title, fontsize=10)
    _label_panels(figure, grid, len(panels), xlabel, ylabel)
    handles = [pyplot.Line2D([], [], label=name, markersize=5, **_line_style(name, names)) for name in names]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return figure


@dataclass(frozen=True)
class Front:
    """A panel of `front_panels`: lines, and what they are measured against, drawn dotted."""

    lines: pd.DataFrame
    ylabel: str
    plain: float
    plain_x: float | None = None


def front_panels(panels: dict[str, Front], x: str, y: str, *, xlabel: str, halves: bool = False) -> Figure:
    """`y` against `x`, two panels side by side, each with a scale of its own and legible on a narrow screen. halves: x
    are shares, the whole at the left, with a mark at each halving."""
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel.lines["press"]))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure, grid = pyplot.subplots(down, across, figsize=(2.6 * across, 2.0 * down + 0.9), sharex=halves, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels.items()):
        axes.axhline(panel.plain, **FIXED["no_press"], linewidth=1)
        if panel.plain_x is not None:
            axes.axvline(panel.plain_x, **FIXED["no_press"], linewidth=1)
        _press_lines_on(axes, panel.lines, x, y, names, log_x=halves)
        axes.set_title(title, fontsize=9)
        axes.set_ylabel(panel.ylabel, fontsize=8)
        axes.tick_params(labelsize=8)
        if halves:
            ticks = [2.0**-power for power in range(7)]
            axes.set_xticks(ticks, ["1", *(f"1/{1 / tick:.0f}" for tick in ticks[1:])])
            axes.set_xlim(1.2, ticks[-1] / 1.2)
    for empty in range(len(panels), down * across):
        grid.flat[empty].set_axis_off()
        grid.flat[empty - across].tick_params(labelbottom=True)
    figure.supxlabel(xlabel, fontsize=9)
    handles = [pyplot.Line2D([], [], label=name, markersize=5, **_line_style(name, names)) for name in names]
    handles.append(pyplot.Line2D([], [], label="不压缩", **FIXED["no_press"]))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def scatter_panels(frame: pd.DataFrame, panels: dict[str, str], y: str, *, ylabel: str) -> Figure:
    """`y` against one column after the other, a mark a press; the keys of `panels` are the labels of the columns."""
    names = list(dict.fromkeys(frame["press"]))
    figure, grid = pyplot.subplots(1, len(panels), figsize=(3.4 * len(panels) + 1.6, 3.4), sharey=True, squeeze=False)
    for axes, (label, x) in zip(grid.flat, panels.items()):
        for name in names:
            rows = frame[frame["press"] == name]
            axes.plot(rows[x], rows[y], **{**_line_style(name, names), "linestyle": "none"}, markersize=6, label=name)
        axes.set_xlabel(label)
    grid[0, 0].set_ylabel(ylabel)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def score_map(table: pd.DataFrame, *, label: str) -> Figure:
    """Shares from 0 to 1, written into the cells; the first row is what the others are compared with."""
    figure, axes = pyplot.subplots(figsize=(1.1 * table.shape[1] + 2.6, 0.34 * len(table) + 1.1))
    seaborn.heatmap(
        table, annot=True, fmt=".2f", cmap="cividis", vmin=0, vmax=1, ax=axes, linewidths=0.5, cbar_kws={"label": label}
    )
    axes.axhline(1, color="white", linewidth=4)
    axes.set(xlabel="", ylabel="")
    axes.tick_params(axis="x", rotation=0, labelsize=9)
    axes.tick_params(axis="y", rotation=0, labelsize=9)
    return figure


def against(panels: dict[str, pd.DataFrame], x: str, y: str, *, xlabel: str, ylabel: str) -> Figure:
    """`y` against `x`, shares from 0 to 1, a mark a press; above the diagonal `y` is better."""
    names = list(dict.fromkeys(name for frame in panels.values() for name in frame["press"]))
    down, across = _rows_and_columns(len(panels))
    size = (2.5 * across + 1.8, 2.6 * down + 0.3)
    figure, grid = pyplot.subplots(down, across, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes, (title, frame) in zip(grid.flat, panels.items()):
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        for name, rows in frame.groupby("press", sort=False):
            axes.plot(rows[x], rows[y], **{**_line_style(name, names), "linestyle": "none"}, markersize=5)
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal")
        axes.set_title(title, fontsize=10)
    _label_panels(figure, grid, len(panels), xlabel, ylabel)
    marks = [{**_line_style(name, names), "linestyle": "none", "label": name} for name in names]
    handles = [pyplot.Line2D([], [], markersize=5, **mark) for mark in marks]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return figure

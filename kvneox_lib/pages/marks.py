"""Figures of bars and of marks: engines by colour where variants are of engines."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import pyplot, ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kvneox_lib.pages.lines import label_panels
from kvneox_lib.pages.looks import (
    ENGINE_COLOURS,
    MAIN_COLOURS,
    MARKERS,
    MORE_COLOURS,
    SMALL,
    UNPRESSED,
    WIDTH,
    engine_of,
    fitting,
    greys,
    height_of_key,
    in_short,
    key,
    legend_above,
    looks_of,
)
from kvneox_lib.pages.words import ENGINES


def bars(names: Sequence[str], values: Sequence[float], *, xlabel: str, marks: Sequence[float] | None = None) -> Figure:
    """A bar for each name, from top to bottom; `marks` are black lines across them. Variants of engines are in the
    colours of these."""
    names = list(names)
    engines = _engines(names)
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.21 * len(names) + 0.65 + 0.35 * bool(engines)))
    places = range(len(names))
    axes.barh(places, list(values), color=[_colour(name) for name in names], height=0.7)
    if marks is not None:
        axes.vlines(list(marks), [place - 0.42 for place in places], [place + 0.42 for place in places], color="black")
    axes.set_yticks(places, map(in_short, names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(xlabel)
    legend_above(figure, [Patch(color=ENGINE_COLOURS[engine], label=ENGINES[engine]) for engine in engines])
    return figure


def _engines(names: Sequence[str]) -> list[str]:
    """Those of which `names` are variants, in the order of the vocabulary."""
    found = {engine_of(name) for name in names}
    return [engine for engine in ENGINES if engine in found]


def _colour(name: str) -> str:
    return ENGINE_COLOURS[engine_of(name) or "ours"]


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
    """Multiples on a logarithmic scale, the names once at the left. The marks of engines' variants have the colours of
    these, and shapes for each `of`."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.rows["name"]))
    marks = list(dict.fromkeys(of for panel in panels for of in panel.rows["of"]))
    engines = _engines(names)
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    height = (0.1 + 0.075 * len(marks)) * len(names) * down + 0.5 + 0.5 * down + 0.2 * bool(engines)
    figure, grid = pyplot.subplots(down, across, figsize=(WIDTH, height), sharey=True, squeeze=False)
    looks = looks_of(marks)
    for axes, panel in zip(grid.flat, panels):
        _dots_on(axes, panel, names, marks)
        axes.set_yticks([place + 0.5 for place in range(len(names) - 1)], minor=True)
        axes.grid(False, axis="y")
        axes.grid(True, axis="y", which="minor")  # between rows
        axes.tick_params(axis="y", which="minor", length=0)
    grid[0, 0].set_yticks(range(len(names)), map(in_short, names))
    grid[0, 0].set_ylim(len(names) - 0.4, -0.6)
    xlabels = list(dict.fromkeys(panel.xlabel for panel in panels))
    for axes, panel in zip(grid.flat, panels):
        axes.set_xlabel(panel.xlabel if len(xlabels) > 1 else "")
    label_panels(figure, grid, len(panels), xlabels[0] if len(xlabels) == 1 else "", "")
    handles = [Patch(color=ENGINE_COLOURS[engine], label=ENGINES[engine]) for engine in engines]
    for i, of in enumerate(marks):
        look = {"color": "0.3", "marker": MARKERS[i]} if engines else {"color": looks[of].colour, "marker": MARKERS[i]}
        handles.append(Line2D([], [], linestyle="none", markersize=4.5, label=of, **look))
    legend_above(figure, handles)
    return figure


def _dots_on(axes, panel: Dots, names: list[str], marks: list[str]) -> None:
    rows = panel.rows[["value", "low", "high"]].astype(float)
    known = rows.to_numpy()[np.isfinite(rows.to_numpy())]
    edge = 2 * known.max() if len(known) else 2.0
    looks = looks_of(marks)
    axes.set_xscale("log")
    for i, of in enumerate(marks):
        for engine in {engine_of(name) for name in names}:
            chosen = (panel.rows["of"] == of) & (panel.rows["name"].map(engine_of).eq(engine) | (engine is None))
            at = rows[chosen].clip(upper=edge)
            places = [names.index(name) + 0.7 * ((i + 0.5) / len(marks) - 0.5) for name in panel.rows["name"][chosen]]
            colour = ENGINE_COLOURS[engine] if engine else looks[of].colour
            style = {"color": colour, "marker": MARKERS[i], "linestyle": "none", "markersize": 4, "label": of}
            bars = (at["value"] - at["low"], at["high"] - at["value"])
            ends = [bar.fillna(0).clip(lower=0).to_numpy() for bar in bars]
            axes.errorbar(at["value"].to_numpy(), places, xerr=ends, capsize=1.5, elinewidth=0.9, **style)
    if panel.even is not None:
        axes.axvline(panel.even, color=UNPRESSED.colour, linestyle=UNPRESSED.dash, linewidth=UNPRESSED.width)
    if np.isinf(rows.to_numpy()).any():
        axes.axvline(edge, color="0.6", linewidth=0.8)
        axes.text(edge, 1.01, panel.beyond, ha="right", fontsize=SMALL, transform=axes.get_xaxis_transform())
    if len(known) and known.max() < 100 * known.min():
        steps = ticker.MaxNLocator(4) if known.max() < 4 * known.min() else ticker.LogLocator(subs=(1, 2, 5))
        axes.xaxis.set_major_locator(steps)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title(fitting(panel.title, 1.6), fontsize=SMALL)


def bar_panels(panels: dict[str, pd.DataFrame], *, xlabel: str, share: bool = False) -> Figure:
    """Panels of bars one above the other, with lines from `low` to `high`: under the name of each `group` its bars,
    each named at its side by `bar`, one name in one colour. share: from 0 to 1, on one scale."""
    names = list(dict.fromkeys(name for frame in panels.values() for name in frame["bar"]))
    colours = dict(zip(names, itertools.cycle(MAIN_COLOURS + MORE_COLOURS)))
    rows = [len(frame) + frame["group"].nunique() for frame in panels.values()]
    size = (WIDTH, 0.152 * sum(rows) + 0.45 * len(panels) + 0.3)
    figure, grid = pyplot.subplots(
        len(panels), 1, figsize=size, height_ratios=rows, sharex="col" if share else False, squeeze=False
    )
    for axes, (title, frame) in zip(grid.flat, panels.items()):
        _bars_on(axes, frame, colours)
        axes.set_title(title)
        if share:
            axes.set_xlim(-0.02, 1.04)
    figure.supxlabel(xlabel)
    return figure


def _bars_on(axes, frame: pd.DataFrame, colours: dict[str, str]) -> None:
    ticks = []
    for group, rows in frame.groupby("group", sort=False):
        ticks.append(group)
        for row in rows.itertuples():
            value = 0.0 if pd.isna(row.value) else row.value
            ends = [[max(0.0, value - row.low)], [max(0.0, row.high - value)]] if pd.notna(row.low) else None
            error = {"elinewidth": 1, "capsize": 1.5, "ecolor": "0.2"}
            axes.barh(len(ticks), value, height=0.75, color=colours[row.bar], xerr=ends, error_kw=error)
            ticks.append(row.bar)
    axes.set_yticks(range(len(ticks)), ticks)
    for place, label in enumerate(axes.get_yticklabels()):
        if label.get_text() in set(frame["group"]):
            axes.axhline(place, color="0.93", linewidth=9, zorder=0)
        else:
            label.set_color("0.35")
    axes.set_ylim(len(ticks) - 0.4, -0.6)
    axes.grid(False, axis="y")


# -- a mark a press ---------------------------------------------------------------------------------------------------


def scatter_panels(
    frame: pd.DataFrame,
    panels: dict[str, str],
    y: str,
    *,
    ylabel: str,
    coloured: Sequence[str] | None = None,
) -> Figure:
    """`y` against one column after the other, a mark a press; the keys of `panels` are the labels of the columns."""
    looks = looks_of(list(dict.fromkeys(frame["press"])), coloured)
    size = (WIDTH, 2.2 + height_of_key(looks))
    figure, grid = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axes, (label, x) in zip(grid.flat, panels.items()):
        for name, look in _back_first(looks):
            rows = frame[frame["press"] == name]
            axes.plot(rows[x], rows[y], **look.mark, label=name)
        axes.set_xlabel(label)
    grid[0, 0].set_ylabel(ylabel)
    key(figure, looks, only_marks=True)
    return figure


def against(
    panels: dict[str, pd.DataFrame],
    x: str,
    y: str,
    *,
    xlabel: str,
    ylabel: str,
    coloured: Sequence[str] | None = None,
) -> Figure:
    """`y` against `x`, shares from 0 to 1, a mark a press; above the diagonal `y` is better."""
    looks = looks_of(list(dict.fromkeys(name for frame in panels.values() for name in frame["press"])), coloured)
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    size = (WIDTH, 2.1 * down + 0.45 + height_of_key(looks))
    figure, grid = pyplot.subplots(down, across, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes, (title, frame) in zip(grid.flat, panels.items()):
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        for name, look in _back_first(looks):
            rows = frame[frame["press"] == name]
            axes.plot(rows[x], rows[y], **look.mark)
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal")
        axes.set_title(title)
    label_panels(figure, grid, len(panels), xlabel, ylabel)
    key(figure, looks, only_marks=True)
    return figure


def _back_first(looks: dict) -> list:
    behind = set(greys(looks))
    return sorted(looks.items(), key=lambda item: item[0] not in behind)

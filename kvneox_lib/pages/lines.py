"""Figures of lines, one a press: at most five in colour, the others grey, and all named at their ends."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from kvneox_lib.pages.looks import (
    FIXED,
    GREY,
    IN_THE_BACK,
    SMALL,
    UNPRESSED,
    WIDTH,
    Look,
    darker,
    fitting,
    height_of_key,
    in_short,
    key,
    looks_of,
    width_of,
)

LEADER = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "linestyle": ":", "relpos": (0, 0.5), "shrinkA": 1}
LINE = 1.2 * SMALL  # from one name at the end of a line to the next, in points
MANY_POINTS = 12
ROOM = {1: 3.6, 2: 2.0, 3: 1.3}  # how wide a panel is, about, in inches, with so many side by side
LONGEST_AT_ENDS = 0.3 * 72 * WIDTH  # names that are longer stand above, in points


def press_lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log_x: bool = False,
    coloured: Sequence[str] | None = None,
) -> Figure:
    """`y` against `x`, one line a press, with bars from <y>_ci95_low to <y>_ci95_high where the frame has them, on the
    lines in colour. coloured: which are, where there are more than five."""
    looks = looks_of(list(dict.fromkeys(frame["press"])), coloured)
    figure, axes = pyplot.subplots(figsize=(WIDTH, max(2.8, (len(looks) * LINE + 50) / 72)), layout=NamesAtEnds())
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _draw_lines(axes, frame, x, y, looks, log_x)
    if max((width_of(in_short(name)) for name in looks), default=0) > LONGEST_AT_ENDS:
        key(figure, looks)
    else:
        _name_ends(axes, looks)
    return figure


def press_line_panels(
    panels: dict[str, pd.DataFrame],
    x: str,
    y: str,
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    own_scale: bool = False,
    coloured: Sequence[str] | None = None,
) -> Figure:
    """`press_lines` in panels, two side by side, on one scale or each on its own. There is no room for names at the
    ends: those in colour are named above, the grey ones below."""
    looks = looks_of(_names(panels.values()), coloured)
    figure, grid = _panels(len(panels), 1.75, looks, sharey=not own_scale)
    for axes, (title, frame) in zip(grid.flat, panels.items()):
        _draw_lines(axes, frame, x, y, looks, log_x, room=ROOM[grid.shape[1]])
        axes.set_title(fitting(title, ROOM[grid.shape[1]]))
    label_panels(figure, grid, len(panels), xlabel, ylabel)
    key(figure, looks)
    return figure


def press_multiples(
    frame: pd.DataFrame, x: str, y: str, *, xlabel: str, ylabel: str, log_x: bool = False, across: int = 3
) -> Figure:
    """A panel for each press, in its colour and with its intervals, all others grey behind it; what is black or dotted
    in every figure stands in each."""
    names = _names([frame])
    fixed = [name for name in names if name in FIXED]
    shown = [name for name in names if name not in FIXED]
    bare = frame.drop(columns=[f"{y}_ci95_low", f"{y}_ci95_high"], errors="ignore")
    down = -(-max(1, len(shown)) // across)
    size = (WIDTH, 1.15 * down + 0.55 + 0.2 * bool(fixed))
    figure, grid = pyplot.subplots(down, across, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, shown):
        others = [other for other in shown if other != name]
        _draw_lines(axes, bare, x, y, looks_of([*others, *fixed], []), log_x, room=ROOM[across])
        _draw_lines(axes, frame, x, y, looks_of([name]), log_x, room=ROOM[across])
        axes.set_title(_in_two(name), fontsize=SMALL, pad=3, color=darker(looks_of([name])[name].colour))
    label_panels(figure, grid, len(shown), xlabel, ylabel)
    key(figure, {name: FIXED[name] for name in fixed})
    return figure


def _in_two(name: str, most: int = 19) -> str:
    """A long name on two lines."""
    if len(name) <= most:
        return name
    cut = name.rfind("_", 0, most)
    return f"{name[:cut]}\n{name[cut:]}" if cut > 0 else name


def _names(frames) -> list[str]:
    return list(dict.fromkeys(name for frame in frames for name in frame["press"]))


def _panels(n: int, height: float, looks: dict[str, Look], **shared) -> tuple[Figure, np.ndarray]:
    across = 3 if n == 3 and shared.get("sharey") else min(2, n)
    down = -(-n // across)
    size = (WIDTH, height * down + 0.45 + height_of_key(looks))
    return pyplot.subplots(down, across, figsize=size, squeeze=False, **shared)


def label_panels(figure: Figure, grid, n_panels: int, xlabel: str, ylabel: str) -> None:
    """What all panels share, said once; the places after the last stay empty."""
    across = grid.shape[1]
    for empty in range(n_panels, grid.size):
        grid.flat[empty].set_axis_off()
        if empty >= across:
            grid.flat[empty - across].tick_params(labelbottom=True)  # the lowest of its column
    figure.supxlabel(xlabel)
    if ylabel:
        figure.supylabel(ylabel)


def _draw_lines(axes, frame, x, y, looks: dict[str, Look], log_x: bool = False, room: float = 3.6) -> None:
    """A line for each of `looks` that the frame has, those in the back first."""
    in_front = [name for name, look in looks.items() if look is not IN_THE_BACK]
    for name, look in sorted(looks.items(), key=lambda item: item[1] is not IN_THE_BACK):
        rows = frame[frame["press"] == name].sort_values(x)
        if rows.empty:
            continue
        style = look.line | {"label": name, "zorder": 2 if look is IN_THE_BACK else 3}
        if len(rows) == 1 and not look.marker:
            style["marker"] = "x"
        if len(rows) > MANY_POINTS:
            step = -(-len(rows) // MANY_POINTS)  # lines that lie upon each other show their marks in turns
            style["markevery"] = (in_front.index(name) % step, step) if name in in_front else None
        if look is IN_THE_BACK or f"{y}_ci95_low" not in frame:
            axes.plot(rows[x], rows[y], **style)
            continue
        low, high = (pd.to_numeric(rows[f"{y}_ci95_{end}"]) for end in ("low", "high"))  # None from few windows
        bars = [bar.clip(lower=0).to_numpy() for bar in (rows[y] - low, high - rows[y])]
        aside = (in_front.index(name) - (len(in_front) - 1) / 2) / 250  # so that bars do not hide each other
        places = rows[x] * 8**aside if log_x else rows[x] + aside * (frame[x].max() - frame[x].min())
        axes.errorbar(places.to_numpy(), rows[y].to_numpy(), yerr=bars, capsize=1.5, elinewidth=0.9, **style)
    _set_ticks(axes, sorted(frame[x].unique()), log_x, room)


def _set_ticks(axes, values: list[float], log_x: bool, room: float) -> None:
    """Where it was measured, if that is at few places; a label that would run into the next is left out."""
    labels = [f"{value:g}" for value in values]
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    elif 1 < len(labels) <= 6 and max(map(len, labels)) <= 5:
        if room < 3:
            labels = [label.lstrip("0") or "0" for label in labels]
        gaps = [72 * room * (after - value) / (values[-1] - values[0]) for value, after in zip(values, values[1:])]
        fits = [gap > width_of(label) + 3 for label, gap in zip(labels, gaps)] + [True]
        axes.set_xticks(values, [label if fit else "" for label, fit in zip(labels, fits)])
    elif len(labels) == 1:
        axes.set_xticks(values, labels)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6 if room > 3 else 4))


# -- names at the ends of lines ---------------------------------------------------------------------------------------


class NamesAtEnds(ConstrainedLayoutEngine):
    """Constrained layout, after which the names at the ends of lines are pushed apart: only then is it known how high
    a panel is, and whether its scale is logarithmic."""

    def execute(self, figure) -> None:
        super().execute(figure)
        for axes in figure.axes:
            names = [text for text in axes.texts if text.get_gid() == "name at an end"]
            if not names:
                continue
            height = axes.bbox.height
            ends = [(axes.transData.transform(text.xy)[1] - axes.bbox.y0) / height for text in names]
            step = LINE * figure.dpi / 72 / height
            for text, place in zip(names, pushed_apart(ends, step)):
                text.xyann = (text.xyann[0], place)


def pushed_apart(places: Sequence[float], step: float) -> list[float]:
    """Places from 0 to 1, in the order of `places`, at least `step` apart (or what room there is) and as near to those
    asked for as a pass upwards and one downwards bring them."""
    if not places:
        return []
    order = sorted(range(len(places)), key=lambda i: places[i])
    low, high = step / 2, 1 - step / 2
    step = min(step, (high - low) / max(1, len(places) - 1))
    found = [min(max(places[i], low), high) for i in order]
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + step)
    found[-1] = min(found[-1], high)
    for i in range(len(found) - 2, -1, -1):
        found[i] = min(found[i], found[i + 1] - step)
    return [found[order.index(i)] for i in range(len(places))]


def _name_ends(axes, looks: dict[str, Look]) -> None:
    """The name of each line at the right, from the lowest to the highest; lines that end as one are in the order that
    they had before."""
    lines = {line.get_label(): line for line in _lines_of(axes) if line.get_label() in looks}
    ends = {name: _end(line) for name, line in lines.items()}
    for name in sorted((name for name in lines if ends[name]), key=lambda name: ends[name].before):
        look, end = looks[name], ends[name]
        behind = look is IN_THE_BACK
        axes.annotate(
            in_short(name),
            (end.x, end.y),
            xytext=(1.03, 0.5),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            color="0.45" if behind else darker(look.colour),
            arrowprops=LEADER,
            annotation_clip=False,
            gid="name at an end",
        )


def _lines_of(axes) -> list:
    """Those of errorbar carry their label on the container."""
    for container in axes.containers:
        container.lines[0].set_label(container.get_label())
    return axes.get_lines()


@dataclass(frozen=True)
class _End:
    x: float
    y: float
    before: tuple[float, ...]  # the values from the last to the first


def _end(line) -> _End | None:
    points = [(x, y) for x, y in zip(*map(np.asarray, line.get_data())) if np.isfinite(y)]
    if not points:
        return None
    return _End(float(points[-1][0]), float(points[-1][1]), tuple(float(y) for _, y in reversed(points)))


# -- fronts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Front:
    """A panel of `front_panels`: lines, and what they are measured against, drawn dotted."""

    lines: pd.DataFrame
    ylabel: str
    plain: float
    plain_x: float | None = None


def front_panels(panels: dict[str, Front], x: str, y: str, *, xlabel: str, halves: bool = False) -> Figure:
    """`y` against `x`, two panels side by side, each with a scale of its own. halves: x are shares, the whole at the
    left, with a mark at each halving."""
    looks = looks_of(_names(panel.lines for panel in panels.values()))
    figure, grid = _panels(len(panels), 1.65, looks, sharex=halves)
    dotted = {"color": UNPRESSED.colour, "linestyle": UNPRESSED.dash, "linewidth": UNPRESSED.width}
    for axes, (title, panel) in zip(grid.flat, panels.items()):
        axes.axhline(panel.plain, **dotted)
        if panel.plain_x is not None:
            axes.axvline(panel.plain_x, **dotted)
        _draw_lines(axes, panel.lines, x, y, looks, log_x=halves, room=ROOM[2])
        axes.set_title(fitting(title, ROOM[2]))
        axes.set_ylabel(panel.ylabel, fontsize=SMALL)
        if halves:
            ticks = [2.0**-power for power in range(7)]
            axes.set_xticks(ticks, ["1", "1/2", "1/4", "", "1/16", "", "1/64"])  # as many as fit
            axes.set_xlim(1.2, ticks[-1] / 1.2)
    label_panels(figure, grid, len(panels), xlabel, "")
    key(figure, looks | {"不压缩": UNPRESSED})
    return figure

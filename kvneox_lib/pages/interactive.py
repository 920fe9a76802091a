"""Figures that one can ask: in HTML a chart with a choice of press and ratio and values under the pointer, elsewhere
the static picture. The data of a chart are inside it, as JSON; report/interactive.js, once on a page, draws them all.
"""

import json
import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

from kvneox_lib.pages.lines import press_line_panels, press_lines
from kvneox_lib.pages.looks import IN_THE_BACK, Look, darker, looks_of


@dataclass(frozen=True)
class Both:
    """What a cell of the report ends with where HTML shows a chart and other formats a picture."""

    figure: Figure
    html: str


def both(
    panels: dict[str, pd.DataFrame],
    x: str,
    y: str,
    *,
    xlabel: str,
    ylabel: str,
    **told,
) -> Both:
    """The chart, and the same as a static figure; `told` is how the chart tells values."""
    labels = {"xlabel": xlabel, "ylabel": ylabel}
    if len(panels) == 1:
        ((title, frame),) = panels.items()
        figure = press_lines(frame, x, y, title=title, **labels)
    else:
        figure = press_line_panels(panels, x, y, **labels)
    return Both(figure, chart(panels, x, y, **labels, **told))


def chart(
    panels: dict[str, pd.DataFrame],
    x: str,
    y: str,
    *,
    xlabel: str,
    ylabel: str,
    digits: int = 3,
    lowest_first: bool = False,
) -> str:
    """`y` against `x` as `press_lines` draws it, in the same colours; of several panels one is shown at a time. digits:
    with which values are written; lowest_first: in the list of values at one `x`."""
    names = list(dict.fromkeys(name for frame in panels.values() for name in frame["press"]))
    looks = looks_of(names)

    def lines(frame: pd.DataFrame) -> list[dict]:
        known = frame.replace([math.inf, -math.inf], math.nan).dropna(subset=[x, y])
        return [_line(rows, x, y, looks[name]) for name, rows in known.groupby("press", sort=False)]

    data = {
        "xlabel": xlabel,
        "ylabel": ylabel,
        "digits": digits,
        "lowest_first": lowest_first,
        "panels": [{"title": title, "lines": drawn} for title, frame in panels.items() if (drawn := lines(frame))],
    }
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    without = "<noscript>这里的图由脚本画出；PDF 与 docx 里是同一张图。</noscript>"
    return f'<div class="kv-chart"><script type="application/json">{written}</script>{without}</div>'


def _line(rows: pd.DataFrame, x: str, y: str, look: Look) -> dict:
    name = rows["press"].iloc[0]
    own = looks_of([name])[name]  # when it is chosen, it has its own colour
    return {
        "name": name,
        "front": look is not IN_THE_BACK,
        "colour": to_hex(own.colour),
        "letters": darker(own.colour),
        "dash": own.dash,
        "hollow": own.hollow,
        "marker": marker_path(own.marker),
        "points": _points(rows.sort_values(x), x, y),
    }


def _points(rows: pd.DataFrame, x: str, y: str) -> list[list[float | None]]:
    ends = [f"{y}_ci95_low", f"{y}_ci95_high"]
    shown = rows.reindex(columns=[x, y, *ends]).apply(pd.to_numeric)
    return [[None if pd.isna(value) else float(value) for value in row] for row in shown.to_numpy()]


def marker_path(marker: str) -> str:
    """matplotlib's marker as a path of SVG, about one unit wide."""
    if not marker:
        return ""
    style = MarkerStyle(marker)
    (corners,) = style.get_path().transformed(style.get_transform()).to_polygons()[:1]
    return "M" + "L".join(f"{a:.3g} {-b:.3g}" for a, b in corners[:-1]) + "Z"

"""Heat maps of shares: dark is none, and the lightest is the most that there is; numbers stand in the cells where they
fit."""

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

from kvneox_lib.pages.looks import SMALL, WIDTH, fitting, width_of

COLOURS = "cividis"
NARROWEST = 1.25  # of a column, as a multiple of what is written in it
LOWEST_ROW = 0.16  # in inches, with a number in it


def kept_heat_maps(kept: dict[str, torch.Tensor], n_bins: int = 64) -> Figure:
    """For each press, the share of tokens kept by (layer, head) along the context; `kept` holds (layers, heads, T)."""
    columns = min(2, len(kept))
    rows = -(-len(kept) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(WIDTH, 1.7 * rows + 0.6), sharex=True, sharey=True, squeeze=False
    )
    for axes, (name, mask) in zip(grid.flat, kept.items()):
        layers, heads, length = mask.shape
        shares = torch.nn.functional.adaptive_avg_pool1d(mask.float().flatten(0, 1)[None], min(n_bins, length))[0]
        image = _image(axes, shares.numpy(), 1.0, extent=(0, length, layers, 0))
        axes.set_title(name)
        axes.set_yticks(range(layers + 1) if layers <= 8 else range(0, layers + 1, layers // 6))
    for axes in list(grid.flat)[len(kept) :]:
        axes.set_axis_off()
    figure.supxlabel("上下文中的位置")
    figure.supylabel("层（层内每行一个头）")
    _colour_bar(figure, image, grid, "保留比例")
    return figure


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
    """For each press a panel of `value`, a share from 0 to 1, averaged, by `rows` and `columns`; one range of colours,
    up to 1 where the shares come near it, else to the highest."""
    tables = {
        name: frame[frame["press"] == name].pivot_table(index=rows, columns=columns, values=value)
        for name in dict.fromkeys(frame["press"])
    }
    across = min(3, len(tables))
    down = -(-len(tables) // across)
    high = range_of(tables.values())
    n_rows, n_columns = (max(table.shape[i] for table in tables.values()) for i in (0, 1))
    wide = (WIDTH - 0.55) / across / max(1, n_columns)
    if across == 1:
        wide = min(wide, 0.6)
    digits = _digits(high)
    written = 72 * wide >= NARROWEST * width_of("000" if digits == 0 else "0" * (digits + 2)) and n_rows <= 12
    tall = max(1.2, LOWEST_ROW * n_rows) if written else 1.4
    size = (WIDTH, (tall + 0.3) * down + (0.65 if written else 1.0))
    figure, grid = pyplot.subplots(down, across, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes, (name, table) in zip(grid.flat, tables.items()):
        image = _image(axes, table, high)
        if written:
            _write(axes, table, high)
        axes.set_title(name, fontsize=SMALL)
        _name_columns(axes, [f"{x:g}" for x in table.columns], 72 * wide)
        shown = range(0, table.shape[0], -(-table.shape[0] // 12 if written else -(-table.shape[0] // 6)))
        axes.set_yticks(shown, [f"{table.index[i]:g}" for i in shown])
    for empty in range(len(tables), grid.size):
        grid.flat[empty].set_axis_off()
        grid.flat[empty - across].tick_params(labelbottom=True)  # the lowest of its column
    figure.supxlabel(xlabel)
    figure.supylabel(ylabel)
    if written:
        _say_what_is_written(figure, label)
    else:
        _colour_bar(figure, image, grid, label)
    return figure


def range_of(tables) -> float:
    """The upper end of the colours: 1 where shares come near it, else the highest share."""
    highest = max((np.nanmax(table.to_numpy(dtype=float)) for table in tables if table.size), default=1.0)
    return 1.0 if not highest or highest > 0.8 else float(highest)


def share_grids(*rows: dict[str, pd.DataFrame], ylabel: str, label: str) -> Figure:
    """Tables of shares from 0 to 1, those of a row side by side, each cell coloured and its number in it. The tables of
    a row have the same lines."""
    if not rows or not all(rows):
        raise ValueError(f"rows={rows!r}: must have a table each")
    heights = [len(next(iter(row.values()))) for row in rows]
    n_across = max(map(len, rows))
    longest = max(width_of(str(name)) for row in rows for table in row.values() for name in table.columns) / 72
    once = len({tuple(table.columns) for row in rows for table in row.values()}) == 1  # then named at the bottom
    named = longest * (1 if once else len(rows))
    size = (WIDTH, 0.17 * sum(heights) + 0.3 * len(rows) + named + 0.6)
    how = {"height_ratios": heights, "sharey": "row", "sharex": "col" if once else False, "squeeze": False}
    figure, grid = pyplot.subplots(len(rows), n_across, figsize=size, **how)
    for axes in [axes for cells, row in zip(grid, rows) for axes in cells[len(row) :]]:
        axes.remove()
    for axes, (title, table) in [cell for of_row, row in zip(grid, rows) for cell in zip(of_row, row.items())]:
        _image(axes, table, 1.0)
        _write(axes, table, 1.0)
        axes.set_title(fitting(title, 3.0 / n_across), fontsize=SMALL)
        axes.set_xticks(range(table.shape[1]), list(table.columns), rotation=90)
        axes.set_yticks(range(table.shape[0]), list(table.index))
    figure.supylabel(ylabel)
    _say_what_is_written(figure, label)
    return figure


def score_map(table: pd.DataFrame, *, label: str) -> Figure:
    """Shares from 0 to 1, written into the cells; the first row is what the others are compared with."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.2 * len(table) + 1.0))
    _image(axes, table, 1.0)
    _write(axes, table, 1.0)
    axes.axhline(0.5, color="white", linewidth=4)
    axes.set_xticks(range(table.shape[1]), [str(name) for name in table.columns])
    axes.set_yticks(range(table.shape[0]), [str(name) for name in table.index])
    _say_what_is_written(figure, label)
    return figure


# -- a panel ----------------------------------------------------------------------------------------------------------


def _image(axes, table, high: float, **more):
    axes.grid(False)
    return axes.imshow(table, aspect="auto", cmap=COLOURS, vmin=0, vmax=high, interpolation="nearest", **more)


def _digits(high: float) -> int:
    """With which a share in per cent is told from others up to `high`."""
    return 0 if high >= 0.2 else min(4, -1 - int(np.floor(np.log10(high))))


def _write(axes, table: pd.DataFrame, high: float) -> None:
    digits = _digits(high)
    for row, shares in enumerate(table.to_numpy(dtype=float)):
        for column, share in enumerate(shares):
            text = "" if np.isnan(share) else f"{100 * share:.{digits}f}"
            colour = "white" if share < high / 2 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=colour)


def _say_what_is_written(figure: Figure, label: str) -> None:
    figure.suptitle(f"格中：{label}（%）", fontsize=SMALL)


def _name_columns(axes, names: list[str], wide: float) -> None:
    """Every column, or as many as fit."""

    def widest() -> float:
        return 1.2 * max(map(width_of, names))

    if widest() > wide:
        names = [name.removeprefix("0") if name.startswith("0.") else name for name in names]
    step = max(1, int(np.ceil(widest() / wide)))
    axes.set_xticks(range(0, len(names), step), names[::step])


def _colour_bar(figure: Figure, image, grid, label: str) -> None:
    bar = figure.colorbar(image, ax=grid, location="top", shrink=0.6, aspect=40, pad=0.02)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)

"""Pictures for notebooks and report, in one style: readable in print and for the colour-blind, labels in Chinese.

The Chinese font is one that the machine has, else the one that the package mplfonts carries.
"""

import importlib.util
from pathlib import Path

import matplotlib
import seaborn
import torch
from matplotlib import font_manager, pyplot
from matplotlib.figure import Figure

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


def head_dimension_order(order: list[int], rotary_ndims: int) -> Figure:
    """Where each dimension goes: `order[i]` is the NeoX dimension at place i of the cache; pairs share a colour."""
    dim, half = len(order), rotary_ndims // 2
    palette = seaborn.color_palette("colorblind", half)
    figure, axes = pyplot.subplots(figsize=(0.5 * dim + 1, 2.4))
    for place, source in enumerate(order):
        colour = palette[source % half] if source < rotary_ndims else "0.85"
        for x, y, label in ((source, 1, source), (place, 0, source)):
            axes.add_patch(pyplot.Rectangle((x - 0.45, y - 0.18), 0.9, 0.36, facecolor=colour, edgecolor="0.3"))
            axes.text(x, y, str(label), ha="center", va="center", fontsize=9)
        axes.plot([source, place], [0.8, 0.2], color=colour if source < rotary_ndims else "0.7", linewidth=1.5)
    axes.set(xlim=(-0.7, dim - 0.3), ylim=(-0.5, 1.5), xticks=[], yticks=[0, 1])
    axes.set_yticklabels(["缓存中的顺序（Llama）", "NeoX 的顺序"])
    axes.grid(False)
    seaborn.despine(figure, left=True, bottom=True)
    return figure


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

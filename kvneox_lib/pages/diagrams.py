"""Drawings that explain and measure nothing: how the project hangs together, how a model is seen, when a press acts."""

import seaborn
from matplotlib import pyplot
from matplotlib.figure import Figure

WIDTH = 5.2  # inches: on a telephone the letters are still legible
EDGE, GREY = "0.25", "0.93"


def _canvas(height: float):
    """Axes without a frame, an inch to the unit."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, height))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def _box(axes, x: float, y: float, width: float, height: float, text: str, colour="white") -> None:
    """With its lower left corner at (x, y)."""
    axes.add_patch(pyplot.Rectangle((x, y), width, height, facecolor=colour, edgecolor=EDGE))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, linespacing=1.4)


def _arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": EDGE, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def _tints(n: int) -> list[tuple]:
    """Pale colours of the palette, on which black letters can be read."""
    return [tuple(1 - 0.5 * (1 - part) for part in colour) for colour in seaborn.color_palette("colorblind", n)]


# ---- the project ----------------------------------------------------------------------------------------------------


def overview() -> Figure:
    """The one way from parameters to the report, from above to below, and who calls the library."""
    blue, orange, green = _tints(3)
    rows = [
        ("params/*.yaml\n要测的模型、方法与压缩率", GREY),
        ("Snakefile\n一个配置运行一次，缺什么补什么", GREY),
        ("notebooks/*.ipynb\n文字、参数、对库的一次调用、图", blue),
        ("results/**/*.json\n记录：数字，以及它从哪里来", orange),
        ("report/*.qmd\n只读记录，从不运行模型", green),
        ("HTML、PDF、docx", "white"),
    ]
    step, tall, wide = 0.72, 0.48, 3.1
    height = step * len(rows)
    figure, axes = _canvas(height)
    bottoms = [height - step * place - tall - 0.05 for place in range(len(rows))]
    for place, ((text, colour), y) in enumerate(zip(rows, bottoms)):
        _box(axes, 0.05, y, wide, tall, text, colour)
        if place:
            _arrow(axes, (0.05 + wide / 2, bottoms[place - 1]), (0.05 + wide / 2, y + tall))
    calling = bottoms[2], bottoms[4]
    _box(
        axes,
        3.9,
        calling[1],
        1.25,
        calling[0] - calling[1] + tall,
        "kvneox_lib\n\n适配、压缩、\n测量；\n报告与笔记本\n共用的分析",
        GREY,
    )
    for y in calling:
        _arrow(axes, (0.05 + wide, y + tall / 2), (3.9, y + tall / 2))
        axes.text(3.52, y + tall / 2 + 0.05, "调用", ha="center", va="bottom", fontsize=9)
    return figure


# ---- the model ------------------------------------------------------------------------------------------------------


def adapter() -> Figure:
    """The fused weights of GPT-NeoX as presses see them: three projections, dimensions in another order, and a rotation
    that is padded with zero frequencies."""
    colours = dict(zip("qkv", _tints(3)))
    figure, axes = _canvas(4.55)
    axes.text(0.05, 4.4, "原版的权重 query_key_value：每个头依次是 q、k、v", va="center", fontsize=9)
    for place, name in enumerate("qkvqkv"):
        _box(axes, 0.05 + 0.72 * place, 3.85, 0.72, 0.36, f"{name}，头 {place // 3}", colours[name])
    axes.text(4.6, 4.03, "…", ha="center", va="center", fontsize=11)
    axes.text(0.05, 3.6, "各取自己的一份，参数不复制", va="center", fontsize=9)
    lefts = {"q": 0.05, "k": 1.8, "v": 3.55}
    for name, x in lefts.items():
        _arrow(axes, (x + 0.8, 3.45), (x + 0.8, 3.2))
        _box(axes, x, 2.8, 1.6, 0.4, f"{name}_proj", colours[name])
        _arrow(axes, (x + 0.8, 2.8), (x + 0.8, 2.55 if name != "v" else 1.1))
    _box(axes, 0.05, 2.07, 3.35, 0.48, "头内的维度重排：一对放在 i 与 i + D/2", "white")
    _box(axes, 0.05, 1.35, 3.35, 0.48, "Llama 的旋转：不旋转的维度，频率补零", "white")
    for name in "qk":
        x = lefts[name] + 0.8
        _arrow(axes, (x, 2.07), (x, 1.83))
        _arrow(axes, (x, 1.35), (x, 1.1))
    axes.text(4.42, 1.85, "次序不变", va="center", fontsize=9)
    _box(axes, 0.05, 0.7, 5.1, 0.4, "注意力与 KV 缓存：次序同 Llama，输出与原版只差舍入", GREY)
    _box(axes, 0.05, 0.05, 5.1, 0.4, "kvpress 的 press：代码一行不改，照 Llama 读，打分、取舍", "white")
    _arrow(axes, (2.2, 0.7), (2.2, 0.45))
    _arrow(axes, (3.0, 0.45), (3.0, 0.7))
    return figure


def head_dimension_order(order: list[int], rotary_ndims: int) -> Figure:
    """Where each dimension goes: `order[i]` is the NeoX dimension at place i of the cache; pairs share a colour."""
    dim, half = len(order), rotary_ndims // 2
    palette = seaborn.color_palette("colorblind", half)
    figure, axes = pyplot.subplots(figsize=(WIDTH, 1.9))
    for place, source in enumerate(order):
        colour = palette[source % half] if source < rotary_ndims else "0.85"
        for x, y in ((source, 1), (place, 0)):
            axes.add_patch(pyplot.Rectangle((x - 0.45, y - 0.18), 0.9, 0.36, facecolor=colour, edgecolor=EDGE))
            axes.text(x, y, str(source), ha="center", va="center", fontsize=9)
        axes.plot([source, place], [0.82, 0.18], color=colour if source < rotary_ndims else "0.7", linewidth=1.5)
    axes.text(-0.5, 1.4, "GPT-NeoX 的次序", va="center", fontsize=9)
    axes.text(-0.5, -0.42, "缓存里的次序（同 Llama）", va="center", fontsize=9)
    axes.set(xlim=(-0.7, dim - 0.3), ylim=(-0.6, 1.6))
    axes.set_axis_off()
    return figure


# ---- a press --------------------------------------------------------------------------------------------------------


def hook_timeline(n_layers: int = 2) -> Figure:
    """When a press acts in the prefill: after the attention of its layer, before the next layer begins."""
    blue, _, green = _tints(3)
    steps = [
        ("注意力\n读全部键值", "white"),
        ("缓存\n全部键值", blue),
        ("钩子\n打分、取舍", "white"),
        ("缓存\n留给解码", green),
    ]
    wide, tall, across, down, left = 0.95, 0.46, 1.15, 1.0, 0.65
    height = down * n_layers + 0.05
    figure, axes = _canvas(height)
    for layer in range(n_layers):
        y = height - down * layer - tall - 0.05
        axes.text(left - 0.08, y + tall / 2, f"第 {layer} 层", ha="right", va="center", fontsize=9)
        for step, (text, colour) in enumerate(steps):
            x = left + across * step
            _box(axes, x, y, wide, tall, text, colour)
            if step:
                _arrow(axes, (x - across + wide, y + tall / 2), (x, y + tall / 2))
        _arrow(axes, (left + wide / 2, y), (left + wide / 2, y - down + tall))
        axes.text(left + wide / 2 + 0.1, y - (down - tall) / 2, "隐状态：全部词元，从不压缩", va="center", fontsize=9)
    return figure

"""How figures look: the Chinese font, sizes that can be read on a telephone, and one colour and marker for each press
and each engine, the same in every figure.

The Chinese font is one that the machine has, else the one that the package mplfonts carries.
"""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import seaborn
from matplotlib import font_manager
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvneox_lib.pages.words import CONTROL, ENGINES
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
# A telephone shows a figure some 390 pixels wide: of this many inches, a point is then a little more than a pixel.
WIDTH = 5.2
SIZE, SMALL = 9.0, 8.5  # of letters, in points


def use_style() -> str:
    """Set matplotlib up; returns the name of the Chinese font."""
    font = chinese_font()
    seaborn.set_theme(style="whitegrid", palette=MAIN_COLOURS)
    matplotlib.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.sans-serif": [font, "DejaVu Sans"],
            "font.size": SIZE,
            "axes.titlesize": SIZE,
            "axes.labelsize": SIZE,
            "figure.labelsize": SIZE,
            "figure.titlesize": SIZE,
            "xtick.labelsize": SMALL,
            "ytick.labelsize": SMALL,
            "legend.fontsize": SMALL,
            "axes.linewidth": 0.8,
            "grid.linewidth": 0.6,
            "axes.unicode_minus": False,
            "figure.constrained_layout.use": True,
            "savefig.bbox": None,  # "tight" would draw everything twice
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


# -- colours ----------------------------------------------------------------------------------------------------------

# Where there are more than five lines these are coloured, and the others grey. They stand for the ways to choose what
# stays: by attention, the same with a budget for each head, by the keys alone, by position, by what each head does.
COLOURED = ("snapkv", "adakv_snapkv", "keydiff", "streaming_llm", "copying_heads")
MOST_COLOURED = 5
MAIN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's, told apart by everyone
MORE_COLOURS = ("#882255", "#56B4E9", "#117733", "#8C510A", "#332288", "#999933", "#AA4499")  # Tol's, and a brown
MARKERS = "os^DvP*X<>hd"
OTHER_COLOURS = (
    "#2D1160",
    "#F1605D",
    "#A02F9C",
    "#4A8C99",
    "#B8941F",
)  # of what is no press; hollow
ENGINE_COLOURS = {"ours": "#1F3F77", "stock": "#C8862B", "static": "#8A5A12", "kvpress": "#5E9C76"}
GREY = "0.72"


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str = ""
    dash: str = "-"
    width: float = 1.5
    hollow: bool = False

    @property
    def line(self) -> dict:
        """As matplotlib's lines take it."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.dash,
            "linewidth": self.width,
            "fillstyle": "none" if self.hollow else "full",
            "markersize": 4.5,
        }

    @property
    def mark(self) -> dict:
        return {**self.line, "linestyle": "none", "marker": self.marker or "o"}


UNPRESSED = Look("0.35", dash=":", width=1.2)
RANDOM, RANDOM_RECENT = Look("black", "o", hollow=True), Look("0.25", "s", dash="--", hollow=True)
FIXED = {
    "no_press": UNPRESSED,
    "不压缩": UNPRESSED,
    CONTROL: Look("0.6", width=4),
    "random": RANDOM,  # what any choice must surpass
    "random_recent": RANDOM_RECENT,
    "随机": RANDOM,  # as kinds of presses are called
    "随机，留近窗": RANDOM_RECENT,
    **{words: Look(ENGINE_COLOURS[engine], "D") for engine, words in ENGINES.items()},
}
IN_THE_BACK = Look(GREY, width=0.9)


def _of_presses() -> dict[str, Look]:
    """In the registry's order. Those of COLOURED have the colours that are told apart most easily, and have them for
    themselves; of all others colour and marker together are a press' own."""
    names = [row.name for row in ROWS if row.name not in FIXED]
    ordered = [name for name in names if name in COLOURED] + [name for name in names if name not in COLOURED]
    return dict(zip(ordered, map(_nth, range(len(ordered)))))


def _nth(place: int) -> Look:
    if place < len(MAIN_COLOURS):
        return Look(MAIN_COLOURS[place], MARKERS[place])
    turn, colour = divmod(place - len(MAIN_COLOURS), len(MORE_COLOURS))
    marker = MARKERS[(len(MAIN_COLOURS) + colour + turn) % len(MARKERS)]
    return Look(MORE_COLOURS[colour], marker, hollow=turn % 2 == 1)


def _of_others(place: int) -> Look:
    return Look(OTHER_COLOURS[place % MOST_COLOURED], MARKERS[place % MOST_COLOURED], hollow=True)


LOOKS = FIXED | _of_presses()
# a kind of presses looks like the best-known of them
LOOKS |= {
    "看末尾窗口的注意力": LOOKS["snapkv"],
    "看别的注意力": LOOKS["expected_attention"],
    "看键和值": LOOKS["keydiff"],
    "只看位置": LOOKS["streaming_llm"],
}


def looks_of(names: Sequence[str], coloured: Sequence[str] | None = None) -> dict[str, Look]:
    """A look for each of `names`, the same press alike in every figure; lines that are no presses are told apart in
    theirs. coloured: which are, where there are more than five; the others are grey."""
    shown = set(coloured_of(names, coloured))
    own = {name: _of_others(place) for place, name in enumerate(name for name in names if name not in LOOKS)}
    return {name: (LOOKS.get(name) or own[name]) if name in FIXED or name in shown else IN_THE_BACK for name in names}


def coloured_of(names: Sequence[str], coloured: Sequence[str] | None = None) -> list[str]:
    """At most five of `names`, besides what is black or dotted in every figure."""
    others = [name for name in names if name not in FIXED]
    if coloured is None and len(others) <= MOST_COLOURED:
        return others
    chosen = [name for name in others if name in (COLOURED if coloured is None else coloured)]
    if coloured is None:
        chosen = chosen or others
    return chosen[:MOST_COLOURED]


def greys(looks: dict[str, Look]) -> list[str]:
    return [name for name, look in looks.items() if look is IN_THE_BACK]


def darker(colour: str) -> str:
    """As letters need it to be read on white."""
    return to_hex([0.75 * part for part in to_rgb(colour)])


# -- engines ----------------------------------------------------------------------------------------------------------

SHORT_ENGINES = {"ours": "本库", "stock": "DynamicCache", "static": "StaticCache", "kvpress": "kvpress"}


def engine_of(name: str) -> str | None:
    """That with whose words the name of a variant begins."""
    return next((engine for engine, words in ENGINES.items() if name.split("，")[0] == words), None)


def in_short(name: str) -> str:
    """The name of a variant that fits beside a figure."""
    if name == "no_press":
        return "不压缩"
    engine = engine_of(name)
    return " ".join([SHORT_ENGINES[engine], *name.split("，")[1:]]) if engine else name


def in_short_all(names: Iterable[str]) -> list[str]:
    """Without the engine where it is the same for all."""
    names = list(names)
    engines = {engine_of(name) for name in names}
    same = len(names) > 1 and len(engines) == 1 and None not in engines
    return [in_short(name).split(" ", 1)[1] for name in names] if same else list(map(in_short, names))


# -- legends ----------------------------------------------------------------------------------------------------------


def key(figure: Figure, looks: dict[str, Look], *, only_marks: bool = False) -> None:
    """Above the figure what is coloured, dark or dotted, below it what is grey."""
    front = {name: look for name, look in looks.items() if look is not IN_THE_BACK}
    handles = [
        Line2D([], [], label=label, **(look.mark if only_marks else look.line))
        for label, look in zip(in_short_all(front), front.values())
    ]
    legend_above(figure, handles)
    if greys(looks):
        named = f"{figure.get_supxlabel()}\n{_greys_in_words(looks)}".strip()
        figure.supxlabel(named, fontsize=SMALL, linespacing=1.3)


def height_of_key(looks: dict[str, Look]) -> float:
    """In inches."""
    front = in_short_all(name for name, look in looks.items() if look is not IN_THE_BACK)
    rows = -(-len(front) // _legend_columns(front)) if front else 0
    return 0.175 * (rows + (1 + _greys_in_words(looks).count("\n") if greys(looks) else 0))


def _greys_in_words(looks: dict[str, Look]) -> str:
    return wrapped(f"灰色：{'、'.join(greys(looks))}")


def legend_above(figure: Figure, handles: list) -> None:
    if not handles:
        return
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=_legend_columns([handle.get_label() for handle in handles]),
        frameon=False,
        fontsize=SMALL,
        handlelength=1.6,
        handletextpad=0.5,
        columnspacing=1.0,
        borderpad=0.1,
    )


def _legend_columns(labels: list[str]) -> int:
    widest = max(map(width_of, labels)) + 3.2 * SMALL
    return max(1, min(len(labels), int((72 * WIDTH - 8) / widest)))


def width_of(text: str, size: float = SMALL) -> float:
    """Roughly, in points: a Chinese character is as wide as it is high."""
    return size * sum(1.0 if ord(letter) > 0x2E80 else 0.58 for letter in text)


def fitting(title: str, room: float) -> str:
    """On two lines, if it is wider than so many inches: cut after the first comma or bracket."""
    parts = re.match("(.*?[，）])(.+)", title)
    if width_of(title, SIZE) <= 72 * room or not parts:
        return title
    return f"{parts[1].removesuffix('，')}\n{parts[2].strip()}"


def wrapped(text: str) -> str:
    """Lines that fit the figure, cut after a comma."""
    lines = [""]
    for part in text.split("、"):
        if lines[-1] and width_of(lines[-1] + part) > 72 * WIDTH - 24:
            lines.append("")
        lines[-1] += part + "、"
    return "\n".join(lines).removesuffix("、")

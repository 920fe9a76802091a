"""Pictures for notebooks and report, in one style: readable in print, on a telephone and for the colour-blind, labels
in Chinese. Lines, maps and marks each have a module; here they have one name.
"""

# ruff: noqa: F401 (pages and notebooks take them from here)

from matplotlib import pyplot
from matplotlib.figure import Figure

from kvneox_lib.pages.lines import Front, front_panels, press_line_panels, press_lines, press_multiples
from kvneox_lib.pages.looks import WIDTH, chinese_font, use_style
from kvneox_lib.pages.maps import heat_maps, kept_heat_maps, score_map, share_grids
from kvneox_lib.pages.marks import Dots, against, bar_panels, bars, dots, scatter_panels


def note(text: str) -> Figure:
    """What stands where a figure would be."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.9))
    axes.text(0.5, 0.5, text, ha="center", va="center", color="0.25", wrap=True)
    axes.set_axis_off()
    return figure

"""Drawings are drawn without a missing glyph, and say what is so."""

import itertools
import warnings

import matplotlib
import pytest
import torch

from kvneox_lib.neox.modeling import half_split
from kvneox_lib.pages import diagrams

matplotlib.use("agg")
pytestmark = pytest.mark.usefixtures("styled")


def texts(figure) -> list:
    """Its texts, drawn with missing glyphs as errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph")
        figure.canvas.draw()
    return [text for text in figure.axes[0].texts if text.get_text()]


@pytest.mark.parametrize("draw", [diagrams.overview, diagrams.adapter, diagrams.hook_timeline])
def test_a_drawing_is_legible_on_a_telephone(draw):
    figure = draw()
    found = texts(figure)
    assert figure.get_size_inches()[0] <= 5.2 and min(text.get_fontsize() for text in found) >= 9
    boxes = [text.get_window_extent() for text in found]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    page = figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)


def test_the_way_of_the_data_is_that_of_the_architecture():
    found = [text.get_text().split("\n")[0] for text in texts(diagrams.overview())]
    assert found[:5] == ["params/*.yaml", "Snakefile", "notebooks/*.ipynb", "results/**/*.json", "report/*.qmd"]


def test_layers_stand_below_each_other():
    heights = {text.get_text(): text.get_position()[1] for text in texts(diagrams.hook_timeline(3))}
    assert heights["第 0 层"] > heights["第 1 层"] > heights["第 2 层"]


def test_dimensions_are_numbered_in_the_order_of_the_cache():
    found = [
        text.get_text() for text in texts(diagrams.head_dimension_order(half_split(torch.arange(16), 8).tolist(), 8))
    ]
    of_cache = [int(text) for text in found if text.isdigit()][1::2]
    assert of_cache == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]

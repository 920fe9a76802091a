"""Charts of the report's HTML hold the data of the static figure, in its colours, and Quarto and the preview number
them as one figure each."""

import json
import re
import shutil

import matplotlib
import pandas as pd
import preview
import pytest
import weave
from conftest import REPOSITORY
from matplotlib.colors import to_hex

from kvneox_lib.pages import figures, interactive, looks
from kvneox_lib.presses.registry import ROWS

REPORT = REPOSITORY / "report"
HOW = {"xlabel": "压缩率", "ylabel": "损失"}


def losses() -> pd.DataFrame:
    names = [row.name for row in ROWS if row.core]
    rows = [(name, ratio, ratio * i) for i, name in enumerate(names) for ratio in (0.5, 0.25)]
    frame = pd.DataFrame(rows, columns=["press", "ratio", "loss"])
    unknown = frame["press"] == "tova"
    return frame.assign(
        loss_ci95_low=(frame["loss"] - 0.1).mask(unknown), loss_ci95_high=(frame["loss"] + 0.2).mask(unknown)
    )


def data_in(html: str) -> dict:
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.S)
    return json.loads(data)


def test_a_chart_holds_the_data_of_the_frame():
    frame = losses()
    data = data_in(interactive.chart({"外": frame, "内": frame[frame["press"] == "tova"]}, "ratio", "loss", **HOW))
    outside, inside = data["panels"]
    assert (outside["title"], inside["title"], data["xlabel"], data["ylabel"]) == ("外", "内", "压缩率", "损失")
    points = {line["name"]: line["points"] for line in outside["lines"]}
    assert list(points) == list(dict.fromkeys(frame["press"]))
    columns = ["ratio", "loss", "loss_ci95_low", "loss_ci95_high"]
    expected = frame[frame["press"] == "snapkv"].sort_values("ratio")[columns].to_numpy().tolist()
    assert points["snapkv"] == expected
    assert points["tova"] == inside["lines"][0]["points"] and points["tova"][0][2:] == [None, None]


def test_a_chart_has_the_looks_of_the_static_figure():
    frame = losses()
    lines = data_in(interactive.chart({"": frame}, "ratio", "loss", **HOW))["panels"][0]["lines"]
    drawn = figures.press_lines(frame, "ratio", "loss", **HOW).axes[0]
    static = {bars.get_label(): bars.lines[0] for bars in drawn.containers}
    front = {line["name"]: line for line in lines if line["front"]}
    assert set(front) == set(static) and len(front) < len(lines)
    for name, line in front.items():
        assert line["colour"] == to_hex(static[name].get_color()) and line["dash"] == static[name].get_linestyle()
        assert line["marker"] == interactive.marker_path(static[name].get_marker())
    behind = {line["name"]: line["colour"] for line in lines if not line["front"]}
    assert behind["tova"] == to_hex(looks.LOOKS["tova"].colour)  # for when it is chosen


def test_lines_and_panels_without_a_point_are_left_out():
    frame = losses()
    unknown = frame.assign(loss=frame["loss"].mask(frame["press"] == "tova"))
    panels = {"外": unknown, "空": frame[frame["press"] == "nobody"], "无": frame.assign(loss=float("nan"))}
    (panel,) = data_in(interactive.chart(panels, "ratio", "loss", **HOW))["panels"]
    names = [line["name"] for line in panel["lines"]]
    assert panel["title"] == "外" and "tova" not in names and len(names) == frame["press"].nunique() - 1


def test_both_show_the_same():
    panels = {"外": losses(), "内": losses()[lambda frame: frame["press"] != "snapkv"]}
    two = interactive.both(panels, "ratio", "loss", digits=1, **HOW)
    assert two.html == interactive.chart(panels, "ratio", "loss", digits=1, **HOW)
    assert [axes.get_title() for axes in two.figure.axes] == ["外", "内"]
    one = interactive.both({"": panels["外"]}, "ratio", "loss", lowest_first=True, **HOW)
    assert len(one.figure.axes) == 1 and data_in(one.html)["lowest_first"]


def test_a_marker_is_drawn_as_matplotlib_draws_it():
    assert interactive.marker_path("s") == "M-0.5 0.5L0.5 0.5L0.5 -0.5L-0.5 -0.5Z"
    points = re.findall(r"[ML]([-.\de]+) ([-.\de]+)", interactive.marker_path("^"))
    assert min(points, key=lambda point: float(point[1]))[0].lstrip("-") == "0"  # the tip is up
    assert len({interactive.marker_path(marker) for marker in looks.MARKERS}) == len(looks.MARKERS)
    assert interactive.marker_path("") == ""


def test_nothing_in_a_name_ends_the_data():
    frame = losses().replace({"press": {"tova": "</script><b>"}})
    html = interactive.chart({"": frame}, "ratio", "loss", **HOW)
    assert html.count("</script>") == 1 and "<b>" not in html
    assert any(line["name"] == "</script><b>" for line in data_in(html)["panels"][0]["lines"])


SECTION = """
```{{python}}
#| label: fig-{0}
#| fig-cap: "图 {0}"
#| fig-alt: "有 {0} 的图"
{1}
```
"""
COMMON = """
import pandas as pd
from kvneox_lib.pages import figures, interactive
frame = pd.read_csv("losses.csv")
figures.use_style()
"""
BOTH = 'interactive.both({"": frame}, "ratio", "loss", xlabel="x", ylabel="y")'
STATIC = 'figures.press_lines(frame, "ratio", "loss", xlabel="x", ylabel="y")'


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One with a chart, a picture, and another chart in another section."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "sections").mkdir()
    shutil.copy(REPORT / "interactive.js", folder)
    losses().to_csv(folder / "losses.csv", index=False)
    names = (
        "import pandas as pd\nfrom kvneox_lib.pages import figures, interactive\nframe = pd.read_csv('losses.csv')\n"
    )
    (folder / "common.py").write_text(names + "figures.use_style()\n")
    one = SECTION.format("one", BOTH) + SECTION.format("two", STATIC)
    (folder / "sections" / "_first.qmd").write_text(f"见 @fig-one、@fig-two 与 @fig-three。\n{one}", encoding="utf-8")
    (folder / "sections" / "_last.qmd").write_text(SECTION.format("three", BOTH), encoding="utf-8")
    (folder / "index.md").write_text("{{< include _made/_first.md >}}\n\n{{< include _made/_last.md >}}\n")
    (folder / "references.bib").write_text("")
    with matplotlib.rc_context():
        weave.weave(folder)
    return folder


def woven(folder) -> str:
    return "".join((folder / "_made" / f"{name}.md").read_text(encoding="utf-8") for name in ("_first", "_last"))


def test_the_script_stands_once_on_a_page_and_only_in_html(report):
    text, script = woven(report), (REPORT / "interactive.js").read_text(encoding="utf-8")
    assert text.count(script) == 1 and text.count('class="kv-chart"') == 2
    other = re.sub(r'^::: \{\.content-visible when-format="html"\}$.*?^:::$', "", text, flags=re.M | re.S)
    assert "kv-chart" not in other and "<script" not in other
    assert re.findall(r"^!\[(.*)\]\(_made/(\S+)\)", other, re.M) == [
        ("", "fig-one"),
        ("图 two", "fig-two"),
        ("", "fig-three"),
    ]
    assert all((report / "_made" / f"fig-one.{kind}").stat().st_size for kind in ("svg", "png"))


def test_the_script_loads_nothing_and_is_small():
    script = (REPORT / "interactive.js").read_text(encoding="utf-8")
    assert len(script) < 10_000
    assert script.count("tabindex") == 1  # one stop of the keyboard a chart, however many points it has
    assert not re.search(r"\beval\b|new Function|fetch\(|import\(|innerHTML|https?://(?!www\.w3\.org)", script)


def test_only_the_drawing_as_a_whole_takes_the_pointer():
    style = (REPORT / "styles.css").read_text(encoding="utf-8")
    assert re.search(r"^\.kv-chart :is\(\.tip, svg \*\) \{ pointer-events: none; \}$", style, re.M)


def test_tables_of_the_preview_stand_in_boxes_that_scroll(tmp_path):
    (tmp_path / "sections").mkdir()
    (tmp_path / "common.py").write_text("")
    (tmp_path / "references.bib").write_text("")
    (tmp_path / "index.md").write_text("| a | b |\n|:--|:--|\n| 1 | 2 |\n\n: 数 {#tbl-one}\n\n见 @tbl-one。\n")
    with matplotlib.rc_context():
        page = preview.build(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    style = (REPORT / "styles.css").read_text(encoding="utf-8")
    assert re.findall(r'<div class="(\w+)"><table>.*?</table></div>', page, re.S) == ["scrolls"]
    assert page.count("<table") == 1 and re.search(r"^\.scrolls\b.*overflow-x: auto", style, re.M)


def test_the_preview_numbers_charts_among_the_pictures(report, tmp_path):
    with matplotlib.rc_context():
        page = preview.build(report, tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall(r"图 (\d)：图 (\w+)", page) == [("1", "one"), ("2", "two"), ("3", "three")]
    assert re.findall(r'href="#fig-(\w+)">图 (\d)', page) == [("one", "1"), ("two", "2"), ("three", "3")]
    assert page.count('<div class="kv-chart">') == 2 and page.count("data:image/svg+xml") == 1
    assert page.count('id="fig-one"') == 1 and page.count("new ResizeObserver") == 1

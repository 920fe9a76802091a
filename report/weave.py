"""Run the cells of sections/*.qmd once, and write what they show, as markdown and pictures, into _made/.

Quarto runs this before it renders: index.md includes the sections as they are in _made/, so that the three formats
share one run. A section is prose with cells and inline values in Quarto's own notation; cells may use every name of
common.py. A cell shows its last expression: a figure (with label, fig-cap and fig-alt), a table (with label and
tbl-cap), or sentences.
"""

import ast
import html
import os
import re
import runpy
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import yaml
from matplotlib import pyplot
from matplotlib.figure import Figure
from sources import marked, places

INCLUDED = re.compile(r"^\{\{< include _made/(\S+)\.md >\}\}$", re.M)
CELL = re.compile(r"^```\{python\}\n(?P<cell>.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`\{python\} (?P<inline>.+?)`")
OPTION = re.compile(r"^#\| (.*)\n", re.M)
CHART = '<div class="kv-chart">'
WITH_SOURCE = re.compile(
    r"^(?:!\[[^\n]*\]\(_made/fig-[^\n]*\}|::: \{#fig-[^\n]*\}\n.*?\n\n(?!:::)[^\n]+\n:::)$"
    r"(?:\n+::: \{\.source[^\n]*\n[^\n]*\n:::$)*",
    re.M | re.S,
)


def weave(folder: Path) -> Path:
    """The folder with the woven sections of the report in `folder`, which two processes share: sections have nothing in
    common but what common.py makes."""
    folder = folder.resolve()
    made = folder / "_made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(exist_ok=True)
    sections = INCLUDED.findall((folder / "index.md").read_text(encoding="utf-8"))
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=_prepare, initargs=(folder,)) as pool:
        woven = dict(zip(sections, pool.map(_weave_section, sections)))
    if with_charts := next((section for section, text in woven.items() if CHART in text), None):
        script = (folder / "interactive.js").read_text(encoding="utf-8")
        woven[with_charts] += f"\n{_raw_html(f'<script>{script}</script>')}"
    for section, text in woven.items():
        (made / f"{section}.md").write_text(text, encoding="utf-8")
    return made


NAMES: dict = {}  # of common.py, in each process


def _prepare(folder: Path) -> None:
    os.chdir(folder)
    matplotlib.use("agg")
    NAMES.update(runpy.run_path("common.py"))


def _weave_section(section: str) -> str:
    text = Path("sections", f"{section}.qmd").read_text(encoding="utf-8")
    try:
        return floating(marked(_run(text, NAMES, Path.cwd() / "_made"), places(Path.cwd())))
    except Exception as error:
        error.add_note(f"while weaving sections/{section}.qmd")
        raise


def _run(text: str, names: dict, made: Path) -> str:
    def shown(found: re.Match) -> str:
        if found["inline"]:
            return _text(_value(found["inline"], names), found["inline"])
        value = _value(found["cell"], names)
        return _block(value, options(found["cell"]), found["cell"], made)

    return re.sub(f"{CELL.pattern}|{INLINE.pattern}", shown, text, flags=re.M | re.S)


def options(cell: str) -> dict:
    return yaml.safe_load("\n".join(OPTION.findall(cell))) or {}


def _value(source: str, names: dict):
    """What the last expression of `source` comes to; None where it ends otherwise."""
    *before, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        before, last = [*before, last], None
    exec(compile(ast.Module(before, []), "<cell>", "exec"), names)
    return last and eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


def _text(value, source: str) -> str:
    if value is None:
        raise ValueError(f"`{source.strip()}` has no value")
    return value.data if hasattr(value, "data") else str(value)


def _block(value, asked: dict, cell: str, made: Path) -> str:
    if asked.get("include", True) is False:
        return ""
    label = asked.get("label", "")
    if label.startswith("fig-"):
        return f"{_figure(value, asked, made)}\n\n{_folded(cell)}"
    text = _text(value, cell)
    if label.startswith("tbl-"):
        return f"{text}\n\n: {_wanted(asked, 'tbl-cap')} {{#{label}}}\n\n{_folded(cell)}"
    return text


def _figure(value, asked: dict, made: Path) -> str:
    """A vector picture, and one in pixels for docx, whose readers don't all show vectors."""
    label, caption, alt = asked["label"], _wanted(asked, "fig-cap"), html.escape(_wanted(asked, "fig-alt"))
    chart, value = (value.html, value.figure) if hasattr(value, "html") else ("", value)  # as interactive.both gives
    if not isinstance(value, Figure):
        raise ValueError(f"{label}: the cell ends with {type(value).__name__}, wants a figure")
    if (made / f"{label}.svg").exists():
        raise ValueError(f"{label}: is the label of two figures")
    value.draw_without_rendering()
    value.set_layout_engine("none")  # it is laid out
    around = value.get_tightbbox().padded(0.1)  # asked for once: savefig would draw the figure each time to find it
    value.savefig(made / f"{label}.svg", bbox_inches=around)
    value.savefig(made / f"{label}.png", bbox_inches=around, dpi=150)
    pyplot.close(value)
    if not chart:
        return f'![{caption}](_made/{label}){{#{label} fig-alt="{alt}"}}'
    still = f'::: {{.content-visible unless-format="html"}}\n![](_made/{label}){{fig-alt="{alt}"}}\n:::\n'
    return f'::: {{#{label} fig-alt="{alt}"}}\n\n{_raw_html(chart)}\n{still}\n{caption}\n:::'


def _wanted(asked: dict, option: str) -> str:
    if not asked.get(option):
        raise ValueError(f"{asked['label']}: lacks {option}")
    return asked[option]


def _folded(cell: str) -> str:
    """The code of a figure or table, for a page on which one can unfold it."""
    source = OPTION.sub("", cell).strip()
    code = f"<details><summary>代码</summary>\n\n```python\n{source}\n```\n\n</details>"
    return _only_html(code)


def floating(woven: str) -> str:
    """In the PDF a figure stands, with the line under it, at the top or bottom of a page, and text fills the rest."""
    start, end = (
        f"```{{=typst}}\n{code}\n```"
        for code in ("#place(auto, float: true)[#block(width: 100%)[#set align(left)", "]]")
    )
    return WITH_SOURCE.sub(lambda found: f"{start}\n\n{found[0]}\n\n{end}", woven)


def _raw_html(text: str) -> str:
    return _only_html(f"```{{=html}}\n{text}\n```")


def _only_html(text: str) -> str:
    return f'::: {{.content-visible when-format="html"}}\n{text}\n:::\n'


if __name__ == "__main__":
    weave(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

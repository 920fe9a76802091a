"""The report builds from whatever records there are; every label, reference, citation and glyph is in its place."""

import ast
import builtins
import importlib.util
import json
import re
import shutil
import subprocess
import time
from html import unescape

import pytest
import yaml
from conftest import REPOSITORY
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from nbclient.exceptions import CellExecutionError

from kvneox_lib.pages import report as reporting
from kvneox_lib.pages.selecting import of_finished_models, of_one_wording
from kvneox_lib.studies.records import load_records

REPORT = REPOSITORY / "report"
REFERENCE = REPOSITORY / "results" / "reference"


def load(name):
    spec = importlib.util.spec_from_file_location(f"report_{name}", REPORT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


preview, fonts = load("preview"), load("fonts")
TEXT = preview.resolve_includes((REPORT / "index.qmd").read_text(encoding="utf-8"), REPORT)
CELLS = preview.CELL.findall(TEXT)
PAGES = [  # but for the explorer, which no report shows
    path.read_text(encoding="utf-8")
    for path in sorted((REPOSITORY / "kvneox_lib" / "pages").glob("*.py"))
    if not path.name.startswith("explore")
]
WITHOUT_CELLS = preview.CELL.sub("", TEXT)
PROSE = re.sub(r"^```.*?^```$|^\$\$.*?^\$\$|^---.*?^---$", "", WITHOUT_CELLS, flags=re.M | re.S)


def labels() -> dict[str, str]:
    """Every label with its caption (of an equation or section: the line that has it)."""
    of_cells = {
        asked["label"]: asked.get(f"{asked['label'][:3]}-cap", "")
        for asked in map(preview.options, CELLS)
        if "label" in asked
    }
    written = re.findall(r"^(.*?)\s*\{#((?:tbl|eq|sec|fig)-[\w-]+)\}$", WITHOUT_CELLS, re.M)
    return of_cells | {label: line for line, label in written}


# ---- what is written ------------------------------------------------------------------------------------------------


def test_every_figure_and_table_has_a_caption_and_is_spoken_of():
    found = labels()
    cells = [preview.options(cell).get("label") for cell in CELLS]
    assert len(found) > 40 and len(set(filter(None, cells))) == len(list(filter(None, cells)))
    assert [label for label, caption in found.items() if not caption.strip()] == []
    referenced = set(preview.REFERENCE.findall(TEXT))
    assert referenced <= set(found)
    assert [label for label in found if label.startswith(("fig", "tbl")) and label not in referenced] == []


def test_a_source_follows_every_figure_of_measurements():
    for found in preview.CELL.finditer(TEXT):
        asked = preview.options(found[1])
        if asked.get("label", "").startswith("fig-") and asked["label"] not in (
            "fig-share",
            "fig-hook",
            "fig-permutation",
        ):
            after = TEXT[found.end() : found.end() + 80]
            assert re.match(r"\n\n\S{0,4}`\{python\} (\w+\.source|say\()", after), asked["label"]


def bibliography() -> dict[str, dict]:
    text = (REPORT / "references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@\w+\{([\w-]+),\n(.*?)^\}$", text, re.M | re.S)
    return {key: dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.M)) for key, body in entries}


def test_citations_and_bibliography_are_the_same_set():
    entries = bibliography()
    cited = set(re.findall(r"@([a-z0-9_]+)(?=[;\]])", PROSE))
    assert cited == set(entries)
    for key, entry in entries.items():
        assert entry.get("title") and entry.get("author") and re.fullmatch(r"(19|20)\d\d", entry["year"]), key
        arxiv = re.search(r"arXiv:(\d\d)\d\d\.\d+", entry.get("journal", ""))
        assert arxiv is None or entry["year"] == f"20{arxiv[1]}", key


def test_the_papers_of_the_core_presses_are_cited():
    from kvneox_lib.presses.registry import REGISTRY

    journals = {entry.get("journal") for entry in bibliography().values()}
    assert [row.name for row in REGISTRY.values() if row.core and row.paper and row.paper not in journals] == []


MEASURED = re.compile(r"(?<![\w.-])(?:\d+\.\d+|\d+\s*(?:%|倍|nat|[MG]B|毫秒|ms|tok))")


def test_in_html_the_code_of_figures_and_tables_can_be_unfolded_and_no_other():
    settings = yaml.safe_load((REPORT / "_quarto.yml").read_text())
    html = settings["format"]["html"]
    assert html["echo"] and html["code-fold"] and not settings["execute"]["echo"]
    for asked in map(preview.options, CELLS):
        shown = "label" in asked
        assert asked.get("echo", True) == shown or asked.get("include", True) is False, asked


def test_prose_has_no_number_typed_by_hand():
    assert MEASURED.search("困惑度是 35.7") and MEASURED.search("快 3 倍")
    plain = re.sub(r"`[^`]*`|\$[^$]*\$", "", PROSE)
    assert set(MEASURED.findall(plain)) <= {"95 %"}  # of an interval


def test_cells_and_pages_type_no_measured_number_into_a_sentence():
    """A number in a string that is shown comes from a record: none stands in the literal part of it."""
    for cell in CELLS + PAGES:
        strings = re.findall(r'"((?:[^"\\]|\\.)*[\u4e00-\u9fff](?:[^"\\]|\\.)*)"', cell)
        literal = [re.sub(r"\{[^{}]*\}", "", text) for text in strings]
        found = [number for text in literal for number in MEASURED.findall(text)]
        assert set(found) <= {"95 %", "0.5", "0.05"}, (found, cell[:200])  # of an interval; of a caption; of a test


def test_no_section_needs_what_another_defines():
    """A name that a cell binds is used in its own section, or bound by index.qmd for all."""
    index = (REPORT / "index.qmd").read_text(encoding="utf-8")
    known = names(preview.CELL.findall(index), ast.Store) | set(dir(builtins))
    for path in sorted((REPORT / "sections").glob("*.qmd")):
        cells = preview.CELL.findall(path.read_text(encoding="utf-8"))
        inline = preview.INLINE.findall(path.read_text(encoding="utf-8"))
        assert names(cells + inline, ast.Load) - names(cells, ast.Store) - known == set(), path.name


def names(sources: list[str], context: type) -> set[str]:
    """What these sources bind (ast.Store) or read (ast.Load)."""
    found = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, context):
            found.add(node.id)
        elif context is ast.Store and isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif context is ast.Store and isinstance(node, ast.arg):
            found.add(node.arg)
        elif context is ast.Store and isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
    return found


def test_no_glyph_is_missing_from_the_font():
    font = FT2Font(fonts.main_font())
    strings = "".join(re.findall(r'"[^"]*"', "".join(CELLS + PAGES)))
    unknown = {c for c in PROSE + strings if ord(c) > 126 and not font.get_char_index(ord(c))}
    assert unknown == set()
    assert not font.get_char_index(0x1F600)  # a face is not in it: the check can fail


def test_the_font_is_put_where_the_pdf_looks_for_it(tmp_path, monkeypatch):
    target = fonts.copy_font(tmp_path / "_fonts")
    assert FT2Font(target).family_name == fonts.MAIN_FONT

    class Another:
        name, fname = "PingFang SC", "another.ttc"

    monkeypatch.setattr(font_manager.fontManager, "ttflist", [Another])
    assert FT2Font(fonts.copy_font(tmp_path / "again")).family_name == fonts.MAIN_FONT  # that of mplfonts
    settings = yaml.safe_load((REPORT / "_quarto.yml").read_text())
    typst = settings["format"]["typst"]
    assert typst["mainfont"] == fonts.MAIN_FONT and typst["font-paths"] == [fonts.FOLDER.name]
    assert settings["tbl-colwidths"] is False and settings["format"]["docx"]["tbl-colwidths"] is True
    assert settings["project"]["pre-render"] == "fonts.py" and settings["format"]["docx"]["fig-format"] == "png"


def test_what_rendering_writes_is_ignored_by_git():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    for name in ("_output/index.html", "_fonts/a.otf", ".quarto/x", "index_files/a.svg"):
        assert subprocess.run(["git", "-C", REPOSITORY, "check-ignore", "-q", f"report/{name}"]).returncode == 0, name


# ---- the preview ----------------------------------------------------------------------------------------------------

GOOD = """# One {#sec-one}

See @fig-a, @tbl-a, @tbl-b, @eq-a and @sec-one; @known says so. A value: `{python} value`.

```{python}
#| include: false
value = "1_2*3"
```

```{python}
#| label: fig-a
#| fig-cap: "A line"
from matplotlib import pyplot
figure = pyplot.plot([1, 2])
```

```{python}
#| label: tbl-a
#| tbl-cap: "A table"
from IPython.display import Markdown
Markdown("|a|b|\\n|-|-|\\n|1|2|")
```

|c|
|-|
|3|

: Another {#tbl-b}

$$
x
$$ {#eq-a}
"""
# the value is asked for after the cell that makes it
GOOD = GOOD.replace(" A value: `{python} value`.", "") + "\nA value: `{python} value`.\n"


def build(tmp_path, text):
    (tmp_path / "index.qmd").write_text(text, encoding="utf-8")
    (tmp_path / "references.bib").write_text("@book{known, title={T}, author={A, B}, year={2000}}")
    return plain(preview.build(tmp_path, tmp_path / "out.html"))


def plain(path) -> str:
    body = re.sub(r"^.*<body>", "", path.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", "", body)))


def test_the_preview_numbers_links_and_shows(tmp_path):
    text = build(tmp_path, GOOD)
    assert "See 图 1, 表 1, 表 2, 式 1 and 小节 1" in text and "A value: 1_2*3." in text
    assert "图 1：A line" in text and "表 1：A table" in text and "表 2：Another" in text
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "<math" in page and not re.search(r'(src|href)="(?!#|data:)', page)
    linked = set(re.findall(r'href="#((?:fig|tbl|eq|sec)-\w+)"', page))
    assert linked == {"fig-a", "tbl-a", "tbl-b", "eq-a", "sec-one"}
    assert all(f'id="{label}"' in page for label in linked)


@pytest.mark.parametrize(
    "old, new, error, message",
    [
        ("@eq-a", "@eq-b", ValueError, "@eq-b: nothing has this label"),
        ("@known", "@unknown", ValueError, "unknown"),
        ('#| fig-cap: "A line"\n', "", ValueError, "fig-a: has 1 outputs and caption None"),
        ("figure = pyplot.plot([1, 2])", "", ValueError, "fig-a: has 0 outputs"),
        ("{python} value`", "{python} print(value)`", ValueError, "has no value"),
        ('value = "1_2*3"', "raise RuntimeError('on purpose')", CellExecutionError, "on purpose"),
    ],
)
def test_the_preview_fails_loudly(tmp_path, old, new, error, message):
    assert old in GOOD
    with pytest.raises(error, match=message):
        build(tmp_path, GOOD.replace(old, new))
    assert not (tmp_path / "out.html").exists()


# ---- the whole report -----------------------------------------------------------------------------------------------


def copied(tmp_path):
    """The report in a repository of its own."""
    shutil.copytree(REPORT, tmp_path / "report", ignore=shutil.ignore_patterns("_*put", "_fonts", ".quarto"))
    return tmp_path / "report"


@pytest.mark.slow
def test_the_report_builds_from_the_reference_records(tmp_path):
    folder, start = copied(tmp_path), time.perf_counter()
    shutil.copytree(REFERENCE, tmp_path / "results" / "reference")
    text = plain(preview.build(folder, tmp_path / "report.html"))
    assert time.perf_counter() - start < 90
    assert "{python}" not in text and not re.search(r"@(fig|tbl|eq|sec)-|\bnan\b|Figure\(", text)
    for study in ("wikitext_ppl", "pg19_ppl"):
        runs = of_finished_models(load_records(REFERENCE / study))
        base = runs[(runs["press"] == "no_press") & (runs["max_windows"] == 200) & runs["kv_bits"].isna()].iloc[0]
        assert (
            f"（{base['dataset']}） {base['ppl']:.1f} [{base['ppl_ci95_low']:.1f}, {base['ppl_ci95_high']:.1f}]" in text
        )
    runs = of_one_wording(of_finished_models(load_records(REFERENCE / "recall")))
    runs = runs.query("press == 'keydiff' and compression_ratio == 0.75")
    keydiff = runs[~runs["query_aware"].astype(bool) & runs["kv_bits"].isna()].iloc[0]
    assert f"keydiff（{keydiff['accuracy']:.2f}）" in text
    for study, notebook in reporting.NOTEBOOKS.items():
        there = (REFERENCE / f"{study}.csv").exists()
        assert (f"（缺少记录：{study}，运行 notebooks/{notebook}.ipynb 可得）" in text) != there, study


@pytest.mark.slow
def test_the_report_builds_without_any_record(tmp_path):
    text = plain(preview.build(copied(tmp_path), tmp_path / "report.html"))
    for study, notebook in reporting.NOTEBOOKS.items():
        assert f"（缺少记录：{study}，运行 notebooks/{notebook}.ipynb 可得）" in text


NO_RANDOM = "（缺少记录：wikitext_ppl 的 random，运行 notebooks/01_wikitext_ppl.ipynb 可得）"
NO_PRESS = "（缺少记录：wikitext_ppl 的 有压缩率的 press，运行 notebooks/01_wikitext_ppl.ipynb 可得）"


@pytest.mark.slow
@pytest.mark.parametrize(
    "wiki, books, timed, changes, said",
    [
        pytest.param(
            ["snapkv__0.50", "snapkv__0.75"],
            ["snapkv__0.50", "snapkv__0.90"],
            "*__snapkv__*",
            {"prefill_s": None, "decode_only": True},
            ["压缩率同为 0.50，两个实验都测了的 1 种方法", NO_RANDOM],
            id="decode only",
        ),
        pytest.param([], ["random__0.50", "random__0.75"], "*__no_press__*", {}, [NO_PRESS], id="no press"),
        pytest.param(
            ["random__0.50", "snapkv__0.75"],
            ["random__0.75", "snapkv__0.75"],
            "*__snapkv__*",
            {"failure": "out of memory", "step_s": None, "prefill_s": None, "kv_bytes": None},
            ["wikitext_ppl 的 与 random 压缩率相同的 press"],
            id="all failed",
        ),
        pytest.param(
            ["snapkv__0.75"],
            ["snapkv__0.75"],
            "*",
            {"press": "think", "compression_ratio": None},
            ["压缩之后每步最短的是 think"],
            id="strength of its own",
        ),
    ],
)
def test_the_report_builds_from_a_few_records(tmp_path, loose_reference, wiki, books, timed, changes, said):
    """A press or two, so few windows that there are no intervals, and incomplete timings: what a first try leaves."""
    folder = copied(tmp_path)
    for study, presses in {"wikitext_ppl": wiki, "pg19_ppl": books, "recall": ["snapkv__0.75"]}.items():
        target = tmp_path / "results" / study
        target.mkdir(parents=True)
        for name in ("no_press__0.00", *presses):
            for path in (loose_reference / study).glob(f"*__demo__{name}__*"):
                if "max_windows=20__" not in path.name:
                    shutil.copyfile(path, target / path.name)
        for path in target.glob("*.json"):
            record = json.loads(path.read_text())
            path.write_text(json.dumps({key: None if "ci95" in key else value for key, value in record.items()}))
    target = tmp_path / "results" / "speed"
    target.mkdir()
    for path in (loose_reference / "speed").glob(f"{timed}.json"):
        record = json.loads(path.read_text())
        pressed = record["press"] != "no_press"
        (target / path.name).write_text(json.dumps(record | changes if pressed else record))
    text = plain(preview.build(folder, tmp_path / "report.html"))
    assert not (found := re.search(r".{,40}\bnan\b.{,40}", text)), found[0]
    assert f"来源：results/wikitext_ppl，{len(wiki) + 1} 份记录" in text
    for words in ("（缺少记录：speed 的 ", *said):
        assert words in text, words

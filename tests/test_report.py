"""The report builds from whatever records there are; every label, reference, citation and glyph is in its place."""

import ast
import builtins
import json
import os
import re
import runpy
import shutil
import subprocess
import zipfile
from html import unescape
from io import BytesIO

import fonts
import preview
import pypandoc
import pytest
import sources
import weave as weaving
import yaml
from conftest import REPOSITORY
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from kvneox_lib.pages import report as reporting
from kvneox_lib.pages import tables
from kvneox_lib.pages.selecting import of_finished_models
from kvneox_lib.presses.registry import REGISTRY, ROWS
from kvneox_lib.studies.records import load_records

REPORT = REPOSITORY / "report"
REFERENCE = REPOSITORY / "results" / "reference"
INDEX = (REPORT / "index.md").read_text(encoding="utf-8")
SECTIONS = {name: (REPORT / "sections" / f"{name}.qmd").read_text("utf-8") for name in weaving.INCLUDED.findall(INDEX)}
TEXT = weaving.INCLUDED.sub(lambda found: SECTIONS[found[1]], INDEX)
CELLS = [found["cell"] for found in weaving.CELL.finditer(TEXT)]
PAGES = [  # but for the explorer, which no report shows
    path.read_text(encoding="utf-8")
    for path in sorted((REPOSITORY / "kvneox_lib" / "pages").glob("*.py"))
    if not path.name.startswith("explore")
]
WITHOUT_CELLS = weaving.CELL.sub("", TEXT)
PROSE = re.sub(r"^```.*?^```$|^\$\$.*?^\$\$|^---.*?^---$", "", WITHOUT_CELLS, flags=re.M | re.S)
SETTINGS = yaml.safe_load((REPORT / "_quarto.yml").read_text(encoding="utf-8"))
PANDOC = pypandoc.get_pandoc_path()


def labels() -> dict[str, str]:
    """Every label with its caption (of an equation or section: the line that has it)."""
    of_cells = {
        asked["label"]: asked.get(f"{asked['label'][:3]}-cap", "")
        for asked in map(weaving.options, CELLS)
        if "label" in asked
    }
    written = re.findall(r"^(.*?)\s*\{#((?:tbl|eq|sec|fig)-[\w-]+)\}$", WITHOUT_CELLS, re.M)
    return of_cells | {label: line for line, label in written}


# ---- what is written ------------------------------------------------------------------------------------------------


def test_every_figure_and_table_has_a_caption_and_is_spoken_of():
    found = labels()
    cells = [weaving.options(cell).get("label") for cell in CELLS]
    assert len(found) > 40 and len(set(filter(None, cells))) == len(list(filter(None, cells)))
    assert [label for label, caption in found.items() if not caption.strip()] == []
    referenced = set(preview.REFERENCE.findall(TEXT))
    assert referenced <= set(found)
    assert [label for label in found if label.startswith(("fig", "tbl")) and label not in referenced] == []


def test_every_section_is_in_the_report():
    assert set(SECTIONS) == {path.stem for path in (REPORT / "sections").glob("*.qmd")}


def test_every_figure_says_what_it_shows_to_those_who_do_not_see_it():
    figures = [asked for asked in map(weaving.options, CELLS) if asked.get("label", "").startswith("fig-")]
    assert len(figures) > 10
    assert [asked["label"] for asked in figures if len(asked.get("fig-alt", "")) < 20] == []  # "待写" is shorter


def test_a_source_follows_every_figure_of_measurements():
    for found in weaving.CELL.finditer(TEXT):
        asked = weaving.options(found["cell"])
        if asked.get("label", "").startswith("fig-") and asked["label"] not in (
            "fig-share",
            "fig-hook",
            "fig-permutation",
            "fig-overview",
            "fig-adapter",
        ):
            after = TEXT[found.end() : found.end() + 80]
            assert re.match(r"\n\n\S{0,4}`\{python\} (\w+\.source|say\()", after), asked["label"]


def bibliography() -> dict[str, dict]:
    text = (REPORT / "references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@\w+\{([\w-]+),\n(.*?)^\}$", text, re.M | re.S)
    return {key: dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.M)) for key, body in entries}


def test_citations_and_bibliography_are_the_same_set():
    """Cited are the keys in prose, and through tables the papers of all presses."""
    entries = bibliography()
    papers = set(tables.keys_of_papers(REPORT / "references.bib").values())
    cited = set(re.findall(r"@([a-z0-9_]+)(?=[;\]])", PROSE))
    of_presses = {tables.cited(row.name).strip("[@]") for row in ROWS if row.paper}
    assert cited | of_presses == set(entries) and of_presses <= papers
    for key, entry in entries.items():
        assert entry.get("title") and (key == "kvgrad" or entry["author"] and re.fullmatch(r"20\d\d", entry["year"])), (
            key
        )
        number = re.fullmatch(r"(\d\d)\d\d\.\d{5}", entry.get("eprint", ""))
        assert entry["year"] == f"20{number[1]}" if number else entry.get("url"), key


def test_every_press_cites_its_paper():
    assert tables.cited("snapkv") == tables.cited("decoding_snapkv") == "[@snapkv]"
    assert tables.cited("cam_streaming_llm") == "[@cam]" and tables.cited("random") == "—"
    assert set(tables.core_presses()["来源"]) >= {"[@tova]", "—"}
    assert {row.paper for row in REGISTRY.values() if row.paper} == set(
        tables.keys_of_papers(REPORT / "references.bib")
    ) & {row.paper for row in REGISTRY.values()}


def cited_as(*keys: str) -> list[str]:
    """What pandoc makes of these entries in the report's style, in a Chinese page."""
    asked = "".join(f"[@{key}] " for key in keys)
    command = [PANDOC, "--citeproc", "--to=plain", "--wrap=none", "--fail-if-warnings", "--metadata=lang:zh"]
    command += [f"--csl={REPORT / SETTINGS['csl']}", f"--bibliography={REPORT / SETTINGS['bibliography']}"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, encoding="utf-8", check=True)
    return done.stdout.split("\n\n")


def test_references_are_in_the_form_of_the_chinese_standard():
    assert SETTINGS["format"]["typst"]["citeproc"] is True  # not typst's own style
    text, preprint, proceedings, journal, software = map(str.strip, cited_as("snapkv", "cam", "finch", "kvpress"))
    assert text == "[1] [2] [3] [4]"
    assert preprint == (
        "[1] LI Y, HUANG Y, YANG B, et al. SnapKV: LLM Knows What You are Looking for Before Generation[EB/OL]. 2024. "
        "https://arxiv.org/abs/2404.14469."
    )
    assert proceedings == (
        "[2] ZHANG Y, DU Y, LUO G, et al. CaM: Cache Merging for Memory-efficient LLMs Inference[C]//Proceedings of "
        "the 41st International Conference on Machine Learning. PMLR, 2024: 58840-58850. "
        "https://openreview.net/forum?id=LCTmppB165."
    )
    assert journal == (
        "[3] CORALLO G, PAPOTTI P. FINCH: Prompt-guided Key-Value Cache Compression for Large Language Models[J]. "
        "Transactions of the Association for Computational Linguistics, 2024, 12: 1517-1532. "
        "https://doi.org/10.1162/tacl_a_00716."
    )
    assert "easy[CP/OL]. 2024. https://github.com/NVIDIA/kvpress." in software


MEASURED = re.compile(r"(?<![\w.-])(?:\d+\.\d+|\d+\s*(?:%|倍|nat|[MG]B|毫秒|ms|tok))")


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
    """A name that a cell uses is bound in its own section, or in common.py for all."""
    common = (REPORT / "common.py").read_text(encoding="utf-8")
    known = names([common], ast.Store) | set(dir(builtins))
    for name, text in SECTIONS.items():
        cells = [found["cell"] for found in weaving.CELL.finditer(text)]
        inline = [found["inline"] for found in weaving.INLINE.finditer(text)]
        assert names(cells + inline, ast.Load) - names(cells, ast.Store) - known == set(), name


def names(texts: list[str], context: type) -> set[str]:
    """What these sources bind (ast.Store) or read (ast.Load)."""
    found = set()
    for node in (node for text in texts for node in ast.walk(ast.parse(text))):
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
    typst = SETTINGS["format"]["typst"]
    assert typst["mainfont"] == fonts.MAIN_FONT and typst["font-paths"] == [fonts.FOLDER.name]
    assert f'"{fonts.MAIN_FONT}"' in (REPORT / typst["include-in-header"]).read_text(encoding="utf-8")
    assert SETTINGS["project"]["pre-render"] == ["fonts.py", "weave.py"]


def test_what_rendering_writes_is_ignored_by_git():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    for name in ("_output/index.html", "_fonts/a.otf", ".quarto/x", "index_files/a.svg", "_made/a.md"):
        assert subprocess.run(["git", "-C", REPOSITORY, "check-ignore", "-q", f"report/{name}"]).returncode == 0, name


# ---- styles ---------------------------------------------------------------------------------------------------------


def test_all_files_that_quarto_is_told_of_are_there():
    formats = SETTINGS["format"]
    told = [formats["html"]["css"], formats["typst"]["include-in-header"], formats["docx"]["reference-doc"]]
    told += [formats["docx"]["filters"][0]["path"], SETTINGS["csl"], SETTINGS["bibliography"]]
    told += SETTINGS["project"]["pre-render"] + SETTINGS["project"]["render"]
    assert [name for name in told if not (REPORT / name).is_file()] == []


def test_on_a_narrow_screen_tables_and_formulas_scroll_not_the_page():
    rules = dict(
        re.findall(r"^([^{}\n]+?) \{(.*?)\}", (REPORT / "styles.css").read_text(encoding="utf-8"), re.M | re.S)
    )
    boxes = ".scrolls, figure > div:has(> table)"
    for what in (boxes, "p:has(math)", "pre"):
        assert "overflow-x: auto" in rules[what], what
    assert "max-width: 100%" in rules[boxes] and "max-width: 100%" in rules["img, svg"]
    assert "keep-all" in rules["td:first-child, th"] and "color" in rules[".source, .source p"]


def test_the_pdf_draws_bold_once_and_keeps_captions_with_tables():
    """The letters have one weight; a bold font that is installed must not be drawn with a line around."""
    rules = (REPORT / "styles.typ").read_text(encoding="utf-8")
    assert "#set strong(delta: 0)" in rules and 'heading: set text(weight: "regular"' in rules
    assert "sticky: true" in rules and "raw.where(block: true): set par(justify: false)" in rules


def test_the_styles_of_the_docx_are_those_of_its_script():
    made = runpy.run_path(str(REPOSITORY / "tools" / "reference_docx.py"))["made"]()
    styles, now = map(styles_of, ((REPORT / "reference.docx").read_bytes(), made))
    assert styles == now and 'w:eastAsia="等线"' in styles and "asciiTheme" not in styles
    assert 16 <= size_of(styles, "Table") <= 18 and size_of(styles, "Heading1") <= 32
    assert size_of(styles, "Source") == size_of(styles, "VerbatimChar") == 16


def styles_of(docx: bytes) -> str:
    with zipfile.ZipFile(BytesIO(docx)) as file:
        return file.read("word/styles.xml").decode()


def size_of(styles: str, name: str) -> int:
    """In half points."""
    style = re.search(rf'<w:style [^>]*w:styleId="{name}".*?</w:style>', styles, re.S)[0]
    return int(re.search(r'<w:sz w:val="(\d+)"', style)[1])


AS_QUARTO_WRAPS = """
# One {#one}

## Two {#two}

+-----------------------------------------------------------------+
| `<w:pPr><w:pStyle w:val="ImageCaption"/></w:pPr>`{=openxml}表 1 |
|                                                                 |
| | a | b |                                                       |
| |:--|:--|                                                       |
| | 1 | 2 |                                                       |
+-----------------------------------------------------------------+

# Three {#three}

| a | b |
|---|---|
| 1 | 2 |
"""


def test_in_the_docx_tables_stand_in_the_text_and_contents_are_filled(tmp_path):
    command = [PANDOC, "--from=markdown", f"--lua-filter={REPORT / 'docx.lua'}", f"--output={tmp_path / 'a.docx'}"]
    subprocess.run(
        [*command, f"--reference-doc={REPORT / 'reference.docx'}"], input=AS_QUARTO_WRAPS.encode(), check=True
    )
    with zipfile.ZipFile(tmp_path / "a.docx") as file:
        body = file.read("word/document.xml").decode()
    assert body.count("<w:tbl>") == 2 and not re.search(r"<w:tc>(?:(?!</w:tc>).)*<w:tbl>", body, re.S)
    assert 'w:val="TableCaption"' in body and "ImageCaption" not in body and 'w:val="center"' not in body
    assert re.findall(r'w:val="(TOC\d)".*?w:anchor="(\w+)"', body) == [("TOC1", "one"), ("TOC1", "three")]
    assert body.index(">One<") < body.index("TOCHeading") < body.rindex(">Three<")  # results, contents, the rest
    assert re.findall(r'fldCharType="(\w+)"', body) == ["begin", "separate", "end"]


# ---- source lines ---------------------------------------------------------------------------------------------------

LINE = "来源：results/reference/recall.csv，3 份记录；提交 0123abc、4567def；笔记本 notebooks/05_recall.ipynb。"


def test_source_lines_are_marked_and_stand_above_the_code():
    folded = weaving._folded("draw(x)\n")
    parts = ["![](a)", folded, LINE, f"损失的{LINE}", folded, "一句话，说到来源：不是。"]
    first, second, third = sources.marked("\n\n".join(parts), lambda found: "").split("::: {.source ")
    assert first == "![](a)\n\n" and second.startswith('custom-style="Source" style=')
    assert second.index("来源：") < second.index("<details>") and third.index("损失的来源：") < third.index("<details>")
    assert third.count("\n:::\n") == 2  # its own end, and that of the code


def test_a_figure_floats_with_the_lines_under_it():
    picture, line = '![A](_made/fig-a){#fig-a fig-alt="b"}', "::: {.source x}\n来源\n:::"
    chart = '::: {#fig-b fig-alt="b"}\n\n::: {.only}\n![](_made/fig-b)\n:::\n\nB\n:::'
    found = weaving.floating(f"one\n\n{picture}\n\n{line}\n\n{line}\n\ntwo\n\n{chart}\n\nthree")
    first, second, third = found.split("#place(auto, float: true)")
    assert first.startswith("one\n") and "two" not in second.split("]]")[0] and "three" not in third.split("]]")[0]
    assert second.split("]]")[0].count("来源") == 2 and chart in third.split("]]")[0]


@pytest.mark.parametrize(
    "origin", ["https://example.org/a/b.git", "http://example.org/a/b", "https://me:s@example.org/a/b"]
)
def test_source_lines_link_to_where_the_repository_is(tmp_path, origin):
    def git(*asked):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", "-C", tmp_path, *who, *asked], check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    git("remote", "add", "origin", origin)
    head, web = git("rev-parse", "HEAD").strip(), origin.removesuffix(".git").replace("me:s@", "")
    text = sources.linked(LINE, sources.places(tmp_path))
    assert f"[05_recall.ipynb]({web}/blob/{head}/notebooks/05_recall.ipynb)" in text
    assert f"[results/reference/recall.csv]({web}/blob/{head}/results/reference/recall.csv)" in text
    assert f"提交 [0123abc]({web}/commit/0123abc)、[4567def]({web}/commit/4567def)；" in text


@pytest.mark.parametrize("origin", ["/home/me/b", "git@example.org:a/b.git"])
def test_source_lines_never_show_where_the_repository_is_on_this_machine(tmp_path, origin):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", origin], check=True)
    text = sources.linked(LINE, sources.places(tmp_path))
    assert "[05_recall.ipynb](../../notebooks/05_recall.ipynb)" in text and "提交 0123abc、4567def；" in text
    assert origin not in text


# ---- the preview ----------------------------------------------------------------------------------------------------

COMMON = "from matplotlib.figure import Figure\nfrom IPython.display import Markdown\nfirst = 1\n"
GOOD = """# One {#sec-one}

See @fig-a, @tbl-a, @tbl-b, @eq-a and @sec-one; [@known] says so.

```{python}
#| include: false
value = f"{first}_2*3"
```

```{python}
#| label: fig-a
#| fig-cap: "A line"
#| fig-alt: "Rises \\"steeply\\""
figure = Figure()
figure.subplots().plot([1, 2])
figure
```

```{python}
#| label: tbl-a
#| tbl-cap: "A table"
Markdown("|a|b|\\n|-|-|\\n|1|2|")
```

|c|
|-|
|3|

: Another {#tbl-b}

$$
x
$$ {#eq-a}

A value: `{python} value`.

来源：results/a.csv。
"""


def build(tmp_path, text):
    (tmp_path / "sections").mkdir()
    (tmp_path / "sections" / "_one.qmd").write_text(text, encoding="utf-8")
    (tmp_path / "index.md").write_text("---\ntitle: T\n---\n\n{{< include _made/_one.md >}}\n", encoding="utf-8")
    (tmp_path / "common.py").write_text(COMMON, encoding="utf-8")
    (tmp_path / "references.bib").write_text("@book{known, title={T}, author={A, B}, year={2000}}")
    return plain(preview.build(tmp_path, tmp_path / "out.html"))


def plain(path) -> str:
    body = re.sub(r"^.*<body>", "", path.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", "", body)))


def test_the_preview_numbers_links_and_shows(tmp_path):
    text = build(tmp_path, GOOD)
    assert "See 图 1, 表 1, 表 2, 式 1 and 小节 1; [1] says so." in text and "A value: 1_2*3." in text
    assert "图 1：A line" in text and "表 1：A table" in text and "表 2：Another" in text
    assert "没有 PDF 与 docx" in text.split("See")[0]  # what it cannot do comes first
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "<math" in page and 'alt="Rises &quot;steeply&quot;"' in page and "value = f" not in page
    assert not re.search(r'(src|href)="(?!#|data:|\.\./\.\./results/a\.csv")', page)
    assert "p:has(math) { overflow-x: auto" in page and 'class="source"' in page  # of styles.css
    linked = set(re.findall(r'href="#((?:fig|tbl|eq|sec)-\w+)"', page))
    assert linked == {"fig-a", "tbl-a", "tbl-b", "eq-a", "sec-one"}
    assert all(f'id="{label}"' in page for label in linked)


@pytest.mark.parametrize(
    "old, new, error, message",
    [
        ("@eq-a", "@eq-b", ValueError, "@eq-b: nothing has this label"),
        ("@known", "@unknown", ValueError, "unknown"),
        ('#| fig-cap: "A line"\n', "", ValueError, "fig-a: lacks fig-cap"),
        ('#| fig-alt: "Rises \\"steeply\\""\n', "", ValueError, "fig-a: lacks fig-alt"),
        ("[1, 2])\nfigure\n", "[1, 2])\n", ValueError, "fig-a: the cell ends with list, wants a figure"),
        ("{python} value`", "{python} print(value)`", ValueError, "has no value"),
        ("{#tbl-b}", "{#tbl-a}", ValueError, "tbl-a: labels two things"),
        ('value = f"{first}_2*3"', "raise RuntimeError('on purpose')", RuntimeError, "on purpose"),
    ],
)
def test_the_preview_fails_loudly(tmp_path, old, new, error, message):
    assert old in GOOD
    with pytest.raises(error, match=message) as raised:
        build(tmp_path, GOOD.replace(old, new))
    assert not (tmp_path / "out.html").exists()
    assert error is ValueError or "sections/_one.qmd" in str(raised.value.__notes__)


# ---- the whole report -----------------------------------------------------------------------------------------------


def copied(tmp_path):
    """The report in a repository of its own."""
    made = shutil.ignore_patterns("_output", "_fonts", "_made", ".quarto", "__pycache__")
    shutil.copytree(REPORT, tmp_path / "report", ignore=made)
    return tmp_path / "report"


@pytest.mark.slow
def test_the_report_builds_from_the_reference_records(tmp_path):
    folder, start = copied(tmp_path), os.times()
    shutil.copytree(REFERENCE, tmp_path / "results" / "reference")
    text = plain(preview.build(folder, tmp_path / "report.html"))
    assert sum(os.times()[:4]) - sum(start[:4]) < 90  # of processor time, that of the two which weave included
    assert "{python}" not in text and not re.search(r"@(fig|tbl|eq|sec)-|\bnan\b|Figure\(", text)
    woven = "".join(path.read_text(encoding="utf-8") for path in sorted((folder / "_made").glob("*.md")))
    assert str(tmp_path) not in woven and str(REPOSITORY) not in woven
    shown = preview.ONLY.sub("", woven)  # HTML scrolls; a page does not
    lines = [line for code in re.findall(r"^```[^\n]*\n(.*?)^```$", shown, re.M | re.S) for line in code.splitlines()]
    assert len(lines) > 20 and [line for line in lines if len(line) > 80] == []
    assert f"[{len(bibliography())}] " in text and f"[{len(bibliography()) + 1}] " not in text  # all are cited
    for study in ("wikitext_ppl", "pg19_ppl"):
        runs = of_finished_models(load_records(REFERENCE / study))
        base = runs[(runs["press"] == "no_press") & (runs["max_windows"] == 200) & runs["kv_bits"].isna()].iloc[0]
        assert f"{base['ppl']:.1f} [{base['ppl_ci95_low']:.1f}, {base['ppl_ci95_high']:.1f}]" in text, study
    for study, notebook in reporting.NOTEBOOKS.items():
        there = (REFERENCE / f"{study}.csv").exists()
        assert (f"（缺少记录：{study}，运行 notebooks/{notebook}.ipynb 可得）" in text) != there, study


@pytest.mark.slow
def test_the_report_builds_without_any_record(tmp_path):
    text = plain(preview.build(copied(tmp_path), tmp_path / "report.html"))
    for study, notebook in reporting.NOTEBOOKS.items():
        assert f"（缺少记录：{study}，运行 notebooks/{notebook}.ipynb 可得）" in text


WITHOUT_TIMES = {"failure": "out of memory", "step_s": None, "prefill_s": None, "kv_bytes": None}
OF_ITS_OWN_STRENGTH = {"press": "think", "compression_ratio": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "wiki, books, timed, changes",
    [
        pytest.param(
            ["snapkv__0.50", "snapkv__0.75"],
            ["snapkv__0.50", "snapkv__0.90"],
            "*__snapkv__*",
            {"prefill_s": None, "decode_only": True},
            id="decode only",
        ),
        pytest.param([], ["random__0.50", "random__0.75"], "*__no_press__*", {}, id="no press"),
        pytest.param(
            ["random__0.50", "snapkv__0.75"],
            ["random__0.75", "snapkv__0.75"],
            "*__snapkv__*",
            WITHOUT_TIMES,
            id="all failed",
        ),
        pytest.param(["snapkv__0.75"], ["snapkv__0.75"], "*", OF_ITS_OWN_STRENGTH, id="strength of its own"),
    ],
)
def test_the_report_builds_from_a_few_records(tmp_path, loose_reference, wiki, books, timed, changes):
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
    assert "（缺少记录：speed 的 " in text and "（缺少记录：recall 的 " in text

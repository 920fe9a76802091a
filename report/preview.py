"""A preview of the report where Quarto is not installed: one HTML file, images and formulas inside.

    python report/preview.py [folder of the report] [file to write]

Understands of Quarto's markdown what this report uses: includes, what is for one format alone, figures, tables, and
references to figures, tables, equations and sections. What does not resolve ends the build.
"""

import base64
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pypandoc
from weave import weave

NAMES = {"fig": "图", "tbl": "表", "eq": "式", "sec": "小节"}
INCLUDE = re.compile(r"^\{\{< include (\S+) >\}\}$", re.M)
ONLY = re.compile(r'^::: \{\.content-visible (when|unless)-format="(\w+)"\}$(.*?)^:::$', re.M | re.S)
PICTURE = re.compile(
    r'^!\[(?P<caption>.*)\]\((?P<path>_made/\S+)\)\{#(?P<label>fig-[\w-]+) fig-alt="(?P<alt>.*)"\}$', re.M
)
CHART = re.compile(
    r'^::: \{#(?P<label>fig-[\w-]+) fig-alt="[^"\n]*"\}$(?P<chart>.*?)\n(?P<caption>[^\n]+)\n:::$', re.M | re.S
)
FIGURE = re.compile(r"^\[(?P<caption>.*)\]\{\.caption of=(?P<label>fig-[\w-]+)\}$", re.M)
TABLE = re.compile(r"^: (?P<caption>.*) \{#(?P<label>tbl-[\w-]+)\}$", re.M)
EQUATION = re.compile(r"^\$\$ \{#(?P<label>eq-[\w-]+)\}$", re.M)
REFERENCE = re.compile(r"(?<![\w`])@((?:fig|tbl|eq|sec)-[\w-]+)")
STYLE = """
body { max-width: 52em; margin: 0 auto; padding: 1em; }
.figure { text-align: center; margin: 1.5em 0 0; }
.note { background: #fff6da; padding: 0.4em 0.8em; font-size: 0.9em; }
div[title] { border-left: 3px solid #888; padding: 0.2em 1em; margin: 1em 0; background: #fafafa; }
div[title]::before { content: attr(title); font-weight: bold; }
"""
LIMITS = (
    "这是预览：没有安装 Quarto 时也能做的一个 HTML 文件，正文、图、表、公式、编号与参考文献俱全；"
    "没有 PDF 与 docx，没有 Quarto 的版式与侧边目录，提示框不能收起。quarto render report 得到完整的报告。"
)


def build(folder: Path, target: Path) -> Path:
    folder = folder.resolve()
    weave(folder)
    text = resolve_includes((folder / "index.md").read_text(encoding="utf-8"), folder)
    markdown = resolve_references(with_pictures(for_html(text), folder))
    with tempfile.TemporaryDirectory() as scratch:
        style, note = Path(scratch) / "style.html", Path(scratch) / "note.html"
        shared = (Path(__file__).parent / "styles.css").read_text(encoding="utf-8")
        style.write_text(f"<style>{shared}{STYLE}</style>", encoding="utf-8")
        note.write_text(f'<p class="note">{LIMITS}</p>', encoding="utf-8")
        command = [pypandoc.get_pandoc_path(), "--from=markdown", "--to=html5", "--standalone", "--mathml", "--toc"]
        command += ["--citeproc", "--number-sections", "--fail-if-warnings"]
        command += ["--columns=10000"]  # no table is so wide that pandoc decides on its columns: HTML does
        command += ["--metadata=lang:zh-Hans", "--metadata=link-citations:true"]
        command += [f"--bibliography={folder / 'references.bib'}", f"--csl={Path(__file__).parent / 'gb7714.csl'}"]
        command += [f"--include-in-header={style}", f"--include-before-body={note}"]
        command += [f"--output={Path(scratch) / 'preview.html'}"]
        done = subprocess.run(command, input=markdown, text=True, encoding="utf-8", capture_output=True)
        if done.returncode:
            raise ValueError(f"pandoc: {done.stderr.strip()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        page = (Path(scratch) / "preview.html").read_text(encoding="utf-8")
        target.write_text(with_boxes(page), encoding="utf-8")
    return target


def with_boxes(page: str) -> str:
    """Each table in a box that scrolls, as Quarto has it."""
    return page.replace("<table>", '<div class="scrolls"><table>').replace("</table>", "</table></div>")


def resolve_includes(text: str, folder: Path) -> str:
    return INCLUDE.sub(lambda found: (folder / found[1]).read_text(encoding="utf-8"), text)


# ---- what is for HTML only, and figures ------------------------------------------------------------------------------


def for_html(markdown: str) -> str:
    """Without what is for other formats alone."""
    return ONLY.sub(lambda found: found[3] if (found[1] == "when") == (found[2] == "html") else "", markdown)


def with_pictures(markdown: str, folder: Path) -> str:
    """The pictures inside the page, and charts where there are some."""

    def picture(found: re.Match) -> str:
        image = base64.b64encode((folder / f"{found['path']}.svg").read_bytes()).decode()
        caption = f"[{found['caption']}]{{.caption of={found['label']}}}"
        start = f"::: {{.figure #{found['label']}}}\n![](data:image/svg+xml;base64,{image})"
        return f'{start}{{alt="{found["alt"]}"}}\n\n{caption}\n:::'

    def chart(found: re.Match) -> str:
        caption = f"[{found['caption']}]{{.caption of={found['label']}}}"
        return f"::: {{.figure #{found['label']}}}\n{found['chart']}\n\n{caption}\n:::"

    return CHART.sub(chart, PICTURE.sub(picture, markdown))


# ---- references -----------------------------------------------------------------------------------------------------


def resolve_references(markdown: str) -> str:
    """Number what has a label, in the order of the text, and turn each @label into a link that says so."""
    numbers = section_numbers(markdown)
    for pattern in (FIGURE, TABLE, EQUATION):
        labels = [found["label"] for found in pattern.finditer(markdown)]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))}: labels two things")
        numbers |= {label: str(i) for i, label in enumerate(labels, 1)}

    def link(found):
        if found[1] not in numbers:
            raise ValueError(f"@{found[1]}: nothing has this label")
        return f"[{NAMES[found[1].split('-')[0]]} {numbers[found[1]]}](#{found[1]})"

    def numbered(template: str):
        return lambda found: template.format(**found.groupdict(), number=numbers[found["label"]])

    text = REFERENCE.sub(link, markdown)
    text = FIGURE.sub(numbered("[图 {number}：{caption}]{{.caption}}"), text)
    text = TABLE.sub(numbered(": []{{#{label}}}表 {number}：{caption}"), text)
    return EQUATION.sub(numbered("$$ [（{number}）]{{#{label} .number}}"), text)


def section_numbers(markdown: str) -> dict[str, str]:
    counts, numbers = [], {}
    for marks, rest in re.findall(r"^(#{1,4}) (.*)$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), re.M):
        if ".unnumbered" in rest:
            continue
        counts = [*counts, 0, 0, 0][: len(marks)]
        counts[-1] += 1
        label = re.search(r"#(sec-[\w-]+)", rest)
        if label:
            numbers[label[1]] = ".".join(map(str, counts))
    return numbers


if __name__ == "__main__":
    here = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    print(build(here, Path(sys.argv[2] if len(sys.argv) > 2 else here / "_output" / "preview.html")))

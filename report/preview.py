"""A preview of the report where Quarto is not installed: one HTML file, images and formulas inside.

    python report/preview.py [folder of the report] [file to write]

Understands of Quarto's markdown what this report uses: includes, cells with label and caption, inline values, and
references to figures, tables, equations and sections. What does not resolve ends the build.
"""

import base64
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import nbformat
import pypandoc
import yaml
from nbclient import NotebookClient

NAMES = {"fig": "图", "tbl": "表", "eq": "式", "sec": "小节"}
CELL = re.compile(r"^```\{python\}\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`\{python\} (.+?)`")
INCLUDE = re.compile(r"^\{\{< include (\S+) >\}\}$", re.M)
OPTION = re.compile(r"^#\| (.*)\n", re.M)
FIGURE = re.compile(r"^\[(?P<caption>.*)\]\{\.caption of=(?P<label>fig-[\w-]+)\}$", re.M)
TABLE = re.compile(r"^: (?P<caption>.*) \{#(?P<label>tbl-[\w-]+)\}$", re.M)
EQUATION = re.compile(r"^\$\$ \{#(?P<label>eq-[\w-]+)\}$", re.M)
REFERENCE = re.compile(r"(?<![\w`])@((?:fig|tbl|eq|sec)-[\w-]+)")
SETUP = "%config InlineBackend.figure_formats = ['svg']"
STYLE = """
body { max-width: 52em; margin: 2em auto; padding: 0 1em; line-height: 1.7; }
table { border-collapse: collapse; font-size: 85%; margin: 1em auto; } caption { margin-bottom: .5em; }
td, th { padding: .2em .7em; border-bottom: 1px solid #ddd; } img { max-width: 100%; }
.figure { text-align: center; margin: 1.5em 0; } .caption, .source { font-size: 88%; color: #444; }
.number { float: right; margin-top: -3.2em; }
pre { background: #f6f6f6; padding: .6em; overflow-x: auto; font-size: 85%; }
div[title] { border-left: 3px solid #888; padding: .2em 1em; margin: 1em 0; background: #fafafa; }
div[title]::before { content: attr(title); font-weight: bold; }
"""


def build(folder: Path, target: Path) -> Path:
    text = resolve_includes((folder / "index.qmd").read_text(encoding="utf-8"), folder)
    markdown = resolve_references(execute(text, folder))
    with tempfile.TemporaryDirectory() as scratch:
        style = Path(scratch) / "style.html"
        style.write_text(f"<style>{STYLE}</style>", encoding="utf-8")
        command = [pypandoc.get_pandoc_path(), "--from=markdown", "--to=html5", "--standalone", "--mathml", "--toc"]
        command += ["--citeproc", "--number-sections", "--fail-if-warnings"]
        command += ["--columns=10000"]  # no table is so wide that pandoc decides on its columns: HTML does
        command += ["--metadata=lang:zh-Hans", f"--metadata=date:{date.today()}"]
        command += [f"--bibliography={folder / 'references.bib'}", "--metadata=link-citations:true"]
        command += [f"--include-in-header={style}", f"--output={Path(scratch) / 'preview.html'}"]
        done = subprocess.run(command, input=markdown, text=True, encoding="utf-8", capture_output=True)
        if done.returncode:
            raise ValueError(f"pandoc: {done.stderr.strip()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((Path(scratch) / "preview.html").read_bytes())
    return target


def resolve_includes(text: str, folder: Path) -> str:
    return INCLUDE.sub(lambda found: (folder / found[1]).read_text(encoding="utf-8"), text)


# ---- cells and inline values ----------------------------------------------------------------------------------------


def execute(text: str, folder: Path) -> str:
    """`text` with what its cells show, and the value of each inline expression, in their places."""
    pieces, sources, end = [], [SETUP], 0  # a piece is markdown, or the number of a source and its options
    for found in re.finditer(f"{CELL.pattern}|{INLINE.pattern}", text, re.M | re.S):
        pieces.append(text[end : found.start()])
        end, cell, inline = found.end(), found[1], found[2]
        pieces.append((len(sources), None if cell is None else options(cell)))
        sources.append(inline if cell is None else cell)
    pieces.append(text[end:])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    shown = [piece if isinstance(piece, str) else _show(notebook.cells[piece[0]], piece[1]) for piece in pieces]
    return "".join(shown)


def options(cell: str) -> dict:
    return yaml.safe_load("\n".join(OPTION.findall(cell))) or {}


def _show(cell, asked: dict | None) -> str:
    outputs = [output["data"] for output in cell.outputs if "data" in output]
    if asked is None:
        return _inline(outputs, cell.source)
    if asked.get("include", True) is False:
        return ""
    shown = "\n\n".join(_block(data) for data in outputs)
    label = asked.get("label", "")
    kind = label.split("-")[0]
    if kind not in ("fig", "tbl"):
        return f"\n{shown}\n"
    if len(outputs) != 1 or not asked.get(f"{kind}-cap"):
        raise ValueError(
            f"{label}: has {len(outputs)} outputs and caption {asked.get(f'{kind}-cap')!r}; wants one each"
        )
    if kind == "tbl":
        return f"\n{shown}\n\n: {asked['tbl-cap']} {{#{label}}}\n"
    return f"\n::: {{.figure #{label}}}\n{shown}\n\n[{asked['fig-cap']}]{{.caption of={label}}}\n:::\n"


def _inline(outputs: list, source: str) -> str:
    if len(outputs) != 1:
        raise ValueError(f"`{source}` has no value")
    if "text/markdown" in outputs[0]:
        return outputs[0]["text/markdown"]
    return re.sub(r"([\\`*_{}\[\]#@$^~<>|])", r"\\\1", outputs[0]["text/plain"].strip("'\""))


def _block(data: dict) -> str:
    if "image/svg+xml" in data:
        image = base64.b64encode(data["image/svg+xml"].encode()).decode()
        return f"![](data:image/svg+xml;base64,{image})"
    return data.get("text/markdown") or f"```\n{data['text/plain']}\n```"


# ---- references -----------------------------------------------------------------------------------------------------


def resolve_references(markdown: str) -> str:
    """Number what has a label, in the order of the text, and turn each @label into a link that says so."""
    numbers = section_numbers(markdown)
    for pattern in (FIGURE, TABLE, EQUATION):
        numbers |= {found["label"]: str(i) for i, found in enumerate(pattern.finditer(markdown), 1)}

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

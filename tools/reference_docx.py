"""Make report/reference.docx, the styles of the report as docx, from the one that pandoc brings.

    python tools/reference_docx.py [file to write]

Sizes are in half points, lengths in twentieths of a point, as the format counts them.
"""

import re
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pypandoc

TARGET = Path(__file__).resolve().parent.parent / "report" / "reference.docx"
FONTS = '<w:rFonts w:ascii="Calibri" w:hAnsi="Calibri" w:cs="Calibri" w:eastAsia="等线"/>'
CODE_FONTS = '<w:rFonts w:ascii="Consolas" w:hAnsi="Consolas" w:eastAsia="等线"/>'
BLACK = '<w:color w:val="000000"/>'
HEADINGS = {"Title": 32, "Heading1": 28, "Heading2": 24, "Heading3": 22}
SOURCE = f"""<w:style w:type="paragraph" w:customStyle="1" w:styleId="Source"><w:name w:val="Source"/>
<w:basedOn w:val="BodyText"/><w:qFormat/><w:pPr><w:spacing w:before="40" w:after="200"/></w:pPr>
<w:rPr>{FONTS}<w:color w:val="666666"/><w:sz w:val="16"/><w:szCs w:val="16"/></w:rPr></w:style>"""
CODE = """<w:style w:type="paragraph" w:customStyle="1" w:styleId="SourceCode"><w:name w:val="Source Code"/>
<w:basedOn w:val="Normal"/><w:link w:val="VerbatimChar"/><w:pPr><w:jc w:val="left"/><w:wordWrap w:val="0"/></w:pPr>
</w:style>"""
ENTRY = """<w:style w:type="paragraph" w:styleId="TOC{level}"><w:name w:val="toc {level}"/><w:basedOn w:val="Normal"/>
<w:pPr><w:tabs><w:tab w:val="right" w:leader="dot" w:pos="9638"/></w:tabs><w:spacing w:after="20"/>
<w:ind w:left="{left}"/></w:pPr></w:style>"""
PAGE = """<w:sectPr><w:pgSz w:w="11906" w:h="16838"/><w:pgMar w:top="1417" w:right="1134" w:bottom="1417"
w:left="1134" w:header="709" w:footer="709" w:gutter="0"/></w:sectPr>"""


def made() -> bytes:
    """The file's bytes; always the same."""
    default = subprocess.run(
        [pypandoc.get_pandoc_path(), "--print-default-data-file=reference.docx"], capture_output=True, check=True
    ).stdout
    target = BytesIO()
    with zipfile.ZipFile(BytesIO(default)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), _changed(name, old.read(name)), zipfile.ZIP_DEFLATED)
    return target.getvalue()


def _changed(name: str, content: bytes) -> bytes:
    change = {"word/styles.xml": styles, "word/document.xml": on_a4}.get(name)
    return change(content.decode()).encode() if change else content


def styles(xml: str) -> str:
    xml = re.sub(r"<w:rFonts [^>]*/>", FONTS, xml)
    xml = re.sub(r"<w:sz [^>]*/>\s*<w:szCs [^>]*/>", _size(21), xml, count=1)  # the default, which comes first
    for style, size in HEADINGS.items():
        xml = _styled(xml, style, f"<w:b/>{BLACK}{_size(size)}")
    xml = _styled(xml, "VerbatimChar", CODE_FONTS + _size(16))
    xml = _styled(xml, "Table", _size(17))
    xml = _styled(xml, "Caption", _size(18))
    xml = _styled(xml, "Figure", "").replace("<w:rPr></w:rPr>", '<w:pPr><w:jc w:val="center"/></w:pPr>')
    entries = "".join(ENTRY.format(level=level, left=300 * (level - 1)) for level in (1, 2))
    return xml.replace("</w:styles>", f"{SOURCE}{CODE}{entries}</w:styles>")


def _size(half_points: int) -> str:
    return f'<w:sz w:val="{half_points}"/><w:szCs w:val="{half_points}"/>'


def _styled(xml: str, style: str, letters: str) -> str:
    """With the letters of that style as these properties say, and as nothing else does."""
    found = re.search(rf'<w:style [^>]*w:styleId="{style}".*?</w:style>', xml, re.S)
    if not found:
        raise ValueError(f"pandoc's reference.docx has no style {style}")
    bare = re.sub(r"<w:rPr>.*?</w:rPr>", "", found[0], flags=re.S)
    before = "<w:tblPr>" if "<w:tblPr>" in bare else "</w:style>"
    return xml.replace(found[0], bare.replace(before, f"<w:rPr>{letters}</w:rPr>{before}", 1))


def on_a4(xml: str) -> str:
    return re.sub(r"<w:sectPr.*?(/>|</w:sectPr>)(?=\s*</w:body>)", PAGE, xml, flags=re.S)


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET).write_bytes(made())

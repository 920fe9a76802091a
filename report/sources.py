"""The line under a figure or table that says where its numbers come from: small, grey, and linked."""

import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

FOLDED = r"^::: \{\.content-visible when-format=\"html\"\}\n<details>(?:(?!</details>).)*</details>\n:::\n\s*"
LINE = re.compile(rf"(?P<code>{FOLDED})?(?P<line>^[^\n。]{{0,4}}来源：[^\n]*)$", re.M | re.S)
FILE = re.compile(r"(?:notebooks|results)/[\w./-]*\w")
COMMIT = re.compile(r"(?<=[ 、])[0-9a-f]{7}(?=[、，；。])")
GREY = 'style="font-size: 0.8em; color: #666666"'  # for typst; HTML and docx have it in their styles


def marked(woven: str, at: Callable[[str], str]) -> str:
    """`woven` with its source lines as blocks that each format shows in its way, above the code that may be unfolded;
    `at` is where a thing is found."""

    def block(found: re.Match) -> str:
        line = f'::: {{.source custom-style="Source" {GREY}}}\n{linked(found["line"], at)}\n:::'
        return f"{line}\n\n{found['code'].strip()}" if found["code"] else line

    return LINE.sub(block, woven)


def linked(line: str, at: Callable[[str], str]) -> str:
    """Files and commits with the addresses that `at` gives them; where it has none, as they are."""

    def link(found: re.Match) -> str:
        name, address = found[0].removeprefix("notebooks/"), at(found[0])
        return f"[{name}]({address})" if address else name

    return COMMIT.sub(link, FILE.sub(link, line))


@cache
def places(folder: Path) -> Callable[[str], str]:
    """Where a reader finds a file or commit of the repository around `folder`: on the web if its origin is there, else
    the file as seen from report/_output/."""
    from kvneox_lib.pages.first_page import web_address  # not before it is wanted: torch comes with it

    origin = web_address(folder)
    if not origin:
        return lambda found: f"../../{found}" if FILE.fullmatch(found) else ""
    head = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return lambda found: f"{origin}/blob/{head}/{found}" if FILE.fullmatch(found) else f"{origin}/commit/{found}"

"""Put the font that _quarto.yml names into _fonts/, so that the PDF has its Chinese on a machine without any such font.

Quarto runs this before it renders.
"""

import importlib.util
import shutil
from pathlib import Path

from matplotlib import font_manager

MAIN_FONT = "Noto Sans CJK SC"  # as mainfont in _quarto.yml
FOLDER = Path(__file__).parent / "_fonts"


def main_font() -> Path:
    """Its file: the installed one, else that of mplfonts. What other Chinese fonts there are does not matter here."""
    for entry in font_manager.fontManager.ttflist:
        if entry.name == MAIN_FONT and Path(entry.fname).exists():
            return Path(entry.fname)
    package = importlib.util.find_spec("mplfonts")
    if package is None:
        raise SystemExit(f"{MAIN_FONT} is not on this machine; pip install mplfonts brings it")
    return Path(package.submodule_search_locations[0]) / "fonts" / "NotoSansCJKsc-Regular.otf"


def copy_font(folder: Path = FOLDER) -> Path:
    source = main_font()
    target = folder / source.name
    if not target.exists() or target.stat().st_size != source.stat().st_size:
        folder.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
    return target


if __name__ == "__main__":
    copy_font()

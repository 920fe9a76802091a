"""Put the font that _quarto.yml names into _fonts/, so that the PDF has its Chinese on a machine without any such font.

Quarto runs this before it renders.
"""

import shutil
from pathlib import Path

from matplotlib import font_manager

from kvneox_lib.figures import chinese_font

MAIN_FONT = "Noto Sans CJK SC"  # as mainfont in _quarto.yml
FOLDER = Path(__file__).parent / "_fonts"


def copy_font(folder: Path = FOLDER) -> Path:
    if chinese_font() != MAIN_FONT:
        raise SystemExit(f"{MAIN_FONT} is not on this machine; pip install mplfonts brings it")
    source = Path(font_manager.findfont(MAIN_FONT, fallback_to_default=False))
    target = folder / source.name
    if not target.exists() or target.stat().st_size != source.stat().st_size:
        folder.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
    return target


if __name__ == "__main__":
    copy_font()

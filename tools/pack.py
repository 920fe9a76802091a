"""Committed records as few files: `python tools/pack.py results/reference`, and back with --unpack."""

import argparse
from pathlib import Path

from kvneox_lib.studies.packing import pack, unpack

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds a folder, or a packed file, for each study")
    parser.add_argument("--unpack", action="store_true")
    arguments = parser.parse_args()
    found = [path for path in arguments.folder.iterdir() if not path.name.startswith(".")]
    names = {path.name.split(".")[0] for path in found if path.is_dir() or path.suffix == ".csv"}
    for name in sorted(names):
        (unpack if arguments.unpack else pack)(arguments.folder / name)

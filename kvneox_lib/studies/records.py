"""What a run writes and how it is read back: a flat JSON file, and tables as CSV beside it. A record exists if its JSON
does, which is renamed into place last, and it is used again only for equal parameters.

A folder of many records can be packed: `results/reference/speed` into `results/reference/speed.csv`, a row a record,
and into one file for each kind of table, `speed.<table>.csv`. Whatever reads records reads both forms.
"""

import contextlib
import csv
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch

from kvneox_lib.inputs.files import write_atomically
from kvneox_lib.studies.provenance import PROVENANCE

# None stands where a figure does not apply (a timing has no nll), but the key has to be there: no column goes missing.
REQUIRED = (
    *("model", "weights", "dataset", "press", "compression_ratio", "kept_fraction", "device", "dtype", "seed"),
    *("n_tokens", "nll_mean", "context_tokens", *PROVENANCE),
)
WEIGHTS = ("pretrained", "bundled", "random")
# What tells the rows of a table apart that has those of several runs.
KNOWN_IN_TABLES = ("press", "compression_ratio", "query_aware", "n_sink", "window", "dataset", "question", "kv_bits")
KNOWN_IN_TABLES += ("keep_tokens", "template", "degenerate")
# Parameters that came later, and what records from before them were measured at.
CAME_LATER = {"kv_bits": None, "prefill_chunk": None, "evict_while_reading": False, "keep_tokens": None}
CAME_LATER |= {"revision": None, "template": "passkey", "n_distractors": 0, "press_options": None}
# Cells of a packed file that stay text, whatever they look like.
TEXTS = (
    *("run_id", "model", "revision", "weights", "dataset", "press", "source", "device", "dtype", "engine", "failure"),
    *("weights_id", "text_sha256", "attn_implementation", "depths", "template", "table_rows"),
    *("question", "cut", "metric", "filter", "context_rule", "task_version", "documents_sha256", "lm_eval_version"),
    *("degenerate", "press_options"),
    *(name for name in PROVENANCE if name != "git_dirty"),
)
LONGEST_ID = 150  # a file name may have 255 bytes; the names of tables come after it


def run_id(dataset: str, model: str, press: str, ratio: float, **differing) -> str:
    """The file name of a run: `wikitext__pythia-70m__snapkv__0.50`, then `__name=value` for every parameter that
    differs from its default, by name. Different values give different ids (`/` reads `+`, what is no good in a file
    name `~` and its hex code); the hub's EleutherAI/ is left out."""
    parts = [_slug(dataset), _slug(model.removeprefix("EleutherAI/")), _slug(press), _slug(_ratio(ratio))]
    parts += [f"{name}={_slug(value)}" for name, value in sorted(differing.items())]
    name = "__".join(parts)
    if len(name) > LONGEST_ID:
        name = f"{name[: LONGEST_ID - 13]}__{hashlib.sha256(name.encode()).hexdigest()[:11]}"
    return name


def _ratio(value):
    """0.5 as 0.50, 0.125 in full."""
    if isinstance(value, float | int) and float(f"{value:.2f}") == value:
        return f"{value:.2f}"
    return [_ratio(item) for item in value] if isinstance(value, list | tuple) else value


def _slug(value) -> str:
    if isinstance(value, list | tuple):  # a list of one keeps its comma, as Python's tuple does
        return ",".join(map(_slug, value)) + ("," if len(value) < 2 else "")
    text = json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
    text = re.sub(r"[^A-Za-z0-9._/-]|__|_$|^_|^[.-]", lambda m: "".join(f"~{b:02X}" for b in m[0].encode()), text)
    return text.replace("/", "+")


def output_folder(output_dir: str | Path) -> Path:
    """`output_dir` seen from the folder that holds params/, found upward from the working folder (papermill runs in
    the caller's folder, JupyterLab in notebooks/); from the working folder itself where there is none."""
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / "params").is_dir()), here)
    return root / Path(output_dir).expanduser()


# ---- writing --------------------------------------------------------------------------------------------------------


def write_record(folder: str | Path, run_id: str, record: Mapping) -> Path:
    """Write <folder>/<run_id>.json. Tables of the run are to be written before."""
    row = {"run_id": run_id} | {name: _plain(name, value) for name, value in record.items()}
    _check_complete(row)
    if row["weights"] not in WEIGHTS:
        raise ValueError(f"weights={row['weights']!r}: must be one of {', '.join(WEIGHTS)} (what was loaded)")
    path = path_of(folder, run_id, ".json")
    write_atomically(path, as_json(row))
    return path


def _check_complete(row: Mapping) -> None:
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise ValueError(f"record: lacks {', '.join(missing)}; a figure that does not apply is None")


def _no_number(text: str):
    raise ValueError(f"{text} is no figure")


def as_json(row: Mapping) -> str:
    return json.dumps(row, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_table(folder: str | Path, run_id: str, name: str, frame: pd.DataFrame) -> Path:
    """What a run has more than one row of (nll by distance, one row per key): <run_id>.<name>.csv beside the record."""
    path = table_path(folder, run_id, name)
    write_atomically(path, frame.to_csv(index=False))
    return path


def table_path(folder: str | Path, run_id: str, name: str) -> Path:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"name={name!r}: must be of a-z, 0-9 and _")
    return path_of(folder, run_id, f".{name}.csv")


def path_of(folder: str | Path, run_id: str, ending: str) -> Path:
    """Not Path.with_suffix, which takes the `.50` of a ratio for a suffix."""
    if Path(run_id).name != run_id:
        raise ValueError(f"run_id={run_id!r}: must be a file name; make it with run_id()")
    return Path(folder) / f"{run_id}{ending}"


def _plain(name: str, value):
    """A value that JSON, CSV and a data frame's cell can hold: None, bool, int, float, str; a list as JSON text."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # numpy's and torch's scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: not a finite number; a figure that does not apply is None")
    if isinstance(value, list | tuple) and not any(isinstance(item, list | tuple | dict) for item in value):
        return json.dumps([_plain(name, item) for item in value], ensure_ascii=False)
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{name}={value!r}: a record is flat; {type(value).__name__} belongs into write_table")


# ---- reading --------------------------------------------------------------------------------------------------------


def find_record(folder: str | Path, run_id: str, parameters: Mapping) -> dict | None:
    """The record of this run if there is one that has these parameters, with equal values."""
    path = path_of(folder, run_id, ".json")
    record = next(read_loose([path]), None) if path.exists() else packed(Path(folder)).get(run_id)
    if record is None:
        return None
    known = {**record, **{name: before for name, before in CAME_LATER.items() if record.get(name) is None}}
    wanted = {name: _plain(name, value) for name, value in parameters.items()}
    stored = {name: known[name] for name in wanted if name in known}
    same = json.dumps(stored, sort_keys=True) == json.dumps(wanted, sort_keys=True)  # True is not 1
    return record if same else None


def load_records(folder: str | Path) -> pd.DataFrame:
    """The records in `folder` itself and in its packed form, one a row, with `study` (the folder's name) and `path`;
    without rows if there are none. A file that is damaged or no record is named in a warning and left out."""
    frame = pd.DataFrame([record for _, record in sorted(all_records(Path(folder)).items())])
    for name, before in CAME_LATER.items():
        if name in frame and before is not None:
            frame[name] = [before if pd.isna(value) else value for value in frame[name]]
    return frame


def tables_of(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """That table of all these records, one below the other, with what tells them apart. Not every run has each."""
    parts = []
    for row in frame.to_dict("records"):
        path = Path(row["path"])
        if path.suffix == ".csv":
            table = _packed_table(*_as_it_is(path.with_suffix(f".{name}.csv"))).get(row["run_id"])
        else:
            own = table_path(path.parent, row["run_id"], name)
            table = _read_csv(own) if own.exists() else None
        if table is not None and _is_whole(row, name, table):
            known = {key: row[key] for key in KNOWN_IN_TABLES if key in row and key not in table}
            parts.append(table.assign(**known))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(KNOWN_IN_TABLES))


def _is_whole(row: dict, name: str, table: pd.DataFrame) -> bool:
    """Whether the table has as many rows as the record says: a copy may have broken off, or be of an earlier run."""
    if not isinstance(row.get("table_rows"), str):  # of a record from before it was said: None, in a frame NaN
        return True
    wanted = re.search(rf"\b{name}=(\d+)", row["table_rows"])
    if wanted and int(wanted[1]) == len(table):
        return True
    what = f"its table {name} has {len(table)} rows, not {wanted[1] if wanted else 0}: left out"
    warnings.warn(f"{row['path']}: {what}; delete the record or run it again", stacklevel=4)
    return False


def _read_csv(source) -> pd.DataFrame:
    return pd.read_csv(source, float_precision="round_trip")


def read_loose(paths: Iterable[Path]) -> Iterable[dict]:
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
            if not isinstance(record, dict) or record.get("run_id") != path.name.removesuffix(".json"):
                raise ValueError("not a record under its own run_id")
            _check_complete(record)
        except (OSError, ValueError, RecursionError) as error:
            warnings.warn(f"{path}: left out, {error}; delete it or run it again", stacklevel=3)
            continue
        yield {**record, "study": path.parent.name, "path": str(path)}


# ---- packed ---------------------------------------------------------------------------------------------------------


def all_records(folder: Path) -> dict[str, dict]:
    loose = {record["run_id"]: record for record in read_loose(sorted(folder.glob("*.json")))}
    return {**packed(folder), **loose}


def packed_path(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.csv"


def _as_it_is(path: Path) -> tuple[Path, int]:
    """A file as it is now: what was read of it before may be used again."""
    return path, path.stat().st_mtime_ns if path.exists() else 0


def packed(folder: Path) -> dict[str, dict]:
    return _packed_records(*_as_it_is(packed_path(folder)))


@lru_cache(maxsize=32)
def _packed_records(path: Path, changed: int) -> dict[str, dict]:
    if not changed:
        return {}
    rows = ({name: value_of_cell(name, cell) for name, cell in row.items()} for row in rows_of(path))
    return {row["run_id"]: {**row, "study": path.stem, "path": str(path)} for row in rows}


@lru_cache(maxsize=32)
def _packed_table(path: Path, changed: int) -> dict[str, pd.DataFrame]:
    if not changed:
        return {}
    return {run_id: part.drop(columns="run_id") for run_id, part in _read_csv(path).groupby("run_id", sort=False)}


def value_of_cell(name: str, cell: str):
    """What a cell of a packed record holds. A field that a record lacks reads None, too."""
    if not cell:
        return None
    if name in TEXTS:
        return cell
    if cell in ("True", "False"):
        return cell == "True"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell)
    return cell


def rows_of(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))

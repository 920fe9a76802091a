"""What a run writes and how it is read back: one flat JSON file per run, the same row as CSV beside it. A record exists
if its JSON does, which is renamed into place last, and it is used again only for equal parameters."""

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch

from kvneox_lib.inputs.files import write_atomically

PACKAGES = ("torch", "transformers", "kvpress")
PROVENANCE = (
    *("python_version", *(f"{package}_version" for package in PACKAGES)),
    *("git_commit", "git_dirty", "device_name", "started_at"),
)
# None stands where a figure does not apply (a timing has no nll), but the key has to be there: no column goes missing.
REQUIRED = (
    *("model", "weights", "dataset", "press", "compression_ratio", "kept_fraction", "device", "dtype", "seed"),
    *("n_tokens", "nll_mean", "context_tokens", *PROVENANCE),
)
WEIGHTS = ("pretrained", "bundled", "random")
NOT_PARAMETERS = ("output_dir", "overwrite")  # where a run is kept and whether again: nothing that it measures
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


# ---- provenance -----------------------------------------------------------------------------------------------------


def provenance(device: str | torch.device = "cpu") -> dict[str, str | bool | None]:
    """Where figures come from; call it when the run starts. What cannot be known is None."""
    commit = _git("rev-parse", "HEAD")
    return {
        "python_version": platform.python_version(),
        **{f"{package}_version": _version(package) for package in PACKAGES},
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no", ".", ":!results")) if commit else None,
        "device_name": _device_name(torch.device(device)),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Ask the checkout that this file is part of. An installed copy has none, even inside some repository."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    # a hook of git's sets GIT_DIR and GIT_INDEX_FILE for its own repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


# ---- writing --------------------------------------------------------------------------------------------------------


def write_record(folder: str | Path, run_id: str, record: Mapping, *, parameters: Mapping) -> Path:
    """Write <folder>/<run_id>.json and .csv: `record`, and every parameter once more as `param_<name>`, as it was asked
    for (param_weights "auto" beside weights "bundled"). Tables of the run are to be written before."""
    row = {"run_id": run_id}
    row |= {name: _plain(name, value) for name, value in record.items()} | _as_columns(parameters)
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise ValueError(f"record: lacks {', '.join(missing)}; give None for a figure that does not apply")
    if row["weights"] not in WEIGHTS:
        raise ValueError(f"weights={row['weights']!r}: must be one of {', '.join(WEIGHTS)} (what was loaded)")
    json_path = _path(folder, run_id, ".json")
    csv_path = _path(folder, run_id, ".csv")
    new = not json_path.exists()
    try:
        write_atomically(csv_path, pd.DataFrame([row]).to_csv(index=False))
        write_atomically(json_path, json.dumps(row, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except BaseException:
        if new:
            csv_path.unlink(missing_ok=True)
        raise
    return json_path


def write_table(folder: str | Path, run_id: str, name: str, frame: pd.DataFrame) -> Path:
    """What a run has more than one row of (nll by distance, one row per key): <run_id>.<name>.csv beside the record."""
    path = table_path(folder, run_id, name)
    write_atomically(path, frame.to_csv(index=False))
    return path


def table_path(folder: str | Path, run_id: str, name: str) -> Path:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"name={name!r}: must be of a-z, 0-9 and _")
    return _path(folder, run_id, f".{name}.csv")


def _path(folder: str | Path, run_id: str, ending: str) -> Path:
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


def _as_columns(parameters: Mapping) -> dict:
    return {f"param_{name}": _plain(name, value) for name, value in parameters.items() if name not in NOT_PARAMETERS}


# ---- reading --------------------------------------------------------------------------------------------------------


def find_record(folder: str | Path, run_id: str, parameters: Mapping) -> dict | None:
    """The record of this run if there is one whose parameters are these: the same names, and equal values. A run that
    may fall back (weights "auto", the text of `python-docs`) should give what it resolved to among its parameters."""
    path = _path(folder, run_id, ".json")
    record = next(_read([path]), None) if path.exists() else None
    stored = {name: value for name, value in (record or {}).items() if name.startswith("param_")}
    same = json.dumps(stored, sort_keys=True) == json.dumps(_as_columns(parameters), sort_keys=True)  # True is not 1
    return record if record and same else None


def load_records(folder: str | Path) -> pd.DataFrame:
    """All records below `folder`, one a row, with `study` (the folder it lies in) and `path`; without rows if there is
    no such folder. A file that is damaged or no record is named in a warning and left out."""
    paths = sorted(path for path in Path(folder).rglob("*.json") if ".ipynb_checkpoints" not in path.parts)
    return pd.DataFrame(list(_read(paths)))


def _read(paths: Iterable[Path]) -> Iterable[dict]:
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict) or record.get("run_id") != path.name.removesuffix(".json"):
                raise ValueError("not a record under its own run_id")
        except (OSError, ValueError) as error:
            warnings.warn(f"{path}: left out, {error}; delete it or run it again", stacklevel=3)
            continue
        yield {**record, "study": path.parent.name, "path": str(path)}

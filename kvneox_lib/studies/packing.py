"""Many records as few files, and back; see `records`."""

import csv
import io
from collections.abc import Collection
from pathlib import Path

from kvneox_lib.inputs.files import write_atomically
from kvneox_lib.studies.records import (
    all_records,
    as_json,
    packed,
    packed_path,
    path_of,
    read_loose,
    rows_of,
    table_path,
    value_of_cell,
)


def pack(folder: str | Path) -> None:
    """Put the records of `folder`, with those packed before, into one file, and their tables into one for each kind.
    What is no record, or no table of one, stays where it is."""
    folder, target = Path(folder), packed_path(folder)
    loose = {record["run_id"] for record in read_loose(sorted(folder.glob("*.json")))}
    if not loose:
        return
    rows = [_bare(record) for _, record in sorted(all_records(folder).items())]
    tables = {}
    for name in _table_names(folder, loose):
        before = _packed_rows(target.with_suffix(f".{name}.csv"))
        tables[name] = []
        for run_id in (row["run_id"] for row in rows):
            own = table_path(folder, run_id, name)
            found = (rows_of(own) if own.exists() else []) if run_id in loose else before.get(run_id, [])
            tables[name] += [{"run_id": run_id, **row} for row in found]
    for name, found in tables.items():
        if found:
            write_atomically(target.with_suffix(f".{name}.csv"), _as_csv(found))
        else:
            target.with_suffix(f".{name}.csv").unlink(missing_ok=True)
    write_atomically(target, _as_csv([_checked_cells(row) for row in rows]))
    for run_id in loose:
        for path in (path_of(folder, run_id, ".json"), *(table_path(folder, run_id, name) for name in tables)):
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def unpack(folder: str | Path) -> None:
    """Back into a file for each record and table; what lies in `folder` already is newer."""
    folder, target = Path(folder), packed_path(folder)
    there = {path.name for path in folder.glob("*.json")}
    tables = {name: _packed_rows(target.with_suffix(f".{name}.csv")) for name in _table_names(folder)}
    for run_id, record in packed(folder).items():
        if f"{run_id}.json" in there:
            continue
        for name, by_run in tables.items():
            if run_id in by_run:
                write_atomically(table_path(folder, run_id, name), _as_csv(_without_empty_columns(by_run[run_id])))
        write_atomically(path_of(folder, run_id, ".json"), as_json(_bare(record)))
    for path in [target, *target.parent.glob(f"{folder.name}.*.csv")]:
        path.unlink(missing_ok=True)


def _without_empty_columns(rows: list[dict]) -> list[dict]:
    """Those that only other runs' tables have."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    return [{name: row[name] for name in names} for row in rows]


def _bare(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in ("study", "path")}


def _table_names(folder: Path, runs: Collection[str] = ()) -> list[str]:
    """Of those packed, and of those that lie in the folder beside the records of `runs`."""
    loose = (path.name.removesuffix(".csv").rpartition(".") for path in folder.glob("*.csv"))
    packed = {path.name.split(".")[-2] for path in folder.parent.glob(f"{folder.name}.*.csv")}
    return sorted(packed | {name for run_id, _, name in loose if run_id in runs})


def _packed_rows(path: Path) -> dict[str, list[dict]]:
    by_run: dict[str, list[dict]] = {}
    for row in rows_of(path) if path.exists() else []:
        by_run.setdefault(row.pop("run_id"), []).append(row)
    return by_run


def _checked_cells(row: dict) -> dict:
    """So that nothing comes back as something else."""
    for name, value in row.items():
        back = value_of_cell(name, "" if value is None else str(value))
        if back != value or type(back) is not type(value):
            raise ValueError(f"{name}={value!r} would come back as {back!r}: name it in TEXTS")
    return row


def _as_csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

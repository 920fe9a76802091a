"""Whether one run is better than another on the same windows, keys or documents."""

from functools import cache

import numpy as np
import pandas as pd

from kvneox_lib.measures.intervals import comparison, holm
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.pages.storage import KINDS
from kvneox_lib.pages.words import listed
from kvneox_lib.presses.registry import ROWS

HOW = "上成对比较，按 Holm 法一起校正"  # after the words for the units
PLACES = {row.name: place for place, row in enumerate(ROWS)}
BETTER, WORSE, LEVEL = "better", "worse", ""


def beside(runs: pd.DataFrame, other: str, same: list[str]) -> pd.DataFrame:
    """Each run beside that of the press `other` in which the columns `same` are equal. Without degenerate runs."""
    runs = healthy(runs)
    ours, others = runs[runs["press"] != other], runs[runs["press"] == other]
    return ours.merge(others, on=same, suffixes=("", "_other"))


def judged(pairs: pd.DataFrame, of: list[Records]) -> pd.DataFrame:
    """`pairs`: two runs of a study, `run_id` and `run_id_other`, in each row, which names the `study` if there are
    several. With `ahead`, by how much the first is better in the mean, `p` after Holm's correction for all rows
    together, over how many `documents`, and `verdict`, that of the first, where that p is below 0.05. Pairs of too few
    units to tell are left out."""
    by_study, rows = {records.study: records for records in of}, []
    units = cache(lambda study, run: _units(by_study[study], run))
    studies = pairs["study"] if "study" in pairs else [of[0].study] * len(pairs)
    for study, one, other in zip(studies, pairs["run_id"], pairs["run_id_other"]):
        ahead = (units(study, one) - units(study, other)).dropna()
        of_document = KINDS[study].of
        documents = np.arange(len(ahead)) if of_document is None else ahead.index.get_level_values(of_document)
        p = comparison(ahead.to_numpy(), np.asarray(documents)).p
        rows.append({"ahead": ahead.mean() if len(ahead) else np.nan, "p": p, "documents": len(set(documents))})
    measured = pd.DataFrame(rows, columns=["ahead", "p", "documents"])
    found = pd.concat([pairs.reset_index(drop=True), measured], axis=1).dropna(subset="p")
    found = found.assign(p=holm(found["p"].to_numpy(dtype=float)))
    sure = np.where(found["ahead"] > 0, BETTER, WORSE)
    return found.assign(verdict=np.where(found["p"] < 0.05, sure, LEVEL))


def _units(records: Records, run: str) -> pd.Series:
    """What the run is worth in each of its units, more being better; none where these were not kept."""
    kind = KINDS[records.study]
    try:
        values = records.table(kind.table, run_id=run).set_index(list(kind.unit))[kind.value].astype(float)
    except Missing:
        empty = pd.MultiIndex.from_arrays([[]] * len(kind.unit), names=kind.unit)
        return pd.Series(dtype=float, index=empty)
    return -values if kind.less_is_better else values


def names(found: pd.DataFrame, verdict: str) -> list[str]:
    """The presses of which this was said, in the order of the registry."""
    return sorted(found.loc[found["verdict"] == verdict, "press"], key=PLACES.get)


def by_verdict(found: pd.DataFrame) -> dict[str, str]:
    """Cells of a table: who is better, who worse, and of how many it cannot be told."""
    better, worse, level = (names(found, verdict) for verdict in (BETTER, WORSE, LEVEL))
    return {"明确更好": listed(better, "—"), "明确更差": listed(worse, "—"), "分不出": f"{len(level)} 种"}

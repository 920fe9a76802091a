"""What was timed, from the runs of the study of speed."""

import pandas as pd


def timed_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Those that did not fail."""
    return runs[runs["failure"].isna()] if "failure" in runs else runs


def corner(runs: pd.DataFrame) -> pd.DataFrame:
    """Of the runs that were timed, those at the longest context and there the largest batch; the baseline first."""
    runs = timed_runs(runs)
    longest = runs[runs["context_tokens"] == runs["context_tokens"].max()]
    largest = longest[longest["batch_size"] == longest["batch_size"].max()]
    plain_first = largest.assign(pressed=largest["press"] != "no_press")
    return plain_first.sort_values(["pressed", "press", "compression_ratio", "engine"])

"""Whether two columns put runs in the same order."""

import pandas as pd


def rank_correlation(one: pd.Series, other: pd.Series) -> float:
    """Spearman's, over the rows that have both, ties at their mean rank; NaN where one of them is the same in all."""
    both = pd.concat([one, other], axis=1, keys=["one", "other"]).apply(pd.to_numeric).dropna().rank()
    return both["one"].corr(both["other"]) if both.nunique().min() > 1 else float("nan")

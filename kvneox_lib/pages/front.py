"""Quality against speed: two studies joined by press and ratio."""

import pandas as pd

from kvneox_lib.pages import turns
from kvneox_lib.pages.report import Missing
from kvneox_lib.pages.selecting import of_one_storage, of_ratios
from kvneox_lib.pages.timings import corner
from kvneox_lib.pages.words import listed

SAME = ["press", "compression_ratio"]


def of_model(losses: pd.DataFrame, model: str) -> pd.DataFrame:
    """Of records of perplexity those of this model; if there are several sets, the one with most scored tokens."""
    if losses.empty:
        raise Missing("wikitext_ppl", model)
    losses = of_ratios(of_one_storage(losses))
    found = losses[(losses["model"] == model) & (losses["weights"] != "random")]
    if found.empty:
        raise Missing("wikitext_ppl", model)
    return found[found["n_tokens"] == found["n_tokens"].max()].drop_duplicates(SAME)


def front(timings: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """This library's runs at the corner beside the loss of the same press at the same ratio. A press with a strength of
    its own has no counterpart."""
    cell, losses = of_one_storage(corner(timings)), of_one_storage(losses)
    ours = cell[cell["engine"] == "ours"].dropna(subset="compression_ratio")
    both = ours.merge(losses[[*SAME, "delta_nll"]], on=SAME)
    if (both["press"] == "no_press").all():
        raise Missing("speed", "与困惑度同样的 press 与压缩率")
    return both


def undominated(both: pd.DataFrame) -> str:
    """One is faster than another only where the interval of their ratio says so."""
    best = [
        f"{row.press} {row.compression_ratio:g}" if row.compression_ratio else "不压缩"
        for _, row in both.iterrows()
        if not any(turns.ratio(row, other).low > 1 for _, other in both[both["delta_nll"] <= row.delta_nll].iterrows())
    ]
    return f"{len(both)} 个配置里，{len(best)} 个没有被别的配置胜过（损失不更大，而吞吐确实更高）：{listed(best)}。"


def spread(both: pd.DataFrame) -> str:
    """Of the presses at one ratio, and of the ratio at which the middle press is fastest beside no compression."""
    plain, others = both[both["press"] == "no_press"], both[both["press"] != "no_press"]
    if plain.empty:
        raise Missing("speed", "no_press")
    groups = [group.sort_values("step_s") for _, group in others.groupby("compression_ratio")]
    apart = max((turns.ratio(group.iloc[-1], group.iloc[0]) for group in groups), key=lambda found: found.value)
    middle = min((group.iloc[len(group) // 2] for group in groups), key=lambda row: row.step_s)
    return (
        f"同一压缩率下，最慢与最快的方法每步用时最多相差到 {apart}；最快的那个压缩率（{middle.compression_ratio:g}）"
        f"上居中的方法，不压缩的每步用时是它的 {turns.ratio(plain.iloc[0], middle)}。"
    )

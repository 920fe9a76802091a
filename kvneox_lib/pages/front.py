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


def spread(both: pd.DataFrame) -> str:
    """At each ratio: how far the presses are apart in time, and how far in loss; and what each ratio gains."""
    plain, others = both[both["press"] == "no_press"], both[both["press"] != "no_press"]
    if plain.empty:
        raise Missing("speed", "no_press")
    groups = [(ratio, group.sort_values("step_s")) for ratio, group in others.groupby("compression_ratio")]
    apart = [turns.ratio(group.iloc[-1], group.iloc[0]) for _, group in groups]
    widest = max(apart, key=lambda found: found.value)
    gains = [
        f"{ratio:g} 时是 {_middle(plain.iloc[0], group)}，损失从 {group['delta_nll'].min():.3f} 到 "
        f"{group['delta_nll'].max():.3f} nat"
        for ratio, group in groups
    ]
    return (
        f"{listed(others['press'].unique())} 在同一压缩率下，一步的用时相差很少：最慢的至多是最快的 {widest}。"
        f"不压缩的一步是压缩后（取居中的方法）的几倍，以及各方法的损失：压缩率 {'；'.join(gains)}。"
    )


def _middle(plain: pd.Series, group: pd.DataFrame) -> turns.Ratio:
    """Of what each press gains the middle one, the upper of two."""
    gains = sorted((turns.ratio(plain, row) for _, row in group.iterrows()), key=lambda gain: gain.value)
    return gains[len(gains) // 2]

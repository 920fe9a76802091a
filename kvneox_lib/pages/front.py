"""Quality against speed: two studies joined by press and ratio."""

import pandas as pd

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
    ours = cell[cell["engine"] == "ours"][[*SAME, "decode_tok_per_s", "kv_bytes"]].dropna(subset="compression_ratio")
    both = ours.merge(losses[[*SAME, "delta_nll"]], on=SAME)
    if (both["press"] == "no_press").all():
        raise Missing("speed", "与困惑度同样的 press 与压缩率")
    return both


def undominated(both: pd.DataFrame) -> str:
    best = [
        f"{row.press} {row.compression_ratio:g}" if row.compression_ratio else "不压缩"
        for row in both.itertuples()
        if not ((both["delta_nll"] <= row.delta_nll) & (both["decode_tok_per_s"] > row.decode_tok_per_s)).any()
    ]
    return f"{len(both)} 个配置里，{len(best)} 个没有被别的配置胜过（损失不更大而吞吐更高）：{listed(best)}。"


def spread(both: pd.DataFrame) -> str:
    plain = both[both["press"] == "no_press"]["decode_tok_per_s"]
    groups = both[both["press"] != "no_press"].groupby("compression_ratio")["decode_tok_per_s"]
    if plain.empty:
        raise Missing("speed", "no_press")
    widest, across = (groups.max() / groups.min()).max(), groups.median().max() / plain.median()
    return (
        f"同一压缩率下，各方法的吞吐最多相差到 {widest:.2f} 倍；吞吐最高的那个压缩率，中位数是不压缩的 {across:.2f} "
        "倍。"
    )

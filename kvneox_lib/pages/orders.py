"""Whether what presses lose in perplexity and what they recall put them in the same order."""

import pandas as pd

from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.ranks import rank_correlation, rank_correlation_ci95
from kvneox_lib.pages.report import Missing, Records, named
from kvneox_lib.pages.selecting import middle_ratio, of_one_storage, pressed
from kvneox_lib.pages.words import number

TOO_FEW = 4  # presses to speak of an order
LITTLE = 0.05  # of the keys: presses below are hardly told apart by recall


def orders(losses: Records, recall: Records) -> pd.DataFrame:
    """A row for each ratio at which enough presses were measured in both: Spearman's correlation of a small loss with a
    high recall, question outside, its interval over presses, and how many recall next to nothing. Degenerate runs are
    left out, and ratios where all presses recall alike: there is no order."""
    lost, found = (pressed(healthy(of_one_storage(records.runs()))) for records in (losses, recall))
    found = found[~found["query_aware"].astype(bool)]
    found = found[found["template"] == "passkey"] if "template" in found else found
    rows = []
    for ratio in sorted(set(lost["compression_ratio"]) & set(found["compression_ratio"])):
        columns = [
            runs[runs["compression_ratio"] == ratio].drop_duplicates("press", keep="last").set_index("press")[name]
            for runs, name in ((lost, "delta_nll"), (found, "accuracy"))
        ]
        both = pd.concat(columns, axis=1).apply(pd.to_numeric).dropna()
        if len(both) < TOO_FEW:
            continue
        pair = -both["delta_nll"], both["accuracy"]
        rho, (low, high) = rank_correlation(*pair), rank_correlation_ci95(*pair)
        if pd.isna([rho, low, high]).any():
            continue
        known = {"text": named(losses), "compression_ratio": ratio, "n_presses": len(both)}
        known |= {"rho": rho, "low": low, "high": high}
        rows.append(known | {"n_little": int((both["accuracy"] < LITTLE).sum())})
    if not rows:
        raise Missing(recall.study, f"与 {losses.study} 共有的几种方法")
    return pd.DataFrame(rows)


def order_table(recall: Records, *texts: Records) -> pd.DataFrame:
    table = pd.concat([orders(losses, recall) for losses in texts])
    return pd.DataFrame(
        {
            "损失来自": table["text"],
            "压缩率": table["compression_ratio"].map("{:g}".format),
            "方法数": table["n_presses"],
            "Spearman 秩相关": [number(row.rho, ".2f") for row in table.itertuples()],
            "95 % 区间": [f"[{number(row.low, '.2f')}, {number(row.high, '.2f')}]" for row in table.itertuples()],
            f"准确率不到 {LITTLE:g} 的": table["n_little"],
        }
    )


def in_words(recall: Records, *texts: Records) -> str:
    """At the middle ratio, and whether it is so at the others."""
    table, parts, ratio = pd.concat([orders(losses, recall) for losses in texts]), [], middle_ratio(recall.runs())
    for row in table[table["compression_ratio"] == ratio].itertuples():
        parts.append(
            f"{row.text}的损失（小者在前）与准确率的 Spearman 秩相关是 {row.rho:.2f} [{row.low:.2f}, {row.high:.2f}]"
            f"（{row.n_presses} 种方法，其中 {row.n_little} 种答对不到 {LITTLE:.0%}）"
        )
    if not parts:
        raise Missing(recall.study, f"压缩率 {ratio:g} 上与困惑度共有的方法")
    return f"压缩率 {ratio:.2f} 时，{'；'.join(parts)}。{_verdict(table)}"


def _verdict(table: pd.DataFrame) -> str:
    agree, against = (table["low"] > 0).sum(), (table["high"] < 0).sum()
    if agree == len(table):
        return "两种名次在每个压缩率上都大体一致。"
    counted = (
        f"各压缩率的 {len(table)} 个秩相关里，{(table['rho'] > 0).sum()} 个为正；区间不含零的，为正者 {agree} 个，"
        f"为负者 {against} 个。"
    )
    if against:
        return counted
    counted += "没有证据说两种名次相反"
    if agree > len(table) / 2:
        return f"{counted}，多数压缩率上它们大体一致。"
    return f"{counted}；这么几种方法也不足以说它们有多一致，所以不能拿一个代替另一个。"

"""Whether what presses lose in perplexity and what they recall put them in the same order."""

import pandas as pd

from kvneox_lib.pages import paired
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.ranks import rank_correlation, rank_correlation_ci95
from kvneox_lib.pages.report import Missing, Records, found_in, named
from kvneox_lib.pages.selecting import middle_ratio, of_one_storage, of_one_wording, pressed
from kvneox_lib.pages.words import STUDY_NAMES, number

TOO_FEW = 4  # presses to speak of an order
LITTLE = 0.05  # of the keys: presses below are hardly told apart by recall


def orders(losses: Records, recall: Records) -> pd.DataFrame:
    """A row for each ratio at which enough presses were measured in both: Spearman's correlation of a small loss with a
    high recall, question outside, its interval over presses, and how many recall next to nothing. Degenerate runs are
    left out, and ratios where all presses recall alike, or next to nothing: there is no order."""
    lost, found = _compared(losses, recall)
    rows = []
    for ratio in sorted(set(lost["compression_ratio"]) & set(found["compression_ratio"])):
        columns = [
            runs[runs["compression_ratio"] == ratio].drop_duplicates("press", keep="last").set_index("press")[name]
            for runs, name in ((lost, "delta_nll"), (found, "accuracy"))
        ]
        both = pd.concat(columns, axis=1).apply(pd.to_numeric).dropna()
        if len(both) < TOO_FEW or (both["accuracy"] < LITTLE).all():
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


def _compared(losses: Records, recall: Records) -> tuple[pd.DataFrame, pd.DataFrame]:
    lost, found = (pressed(healthy(of_one_storage(records.runs()))) for records in (losses, recall))
    return lost, of_one_wording(found[~found["query_aware"].astype(bool)])


def order_table(recall: Records, *texts: Records) -> pd.DataFrame:
    table = pd.concat([orders(losses, recall) for losses in texts])
    return pd.DataFrame(
        {
            "损失来自": table["text"],
            "压缩率": table["compression_ratio"].map("{:g}".format),
            "参加排名的": table["n_presses"],
            "Spearman 秩相关": [number(row.rho, ".2f") for row in table.itertuples()],
            "95 % 区间": [f"[{number(row.low, '.2f')}, {number(row.high, '.2f')}]" for row in table.itertuples()],
            f"准确率不到 {LITTLE:g} 的": table["n_little"],
        }
    )


def in_words(recall: Records, *texts: Records) -> str:
    """Whether the two orders agree, over all ratios."""
    table = pd.concat([orders(losses, recall) for losses in texts])
    agree, against = (table["low"] > 0).sum(), (table["high"] < 0).sum()
    if agree == len(table):
        return f"{len(table)} 个秩相关的区间都在零以上：两种名次大体一致。"
    text = f"{len(table)} 个秩相关里，区间全在零以上的有 {agree} 个，全在零以下的有 {against} 个。"
    if against:
        return text
    return f"{text}没有证据说两种名次相反，但区间很宽，也不足以拿一个代替另一个。"


def opposed(recall: Records, *texts: Records) -> str:
    """At the middle ratio: how many pairs of presses are told apart both by loss and by recall, and of these how many
    in opposite orders; of these the two that recall tells apart most."""
    parts = []
    for losses in texts:
        pairs = _both_told(losses, recall)
        apart = pairs[(pairs["verdict"] != paired.LEVEL) & (pairs["verdict_recall"] != paired.LEVEL)]
        against = apart[apart["verdict"] != apart["verdict_recall"]]
        text = (
            f"{STUDY_NAMES[losses.study]}的损失与准确率都分得出先后的有 {len(apart)} 对，其中 {len(against)} 对次序相反"
        )
        if len(against):
            text += f"，如{_pair_in_words(against.loc[against['ahead_recall'].abs().idxmax()])}"
        parts.append(text)
    ratio = pairs["compression_ratio"].iloc[0]
    return (
        f"再逐对地看。压缩率 {ratio:g} 时，把方法两两相比（同样的窗口、同样的口令，两边各按 Holm 法校正）："
        f"{'；'.join(parts)}。"
    )


def _both_told(losses: Records, recall: Records) -> pd.DataFrame:
    """Every two presses at the middle ratio, as `paired.judged` tells them by loss, and (`_recall`) by recall."""
    ratio = middle_ratio(recall.runs())
    found = [
        runs[runs["compression_ratio"] == ratio].drop_duplicates("press", keep="last")
        for runs in _compared(losses, recall)
    ]
    common = sorted(set(found[0]["press"]) & set(found[1]["press"]))
    judged = []
    for runs, records, shown in zip(found, (losses, recall), ("delta_nll", "accuracy")):
        known = runs.assign(value=runs[shown])[["press", "compression_ratio", "run_id", "value"]]
        known = known[known["press"].isin(common)]
        pairs = known.merge(known, on="compression_ratio", suffixes=("", "_other"))
        judged.append(paired.judged(pairs[pairs["press"] < pairs["press_other"]], [records]))
    both = judged[0].merge(judged[1], on=["compression_ratio", "press", "press_other"], suffixes=("", "_recall"))
    return found_in(recall.study, both, f"压缩率 {ratio} 上与 {losses.study} 共有的几种方法")


def _pair_in_words(row: pd.Series) -> str:
    return (
        f" {row['press']} 与 {row['press_other']}：损失 {row['value']:.3f} 对 {row['value_other']:.3f} nat，"
        f"准确率 {row['value_recall']:.2f} 对 {row['value_other_recall']:.2f}"
    )

"""What is said and shown of recall: the runs and tables of study `recall`."""

from functools import partial

import pandas as pd
import torch

from kvneox_lib.measures.causes import LEAST_ATTENTION, OF_THE_MOST, find_copying_heads
from kvneox_lib.pages.degenerate import healthy, said
from kvneox_lib.pages.ranks import rank_correlation
from kvneox_lib.pages.report import Missing, found_in
from kvneox_lib.pages.selecting import budget_column, middle_ratio, of_one_storage, pressed, storage_column
from kvneox_lib.pages.words import listed, with_interval

MODES = {"问题在外": False, "问题在内": True}
RULE = f"说出数字时投给该数字的注意力不低于 {LEAST_ATTENTION:g}，也不低于最高者的 {OF_THE_MOST:.0%}"
KEPT = {"digits_kept": "数字的保留", "digits_kept_where_read": "关键处的保留"}


# ---- which runs -----------------------------------------------------------------------------------------------------


def in_mode(table: pd.DataFrame, mode: str) -> pd.DataFrame:
    return table[table["query_aware"].astype(bool) == MODES[mode]]


def by_mode(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs with a ratio, in the modes that were measured."""
    panels = {mode: in_mode(pressed(of_one_storage(runs)), mode) for mode in MODES}
    return {mode: part for mode, part in panels.items() if len(part)}


def at_middle_ratio(runs: pd.DataFrame, mode: str) -> pd.DataFrame:
    """By press, without degenerate runs."""
    ratio, runs = middle_ratio(runs), healthy(of_one_storage(runs))
    return there(in_mode(runs[runs["compression_ratio"] == ratio], mode), mode).set_index("press", drop=False)


there = partial(found_in, "recall")


def with_digits(runs: pd.DataFrame, mode: str) -> pd.DataFrame:
    """The compressed runs of which is known how many digits they kept, without degenerate ones."""
    return there(in_mode(pressed(healthy(of_one_storage(runs))), mode).dropna(subset=list(KEPT)), "digits_kept")


# ---- tables ---------------------------------------------------------------------------------------------------------


def accuracy_table(runs: pd.DataFrame) -> pd.DataFrame:
    modes = {aware: mode for mode, aware in MODES.items()}
    table = pd.DataFrame({"用法": runs["query_aware"].map(modes), "press": runs["press"]})
    table["准确率"] = [with_interval(row, "accuracy", 2) for _, row in runs.iterrows()]
    columns = {"compression_ratio": "压缩率", "nll_mean": "答案的 nll", "kept_fraction": "实际保留", **KEPT}
    shown = {
        words: pd.to_numeric(runs[name]).map(lambda value: "—" if pd.isna(value) else f"{value:.2f}")
        for name, words in columns.items()
    }
    return table.assign(**budget_column(runs), **storage_column(runs), **shown)


def by_depth(keys: pd.DataFrame, mode: str, presses=()) -> pd.DataFrame:
    """Table `keys` for heat maps: `correct` as a number, by depth and ratio; of `presses` those there, if any are."""
    keys = in_mode(of_one_storage(keys), mode)
    keys = keys[(keys["press"] != "no_press") & (keys["compression_ratio"] > 0)]
    chosen = there(_among(keys, presses), f"{mode}的逐口令表")
    return chosen.assign(correct=chosen["correct"].astype(float), depth=chosen["depth"].round(2))


def _among(table: pd.DataFrame, presses) -> pd.DataFrame:
    chosen = table[table["press"].isin(presses)]
    return chosen if len(chosen) else table


def head_shares(heads: pd.DataFrame, presses=()) -> pd.DataFrame:
    """Table `heads` of one mode for heat maps: `share` is the attention to the digit being said (not compressed), and
    the digits that each press, or each of `presses`, kept at the middle ratio."""
    heads = of_one_storage(heads)
    looking = heads[heads["press"] == "no_press"]
    left = pressed(heads).dropna(subset="digits_kept")
    left = left[left["compression_ratio"] == middle_ratio(heads)]
    left = left[left["press"].isin(presses)] if presses else left
    looking = looking.assign(press="注意力", share=looking["copy_attention"])
    return pd.concat([looking, left.assign(share=left["digits_kept"])])


def copying_heads(heads: pd.DataFrame) -> pd.DataFrame:
    """Those that `causes` calls so, by what they do without a press; that which looks most first. There may be none."""
    heads = of_one_storage(heads)
    plain = heads[heads["press"] == "no_press"].sort_values("copy_attention", ascending=False)
    copying = find_copying_heads(torch.tensor(plain["copy_attention"].to_numpy(dtype=float)))
    return plain[copying.numpy()]


# ---- sentences ------------------------------------------------------------------------------------------------------


def plain(runs: pd.DataFrame) -> str:
    found = of_one_storage(runs[runs["press"] == "no_press"])
    parts = [
        f"{mode} {with_interval(row, 'accuracy', 2)}" for mode in MODES for _, row in in_mode(found, mode).iterrows()
    ]
    if not parts:
        raise Missing("recall", "no_press")
    return f"不压缩时的准确率：{'，'.join(parts)}；模型本来答不出的，压缩无从破坏。"


def not_ranked(runs: pd.DataFrame) -> str:
    return "".join(said(pressed(of_one_storage(runs))))


def survivors(runs: pd.DataFrame) -> str:
    parts = []
    for mode in MODES:
        accuracy = at_middle_ratio(runs, mode)["accuracy"].sort_values()
        high, low = accuracy[accuracy >= 0.5][::-1], accuracy[accuracy < 0.05]
        words = listed([f"{name}（{share:.2f}）" for name, share in high.items()], "无")
        parts.append(f"{mode}，答对一半以上的：{words}，答对不到二十分之一的：{listed(low.index, '无')}")
    return f"压缩率 {middle_ratio(runs):.2f} 时：{'；'.join(parts)}。"


def gained(runs: pd.DataFrame) -> str:
    outside, inside = (at_middle_ratio(runs, mode)["accuracy"] for mode in MODES)
    gain = there((inside - outside).dropna().sort_values(), "同一方法的两种用法")
    name = gain.index[-1]
    if gain[name] <= 0:
        return f"压缩时看得到问题，{len(gain)} 种方法的准确率都没有因此更高。"
    return f"看得到问题，获益最多的是 {name}（{outside[name]:.2f} → {inside[name]:.2f}）。"


def edge(keys: pd.DataFrame) -> str:
    """Of StreamingLLM, which looks at nothing but places."""
    keys = in_mode(of_one_storage(keys[keys["press"] == "streaming_llm"]), "问题在外")
    kept, gone = (keys[part]["correct"].astype(float) for part in (keys["digits_kept"] == 1, keys["digits_kept"] == 0))
    if kept.empty or gone.empty:
        raise Missing("recall", "数字全部留下与全部淘汰的提问")
    return (
        f"只看位置的 StreamingLLM 可以用来检查测法：数字全部留下的 {len(kept)} 次提问答对 {kept.mean():.0%}，"
        f"全部淘汰的 {len(gone)} 次答对 {gone.mean():.0%}。"
    )


def copying(heads: pd.DataFrame) -> str:
    """Of the heads of one mode."""
    heads = of_one_storage(heads)
    every, reading = heads[heads["press"] == "no_press"], copying_heads(heads)
    names = listed([f"第 {row.layer} 层第 {row.head} 头（{row.copy_attention:.2f}）" for row in reading.itertuples()])
    if reading.empty:
        return f"{len(every)} 个头里没有抄写的头（{RULE}）：最高的也只有 {every['copy_attention'].max():.2f}。"
    share = reading["copy_attention"].sum() / every["copy_attention"].sum()
    return f"{len(every)} 个头里抄写的（{RULE}）有 {len(reading)} 个：{names}，合占全部抄写注意力的 {share:.0%}。"


def correlated(runs: pd.DataFrame, mode: str) -> str:
    told = with_digits(runs, mode)
    ranks = {words: rank_correlation(told["accuracy"], told[name]) for name, words in KEPT.items()}
    if any(map(pd.isna, ranks.values())):
        raise Missing("recall", "准确率与保留的比例都有高低的几次运行")
    parts = [f"与“{words}”的秩相关是 {relation:.2f}" for words, relation in ranks.items()]
    return f"{mode}的 {len(told)} 次运行里，准确率{'，'.join(parts)}。"


def digits_in_words(runs: pd.DataFrame) -> list[str]:
    """Of each mode how accuracy goes with the digits kept, and of each press at the middle ratio how many it kept."""
    lines, ratio = [], middle_ratio(runs)
    for mode in by_mode(runs):
        try:
            lines.append(correlated(runs, mode))
        except Missing:
            pass  # too few runs to be in any order
        found = at_middle_ratio(runs, mode).dropna(subset=list(KEPT))
        lines += [
            f"{mode}，压缩率 {ratio:.2f}，{row.press}：缓存留下 {row.kept_fraction:.0%}，"
            f"数字留下 {row.digits_kept:.0%}，关键处留下 {row.digits_kept_where_read:.0%}，准确率 {row.accuracy:.2f}。"
            for row in found.itertuples()
        ]
    return lines


def elsewhere(runs: pd.DataFrame) -> str:
    """Of SnapKV."""
    found = at_middle_ratio(runs, "问题在外")
    run = there(found[found["press"] == "snapkv"].dropna(subset=list(KEPT)), "snapkv 的 digits_kept").iloc[0]
    text = (
        f"SnapKV 在压缩率 {run.compression_ratio:.2f} 时留下数字的 {run.digits_kept:.0%}，在关键处留下 "
        f"{run.digits_kept_where_read:.0%}。"
    )
    if run.digits_kept_where_read < run.digits_kept:
        text += "观察窗口里是正文，不是问题，抄写的头此刻没有在看口令，按窗口的注意力打分也就没有理由留下它们。"
    return text

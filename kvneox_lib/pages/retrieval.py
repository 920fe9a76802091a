"""What is said and shown of recall: the runs and tables of study `recall`."""

from functools import partial

import pandas as pd
import torch

from kvneox_lib.measures.causes import LEAST_ATTENTION, OF_THE_MOST, find_copying_heads
from kvneox_lib.measures.intervals import share_ci95
from kvneox_lib.pages import kinds, paired
from kvneox_lib.pages.degenerate import healthy, is_degenerate
from kvneox_lib.pages.ranks import drawn_rank_correlations, interval_of, rank_correlation
from kvneox_lib.pages.report import Missing, Records, found_in
from kvneox_lib.pages.selecting import budget_column, middle_ratio, of_one_storage, pressed, storage_column
from kvneox_lib.pages.words import listed, with_interval

MODES = {"问题在外": False, "问题在内": True}
RULE = f"说出数字时投给该数字的注意力不低于 {LEAST_ATTENTION:g}，也不低于最高者的 {OF_THE_MOST:.0%}"
SHOWN_BY_DEPTH = ("random", "streaming_llm", "keydiff", "lagkv", "chunkkv_snapkv")  # places, keys, values, chunks
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


def all_accuracies(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each press, the best first: around the middle ratio with the question outside, and at it inside. A
    star: a degenerate run."""
    middle, runs = middle_ratio(runs), pressed(of_one_storage(runs))
    ratios = sorted(there(runs, "有压缩率的 press")["compression_ratio"].unique())
    at = ratios.index(middle)
    asked = [("问题在外", ratio) for ratio in ratios[max(0, at - 1) : at + 2]] + [("问题在内", middle)]
    columns, order = {}, in_mode(runs, "问题在外").query("compression_ratio == @middle").set_index("press")["accuracy"]
    for mode, ratio in asked:
        part = in_mode(runs[runs["compression_ratio"] == ratio], mode).set_index("press")
        stars = is_degenerate(part).map({True: " *", False: ""})
        cells = [with_interval(row, "accuracy", 2) for _, row in part.iterrows()]
        columns[f"{mode} {ratio:g}"] = pd.Series(cells, index=part.index) + stars
    table = pd.DataFrame(columns).fillna("—").rename_axis("press").reset_index()
    return table.sort_values("press", key=lambda names: -names.map(order).fillna(-1), kind="stable")


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
    looking = looking.assign(press="注意力（不压缩）", share=looking["copy_attention"])
    titles = left["press"] + left["compression_ratio"].map(" {:g}".format)
    return pd.concat([looking, left.assign(press=titles, share=left["digits_kept"])])


def copying_heads(heads: pd.DataFrame) -> pd.DataFrame:
    """Those that `causes` calls so, by what they do without a press; that which looks most first. There may be none."""
    heads = of_one_storage(heads)
    plain = heads[heads["press"] == "no_press"].sort_values("copy_attention", ascending=False)
    copying = find_copying_heads(torch.tensor(plain["copy_attention"].to_numpy(dtype=float)))
    return plain[copying.numpy()]


# ---- on the same keys ------------------------------------------------------------------------------------------------


def against_random(records: Records) -> pd.DataFrame:
    """Each press beside evicting at random, at every ratio, with the question outside; judged together."""
    runs = in_mode(pressed(of_one_storage(records.runs())), "问题在外")
    pairs = there(paired.beside(runs, "random", ["compression_ratio"]), "random").sort_values("compression_ratio")
    return there(paired.judged(pairs, [records]), "与 random 可以配对的 press")


def random_table(records: Records) -> pd.DataFrame:
    rows = []
    for ratio, part in against_random(records).groupby("compression_ratio"):
        known = {"压缩率": f"{ratio:g}", "随机淘汰": f"{part['accuracy_other'].iloc[0]:.2f}"}
        rows.append(known | paired.by_verdict(part))
    return pd.DataFrame(rows)


def seeing_the_question(records: Records) -> pd.DataFrame:
    """Each press with the question inside beside the same with it outside, at the middle ratio."""
    runs = pressed(healthy(of_one_storage(records.runs())))
    runs = runs[runs["compression_ratio"] == middle_ratio(runs)]
    inside, outside = (there(in_mode(runs, mode), mode) for mode in ("问题在内", "问题在外"))
    pairs = inside.merge(outside, on="press", suffixes=("", "_other"))
    return there(paired.judged(pairs, [records]), "同一方法的两种用法")


# ---- sentences ------------------------------------------------------------------------------------------------------


def plain(runs: pd.DataFrame) -> str:
    found = of_one_storage(runs[runs["press"] == "no_press"])
    parts = [
        f"{mode} {with_interval(row, 'accuracy', 2)}" for mode in MODES for _, row in in_mode(found, mode).iterrows()
    ]
    if not parts:
        raise Missing("recall", "no_press")
    return f"不压缩时的准确率：{'，'.join(parts)}；模型本来答不出的，压缩无从破坏。"


def survivors(runs: pd.DataFrame) -> str:
    """Up to which ratio half of the keys are found after compression, and by how many presses."""
    bare = in_mode(of_one_storage(runs[runs["press"] == "no_press"]), "问题在外")
    runs = there(kinds.methods(in_mode(pressed(healthy(of_one_storage(runs))), "问题在外")), "问题在外")
    text = f"不压缩时答对 {with_interval(bare.iloc[0], 'accuracy', 2)}。" if len(bare) else ""
    found = runs[runs["accuracy"] >= 0.5]
    if found.empty:
        return f"{text}先压缩后提问，测过的压缩率上没有一种方法答对一半。"
    ratio, hardest = found["compression_ratio"].max(), runs["compression_ratio"].max()
    last = found[found["compression_ratio"] == ratio].sort_values("accuracy", ascending=False)
    n = runs.loc[runs["compression_ratio"] == ratio, "press"].nunique()
    names = listed([f"{row.press}（{row.accuracy:.2f}）" for row in last.itertuples()])
    text += f"先压缩后提问，压缩率 {ratio:g} 时，{n} 种方法里仍答对一半以上的有 {len(last)} 种：{names}"
    return text + (f"；压缩率 {hardest:g} 时一种也没有。" if hardest > ratio else "。")


def beside_random(records: Records) -> str:
    """At the lowest ratio: whether choosing by a score does better than not choosing at all."""
    found = against_random(records)
    found = found[found["compression_ratio"] == found["compression_ratio"].min()]
    better, worse = (paired.names(found, verdict) for verdict in (paired.BETTER, paired.WORSE))
    text = (
        f"压缩率 {found['compression_ratio'].iloc[0]:g} 时，随机淘汰还答对 {found['accuracy_other'].iloc[0]:.2f}。"
        f"与它相比（同样的口令{paired.HOW}），{len(found)} 种方法里明确更好的有 {len(better)} 种，"
        f"明确更差的有 {len(worse)} 种。"
    )
    if not worse:
        return text
    lost = found[found["verdict"] == paired.WORSE]["accuracy"]
    return (
        f"{text}更差的几种只答对 {lost.min():.2f} 至 {lost.max():.2f}：丢掉的一样多，按分数挑选反而不如不挑，"
        "问题不在丢了多少，而在丢了什么。"
    )


def gained(records: Records) -> str:
    found = there(kinds.methods(seeing_the_question(records)), "同一方法的两种用法")
    better, worse = (found[found["verdict"] == verdict] for verdict in (paired.BETTER, paired.WORSE))
    text = (
        f"压缩率 {found['compression_ratio'].iloc[0]:g} 时，{len(found)} 种方法里，压缩时看得到问题便明确答得更好的有 "
        f"{len(better)} 种，更差的有 {len(worse)} 种（同样的口令{paired.HOW}）。"
    )
    if better.empty:
        return text
    most, still = better.loc[better["ahead"].idxmax()], better[better["accuracy"] < 0.5]
    text += f"获益最多的是 {most.press}（由 {most.accuracy_other:.2f} 到 {most.accuracy:.2f}）"
    return text + (f"；这 {len(better)} 种里有 {len(still)} 种仍答不出一半。" if len(still) else "。")


def edge(keys: pd.DataFrame) -> str:
    """Of StreamingLLM, which looks at nothing but places."""
    keys = in_mode(of_one_storage(keys[keys["press"] == "streaming_llm"]), "问题在外")
    kept, gone = (keys[part]["correct"].astype(float) for part in (keys["digits_kept"] == 1, keys["digits_kept"] == 0))
    if kept.empty or gone.empty:
        raise Missing("recall", "数字全部留下与全部淘汰的提问")
    return (
        f"StreamingLLM 只看位置，正可用来检查测法：数字全部留下的 {len(kept)} 次提问答对 {kept.mean():.0%}，"
        f"全部淘汰的 {len(gone)} 次答对 {gone.mean():.0%}。"
    )


def deeper(keys: pd.DataFrame, presses=()) -> str:
    """Whether keys in the second half of a context are found more often than those in the first, over all ratios, of
    presses that are not about places: where the intervals part."""
    keys = by_depth(healthy(keys), "问题在外", presses)
    keys = there(kinds.methods(keys[keys["press"] != "streaming_llm"]), "不只看位置的 press")
    later, earlier = [], []
    for press, part in keys.groupby("press", sort=False):
        halves = [part[(part["depth"] >= 0.5) == is_later] for is_later in (False, True)]
        if not all(map(len, halves)):
            continue
        (low, high), (low_later, high_later) = (share_ci95(half["correct"], half["context"]) for half in halves)
        later += [press] if low_later > high else []
        earlier += [press] if high_later < low else []
    told = [
        f"{listed(names)} 更容易答对{words}的口令" for names, words in ((later, "后半"), (earlier, "前半")) if names
    ]
    if rest := keys["press"].nunique() - len(later) - len(earlier):
        told.append(f"{'其余' if told else '图里别的'} {rest} 种方法，口令藏在前半还是后半看不出差别")
    return f"{'；'.join(told)}（两半的区间不重叠才算有差别）。"


def copying(heads: pd.DataFrame) -> str:
    """Of the heads of one mode."""
    heads = of_one_storage(heads)
    every, reading = heads[heads["press"] == "no_press"], copying_heads(heads)
    if reading.empty:
        return f"{len(every)} 个头里没有抄写的头（{RULE}）：最高的也只有 {every['copy_attention'].max():.2f}。"
    share = reading["copy_attention"].sum() / every["copy_attention"].sum()
    in_layers = reading.groupby("layer").size()
    where = listed([f"第 {layer} 层 {n} 个" for layer, n in in_layers.items()])
    return (
        f"{len(every)} 个头里，只有 {len(reading)} 个在读数字（{where}）：它们{RULE}，合占全部抄写注意力的 "
        f"{share:.0%}。下文称这样的头为**抄写的头**。"
    )


def correlated(runs: pd.DataFrame, mode: str) -> str:
    """Whether accuracy goes with the digits kept, or with those kept where they are read; over presses, all runs of one
    drawn together."""
    told = with_digits(runs, mode)
    ranks = {name: rank_correlation(told["accuracy"], told[name]) for name in KEPT}
    if any(map(pd.isna, ranks.values())):
        raise Missing("recall", "准确率与保留的比例都有高低的几次运行")
    drawn = {name: drawn_rank_correlations(told["accuracy"], told[name], groups=told["press"]) for name in KEPT}
    parts = [f"与“{words}”的秩相关是 {ranks[name]:.2f}{_between(drawn[name])}" for name, words in KEPT.items()]
    counted = kinds.methods(told)["press"].nunique()
    control = "连同随机淘汰" if counted < told["press"].nunique() else ""
    text = f"{mode}，{counted} 种方法{control}的 {len(told)} 次运行里，准确率{'，'.join(parts)}"
    whole, where = drawn.values()
    low, high = interval_of(where - whole)
    if pd.isna(low):
        return f"{text}；方法太少，没有区间。"
    text += f"；后者减前者是 {ranks['digits_kept_where_read'] - ranks['digits_kept']:.2f}{_between(where - whole)}。"
    if low > 0:
        return text + "准确率更跟着关键处留下多少走，而不是总共留下多少。"
    return text + ("准确率更跟着总共留下多少走。" if high < 0 else "两者哪个说得更准，这些方法定不下来。")


def _between(drawn) -> str:
    low, high = interval_of(drawn)
    return "" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]"


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

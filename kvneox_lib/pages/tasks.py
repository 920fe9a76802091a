"""What is said and shown of tasks: the runs of study `tasks`, one for each task, press, ratio, and place of the
question."""

from functools import partial

import pandas as pd

from kvneox_lib.measures.intervals import holm
from kvneox_lib.pages import kinds
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.ranks import kendall
from kvneox_lib.pages.report import found_in
from kvneox_lib.pages.selecting import (
    bits_of,
    budget_column,
    middle_ratio,
    of_one_storage,
    pressed,
    storage_column,
    strength_axis,
)
from kvneox_lib.pages.words import listed, number, with_interval

MODES = {"outside": "问题在外", "inside": "问题在内"}
TASKS = {
    "kvneox_passkey": "口令",
    "kvneox_multikey": "几个口令",
    "kvneox_cloze": "末词（选择）",
    "kvneox_cloze_free": "末词（填空）",
    "kvneox_copy": "抄写",
}
RULES = {
    "context": "文档的 context 字段",
    "ruler": "最后一行之前",
    "fewshot": "最后一例之前",
    "passage": "引用的短文",
    "inside": "除最后一个词元",
    "none": "没有规则，除最后一个词元",
}


def named(task: str) -> str:
    return TASKS.get(task, task)


there = partial(found_in, "tasks")


def ordered(runs: pd.DataFrame) -> pd.DataFrame:
    """The tasks in the order of the table above, others after them."""
    places = {task: place for place, task in enumerate(TASKS)}
    return runs.sort_values(
        "dataset", key=lambda names: names.map(lambda name: places.get(name, len(places))), kind="stable"
    )


def in_mode(runs: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Those of one storage."""
    return there(ordered(of_one_storage(runs[runs["question"] == mode])), MODES[mode])


def modes_of(runs: pd.DataFrame) -> list[str]:
    return [mode for mode in MODES if (runs["question"] == mode).any()]


def by_task(runs: pd.DataFrame, mode: str) -> dict[str, pd.DataFrame]:
    """The runs with a ratio, or budget, by the task's name; the scores without a press go along, at all of these."""
    shown, (strength, _) = in_mode(runs, mode), strength_axis(runs)
    shown = shown[(shown["press"] == "no_press") | shown[strength].notna()]
    panels = {named(task): _with_baseline_line(part, strength) for task, part in shown.groupby("dataset", sort=False)}
    return there(panels, "有压缩率的 press")


def _with_baseline_line(part: pd.DataFrame, strength: str) -> pd.DataFrame:
    """The score without a press as a line over all ratios or budgets."""
    bare, compressed = (part[(part["press"] == "no_press") == is_bare] for is_bare in (True, False))
    values = sorted(compressed[strength].unique())
    line = pd.concat([bare.assign(**{strength: value}) for value in values]) if values else bare
    return pd.concat([line, compressed])


def at_middle_ratio(runs: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Scores, a row for each press and a column for each task, as they are without a press first."""
    chosen, ratio = healthy(in_mode(runs, mode)), middle_ratio(runs)
    chosen = chosen[(chosen["press"] == "no_press") | (chosen["compression_ratio"] == ratio)]
    table = chosen.pivot_table(index="press", columns="dataset", values="score", sort=False).rename(columns=named)
    best_first = table.mean(axis=1).sort_values(ascending=False).index
    names = [*(name for name in best_first if name == "no_press"), *(name for name in best_first if name != "no_press")]
    return there(table.loc[names], f"压缩率 {ratio}")


def inside_against_outside(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each task the presses' scores with the question outside and inside, at every ratio; no degenerate runs."""
    keys = ["dataset", "press", "compression_ratio"]
    runs = pressed(ordered(healthy(of_one_storage(runs))))
    outside, inside = (runs[runs["question"] == mode].set_index(keys)["score"] for mode in MODES)
    both = pd.concat([outside, inside], axis=1, keys=["outside", "inside"]).dropna().reset_index()
    return there(
        {named(task): part for task, part in both.groupby("dataset", sort=False)}, "问题在外与在内都测过的方法"
    )


def beside_others(runs: pd.DataFrame, others: dict[str, pd.Series], ratio: float) -> pd.DataFrame:
    """At a ratio a row for each press: the scores of the tasks, question outside, and what other studies say of it."""
    chosen = healthy(in_mode(runs, "outside"))
    chosen = there(chosen[chosen["compression_ratio"] == ratio], f"压缩率 {ratio:g}")
    scores = chosen.pivot_table(index="press", columns="dataset", values="score", sort=False).rename(columns=named)
    return pd.concat([scores, *(other.rename(name) for name, other in others.items())], axis=1).reindex(scores.index)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _changed(runs: pd.DataFrame) -> pd.Series:
    """Not the cache as it is."""
    return (runs["press"] != "no_press") | bits_of(runs).notna()


def corrected(runs: pd.DataFrame) -> pd.Series:
    """McNemar's p by run, corrected for all that are shown."""
    p = pd.to_numeric(runs["mcnemar_p"]).where(_changed(runs))
    return pd.Series(holm(p.to_numpy(dtype=float)), runs.index)


def correction(runs: pd.DataFrame) -> str:
    """Over how many."""
    found = corrected(runs).dropna()
    if found.empty:
        return ""
    return (
        f"表里有 {len(found)} 个 McNemar p，校正后的 p 按 Holm 法对它们一起校正，"
        f"小于 0.05 的有 {(found < 0.05).sum()} 个。"
    )


def score_table(runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (_, row), changed, p in zip(runs.iterrows(), _changed(runs), corrected(runs)):
        rows.append(
            {
                "任务": named(row["dataset"]),
                "用法": MODES[row["question"]],
                "press": row["press"],
                "压缩率": number(row["compression_ratio"], ".2f"),
                "指标": row["metric"],
                "得分": with_interval(row, "score", 2),
                "与不压缩之差": with_interval(row, "delta_score", 2) if changed else "—",
                "McNemar p": number(row["mcnemar_p"], ".2g") if changed else "—",
                "校正后的 p": number(p, ".2g"),
            }
        )
    table = pd.DataFrame(rows)
    for name, column in {**budget_column(runs), **storage_column(runs)}.items():
        table.insert(list(table).index("指标"), name, column)
    return table


def prompt_table(runs: pd.DataFrame) -> pd.DataFrame:
    """How the prompts of each task were split, from the runs that compress."""
    rows, strength = [], strength_axis(runs)[0]
    compressed = ordered(runs[(runs["press"] != "no_press") & runs[strength].notna()])
    for (task, mode), part in compressed.groupby(["dataset", "question"], sort=False):
        first = part.iloc[0]
        rules = [word.partition("=")[0] for word in first["context_rule"].split()]
        rows.append(
            {
                "任务": named(task),
                "用法": MODES[mode],
                "篇数": f"{first['n_documents']:.0f}",
                "提示的词元": f"{first['prompt_tokens']:.0f}",
                "参与压缩": f"{first['compressed_share']:.0%}",
                "上下文到哪里": listed(RULES.get(rule, rule) for rule in rules),
                "截短的篇数": f"{part['n_cut'].max():.0f}",
                "太短、未压缩的篇数": f"{part['n_not_compressed'].max():.0f}",
            }
        )
    return there(pd.DataFrame(rows), "有压缩率的 press")


def published_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Table `scores` of the runs without a press, where the model's own authors have published theirs."""
    known = scores.dropna(subset=["published"]) if "published" in scores else scores.iloc[:0]
    known = known.drop_duplicates(["dataset", "metric", "filter"])
    return pd.DataFrame(
        {
            "任务": known["dataset"],
            "指标": known["metric"],
            "测得": [f"{row.value:.4f} ± {row.stderr:.4f}" for row in known.itertuples()],
            "EleutherAI 公布": [f"{row.published:.4f} ± {row.published_stderr:.4f}" for row in known.itertuples()],
        }
    )


# ---- sentences ------------------------------------------------------------------------------------------------------


def plain(runs: pd.DataFrame) -> str:
    bare = there(ordered(of_one_storage(runs[runs["press"] == "no_press"])).drop_duplicates("dataset"), "no_press")
    parts = [f"{named(row['dataset'])} {with_interval(row, 'score', 2)}" for _, row in bare.iterrows()]
    return f"不压缩时的得分：{'，'.join(parts)}。"


def harmed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of one storage that score clearly less than no compression: by McNemar's p, corrected for all of them
    together, or by the interval where documents are not independent. Degenerate runs are not judged."""
    runs = pressed(healthy(of_one_storage(runs)))
    p, high = corrected(runs), pd.to_numeric(runs["delta_score_ci95_high"])
    return runs[(p < 0.05).where(p.notna(), high < 0) & (pd.to_numeric(runs["delta_score"]) < 0)]


def unharmed(runs: pd.DataFrame, mode: str) -> str:
    """At the middle ratio: in which tasks each press shows no harm; most are harmed in most tasks."""
    ratio = middle_ratio(runs)
    of_ratio = in_mode(pressed(healthy(runs)), mode)
    of_ratio = kinds.methods(of_ratio[of_ratio["compression_ratio"] == ratio])
    whole = of_ratio.drop(harmed(in_mode(runs, mode)).index, errors="ignore")
    tasks = there(of_ratio, f"压缩率 {ratio}")["dataset"].map(named).unique()
    n_presses = of_ratio["press"].nunique()
    by_press = whole.groupby("press", sort=False)["dataset"].agg(lambda names: tuple(map(named, names)))
    all_whole = by_press.index[by_press.map(len) == len(tasks)]
    text = (
        f"压缩率 {ratio:g} 时，{n_presses} 种方法里，各项任务都看不出变差的有 {listed(all_whole)}"
        "（与不压缩在同样的文档上成对比较，McNemar 检验，按 Holm 法一起校正）"
    )
    some = by_press.drop(all_whole)
    parts = [
        f"{listed(part.index)} 只在{'、'.join(names)}上" for names, part in some.groupby(some, sort=False) if names
    ]
    if parts:
        text += f"；{'，'.join(parts)}看不出变差"
    n_rest = n_presses - len(by_press)
    return text + (f"；其余 {n_rest} 种各项都明确变差。" if n_rest else "。")


def gained(runs: pd.DataFrame) -> str:
    """What it is worth to see the question."""
    parts = []
    for task, both in inside_against_outside(runs).items():
        mean = (both["inside"] - both["outside"]).groupby(both["press"]).mean().sort_values()
        parts.append(f"{task}平均 {mean.mean():+.2f}（最多的是 {mean.index[-1]}，{mean.iloc[-1]:+.2f}）")
    return f"压缩时看得到问题，得分的变化（各压缩率平均）：{'；'.join(parts)}。"


# ---- beside recall and perplexity -----------------------------------------------------------------------------------

RECALL, LOSSES = "口令检索", {"pg19_ppl": "长书的损失", "wikitext_ppl": "短文的损失"}


def others_at(recall: pd.DataFrame, losses: dict[str, pd.DataFrame], ratio: float) -> dict[str, pd.Series]:
    """By press: recall with the question outside, and what compression costs in perplexity."""
    recall = healthy(of_one_storage(recall))
    losses = {study: healthy(of_one_storage(runs)) for study, runs in losses.items()}
    outside = recall[~recall["query_aware"].astype(bool) & (recall["compression_ratio"] == ratio)]
    found = {RECALL: outside.set_index("press")["accuracy"]}
    for study, runs in losses.items():
        found[LOSSES[study]] = runs[runs["compression_ratio"] == ratio].set_index("press")["delta_nll"]
    return found


def taus(runs: pd.DataFrame, recall: pd.DataFrame, losses: dict[str, pd.DataFrame], ratio: float) -> dict:
    """(task, other measure): Kendall's tau between the orders of the presses, its interval, and how many there are. A
    small loss is good, so that its sign is turned."""
    table = beside_others(runs, others_at(recall, losses, ratio), ratio)
    others = [name for name in table if name in (RECALL, *LOSSES.values())]
    tasks = [name for name in table if name not in others]
    pairs = [(one, other) for other in others for one in tasks]
    pairs += [(RECALL, other) for other in others if other != RECALL]
    return {(one, other): kendall(table[one], table[other] * (1 if other == RECALL else -1)) for one, other in pairs}


def agreement(runs: pd.DataFrame, recall: pd.DataFrame, losses: dict[str, pd.DataFrame], ratios) -> pd.DataFrame:
    rows = {}
    for ratio in ratios:
        for pair, (tau, low, high, _) in taus(runs, recall, losses, ratio).items():
            text = "—" if pd.isna(tau) else f"{tau:+.2f} [{low:+.2f}, {high:+.2f}]"
            rows.setdefault(pair, {"比较": "，".join(pair)})[f"压缩率 {ratio:g}"] = text
    return there(pd.DataFrame(rows.values()), "与检索、困惑度共有的方法")


def agreeing(runs: pd.DataFrame, recall: pd.DataFrame, losses: dict[str, pd.DataFrame], ratios) -> str:
    """With which other measures each task agrees beyond its interval, at all of these ratios."""
    found = [taus(runs, recall, losses, ratio) for ratio in ratios]
    n_pairs, by_task = len(found[0]), {}
    for one, other in (pair for pair in found[0] if all(of.get(pair, (0, 0))[1] > 0 for of in found)):
        by_task.setdefault(one, []).append(other)
    parts = [f"{one}与{'、'.join(others)}" for one, others in by_task.items()]
    said = "、".join(f"{ratio:g}" for ratio in ratios)
    if not parts:
        return f"{n_pairs} 对里，没有一对的区间在压缩率 {said} 上都在零以上。"
    n_sure = sum(map(len, by_task.values()))
    return f"{n_pairs} 对里，区间在压缩率 {said} 上都在零以上的有 {n_sure} 对：{'；'.join(parts)}。"

"""What is said and shown of tasks: the runs of study `tasks`, one for each task, press, ratio, and place of the
question."""

import pandas as pd

from kvneox_lib.pages.report import Missing
from kvneox_lib.pages.selecting import middle_ratio, pressed
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


def there(found, what: str):
    """`found`, if there is anything in it."""
    if not len(found):
        raise Missing("tasks", what)
    return found


def in_mode(runs: pd.DataFrame, mode: str) -> pd.DataFrame:
    return there(runs[runs["question"] == mode], MODES[mode])


def modes_of(runs: pd.DataFrame) -> list[str]:
    return [mode for mode in MODES if (runs["question"] == mode).any()]


def by_task(runs: pd.DataFrame, mode: str) -> dict[str, pd.DataFrame]:
    """The runs with a ratio, by the task's name; the scores without a press go along, at ratio 0."""
    shown = in_mode(runs, mode)
    shown = shown[(shown["press"] == "no_press") | shown["compression_ratio"].notna()]
    panels = {named(task): _with_baseline_line(part) for task, part in shown.groupby("dataset", sort=False)}
    return there(panels, "有压缩率的 press")


def _with_baseline_line(part: pd.DataFrame) -> pd.DataFrame:
    """The score without a press as a line over all ratios."""
    bare, compressed = part[part["press"] == "no_press"], pressed(part)
    ratios = sorted(compressed["compression_ratio"].unique())
    line = pd.concat([bare.assign(compression_ratio=ratio) for ratio in ratios]) if ratios else bare
    return pd.concat([line, compressed])


def at_middle_ratio(runs: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Scores, a row for each press and a column for each task, as they are without a press first."""
    chosen = in_mode(runs, mode)
    ratio = middle_ratio(runs)
    chosen = chosen[(chosen["press"] == "no_press") | (chosen["compression_ratio"] == ratio)]
    table = chosen.pivot_table(index="press", columns="dataset", values="score", sort=False)
    return there(table.rename(columns=named, index={"no_press": "不压缩"}), f"压缩率 {ratio}")


def inside_against_outside(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each task the presses' scores with the question outside and inside, at every ratio."""
    keys = ["dataset", "press", "compression_ratio"]
    outside, inside = (pressed(runs[runs["question"] == mode]).set_index(keys)["score"] for mode in MODES)
    both = pd.concat([outside, inside], axis=1, keys=["outside", "inside"]).dropna().reset_index()
    return there(
        {named(task): part for task, part in both.groupby("dataset", sort=False)}, "问题在外与在内都测过的方法"
    )


# ---- tables ---------------------------------------------------------------------------------------------------------


def score_table(runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for _, row in runs.iterrows():
        compressed = row["press"] != "no_press"
        rows.append(
            {
                "任务": named(row["dataset"]),
                "用法": MODES[row["question"]],
                "press": row["press"],
                "压缩率": number(row["compression_ratio"], ".2f"),
                "指标": row["metric"],
                "得分": with_interval(row, "score", 2),
                "与不压缩之差": with_interval(row, "delta_score", 2) if compressed else "—",
                "McNemar p": number(row["mcnemar_p"], ".2g") if compressed else "—",
            }
        )
    return pd.DataFrame(rows)


def prompt_table(runs: pd.DataFrame) -> pd.DataFrame:
    """How the prompts of each task were split, from the runs that compress."""
    rows = []
    for (task, mode), part in pressed(runs).groupby(["dataset", "question"], sort=False):
        first = part.iloc[0]
        rules = [word.partition("=")[0] for word in first["context_rule"].split()]
        rows.append(
            {
                "任务": named(task),
                "用法": MODES[mode],
                "文档": f"{first['n_documents']:.0f}",
                "提示的词元": f"{first['prompt_tokens']:.0f}",
                "参与压缩": f"{first['compressed_share']:.0%}",
                "上下文到哪里": listed(RULES.get(rule, rule) for rule in rules),
                "截短的": f"{first['n_cut']:.0f}",
                "太短而未压缩的": f"{part['n_not_compressed'].max():.0f}",
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
    bare = there(runs[runs["press"] == "no_press"].drop_duplicates("dataset"), "no_press")
    parts = [f"{named(row['dataset'])} {with_interval(row, 'score', 2)}" for _, row in bare.iterrows()]
    return f"不压缩时的得分：{'，'.join(parts)}。"


def unharmed(runs: pd.DataFrame, mode: str) -> str:
    """Which presses lose nothing that these documents show, of each task at the middle ratio."""
    ratio, parts = middle_ratio(runs), []
    for task, part in in_mode(pressed(runs), mode).groupby("dataset", sort=False):
        at = part[part["compression_ratio"] == ratio]
        whole = at[pd.to_numeric(at["delta_score_ci95_high"]) >= 0]
        parts.append(f"{named(task)}，{listed(whole.sort_values('score', ascending=False)['press'], '一个也没有')}")
    return f"{MODES[mode]}，压缩率 {ratio:.2f}，与不压缩的差的区间碰到零的：{'；'.join(parts)}。"


def gained(runs: pd.DataFrame) -> str:
    """What it is worth to see the question."""
    parts = []
    for task, both in inside_against_outside(runs).items():
        mean = (both["inside"] - both["outside"]).groupby(both["press"]).mean().sort_values()
        parts.append(f"{task}平均 {mean.mean():+.2f}（最多的是 {mean.index[-1]}，{mean.iloc[-1]:+.2f}）")
    return f"压缩时看得到问题，得分的变化（各压缩率平均）：{'；'.join(parts)}。"

"""Tasks on the same documents: each press beside evicting at random, and with the question inside beside outside."""

import pandas as pd

from kvneox_lib.pages import kinds, paired
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.report import Records
from kvneox_lib.pages.selecting import middle_ratio, of_one_storage, pressed
from kvneox_lib.pages.tasks import MODES, in_mode, named, ordered, there
from kvneox_lib.pages.words import listed, number


def against_random(records: Records, ratio: float, mode: str = "outside") -> pd.DataFrame:
    """Each press beside evicting at random, in each task; judged together."""
    runs = in_mode(pressed(records.runs()), mode)
    pairs = paired.beside(runs[runs["compression_ratio"] == ratio], "random", ["dataset"])
    return there(ordered(paired.judged(there(pairs, "random"), [records])), "与 random 可以配对的 press")


def random_table(records: Records, ratio: float) -> pd.DataFrame:
    bare = records.runs(press="no_press").drop_duplicates("dataset").set_index("dataset")["score"]
    rows = []
    for task, part in against_random(records, ratio).groupby("dataset", sort=False):
        known = {"任务": named(task), "不压缩": number(bare.get(task), ".2f")}
        rows.append(known | {"随机淘汰": f"{part['score_other'].iloc[0]:.2f}"} | paired.by_verdict(part))
    return pd.DataFrame(rows)


def told_apart(records: Records, ratio: float) -> str:
    """In which tasks presses are better or worse than evicting at random."""
    found = against_random(records, ratio)
    told = (found["verdict"] != paired.LEVEL).groupby(found["dataset"].map(named), sort=False)
    parts = [f"{task} {len(part)} 种方法里 {part.sum()} 种" for task, part in told]
    few = [task for task, part in told if part.mean() < 0.5]
    return f"与随机淘汰分得出高下的，{'，'.join(parts)}。" + (
        f"分得出的少（{listed(few)}），或是随机淘汰也没有损失多少，这项任务不在乎留下的是什么；"
        "或是大家一样差。是哪一种，看它与不压缩差多少。"
        if few
        else ""
    )


def stands(records: Records, press: str, ratio: float, mode: str) -> str:
    """Where one press is better than evicting at random, and where worse."""
    found = against_random(records, ratio, mode)
    found = there(found[found["press"] == press], press).assign(task=lambda table: table["dataset"].map(named))
    words = {paired.BETTER: "明确好于", paired.WORSE: "明确差于", paired.LEVEL: "分不出高下"}
    parts = []
    for verdict, said in words.items():
        part = found[found["verdict"] == verdict]
        if len(part):
            scores = [f"{row.task}（{row.score:.2f} 对 {row.score_other:.2f}）" for row in part.itertuples()]
            parts.append(f"{said}{'的是' if verdict == paired.LEVEL else '随机淘汰的是'}{listed(scores)}")
    return f"{MODES[mode]}、压缩率 {ratio:g} 时，{press} {'，'.join(parts)}。"


def seeing_the_question(records: Records) -> pd.DataFrame:
    """Each press with the question inside beside the same with it outside, in each task at the middle ratio."""
    runs = pressed(ordered(healthy(of_one_storage(records.runs()))))
    runs = runs[runs["compression_ratio"] == middle_ratio(runs)]
    inside, outside = (there(runs[runs["question"] == mode], MODES[mode]) for mode in ("inside", "outside"))
    pairs = inside.merge(outside, on=["dataset", "press"], suffixes=("", "_other"))
    return there(ordered(paired.judged(pairs, [records])), "问题在外与在内都测过的方法")


def seeing_in_words(records: Records) -> str:
    parts = []
    found = kinds.methods(seeing_the_question(records))
    for task, part in found.groupby("dataset", sort=False):
        better, worse = (paired.names(part, verdict) for verdict in (paired.BETTER, paired.WORSE))
        parts.append(
            f"{named(task)} {len(part)} 种方法里更好的 {len(better)} 种、更差的 {len(worse)} 种"
            + (f"（{listed(worse)}）" if worse else "")
        )
    ratio = found["compression_ratio"].iloc[0]
    text = f"压缩率 {ratio:g} 时，看得到问题之后明确变化的（同样的文档{paired.HOW}）：{'；'.join(parts)}。"
    better = found[found["verdict"] == paired.BETTER]
    if better.empty:
        return text
    most = better.loc[better["ahead"].idxmax()]
    task = named(most["dataset"])
    return f"{text}获益最多的是 {most.press} 在{task}上，由 {most.score_other:.2f} 到 {most.score:.2f}。"

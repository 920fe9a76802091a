"""What is said and shown of the words in which recall is told and asked for, and of how many numbers stand beside each
other: runs of study `recall` in several wordings, or with more to tell apart. All with the question outside.
"""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from kvneox_lib.inputs.templates import DEMO, TEMPLATES, WORDINGS
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.report import Missing, Records, read, say, settings
from kvneox_lib.pages.retrieval import copying_heads, in_mode
from kvneox_lib.pages.selecting import middle_ratio, of_one_crowd, of_one_storage, of_one_wording, pressed
from kvneox_lib.pages.words import listed, with_interval

OUTSIDE, PLAIN = "问题在外", "不压缩"
TRAINED = {True: "训练过", False: "未训练"}
NAMED = {DEMO: "随包附带的模型", WORDINGS: f"模型 {WORDINGS}"}
EXAMPLE = {"name": "Belmora", "digits": "48213"}
SEVERAL = "几种说法的运行"


# ---- which runs -----------------------------------------------------------------------------------------------------


def as_usual(records: Records) -> Records:
    """For pages that are about something else: those in one wording."""
    return replace(records, frame=of_one_wording(records.frame).reset_index(drop=True))


def read_as_usual(root=None) -> Records:
    """The same of the setting of `recall` that has most of these: there may be more runs in many wordings of fewer
    keys."""
    found = map(as_usual, settings("recall", root))
    return max(found, key=lambda records: len(records.frame), default=read("recall", root))


def of_each_model(root=None) -> list[Records]:
    """Of each model the runs of study `recall` in the setting that was asked in most wordings, of those with several;
    where there are none, the runs there are."""
    most: dict[str, Records] = {}
    for records in settings("recall", root):  # those with most runs come first
        n, model = len(wordings_in(records.frame)), records.run()["model"]
        if n > 1 and n > (len(wordings_in(most[model].frame)) if model in most else 0):
            most[model] = records
    return [*most.values()] or [read("recall", root)]


def told_of_each(several: list[Records], sentence: Callable[[pd.DataFrame], str]) -> str:
    """Model by model; what is missing in all, once."""
    return "".join(dict.fromkeys(say(_told, sentence, records) for records in several))


def _told(sentence: Callable[[pd.DataFrame], str], records: Records) -> str:
    return sentence(records.runs())


def with_crowds(several: list[Records]) -> Records:
    """The first in which the numbers beside each other differ."""
    for records in several:
        try:
            crowd_lines(records.runs())
        except Missing:
            continue
        return records
    return several[0]


def wordings_in(runs: pd.DataFrame) -> list[str]:
    """In the order of their table. Before there was a choice all runs were in the first."""
    names = runs["template"].unique() if "template" in runs else [next(iter(TEMPLATES))]
    return [name for name in TEMPLATES if name in names]


def in_several(runs: pd.DataFrame) -> pd.DataFrame:
    """Those that differ in the wording, the press and the ratio alone, where there are several wordings."""
    runs = in_mode(of_one_storage(runs), OUTSIDE)
    if len(wordings_in(runs)) < 2:
        raise Missing("recall", SEVERAL)
    alike = [of_one_wording(part) for _, part in of_one_crowd(runs).groupby("template", sort=False)]
    found = pd.concat(alike)
    asked = found.groupby(["press", "compression_ratio"], dropna=False)["template"].transform("nunique")
    found = found[(asked == asked.max()) | (found["press"] == "no_press")]  # the others were asked in one or two
    return found.sort_values("template", key=lambda names: names.map([*TEMPLATES].index), kind="stable")


def _ours(runs: pd.DataFrame) -> str | None:
    """The model, where it is one of which it is known what it has read."""
    names = set(runs["model"])
    return names.pop() if len(names) == 1 and names <= {DEMO, WORDINGS} else None


def was_trained(model: str, name: str) -> bool:
    return model in TEMPLATES[name].trained


def _groups(runs: pd.DataFrame) -> dict[str, list[str]]:
    """The wordings in it, apart by whether the model was trained on them, where that is known."""
    names, model = wordings_in(runs), _ours(runs)
    if model is None:
        return {"": names}
    parts = {words: [name for name in names if was_trained(model, name) == known] for known, words in TRAINED.items()}
    return {words: part for words, part in parts.items() if part}


# ---- what the wordings are ------------------------------------------------------------------------------------------


def statement(name: str) -> str:
    return TEMPLATES[name].statement.strip().format(**EXAMPLE)


def wording_table(*several: pd.DataFrame) -> pd.DataFrame:
    """`several` are the runs of a model each."""
    asked = [set(wordings_in(runs)) for runs in several]
    names = [name for name in TEMPLATES if any(name in of_one for of_one in asked)]
    table = pd.DataFrame({"说法": names, "句子": map(statement, names)})
    table["问题"] = [" ".join(TEMPLATES[name].asked(EXAMPLE["name"]).split()) for name in names]
    for model in filter(None, map(_ours, several)):
        table[model] = [TRAINED[was_trained(model, name)] for name in names]
    return table


def known(runs: pd.DataFrame) -> str:
    """Which wordings the figures are of, and whether the model was trained on them."""
    names = wordings_in(runs)
    told = (
        f"口令的说法是 {names[0]}（“{statement(names[0])}”）"
        if len(names) == 1
        else f"口令有 {len(names)} 种说法（{listed(names)}）"
    )
    if _ours(runs) is None:
        return f"{told}；这个模型不是为口令训练的，读没读过这样的句子，无从知道。"
    parts = [
        f"{listed(part)} 是{_read(words)}" if len(names) > 1 else f"它是{_read(words)}"
        for words, part in _groups(runs).items()
    ]
    return f"{told}；对{NAMED[_ours(runs)]}，{'，'.join(parts)}。"


def _read(words: str) -> str:
    return "训练时读过的" if words == TRAINED[True] else "训练时没有读过的"


def trained_on() -> str:
    """Of the bundled model."""
    seen, kept_out = ([name for name in TEMPLATES if was_trained(DEMO, name) == part] for part in (True, False))
    return (
        f"口令的说法，它训练时读过 {len(seen)} 种（{listed(seen)}），其余 {len(kept_out)} 种没有读过"
        f"（{listed(kept_out)}）。"
    )


# ---- accuracy by wording --------------------------------------------------------------------------------------------


def grids(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each ratio the accuracy by wording (down) and press (across, without any first); without a ratio that alone.
    The names say which model it is."""
    found = in_several(runs)
    named, labels = f"{_model(found)}，", _labels(found)
    ratios = sorted(pressed(found)["compression_ratio"].unique())
    if not ratios:
        return {f"{named}{PLAIN}": _grid(found, None).rename(index=labels)}
    return {f"{named}压缩率 {ratio:g}": _grid(found, ratio).rename(index=labels) for ratio in ratios}


def _model(runs: pd.DataFrame) -> str:
    return listed(runs["model"].unique())


def _grid(found: pd.DataFrame, ratio: float | None, value: str = "accuracy") -> pd.DataFrame:
    chosen = found[(found["press"] == "no_press") | (found["compression_ratio"] == ratio)]
    names = [name for part in _groups(found).values() for name in part]
    table = chosen.pivot_table(index="template", columns="press", values=value).reindex(names)
    presses = [name for name in ("no_press", *dict.fromkeys(pressed(found)["press"])) if name in table]
    return table[presses].rename(columns={"no_press": PLAIN})


def _labels(runs: pd.DataFrame) -> dict[str, str]:
    return {name: f"{name}{words and f'（{words}）'}" for words, part in _groups(runs).items() for name in part}


def wording_intervals(*several: pd.DataFrame) -> pd.DataFrame:
    """The accuracy of each wording at the middle ratio, with its interval; `several` are the runs of a model each."""
    return pd.concat([_wording_intervals(runs) for runs in several], ignore_index=True).fillna("—")


def _wording_intervals(runs: pd.DataFrame) -> pd.DataFrame:
    found = in_several(runs)
    ratio, labels, model = middle_ratio(found), _labels(found), _model(found)
    rows = []
    for name, label in labels.items():
        part = found[found["template"] == name]
        shown = part[(part["press"] == "no_press") | (part["compression_ratio"] == ratio)]
        cells = {row["press"]: with_interval(row, "accuracy", 2) for _, row in shown.iterrows()}
        rows.append({"模型": model, "说法": label, PLAIN: cells.pop("no_press", "—"), **cells})
    return pd.DataFrame(rows)


def by_training(runs: pd.DataFrame) -> str:
    """Without a press: means over the wordings that were trained and over those that were not."""
    found = in_several(runs)
    table = _grid(found, None)
    if PLAIN not in table:
        raise Missing("recall", "no_press")
    bare = table[PLAIN].dropna()
    known = {words: bare[bare.index.isin(part)] for words, part in _groups(found).items()}
    told = [f"{words and f'{words}的 '}{len(part)} 种{_mean(part)}" for words, part in known.items() if len(part)]
    return f"{_model(found)} 不压缩时各种说法的准确率，{'，'.join(told)}。"


def _mean(values: pd.Series) -> str:
    if len(values) == 1:
        return f"是 {values.iloc[0]:.2f}"
    return f"平均 {values.mean():.2f}（{values.min():.2f} 至 {values.max():.2f}）"


def of_the_best(runs: pd.DataFrame) -> str:
    """Whether the press that is best in the first wording is so in the others, of those that the model can answer; and
    where it loses what the model answers without a press."""
    found = healthy(in_several(runs))
    ratio = middle_ratio(found)
    table, low, high = (_grid(found, ratio, f"accuracy{end}") for end in ("", "_ci95_low", "_ci95_high"))
    if PLAIN not in table:
        raise Missing("recall", "no_press")
    first, plain = table.index[0], table.pop(PLAIN)
    if table.shape[1] < 2 or not plain[first] >= 0.5:
        raise Missing("recall", f"{first} 的几种方法")
    best, others = table.loc[first].idxmax(), table.index[1:]
    text = f"{_model(found)} 在 {first} 上，压缩率 {ratio:g} 时最好的是 {best}（{table.loc[first, best]:.2f}）。"
    answered = [name for name in others if plain[name] >= 0.5]
    if answered:
        ahead = [name for name in answered if low.loc[name, best] > high.loc[name, table.columns.drop(best)].max()]
        text += (
            f"其余不压缩时答对一半以上的 {len(answered)} 种说法里，它在 {len(ahead)} 种上也是最好的"
            "（区间与别的方法不重叠）。"
        )
    else:
        text += "其余的说法，模型不压缩也答不对一半。"
    lost = [name for name in others if high.loc[name, best] < low.loc[name, PLAIN]]
    if not lost:
        return text
    level = [name for name in table if (high.loc[lost, name] >= low.loc[lost, PLAIN]).all()]
    level = [name for name in level if (low.loc[lost, name] <= high.loc[lost, PLAIN]).all()]
    text += f"但 {listed(lost)} 不压缩时答对 {_span(plain[lost])}，它只答对 {_span(table.loc[lost, best])}"
    return text + (f"，而 {listed(level)} 与不压缩分不出。" if level else "，别的方法也没有处处留得住的。")


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} 至 {high}"


def same_readers(several: list[Records]) -> str:
    """Model by model: whether the heads that read the digits are the same in all wordings, and what the press that is
    best in the first wording keeps where they read."""
    return "".join(dict.fromkeys(say(_same_readers, records) for records in several))


def _same_readers(records: Records) -> str:
    runs = in_several(records.runs())
    heads = records.table("heads", press="no_press", query_aware=False)
    reading = {
        name: set(zip(*copying_heads(heads[heads["template"] == name])[["layer", "head"]].to_numpy().T))
        for name in wordings_in(runs)
    }
    first, *others = reading.values()
    beyond = set().union(*others) - first
    text = f"{_model(runs)} 的 {len(reading)} 种说法里，读数字的"
    text += f"都在那 {len(first)} 个头之内。" if not beyond else f"除那 {len(first)} 个头外另有 {len(beyond)} 个。"
    return text + _kept_where_read(healthy(runs))


def _kept_where_read(runs: pd.DataFrame) -> str:
    """Of the best in the first wording, at the middle ratio, in the others."""
    if "digits_kept_where_read" not in runs:
        return ""
    ratio = middle_ratio(runs)
    table, kept = _grid(runs, ratio).drop(columns=PLAIN, errors="ignore"), _grid(runs, ratio, "digits_kept_where_read")
    best = table.iloc[0].idxmax()
    return (
        f"在第一种说法上最好的 {best}，压缩率 {ratio:g} 时在关键处留下数字的 {kept[best].iloc[0]:.0%}，"
        f"在其余说法上留下 {kept[best].iloc[1:].min():.0%} 至 {kept[best].iloc[1:].max():.0%}。"
    )


# ---- more to tell apart ---------------------------------------------------------------------------------------------


def crowds(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """In the first wording there is: the runs by how many keys and other numbers a context has, of the presses that
    were measured in all of these."""
    runs = in_mode(of_one_storage(runs), OUTSIDE)
    runs = runs[runs["template"] == wordings_in(runs)[0]] if "template" in runs and len(runs) else runs
    columns = [name for name in ("keys_per_context", "n_distractors") if name in runs]
    parts = {_crowd(dict(zip(columns, at))): part for at, part in runs.groupby(columns)} if columns else {}
    together = [set(map(tuple, part[["press", "compression_ratio"]].to_numpy())) for part in parts.values()]
    common = set.intersection(*together) if together else set()
    if len(parts) < 2 or not common:
        raise Missing("recall", "每段上下文里数字多少不同的运行")
    return {
        words: part[[pair in common for pair in map(tuple, part[["press", "compression_ratio"]].to_numpy())]]
        for words, part in parts.items()
    }


def _crowd(at: dict) -> str:
    more = at.get("n_distractors", 0)
    return f"每段 {at['keys_per_context']:.0f} 句" + (f"，另有 {more:.0f} 句不问" if more else "")


def crowd_lines(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The same without the baseline."""
    panels = {words: pressed(part) for words, part in crowds(runs).items()}
    if not all(map(len, panels.values())):
        raise Missing("recall", "有压缩率的 press")
    return panels


def crowded(runs: pd.DataFrame) -> str:
    """At the highest ratio: what becomes of the presses that find half of the keys in the first kind of contexts."""
    runs = healthy(runs)
    panels = crowds(runs)
    compressed = pd.concat(crowd_lines(runs).values())
    highest, least = compressed["compression_ratio"].max(), next(iter(panels))
    rows = {words: _at(part, highest) for words, part in panels.items()}
    finding = rows[least].index[(rows[least]["accuracy"] >= 0.5) & (rows[least].index != "no_press")]
    text = f"压缩率 {highest:g} 时，{least}，答对一半以上的有 {listed(finding)}。"
    fallen = [
        f"{words}，{press} 由 {rows[least].loc[press, 'accuracy']:.2f} 降到 {row.loc[press, 'accuracy']:.2f}"
        + (f"（不压缩 {row.loc['no_press', 'accuracy']:.2f}）" if "no_press" in row.index else "")
        for words, row in rows.items()
        for press in finding
        if row.loc[press, "accuracy_ci95_high"] < rows[least].loc[press, "accuracy_ci95_low"]
    ]
    if not len(finding):
        return text
    if not fallen:
        return f"{text}要分清的数字再多，也看不出它们变差。"
    return f"{text}要分清的数字多了，明确变差的（区间不重叠）：{'；'.join(fallen)}。"


def _at(part: pd.DataFrame, ratio: float) -> pd.DataFrame:
    return part[(part["press"] == "no_press") | (part["compression_ratio"] == ratio)].set_index("press")

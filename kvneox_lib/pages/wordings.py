"""What is said and shown of the words in which recall is told and asked for, and of how many numbers stand beside each
other: runs of study `recall` in several wordings, or with more to tell apart. All with the question outside.
"""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from kvneox_lib.inputs.templates import DEMO, TEMPLATES, WORDINGS
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.report import Missing, Records, read, say, settings
from kvneox_lib.pages.retrieval import in_mode
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


def _grid(found: pd.DataFrame, ratio: float | None) -> pd.DataFrame:
    chosen = found[(found["press"] == "no_press") | (found["compression_ratio"] == ratio)]
    names = [name for part in _groups(found).values() for name in part]
    table = chosen.pivot_table(index="template", columns="press", values="accuracy").reindex(names)
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
    """Means over the wordings that were trained and over those that were not, without a press and with each."""
    found = in_several(runs)
    ratio, groups = middle_ratio(found), _groups(found)
    table, text = _grid(healthy(found), ratio), f"{_model(found)}："
    bare = table.pop(PLAIN).dropna() if PLAIN in table else pd.Series(dtype=float)
    if len(bare):
        known = {words: bare[bare.index.isin(part)] for words, part in groups.items()}
        told = [f"{words and f'{words}的'} {len(part)} 种 {_mean(part)}" for words, part in known.items() if len(part)]
        text += f"各种说法准确率的平均（括号里是最低与最高），不压缩时{'，'.join(told)}。"
    if not table.shape[1]:
        return text
    means = pd.DataFrame({words: table.loc[part].mean() for words, part in groups.items()})
    means = means.sort_values(means.columns[0], ascending=False)
    parts = [
        f"{press} {'、'.join(f'{words}{_after(words)}{row[words]:.2f}' for words in means)}"
        for press, row in means.iterrows()
    ]
    return f"{text}压缩率 {ratio:g} 时：{'；'.join(parts)}。"


def _after(words: str) -> str:
    return "的 " if words else ""


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.2f}" + (f"（{values.min():.2f} 至 {values.max():.2f}）" if len(values) > 1 else "")


def of_the_best(runs: pd.DataFrame) -> str:
    """Whether the press that is best in the first wording is so in the others, of those that the model can answer."""
    found = in_several(runs)
    table = _grid(healthy(found), middle_ratio(found))
    if PLAIN not in table:
        raise Missing("recall", "no_press")
    first, plain = table.index[0], table.pop(PLAIN)
    answered = table[plain >= 0.5]
    if table.shape[1] < 2 or first not in answered.index:
        raise Missing("recall", f"{first} 的几种方法")
    best, others = table.loc[first].idxmax(), answered.drop(index=first)
    text = f"{_model(found)} 在 {first} 上最好的是 {best}（{table.loc[first, best]:.2f}）。"
    if others.empty:
        return f"{text}其余的说法，模型不压缩也答不对一半，比不出各方法的次序。"
    ahead = [name for name in others.index if others.loc[name].idxmax() == best]
    return (
        f"{text}其余不压缩时答对一半以上的 {len(others)} 种说法里，它在 {len(ahead)} 种上仍是最好的，"
        f"准确率 {others[best].min():.2f} 至 {others[best].max():.2f}。"
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
    parts, compressed = [], pd.concat(crowd_lines(runs).values())
    highest = compressed["compression_ratio"].max()
    for words, part in crowds(runs).items():
        shown = part[(part["press"] == "no_press") | (part["compression_ratio"] == highest)]
        shown = shown.sort_values("press", key=lambda names: names != "no_press", kind="stable")
        told = [f"{PLAIN if row.press == 'no_press' else row.press} {row.accuracy:.2f}" for row in shown.itertuples()]
        parts.append(f"{words}：{'、'.join(told)}")
    return (
        f"每段上下文里数字越多，越要分得清是谁的。{_model(compressed)} 在最高的压缩率 {highest:g} 时的准确率，"
        f"{'；'.join(parts)}。"
    )

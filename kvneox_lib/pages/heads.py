"""What is said and shown of the heads that copy, and of the trial that they are the cause: study `heads`."""

import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.causes import LEAST_ATTENTION, OF_THE_MOST
from kvneox_lib.pages import figures
from kvneox_lib.pages.report import Missing, Records, found_in, say, settings, sources
from kvneox_lib.pages.words import listed
from kvneox_lib.studies.heads import recall_of

GROUPS = {"copying": "抄写的头", "control": "同样多的别的头", "others": "其余全部头"}
DONE = {"dropped": "去掉", "kept": "留住", "lent": "借用"}
AS_IS = "原样"
NONE_COPY, ALL_COPY = "这个模型没有抄写的头，试验不做。", "这个模型的头全都抄写，没有别的头可以对照，试验不做。"


# ---- the trial ------------------------------------------------------------------------------------------------------


def tried(trial: pd.DataFrame) -> pd.DataFrame:
    """Table `trial`, a row for each run and condition: recall with its interval, and what was kept. All draws of
    control heads are one condition."""
    rows = []
    group = trial["heads"].str.replace(r" \d+$", "", regex=True)
    by = ["press", "compression_ratio", "digits", "group"]
    for names, part in trial.assign(group=group).groupby(by, sort=False, dropna=False):
        recall, low, high = recall_of(part)
        counted = {"n_keys": int(part["n_keys"].sum()), "n_draws": part["heads"].nunique()}
        kept = (part["kept_fraction"] * part["n_keys"]).sum() / part["n_keys"].sum()
        rows.append(dict(zip(by, names)) | {"value": recall, "low": low, "high": high, "kept": kept} | counted)
    table = found_in("heads", pd.DataFrame(rows), "表 trial")
    return table.sort_values("press", key=lambda press: press != "no_press", kind="stable", ignore_index=True)


def condition_in_words(row) -> str:
    return AS_IS if row.digits == "as_is" else f"{DONE[row.digits]}：{GROUPS[row.group]}"


def asked_of(trial: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The conditions that answer a question, of each press at its highest ratio. Whether heads are necessary is asked
    where keys are found: digits are taken away. Whether they are sufficient, where they are not: digits are given, or
    what another press keeps."""
    table = _hardest(tried(trial))
    own = table[table["digits"] == "as_is"].set_index("press")["value"]
    finds = table["press"].map(own) >= 0.5
    panels = {
        "必要吗：去掉数字": table[finds & table["digits"].isin(["as_is", "dropped"])],
        "充分吗：放回数字": table[~finds & table["digits"].isin(["as_is", "kept", "lent"])],
    }
    return {title: part for title, part in panels.items() if len(part)}


def trial_table(trial: pd.DataFrame) -> pd.DataFrame:
    table = pd.concat(asked_of(trial).values())
    return pd.DataFrame(
        {
            "press": [_press_in_words(row) for row in table.itertuples()],
            "每个头里": [condition_in_words(row) for row in table.itertuples()],
            "准确率": [_share(row) for row in table.itertuples()],
            "提问数": table["n_keys"],
            "抽签次数": [row.n_draws if row.group == "control" else "" for row in table.itertuples()],
            "实际保留": table["kept"].map("{:.3f}".format),
        }
    )


def trial_bars(trial: pd.DataFrame) -> Figure:
    panels = {}
    for title, table in asked_of(trial).items():
        bar = [condition_in_words(row) for row in table.itertuples()]
        panels[title] = table.assign(bar=bar, group=[_press_in_words(row) for row in table.itertuples()])
    return figures.bar_panels(panels, xlabel="口令准确率", share=True)


def _hardest(table: pd.DataFrame) -> pd.DataFrame:
    last = table.groupby("press")["compression_ratio"].transform("max")
    return table[(table["compression_ratio"] == last) | table["compression_ratio"].isna()]


def _press_in_words(row) -> str:
    if row.press == "no_press":
        return "不压缩"
    return f"{row.press}{_ratio(row)}"


def _ratio(row) -> str:
    return "" if pd.isna(row.compression_ratio) else f" {row.compression_ratio:g}"


def found(heads: pd.DataFrame) -> str:
    """Which heads copy, by the keys on which they were looked for, and whether others tell the same."""
    copying = heads[heads["copies"].astype(bool)]
    rule = f"说出数字时投给该数字的注意力不低于 {LEAST_ATTENTION:g}，也不低于最高者的 {OF_THE_MOST:.0%}"
    if copying.empty:
        most = heads["copy_attention"].max()
        return f"按“{rule}”的标准，{len(heads)} 个头里没有抄写的头：投得最多的头也只有 {most:.3f}。"
    rest = heads[~heads["copies"].astype(bool)]["copy_attention_tried"]
    beside = f"，其余各头至多 {rest.max():.2f}" if len(rest) else ""
    where = listed([f"第 {layer} 层 {n} 个" for layer, n in copying.groupby("layer").size().items()])
    return (
        f"按“{rule}”的标准，{len(heads)} 个头里抄写的有 {len(copying)} 个（{where}）；在找头时没有用过的口令上，"
        f"它们投给数字的注意力至少 {copying['copy_attention_tried'].min():.2f}{beside}。"
    )


def necessary(trial: pd.DataFrame) -> str:
    """Of no compression. Heads are necessary where without their digits less than half is recalled, and as much as ever
    without those of other heads."""
    shares = _by_condition(tried(trial), "no_press")
    if untried := _untried(shares):
        return untried
    whole, without = shares.loc["as_is", "none"], _there(shares, "dropped", "copying")
    control, others = (_there(shares, "dropped", group) for group in ("control", "others"))
    text = (
        f"不压缩时准确率 {_share(whole)}。只从抄写的头里去掉数字，准确率 {_share(without)}；从同样多的别的头里去掉"
        f"（抽签 {control.n_draws} 次）{_share(control)}；从其余全部头里去掉 {_share(others)}。"
    )
    if not without.high < min(control.low, others.low):
        return text + "几种去法的区间有重叠，这些提问不足以说抄写的头是必要的。"
    if without.high < 0.5 and whole.low <= min(control.high, others.high):
        return text + "缺了抄写的头里的数字，就连一半也答不出；缺了别处的，看不出变差：对答出口令，抄写的头是必要的。"
    return text + "去掉抄写的头里的数字损害更大，但这还不足以说没有它们就答不出，别处的却不碍事。"


def sufficient(trial: pd.DataFrame) -> str:
    """Of the presses that do not find the keys, each at its highest ratio. Heads are sufficient where with their digits
    at least half is recalled, and less than half with those of all others. What else the others keep is what the press
    kept: that they need not see anything is not tried."""
    table, rows = _hardest(tried(trial)), []
    if untried := _untried(_by_condition(table, "no_press")):
        return untried
    for press in dict.fromkeys(table["press"]):
        shares = _by_condition(table, press)
        own = shares.loc["as_is", "none"]
        if press != "no_press" and own.value < 0.5 and ("kept", "copying") in shares.index:
            rows.append((own, shares.loc["kept", "copying"], _there(shares, "kept", "others")))
    if not rows:
        raise Missing("heads", "压缩后答不出一半的 press")
    own, given, others = (pd.DataFrame(part).reset_index(drop=True) for part in zip(*rows))
    text = (
        f"{_these(own)}的准确率是 {_span(own)}；预算不变，只在抄写的头里留住数字，便是 {_span(given)}；"
        f"只在其余全部头里留住，是 {_span(others)}。"
    )
    if (given["low"] >= 0.5).all() and (own["high"] < 0.5).all() and (others["high"] < 0.5).all():
        text += "只在抄写的头里留住数字，就答得出大半；只在其余的头里留住则不行："
        return text + "对答出口令，在抄写的头里留住数字是充分的。"
    return text + "并非每种方法都因此答得出大半，这些提问不足以说在抄写的头里留住数字是充分的。"


def lent(runs: pd.DataFrame, trial: pd.DataFrame) -> str:
    """Of the presses whose copying heads kept what another press keeps."""
    table, rows = _hardest(tried(trial)), []
    if untried := _untried(_by_condition(table, "no_press")):
        return untried
    for press in dict.fromkeys(table["press"]):
        shares = _by_condition(table, press)
        if ("lent", "copying") in shares.index:
            rows.append((shares.loc["as_is", "none"], shares.loc["lent", "copying"], _there(shares, "lent", "others")))
    lender = runs["lender"].dropna().unique()
    if not rows or len(lender) != 1:
        raise Missing("heads", "lent 的条件")
    own, borrowed, swapped = (pd.DataFrame(part) for part in zip(*rows))
    return (
        f"不是放回指定的数字，而是让抄写的头改留 {lender[0]} 在同一压缩率下所留的条目，{_these(own)}的准确率由 "
        f"{_span(own)} 变为 {_span(borrowed)}；反过来，只有其余的头改留，是 {_span(swapped)}。"
    )


def _these(rows: pd.DataFrame) -> str:
    """The presses, and the ratio where it is the same for all."""
    ratios = rows["compression_ratio"].unique()
    if len(ratios) == 1 and pd.notna(ratios[0]):
        return f"{listed(rows['press'])}（压缩率 {ratios[0]:g}）"
    return f"{listed([f'{row.press}{_ratio(row)}' for row in rows.itertuples()])} "


def _span(rows: pd.DataFrame) -> str:
    """From the lowest share to the highest."""
    low, high = f"{rows['value'].min():.2f}", f"{rows['value'].max():.2f}"
    return low if low == high else f"{low} 至 {high}"


def _by_condition(table: pd.DataFrame, press: str) -> pd.DataFrame:
    return found_in("heads", table[table["press"] == press], press).set_index(["digits", "group"])


def _untried(shares: pd.DataFrame) -> str:
    """Of the conditions without a press: why there are none to compare; nothing where there are."""
    groups = set(shares.index.get_level_values("group"))
    if "copying" not in groups:
        return NONE_COPY
    return "" if "others" in groups else ALL_COPY


def _there(shares: pd.DataFrame, digits: str, group: str) -> pd.Series:
    if (digits, group) not in shares.index:
        raise Missing("heads", f"抄写的头的试验（{GROUPS[group]}）")
    return shares.loc[digits, group]


def _share(row) -> str:
    return f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"


# ---- of a model, for pages that are about something else ------------------------------------------------------------


def of_model(loaded: LoadedModel) -> Records:
    """The most records there are of this model with these weights."""
    for records in settings("heads"):
        first = records.frame.iloc[0]
        if (first["model"], first["weights"], first["weights_id"]) == (
            loaded.name,
            loaded.weights,
            loaded.weights_id,
        ):
            return records
    raise Missing("heads", loaded.name)


def trial_bars_of(loaded: LoadedModel) -> Figure:
    return trial_bars(of_model(loaded).table("trial"))


def cause_of(loaded: LoadedModel) -> str:
    records = of_model(loaded)
    trial = records.table("trial")
    told = dict.fromkeys(say(sentence, trial) for sentence in (necessary, sufficient))  # why nothing was tried, once
    return "".join(told) + "\n\n" + sources([records])

"""What compression costs in perplexity: figures, tables and words from a study's runs and its tables of windows,
distances and heads. Notebooks 01 and 02 show these, and the report builds on them.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.measures.intervals import FEW_DOCUMENTS, comparison, holm, interval
from kvneox_lib.pages import degenerate, figures, kinds
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.report import Missing
from kvneox_lib.pages.selecting import (
    and_storage,
    bits_of,
    budget_column,
    left_out_of_figures,
    numeric,
    of_one_storage,
    pressed,
    storage_column,
)
from kvneox_lib.pages.words import CONTROL, listed, machine_of, model_of, number, numbers, plain, with_interval
from kvneox_lib.studies.records import tables_of

SAME_WINDOWS = ["model", "weights_id", "dataset", "text_sha256", "device_name", "context_tokens", "n_windows"]
LOW, HIGH = "delta_nll_ci95_low", "delta_nll_ci95_high"
DELTA = "nll 与不压缩之差（nat）"


# ---- of what an interval speaks -----------------------------------------------------------------------------------


def of_documents(run: pd.Series, of: int | None = None) -> str:
    """From how many texts the windows are, `of` so many; nothing in records from before that was counted."""
    n = pd.to_numeric(run.get("n_documents", np.nan))
    return "" if pd.isna(n) else f"（取自 {n:.0f} 篇文本{'' if of in (None, n) else f'，共有 {of} 篇'}）"


def reach(n_documents: int) -> str:
    """Of what intervals over windows speak, in words."""
    if n_documents == 1:
        return "区间由自助法得到，相邻的窗口成块抽取；文本只有一篇，这段区间只说这一篇文本。"
    drawn = f"区间由自助法得到：先抽文本（共 {n_documents} 篇），再在每篇里成块抽取相邻的窗口"
    if n_documents <= FEW_DOCUMENTS:
        return f"{drawn}；文本这样少，区间按 t 分布放宽。"
    return f"{drawn}。"


def reach_of_verdicts(verdicts: pd.DataFrame) -> str:
    """Of what the verdicts of `against` speak, and over how many they are corrected."""
    tested = verdicts.dropna(subset="p")
    if tested.empty:
        return ""
    said = (tested["verdict"] != "").sum()
    text = f"表里共 {len(tested)} 次比较，好与差按 Holm 法对这 {len(tested)} 次一起校正（p < 0.05），{said} 次有定论。"
    few = tested[tested["n_documents"] <= FEW_DOCUMENTS]
    if few.empty:
        return text
    several = few["n_documents"].max() > 1
    text += "文本不到六篇时，定论只说这些文本：窗口成块抽取，文本不抽。"
    if not several:
        return text
    several = tested[tested["n_documents"] > 1]
    return text + (
        f"若问别的文本（连文本一起抽，按 t 分布放宽），有几篇文本的 {len(several)} 次比较里，"
        f"区间不含零的有 {several['excludes_zero'].sum()} 次，未经校正。"
    )


# ---- runs -----------------------------------------------------------------------------------------------------------


def described(study) -> str:
    """Of a study: model, text, how much was scored, and on which machine."""
    first = study.records.iloc[0]
    titles = "、".join(map(plain, filter(None, study.text.titles))) if len(study.text.titles) <= 3 else ""
    return (
        f"{model_of(study.loaded)}，文本 **{plain(study.text.name)}**"
        f"{titles and f'（{titles}）'}，{first.n_windows} 个窗口"
        f"{of_documents(first, len(study.text.documents))}，"
        f"每个窗口上下文 {first.context_tokens} 个词元，"
        f"共计分 {first.n_tokens} 个词元；{machine_of(first)}。"
    )


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a run, in words."""
    return pd.DataFrame(
        {
            "press": runs["press"],
            "压缩率": numbers(runs["compression_ratio"], ".2f"),
            **budget_column(runs),
            **storage_column(runs),
            "实际保留": numbers(runs["kept_fraction"], ".3f"),
            "困惑度": _with_intervals(runs, "ppl", 2),
            "与不压缩之差": _with_intervals(runs, "delta_nll", 3),
            "每字节比特": _with_intervals(runs, "bits_per_byte", 3),
            "词级困惑度": _with_intervals(runs, "word_ppl", 0),
            "KV缓存MB": numbers(runs["kv_bytes"] / 1e6, ".2f"),
            "对照之差": numbers(runs["control_delta_nll"], "+.6f"),
        }
    )


def _with_intervals(runs: pd.DataFrame, column: str, digits: int) -> list[str]:
    return [with_interval(row, column, digits) for _, row in runs.iterrows()]


def placed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs under a press with their `ratio`: what was asked to go, or was measured as gone where the strength is
    the press' own."""
    found = numeric(runs[runs["press"] != "no_press"])
    return found.assign(ratio=pd.to_numeric(found["compression_ratio"]).fillna(1 - found["kept_fraction"]))


def moved(runs: pd.DataFrame) -> pd.DataFrame:
    """How far the control moves at each ratio, under the press that moves it most: a line beside those of presses."""
    control = placed(runs).assign(delta_nll=lambda found: found["control_delta_nll"].abs())
    return control.groupby("ratio", as_index=False)["delta_nll"].max().assign(press=CONTROL)


def loss_lines(runs: pd.DataFrame, control: pd.DataFrame | None = None) -> Figure:
    """Loss against ratio, a line a press; `control` is what `moved` gives."""
    shown = placed(of_one_storage(runs))
    if shown.empty:
        return figures.note("只测了不压缩，没有可画的损失")
    shown = shown[["press", "ratio", "delta_nll", *(name for name in (LOW, HIGH) if name in shown)]]
    lines = shown if control is None else pd.concat([control, shown])
    return figures.press_lines(lines, "ratio", "delta_nll", xlabel="压缩率", ylabel=DELTA)


def rising(runs: pd.DataFrame) -> pd.Series:
    """For each press with intervals at several ratios, whether that at the highest lies above that at the lowest."""
    found = {}
    for press, rows in pressed(numeric(of_one_storage(runs))).dropna(subset=[LOW, HIGH]).groupby("press", sort=False):
        rows = rows.sort_values("compression_ratio")
        if rows["compression_ratio"].nunique() > 1:
            found[press] = bool(rows[LOW].iloc[-1] > rows[HIGH].iloc[0])
    return pd.Series(found, dtype=bool)


def at_highest(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs at the highest ratio measured, with `ppl_ratio` as floats."""
    found = pressed(of_one_storage(runs))
    found = found[found["compression_ratio"] == found["compression_ratio"].max()]
    return found.assign(ppl_ratio=pd.to_numeric(found["ppl_ratio"]))


def still(runs: pd.DataFrame) -> str:
    return f"对照的最大变动是 {runs['control_delta_nll'].abs().max():.1e} nat：**教师强制的困惑度与 press 无关**。"


def findings(runs: pd.DataFrame, windows: pd.DataFrame) -> list[str]:
    """What the runs of a study show, a sentence each; `windows` is its table of that name."""
    lines = [*left_out_of_figures(runs), *degenerate.said(runs), still(runs)]
    rises = rising(runs)
    if len(rises):
        flat = "、".join(rises.index[~rises])
        lines.append(
            f"测了多个压缩率的 {len(rises)} 种 press 中，{rises.sum()} 种在最高压缩率下的损失高于最低压缩率，且两个区间"
            + (f"不重叠；例外：{flat}。" if flat else "不重叠。")
        )
    better = numeric(runs.assign(kv_bits=bits_of(runs)))[lambda found: found[HIGH] < 0]
    if len(better):
        which = listed(
            f"{row.press} {number(row.compression_ratio, '.2f')}{and_storage(row.kv_bits)}"
            for row in better.itertuples()
        )
        n = len(runs[runs["press"] != "no_press"])
        lines.append(
            f"值得再看一眼，比不压缩还好且区间不含零的：{which}。"
            f"一共看了 {n} 次运行，即使都没有差别，碰巧也会有约 {n * 0.025:.1f} 次。"
        )
    return lines + _against_random(windows)


def _against_random(windows: pd.DataFrame) -> list[str]:
    lines, found = [], against(windows, "random").dropna(subset="nll_difference_ci95_low")  # none from few windows
    for ratio, part in found[found["press"] != "no_press"].groupby("compression_ratio"):
        better, unclear, worse = (
            listed(part.loc[part["verdict"] == verdict, "press"], "无") for verdict in ("better", "", "worse")
        )
        lines.append(
            f"压缩率 {ratio:.2f}，与随机淘汰逐窗口相比：显著更好的有 {better}；分不出的有 {unclear}；"
            f"显著更差的有 {worse}。"
        )
    return lines + ([reach_of_verdicts(found)] if lines else [])


def highest_losses(runs: pd.DataFrame) -> list[str]:
    """What each press costs at the highest ratio measured, or at its own strength."""
    shown = placed(runs).assign(kv_bits=bits_of(runs))
    shown = shown[shown["compression_ratio"].isna() | (shown["ratio"] == pressed(runs)["compression_ratio"].max())]
    return [
        f"{row.press}（压缩率 {row.ratio:.2f}{and_storage(row.kv_bits)}）：每词元多 "
        f"{with_interval(row, 'delta_nll')} nat，困惑度乘以 "
        f"{number(row.ppl_ratio, '.3f')}。"
        for _, row in shown.iterrows()
    ]


# ---- windows --------------------------------------------------------------------------------------------------------


def against(table: pd.DataFrame, other: str) -> pd.DataFrame:
    """Each press against `other` at the same ratio, window by window: `nll_difference` with its 95 % interval, and
    `verdict`, see `judged`. `excludes_zero`: whether that interval does.

    `table` is the study's table `windows`; its windows are the same for every run. Degenerate runs are left out.
    """
    rows, table = [], healthy(of_one_storage(table))
    for ratio, part in table.groupby("compression_ratio"):
        by_press = dict(iter(part.groupby("press")))
        for name in by_press.keys() - {other} if other in by_press else ():
            documents = by_press[name]["document"].to_numpy()
            difference = by_press[name]["nll_mean"].to_numpy() - by_press[other]["nll_mean"].to_numpy()
            found, decides = interval(difference, None, documents), comparison(difference, documents)
            row = {"press": name, "compression_ratio": ratio, "nll_difference": difference.mean(), "p": decides.p}
            row |= {"nll_difference_ci95_low": found.low, "nll_difference_ci95_high": found.high}
            excludes_zero = found.low > 0 or found.high < 0
            rows.append(row | {"excludes_zero": excludes_zero, "n_documents": found.n_documents})
    columns = ["press", "compression_ratio", "nll_difference", "p", "nll_difference_ci95_low"]
    columns += ["nll_difference_ci95_high", "excludes_zero", "n_documents"]
    table = pd.DataFrame(rows, columns=columns).sort_values(["compression_ratio", "nll_difference"], ignore_index=True)
    return judged(table)


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """With `verdict`, better or worse where p leaves no doubt after Holm's correction over all rows, else "" (no order
    can be claimed). A page that shows several tables as one puts them together and judges them anew."""
    sure, lower = holm(table["p"].to_numpy(dtype=float)) < 0.05, table["nll_difference"] < 0
    return table.assign(verdict=np.where(sure, np.where(lower, "better", "worse"), ""))


def of_one_book(windows: pd.DataFrame) -> pd.DataFrame:
    """The windows of the first document, with `ppl`: without compression, and at the highest ratio measured."""
    windows = of_one_storage(windows).dropna(subset="compression_ratio")
    shown = windows["compression_ratio"].isin([0.0, pressed(windows)["compression_ratio"].max()])
    book = windows[(windows["document"] == windows["document"].min()) & shown]
    return book.assign(ppl=np.exp(book["nll_mean"]))


def book_lines(windows: pd.DataFrame, y: str) -> Figure:
    """`ppl` or `delta_nll` along a book."""
    book = of_one_book(windows)
    ratio, ylabel = pressed(book)["compression_ratio"].max(), {"ppl": "困惑度", "delta_nll": DELTA}[y]
    title = "" if pd.isna(ratio) else f"压缩率 {ratio:.2f}"
    return figures.press_lines(book, "position", y, xlabel="窗口在书中的位置（词元）", ylabel=ylabel, title=title)


def along_book(windows: pd.DataFrame) -> str:
    """Where the book is hard, and where compression hurts."""
    book = of_one_book(windows)
    plain = book[book["press"] == "no_press"].set_index("position")["ppl"]
    text = (
        f"不压缩时困惑度最低的窗口在第 {plain.idxmin()} 个词元处（{plain.min():.1f}），最高的在第 {plain.idxmax()} 个"
        f"词元处（{plain.max():.1f}）。"
    )
    under = pressed(book)
    if under.empty:
        return text
    loss = under.groupby("position")["delta_nll"].mean()
    return text + (
        f"压缩率 {under['compression_ratio'].max():.2f} 时，各 press 平均损失最大的窗口在第 {loss.idxmax()} 个词元处"
        f"（{loss.max():+.3f} nat），最小的在第 {loss.idxmin()} 个词元处（{loss.min():+.3f} nat）。"
    )


# ---- distances and heads --------------------------------------------------------------------------------------------


def distance_lines(table: pd.DataFrame, ratio: float | None) -> Figure:
    """Loss against the distance from the cut, at one ratio; `table` is the study's table `distance`."""
    table = of_one_storage(table)
    shown = table[table["compression_ratio"] == ratio]
    if shown.empty:
        return figures.note("没有由压缩率决定强度的 press，这一节略去")
    return figures.press_lines(
        shown.assign(middle=(shown["from_token"] * shown["to_token"]) ** 0.5),
        "middle",
        "delta_nll",
        xlabel="切口之后第几个计分的词元",
        ylabel=DELTA,
        title=f"压缩率 {ratio:.2f}",
        log_x=True,
    )


def near_and_far(table: pd.DataFrame, near: int = 16) -> pd.DataFrame:
    """Of the table `distance` at one ratio, a row a press: `near`, its mean loss in the bins up to `near`, `far`, that
    in the last, and `share`, far over near; NaN where nothing is lost near."""
    rows, last = [], table["to_token"].max()
    for press, bins in table.groupby("press", sort=False):
        close = bins[bins["to_token"] <= near]
        tokens = close["to_token"] - close["from_token"] + 1
        lost = (close["delta_nll"] * tokens).sum() / max(tokens.sum(), 1)
        rows.append({"press": press, "near": lost, "far": bins.loc[bins["to_token"] == last, "delta_nll"].mean()})
    found = pd.DataFrame(rows, columns=["press", "near", "far"])
    return found.assign(
        kind=found["press"].map(kinds.kind_of), share=(found["far"] / found["near"]).where(found.near > 0)
    )


def lasting(table: pd.DataFrame, ratio: float | None) -> str:
    """How long the loss lasts at one ratio: what is left of it far from the cut, for presses that work alike."""
    shown = of_one_storage(table)
    shown = shown[shown["compression_ratio"] == ratio]
    if shown.empty:
        return "没有由压缩率决定强度的 press，这一节略去。"
    found, farthest = near_and_far(shown).dropna(subset="share"), shown.loc[shown["to_token"].idxmax()]
    parts = [
        f"{kind} {span(part['share'])}（{listed(part['press'])}）" for kind, part in found.groupby("kind", sort=False)
    ]
    return (
        f"压缩率 {ratio:.2f}，切口之后第 {farthest['from_token']}–{farthest['to_token']} 个计分的词元上的损失，"
        f"是前 16 个词元上的：{'；'.join(parts)}。"
        "续文取多长会影响平均损失：比较两份结果，先要看计分的范围是否一样。"
    )


def span(shares: pd.Series) -> str:
    """From the least to the most, or the one share there is."""
    return " 至 ".join(dict.fromkeys(f"{share:.0%}" for share in (shares.min(), shares.max())))


def kept_maps(heads: pd.DataFrame) -> Figure:
    """What each layer and head kept; `heads` is the study's table of that name, for one strength of each press."""
    if heads.empty:
        return figures.note("只测了不压缩，没有可画的保留比例")
    return figures.heat_maps(of_one_storage(heads), "layer", "head", "kept", ylabel="层", xlabel="头", label="保留比例")


# ---- readings -------------------------------------------------------------------------------------------------------


def evicting_in_words(settings: list) -> str:
    """What evicting while the context is read costs, beside compressing it when it has been read: of the runs of study
    `wikitext_ppl` in all its settings (`Records`) those that differ in that alone."""
    runs = pd.concat([records.frame for records in settings], ignore_index=True) if settings else pd.DataFrame()
    if "evict_while_reading" not in runs:
        raise Missing("wikitext_ppl", "边读边淘汰")
    runs = of_one_storage(runs)
    evicts, same = runs["evict_while_reading"].eq(True), ["press", "compression_ratio", *SAME_WINDOWS]
    both = runs[evicts].merge(runs[~evicts], on=same, suffixes=("", "_after")).query("press != 'no_press'")
    if both.empty:
        raise Missing("wikitext_ppl", "边读边淘汰")
    one, differences = both.iloc[0], _evicting_beside_after(runs, both)
    p = holm(np.array([comparison(part["difference"].to_numpy(), part["document"]).p for _, part in differences]))
    means = [(f"{press} {ratio:g}", part["difference"].mean()) for (press, ratio), part in differences]
    clear = [f"{name}（{mean:+.3f}）" for (name, mean), sure in zip(means, p < 0.05) if sure]
    low, high = (end(mean for _, mean in means) + 0.0 for end in (min, max))
    return (
        f"质量的代价（{plain(one['dataset'])} 的 {one['n_windows']} 个窗口，{one['model']}）：每 "
        f"{one['prefill_chunk']:.0f} 个词元淘汰一次，与读完再压缩相比，{len(means)} 个配置的损失之差从 {low:+.3f} 到 "
        f"{high:+.3f} nat，逐窗口相减、按 Holm 法一起校正后{'分得开的有 ' + listed(clear) if clear else '都分不开'}。"
    )


def _evicting_beside_after(runs: pd.DataFrame, both: pd.DataFrame) -> list[tuple]:
    """By press and ratio the `difference` of each window."""
    sides = [tables_of(runs[runs["run_id"].isin(both[name])], "windows") for name in ("run_id", "run_id_after")]
    same = ["press", "compression_ratio", "document", "position"]
    if any(side.empty for side in sides):
        raise Missing("wikitext_ppl", "表 windows")
    windows = sides[0].merge(sides[1], on=same, suffixes=("", "_after")).sort_values(same)
    windows = windows.assign(difference=windows["nll_mean"] - windows["nll_mean_after"])
    return list(windows.groupby(["press", "compression_ratio"]))

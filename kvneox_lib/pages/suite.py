"""What is said and shown of models in several sizes, and in several states of their training.

Recall and losses are compared of models and states that were measured alike: of the settings that the records are in,
those that differ in nothing else, as many as there are.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.inputs.weights import PYTHIA
from kvneox_lib.pages import figures
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.ranks import rank_correlation
from kvneox_lib.pages.report import Missing, Records, sentences, settings, sources
from kvneox_lib.pages.retrieval import RULE, copying_heads
from kvneox_lib.pages.selecting import middle_ratio, numeric, of_one_storage
from kvneox_lib.pages.words import STUDY_NAMES, listed, number
from kvneox_lib.studies.table import STUDIES

VALUES = {"recall": "accuracy", "wikitext_ppl": "delta_nll"}  # what is shown of each study
NAMES = {"recall": "口令准确率", "wikitext_ppl": "损失（nat/词元）"}
# May differ between models that are measured alike: which one it is, and how it was run.
MAY_DIFFER = ("model", "revision", "weights", "weights_id", "attn_implementation", "batch_size")
MAY_DIFFER += ("dtype", "device", "device_name", "n_threads")
Place = Callable[[Mapping], float | None]  # where a run stands: `millions` or `step`


class NotRun(Missing):
    """Nobody has run this sweep."""

    def __init__(self, what: str, params: str):
        how = f"`snakemake --cores all --configfile params/{params}.yaml`"
        LookupError.__init__(self, f"（还没有{what}的记录；在取得到 Pythia 权重的机器上运行 {how} 可得）")


# ---- which runs -----------------------------------------------------------------------------------------------------


def of_sizes(study: str, root: Path | None = None) -> list[Records]:
    """One for each size of Pythia, the smallest first."""
    return _alike(settings(study, root), millions) or _none("多种大小", "pythia-suite")


def of_training(study: str, root: Path | None = None) -> list[Records]:
    """One for each state of a model's training, model by model, the earliest first."""
    return _alike(settings(study, root, revisions=True), step) or _none("训练途中", "pythia-checkpoints")


def _none(what: str, params: str):
    raise NotRun(what, params)


def millions(run: Mapping) -> float | None:
    """Parameters of a Pythia model."""
    shape = PYTHIA.get(run["model"].removeprefix("EleutherAI/"))
    if shape is None:
        return None
    layers, hidden, _, vocabulary = shape
    of_a_layer = 12 * hidden**2 + 13 * hidden  # with the biases, and two norms
    return (2 * vocabulary * hidden + layers * of_a_layer + 2 * hidden) / 1e6


def step(run: Mapping) -> float | None:
    found = re.fullmatch(r"step(\d+)", str(run["revision"]))
    return float(found[1]) if found else None


def _alike(found: list[Records], place: Place) -> list[Records]:
    """Of each model and place one, all measured alike: of the ways of measuring the one with most; two at least."""
    ways: dict[tuple, dict] = {}
    for records in found:  # those with most runs come first
        run = records.run()
        if place(run) is not None:
            ways.setdefault(_way(records), {}).setdefault((run["model"], place(run)), records)
    most = max(ways.values(), key=len, default={})
    by_size = sorted(most, key=lambda key: (millions({"model": key[0]}) or 0, *key))
    return [most[key] for key in by_size] if len({at for _, at in most}) > 1 else []


def _way(records: Records) -> tuple:
    row, run = STUDIES[records.study], records.run()
    names = [name for name in row.parameters if name not in (*MAY_DIFFER, *row.axes)]
    return tuple(None if pd.isna(run.get(name)) else run[name] for name in names)


def states(study: str, root: Path | None = None) -> pd.DataFrame:
    """The runs of all states of training."""
    return runs_of(of_training(study, root), step)


def heads_of_states(root: Path | None = None) -> pd.DataFrame:
    return heads_of(of_training("recall", root), step)


def runs_of(found: list[Records], place: Place) -> pd.DataFrame:
    """Their runs, with `at`, where each stands (millions of parameters, or a step), and `value`, what is shown. Of
    recall those where the question comes after compression."""
    value = VALUES[found[0].study]
    parts = [of_one_storage(records.runs()).assign(at=place(records.run())) for records in found]
    runs = numeric(pd.concat(parts, ignore_index=True))
    if "query_aware" in runs:
        runs = runs[~runs["query_aware"].astype(bool)]
    return runs.rename(columns=lambda name: re.sub(rf"^{value}(?=$|_ci95)", "value", name))


def heads_of(found: list[Records], place: Place) -> pd.DataFrame:
    """Of study recall: attention to the digit being said, by model, `at`, layer and head."""
    parts = []
    for records in found:
        table = records.table("heads", press="no_press").drop_duplicates(["layer", "head"])
        parts.append(table.assign(model=records.run()["model"], at=place(records.run())))
    return pd.concat(parts, ignore_index=True)


# ---- pictures and tables --------------------------------------------------------------------------------------------


def lines(xlabel: str, *several: pd.DataFrame, by_model: bool = False) -> Figure:
    """`value` of each press at one ratio, which the title tells, and of no press, against `at`: a panel for each of
    `several` (runs of a study), and for each model where they are many at a place."""
    panels = {}
    for runs in several:
        name = NAMES[runs["study"].iloc[0]]
        for model, part in runs.groupby("model", sort=False) if by_model else [("", runs)]:
            panels[f"{model} {_at_ratio(part)}，{name}".strip()] = _shown(part)
    how = {"xlabel": xlabel, "ylabel": "", "log_x": True, "own_scale": True}
    return _marked(figures.press_line_panels(panels, "at", "value", **how), panels)


def _at_ratio(runs: pd.DataFrame) -> str:
    ratio = middle_ratio(runs)
    return "压缩后" if ratio is None else f"压缩率 {ratio:g} 时"


def _shown(runs: pd.DataFrame) -> pd.DataFrame:
    plain = (runs["press"] == "no_press") & runs["value"].notna()
    return healthy(runs[plain | (runs["compression_ratio"] == middle_ratio(runs))])


def head_lines(heads: pd.DataFrame, most: int = 6) -> Figure:
    """Attention of the heads that copy in the last state (if any do), state by state, and of the first among all
    others."""
    panels = {}
    for model, part in heads.groupby("model", sort=False):
        kept = chosen_heads(part)[:most]
        names = part["layer"].astype(str).str.cat(part["head"].astype(str), "-")
        labels = names.where(names.isin([f"{layer}-{head}" for layer, head in kept]), "其余")
        panels[model] = part.assign(press=labels).groupby(["press", "at"], as_index=False)["copy_attention"].max()
    how = {"xlabel": "训练步数", "ylabel": "投向数字的注意力", "log_x": True}
    return _marked(figures.press_line_panels(panels, "at", "copy_attention", **how), panels)


def _marked(figure: Figure, panels: dict[str, pd.DataFrame]) -> Figure:
    """With ticks where something was measured."""
    for axes, frame in zip(figure.axes, panels.values()):
        places = sorted(frame["at"].unique())
        axes.set_xticks(places, [f"{place:.0f}" for place in places], fontsize=7, rotation=45)
        axes.minorticks_off()
    return figure


def chosen_heads(heads: pd.DataFrame) -> list[tuple[int, int]]:
    """(layer, head) of those that copy in the last state of one model; that which looks most first."""
    last = heads[heads["at"] == heads["at"].max()]
    return list(copying_heads(last)[["layer", "head"]].itertuples(index=False, name=None))


def overview(label: str, recall: pd.DataFrame, losses: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """A row for each model and place: its copying heads, recall, and from where to where presses go at one ratio,
    which the head tells."""
    rows, told = [], [f"{_at_ratio(runs)}的{name}" for runs, name in ((recall, "准确率"), (losses, "损失"))]
    recall, losses = _shown(recall), _shown(losses)
    for (model, at), part in heads.groupby(["model", "at"], sort=False):
        copying = copying_heads(part)["copy_attention"]
        of_recall, of_losses = (_at(runs, model, at) for runs in (recall, losses))
        bare = of_recall[of_recall["press"] == "no_press"]["value"]
        rows.append(
            {
                "模型": model,
                label: f"{at:.0f}",
                "投向数字的注意力，最大的头": f"{part['copy_attention'].max():.2f}",
                "抄写的头": f"{len(copying)}/{len(part)}",
                "不压缩的准确率": number(bare.iloc[0] if len(bare) else None, ".2f"),
                **dict(zip(told, (_ends(of_recall, ".2f"), _ends(of_losses, "+.3f")))),
            }
        )
    return pd.DataFrame(rows)


def _at(runs: pd.DataFrame, model: str, at: float) -> pd.DataFrame:
    return runs[(runs["model"] == model) & (runs["at"] == at)]


def pressed(runs: pd.DataFrame) -> pd.DataFrame:
    shown = _shown(runs)
    return shown[shown["press"] != "no_press"].dropna(subset="value")


def _ends(runs: pd.DataFrame, spec: str) -> str:
    """Of all presses, without saying which is which: the best of several that are level is nobody."""
    values = pressed(runs)["value"] if len(runs) else runs
    if not len(values):
        return "—"
    low, high = (format(end + 0.0, spec) for end in (values.min(), values.max()))
    return low if low == high else f"{low} 至 {high}"


# ---- sentences ------------------------------------------------------------------------------------------------------


def measured(found: list[Records], unit: str) -> str:
    """What was measured; `unit` is 大小 or 状态."""
    models = listed(dict.fromkeys(records.run()["model"] for records in found))
    run = found[0].run()
    return f"测了 {len(found)} 个{unit}：{models}；文本 {run['dataset']}，上下文 {run['context_tokens']:.0f} 个词元。"


def of_pythia(root: Path | None = None) -> str:
    """What its sizes change, where they were measured; which of the two sweeps that are prepared nobody has run."""
    text, not_run = "", []
    try:
        recall, losses = (runs_of(of_sizes(study, root), millions) for study in VALUES)
        text = sentences(
            lambda: measured(of_sizes("recall", root), "大小"),
            lambda: head_shares(heads_of(of_sizes("recall", root), millions)),
            lambda: differing(recall, "准确率", "{} 百万参数"),
            lambda: differing(losses, "损失", "{} 百万参数"),
            lambda: same_order(recall, "准确率"),
            lambda: same_order(losses, "损失"),
        ).data
    except NotRun:
        not_run.append("前者")
    try:
        there = any(millions(records.run()) for records in of_training("recall", root))
    except NotRun:
        there = False
    not_run += [] if there else ["后者"]
    which = "两者都" if len(not_run) > 1 else "".join(not_run)
    return text + (f"{which}还没有测过。" if which else "")


def source(chosen: Callable[[str], list[Records]], *studies: str) -> str:
    """Where the figures of these studies come from; `chosen` is `of_sizes` or `of_training`."""
    return "".join(_source(chosen, study) for study in studies)


def _source(chosen: Callable[[str], list[Records]], study: str) -> str:
    try:
        found = chosen(study)
    except NotRun:  # the figure, or table, says how to make them
        return f"{STUDY_NAMES[study]}：还没有记录。"
    return sources([replace(found[0], frame=pd.concat([one.frame for one in found]))])


def heads_appear(heads: pd.DataFrame) -> str:
    """Of each model, when the heads that copy at the end, if there are any, first had half of what they have then."""
    parts = []
    for model, part in heads.groupby("model", sort=False):
        steps = [_first_at_half(part, *head) for head in chosen_heads(part)]
        if not steps:
            parts.append(f"{model} 最后没有抄写的头")
            continue
        by_step = pd.Series(steps).value_counts().sort_index()
        when = "、".join(f"第 {at:.0f} 步（{count} 个）" for at, count in by_step.items())
        if len(by_step) == 1:
            when = f"同一个状态，第 {steps[0]:.0f} 步"
        parts.append(f"{model} 最后抄写的 {len(steps)} 个头，注意力最早达到各自最终值的一半是在{when}")
    return f"{'；'.join(parts)}。"


def _first_at_half(heads: pd.DataFrame, layer: int, head: int) -> float:
    own = heads[(heads["layer"] == layer) & (heads["head"] == head)].sort_values("at")
    return own[own["copy_attention"] >= own["copy_attention"].iloc[-1] / 2]["at"].iloc[0]


def recall_appears(recall: pd.DataFrame) -> str:
    parts = []
    for model, part in recall[recall["press"] == "no_press"].groupby("model", sort=False):
        part = part.sort_values("at")
        able = part[part["value"] >= 0.5]["at"]
        when = f"到第 {able.iloc[0]:.0f} 步过半" if len(able) else "始终没有过半"
        parts.append(f"{model} {when}，最后一个状态是 {part['value'].iloc[-1]:.2f}")
    if not parts:
        raise Missing("recall", "no_press")
    return f"不压缩时的准确率，{'；'.join(parts)}。"


def differing(runs: pd.DataFrame, what: str, unit: str) -> str:
    """Where presses differ at all: the intervals of the best and the worst at the middle ratio lie apart. Of the others
    nothing is concluded, since these two are chosen afterwards, and each has its own interval. `unit`, in which a place
    is told, holds `{}`."""
    ratio, parts = middle_ratio(runs), []
    if ratio is None:
        raise Missing(runs["study"].iloc[0], "有压缩率的 press")
    for model, part in runs.groupby("model", sort=False):
        apart = [unit.format(f"{at:.0f}") for at, there in pressed(part).groupby("at") if _lie_apart(there)]
        parts.append(f"{model} 在{listed(apart)}" if apart else f"{model} 没有一处")
    return f"压缩率 {ratio:.2f} 时，各方法的{what}拉得开的地方：{'；'.join(parts)}。"


def gaining(losses: pd.DataFrame) -> str:
    """Where compression lowered the loss; nothing where it did so nowhere."""
    below = pressed(losses)[lambda found: found["value_ci95_high"] < 0]
    if below.empty:
        return ""
    parts = [
        f"{model} 第 {at:.0f} 步的 {listed(there['press'])}"
        for (model, at), there in below.groupby(["model", "at"], sort=False)
    ]
    told = f"压缩之后损失反而变小的（各自的 95 % 区间在零以下）：{'；'.join(parts)}"
    return f"{told}；那时的模型还没有从远处的上下文里得到好处。"


def _lie_apart(runs: pd.DataFrame) -> bool:
    runs = runs.dropna(subset=["value_ci95_low", "value_ci95_high"])
    if len(runs) < 2:
        return False
    return bool(
        runs.loc[runs["value"].idxmax(), "value_ci95_low"] > runs.loc[runs["value"].idxmin(), "value_ci95_high"]
    )


def same_order(runs: pd.DataFrame, what: str) -> str:
    """Whether the smallest and the largest model put presses in the same order."""
    found = pressed(runs)
    ends = [found[found["at"] == at].set_index("press")["value"] for at in (found["at"].min(), found["at"].max())]
    relation = rank_correlation(*ends)
    if pd.isna(relation):
        raise Missing(runs["study"].iloc[0], "几种大小共有的 press")
    n = len(ends[0].index.intersection(ends[1].index))
    return f"最小与最大的模型按{what}给各方法排的名次，Spearman 秩相关是 {relation:.2f}（{n} 种方法）。"


def head_shares(heads: pd.DataFrame) -> str:
    parts = []
    for model, part in heads.groupby("model", sort=False):
        copying = copying_heads(part)
        counted = f"{len(copying)}/{len(part)}" if len(copying) else "没有抄写的头"
        parts.append(f"{model} {counted}（最大 {part['copy_attention'].max():.2f}）")
    return f"抄写的头（{RULE}）与全部头：{'，'.join(parts)}。"

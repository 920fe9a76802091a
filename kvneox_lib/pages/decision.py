"""Which method for which use: the table of the report's first page, chosen from the records by a stated rule.

A use is what a compressed cache is for, and is asked for in parts, each a text or a task. Of the methods that were
measured in all of them and did what their names say, at each ratio that is taken which loses to none for sure in any
part; where there is no such method, each part has its own.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from kvneox_lib.measures.intervals import comparison, holm
from kvneox_lib.pages import turns
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.pages.selecting import bits_of, of_ratios
from kvneox_lib.pages.storage import KINDS, timed_in_bits
from kvneox_lib.pages.timings import at_corner, column, timed_runs
from kvneox_lib.pages.words import bullets, listed, number
from kvneox_lib.studies.records import tables_of

RATIOS = (0.5, 0.75, 0.9)
TEXTS = ("wikitext_ppl", "pg19_ppl")
ABOUT_THE_TEXT = ("kvneox_cloze", "kvneox_copy")  # answers that go with the text; passkeys are what recall asks for
ELSEWHERE = "\u00a0*"  # after a time that was not measured of this row where the others were
CONFIGURATION = ["press", "compression_ratio"]
PARTS = {"wikitext_ppl": "短文", "pg19_ppl": "长书", "recall": "口令", "kvneox_cloze": "末词", "kvneox_copy": "抄写"}


@dataclass(frozen=True)
class Use:
    name: str
    studies: tuple[str, ...]  # of what it asks for
    question: str = "outside"  # while the context is compressed


AFTERWARDS = Use("事后提问", ("recall", "tasks"))
BEFOREHAND = Use("问题已知", ("recall", "tasks"), "inside")
USES = (Use("只续写", TEXTS), AFTERWARDS, BEFOREHAND)
SAVING = "只省字节"


@dataclass(frozen=True)
class Choice:
    """What loses least for a use at a ratio, and what cannot be told from it; in all parts, or in those alone."""

    use: Use
    ratio: float
    press: str
    level: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


# ---- what each method loses -----------------------------------------------------------------------------------------


def that_count(records: Records, question: str) -> pd.DataFrame:
    """The runs of a study with the question there, without degenerate ones."""
    runs = healthy(of_ratios(records.runs()))
    if records.study == "recall":
        return runs[runs["query_aware"].astype(bool) == (question == "inside")]
    if records.study == "tasks":
        return runs[(runs["question"] == question) & runs["dataset"].isin(ABOUT_THE_TEXT)]
    return runs


def lost(records: Records, question: str) -> pd.DataFrame:
    """A row for each window, key or document, a column for each press and ratio: by how much worse it is than with the
    whole cache. Rows with one `drawn` are drawn together in an interval. `part`: a text or a task."""
    kind, runs = KINDS[records.study], that_count(records, question)
    runs = runs[bits_of(runs).isna() & runs["compression_ratio"].isin([0.0, *RATIOS])]
    parts = []
    for name, part in runs.groupby("dataset"):
        table = tables_of(part, kind.table).astype({kind.value: float})
        values = table.set_index([*kind.unit, *CONFIGURATION])[kind.value].unstack(CONFIGURATION)
        if ("no_press", 0.0) not in values:
            continue
        worse = values.sub(values["no_press", 0.0], axis=0) * (1 if kind.less_is_better else -1)
        units = [f"{records.study} {name} {unit}" for unit in worse.index]
        of = (
            units
            if kind.of is None
            else [f"{records.study} {name} {of}" for of in worse.index.get_level_values(kind.of)]
        )
        part = [PARTS[name if records.study == "tasks" else records.study]] * len(worse)
        names = ["part", "drawn", "unit"]
        parts.append(worse.set_index(pd.MultiIndex.from_arrays([part, of, units], names=names)))
    if not parts:
        raise Missing(records.study, f"表 {kind.table}")
    return pd.concat(parts).drop(columns="no_press", level=0)


# ---- what to choose -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def choices(*several: Records) -> tuple[Choice, ...]:
    """For every use and ratio, in that order: of all parts together, else of each."""
    found = []
    for (use, ratio), best in best_by_part(*several).items():
        means = by_ratio(use, several)[ratio].mean()
        common = sorted(set.intersection(*map(set, best.values())), key=means.get)
        if common:
            found.append(Choice(use, ratio, common[0], tuple(common[1:])))
            continue
        together: dict[tuple[str, ...], list[str]] = {}
        for part, presses in best.items():
            together.setdefault(presses, []).append(part)
        found += [Choice(use, ratio, first, tuple(level), tuple(parts)) for (first, *level), parts in together.items()]
    return tuple(found)


@lru_cache(maxsize=4)
def best_by_part(*several: Records) -> dict[tuple[Use, float], dict[str, tuple[str, ...]]]:
    """For every use and ratio: in each part what loses least, and after it what cannot be told from that. All
    comparisons are corrected together."""
    found, compared = {}, {}
    for use in USES:
        for ratio, losses in by_ratio(use, several).items():
            for part, of_part in losses.groupby(level="part", sort=False):
                best = of_part.mean().idxmin()
                found[use, ratio, part] = best
                others = of_part.columns.drop(best)
                compared |= {(use, ratio, part, name): _p(of_part[name] - of_part[best]) for name in others}
    if not found:
        raise Missing(several[0].study, "可以选择的方法")
    sure = dict(zip(compared, holm(np.array([*compared.values()])) < 0.05))
    told: dict[tuple[Use, float], dict[str, tuple[str, ...]]] = {}
    for (use, ratio, part), best in found.items():
        level = [name for *of, name in compared if of == [use, ratio, part] and not sure[*of, name]]
        told.setdefault((use, ratio), {})[part] = (best, *level)
    return told


def not_candidates(use: Use, *several: Records) -> list[str]:
    """What is best elsewhere and was not measured in all parts of this use."""
    asked = {name for losses in by_ratio(use, several).values() for name in losses}
    named = {name for one in choices(*several) for name in (one.press, *one.level)}
    return sorted(named - asked) if asked else []


@lru_cache(maxsize=16)
def by_ratio(use: Use, several: tuple[Records, ...]) -> dict[float, pd.DataFrame]:
    """What each press loses of all that the use asks for; none of it where one of its studies has no records."""
    by_study = {records.study: records for records in several if len(records.frame)}
    try:
        losses = pd.concat([lost(by_study[study], use.question) for study in use.studies])
    except (Missing, KeyError):
        return {}
    found = {ratio: losses.loc[:, losses.columns.get_level_values(1) == ratio].droplevel(1, axis=1) for ratio in RATIOS}
    return {ratio: part.dropna(axis=1) for ratio, part in found.items() if not part.dropna(axis=1).empty}


def _p(behind: pd.Series) -> float:
    return comparison(behind.to_numpy(), pd.factorize(behind.index.get_level_values("drawn"))[0]).p


# ---- the table ------------------------------------------------------------------------------------------------------


def table(settings: list[Records], *several: Records) -> pd.DataFrame:
    """A row for each choice, and for the whole cache in fewer bits; `settings` are those of study `speed`."""
    whole = {"用途": "不压缩", "压缩率": "—", "方法": "—"} | _measured(several, "outside", press="no_press")
    rows = [whole | dict.fromkeys(TIMES, "1")]
    for one in choices(*several):
        level = f"（≈\u00a0{listed(one.level)}）" if one.level else ""
        method = f"{listed(one.parts)}：{one.press}{level}" if one.parts else one.press + level
        head = {"用途": one.use.name, "压缩率": f"{one.ratio:g}", "方法": method}
        measured = _measured(several, one.use.question, press=one.press, compression_ratio=one.ratio)
        rows.append(head | measured | _times(settings, one.press, one.ratio))
    for bits in _bits_measured(several):
        head = {"用途": SAVING, "压缩率": "—", "方法": f"{bits:.0f} 位"}
        measured = _measured(several, "outside", press="no_press", kv_bits=bits)
        rows.append(head | measured | _times_in_bits(settings, bits))
    table = pd.DataFrame(rows)
    return table.assign(用途=table["用途"].mask(table["用途"] == table["用途"].shift(), ""))


def _bits_measured(several: tuple[Records, ...]) -> list[float]:
    found = pd.concat([bits_of(records.frame) for records in several if len(records.frame)])
    return sorted(found.dropna().unique(), reverse=True)


def _measured(several: tuple[Records, ...], question: str, **wanted) -> dict[str, str]:
    """What was measured of one configuration."""
    runs = {records.study: _of(records, question, wanted) for records in several if len(records.frame)}
    shares = [_mean(part, "kv_share") for part in runs.values() if len(part)]
    return {
        "短文损失": number(_mean(runs.get("wikitext_ppl"), "delta_nll"), ".3f"),
        "长书损失": number(_mean(runs.get("pg19_ppl"), "delta_nll"), ".3f"),
        "口令": number(_mean(runs.get("recall"), "accuracy"), ".2f"),
        "末词、抄写": number(_mean(runs.get("tasks"), "score"), ".2f"),
        "缓存": number(shares[0] if shares else np.nan, ".2f"),
    }


def _of(records: Records, question: str, wanted: dict) -> pd.DataFrame:
    runs = that_count(records, question)
    whole = runs[(runs["press"] == "no_press") & bits_of(runs).isna()].set_index("dataset")["kv_bytes"]
    chosen = bits_of(runs).isna() if "kv_bits" not in wanted else bits_of(runs) == wanted["kv_bits"]
    for name in set(wanted) - {"kv_bits"}:
        chosen &= runs[name] == wanted[name]
    runs = runs[chosen]
    return runs.assign(kv_share=runs["kv_bytes"] / runs["dataset"].map(whole))


def _mean(runs: pd.DataFrame | None, name: str) -> float:
    return np.nan if runs is None or runs.empty else float(pd.to_numeric(runs[name]).mean())


# ---- times ----------------------------------------------------------------------------------------------------------

TIMES = {"每步": "step_s", "首词元": "prefill_s"}


def _times(settings: list[Records], press: str, ratio: float) -> dict[str, str]:
    """As multiples of this library's without compression. Where the press itself was not timed in the cell that all
    rows are about, its step is that of others which keep as much, and its first token what it takes elsewhere."""
    there = _compressed(_cell(settings))
    at_ratio = there[there["compression_ratio"] == ratio]
    own = at_ratio[at_ratio["press"] == press]
    if len(own):
        return {words: number(own[name].iloc[0].value, ".2f") for words, name in TIMES.items()}
    steps = [one.value for one in at_ratio["step_s"] if pd.notna(one.value)]
    first = _nearest(settings, press, ratio)
    return {"每步": _span(steps), "首词元": "—" if first is None else _elsewhere(first["prefill_s"].value)}


def _cell(settings: list[Records]) -> pd.DataFrame:
    if not settings:
        raise Missing("speed")
    return at_corner(settings[0].frame)


def _compressed(cell: pd.DataFrame) -> pd.DataFrame:
    """This library's runs under a press, each as multiples of that without one in the same turns."""
    ours = cell[(cell["engine"] == "ours") & bits_of(cell).isna() & column(cell, "prefill_chunk").isna()]
    plain, pressed = ours[ours["press"] == "no_press"], ours[ours["press"] != "no_press"]
    if plain.empty:
        return pressed.iloc[:0]
    ratios = {name: [turns.ratio(row, plain.iloc[0], name) for _, row in pressed.iterrows()] for name in TIMES.values()}
    return pressed.assign(**ratios)


def _span(values: list[float]) -> str:
    if not values:
        return "—"
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return (low if low == high else f"{low}–{high}") + ELSEWHERE


def _nearest(settings: list[Records], press: str, ratio: float) -> pd.Series | None:
    """Of the runs of a press that were timed elsewhere the one most like those in the cell: in model, then in
    precision, length, ratio and batch."""
    cell, found = _cell(settings).iloc[0], []
    for records in settings:
        for _, one in timed_runs(records.frame).groupby(["context_tokens", "batch_size", "dtype"]):
            pressed = _compressed(one)
            found += [row for _, row in pressed[pressed["press"] == press].iterrows()]

    def unlike(row: pd.Series) -> tuple:
        lengths, batches = (abs(row[name] - cell[name]) for name in ("context_tokens", "batch_size"))
        other = row["model"] != cell["model"], row["dtype"] != cell["dtype"]
        return *other, lengths, abs(row["compression_ratio"] - ratio), batches

    return min(found, key=unlike, default=None)


def _where_first(settings: list[Records], *several: Records) -> str:
    """Where the first token was timed of what was not timed in the cell."""
    there = _compressed(_cell(settings))
    timed = set(zip(there["press"], there["compression_ratio"]))
    asked = [(one.press, one.ratio) for one in choices(*several) if (one.press, one.ratio) not in timed]
    found = [(press, _nearest(settings, press, ratio)) for press, ratio in asked]
    cell = _cell(settings).iloc[0]
    places = dict.fromkeys(f"{press} 的取自{_place(row, cell)}" for press, row in found if row is not None)
    return f"首词元的用时，{'，'.join(places)}" if places else ""


def _place(row: pd.Series, cell: pd.Series) -> str:
    model = {"demo": "演示模型、", cell["model"]: ""}.get(row["model"], f" {row['model']} 的形状、")
    dtype = "" if row["dtype"] == cell["dtype"] else f"、{row['dtype']}"
    size = f"上下文 {row['context_tokens']}、批 {row['batch_size']}"
    return f"{model}{size}、压缩率 {row['compression_ratio']:g}{dtype}"


def _times_in_bits(settings: list[Records], bits: float) -> dict[str, str]:
    try:
        runs = timed_in_bits(settings)
    except Missing:
        return dict.fromkeys(TIMES, "—")
    runs = runs[runs["dtype"] == runs["dtype"].iloc[0]]
    plain, own = runs[runs["way"] == ""], runs[(runs["way"] == "bits") & (runs["bits"] == bits)]
    if plain.empty or own.empty:
        return dict.fromkeys(TIMES, "—")
    found = {words: turns.ratio(own.iloc[0], plain.iloc[0], name).value for words, name in TIMES.items()}
    return {words: _elsewhere(value) for words, value in found.items()}


def _elsewhere(value: float) -> str:
    return "—" if pd.isna(value) else f"{value:.2f}{ELSEWHERE}"


# ---- sentences ------------------------------------------------------------------------------------------------------


def rule(*several: Records) -> str:
    """How a row is chosen."""
    choices(*several)  # there are rows
    return (
        "**怎样选。** 每行的方法由记录选出：名不副实的（实际做的与名字所说的不符，@tbl-degenerate）不算；"
        "在每种文本、每项任务上都没有明确输给最好者的，取损失最小的一种，“≈”之后是另外几种；"
        "没有这样的方法，就各写各的（逐个相减，全表的比较一起校正）。"
        f"{_left_out(several)}挑选与评分用同一批数据，所以表里的数略为乐观。"
    )


def _left_out(several: tuple[Records, ...]) -> str:
    uses: dict[tuple[str, ...], list[str]] = {}
    for use in USES:
        uses.setdefault(tuple(not_candidates(use, *several)), []).append(use.name)
    told = {listed(presses): listed(names) for presses, names in uses.items() if presses}
    return "".join(f"{presses} 没有按{names}测全，不在那几行的候选里。" for presses, names in told.items())


def columns(settings: list[Records], *several: Records) -> str:
    """What stands in them."""
    plain = _cell(settings).iloc[0]
    elsewhere = [
        "每步写的是同一压缩率下别的方法",
        *filter(None, [_where_first(settings, *several), _bits_timed(settings)]),
    ]
    return (
        "**各列。** 事后提问指压缩时还不知道问题（问题在外），问题已知指压缩时看得到它（问题在内），"
        f"{SAVING}的各行条目全留，每个数少记几位。损失是每个词元多出的 nat；口令是答对的比例，"
        "末词、抄写是两项得分的平均；缓存是不压缩时的几分之几；每步与首词元的用时是本库不压缩时的几倍："
        f"{plain.model} 的形状、上下文 {plain.context_tokens}、批 {plain.batch_size}。"
        f"带 * 的没有在那里计时：{'；'.join(elsewhere)}。"
    )


def _bits_timed(settings: list[Records]) -> str:
    try:
        first = timed_in_bits(settings).iloc[0]
    except Missing:
        return ""
    return f"几位的各行在批 {first['batch_size']}、{first['dtype']} 时测得"


def advice(*several: Records) -> str:
    """What is chosen for each use, as a list."""
    chosen = {use: [one for one in choices(*several) if one.use == use] for use in USES}
    return bullets(f"**{use.name}**：{_chosen_in_words(found)}。" for use, found in chosen.items() if found)


def _chosen_in_words(chosen: list[Choice]) -> str:
    alike: dict[tuple, list[str]] = {}
    for one in chosen:
        alike.setdefault((one.press, one.level, one.parts), []).append(f"{one.ratio:g}")
    parts = [
        f"压缩率 {listed(ratios)} {f'的{listed(of)}' if of else ''}用 {press}"
        + (f"（{listed(level)} 与它分不出）" if level else "")
        for (press, level, of), ratios in alike.items()
    ]
    return "，".join(parts)


def knowing(*several: Records) -> str:
    """Whether it helps to show the press the question, for whoever may choose the method."""
    outside, inside = ([one for one in choices(*several) if one.use == use] for use in (AFTERWARDS, BEFOREHAND))
    pairs = [(one, other) for one in outside for other in inside if one.ratio == other.ratio]
    differences = {
        (part, one.ratio): of_part
        for one, other in pairs
        for part, of_part in _between(one, other, several).groupby(level="part", sort=False)
        if {part} <= set(one.parts or [part]) & set(other.parts or [part])
    }
    if not differences:
        raise Missing("tasks", "问题在内与在外都测过的方法")
    sure = holm(np.array([*map(_p, differences.values())])) < 0.05
    told: dict[tuple[str, str], list[str]] = {}
    for (part, ratio), is_sure in zip(differences, sure):
        if is_sure:
            verdict = "不看的更好" if differences[part, ratio].mean() > 0 else "看到的更好"
            told.setdefault((part, verdict), []).append(f"{ratio:g}")
    said = [f"{part}在压缩率 {listed(ratios)} 是{verdict}" for (part, verdict), ratios in told.items()]
    rest = [] if sure.all() else ["其余分不出" if said else "各项都分不出"]
    return f"问题已知时，让方法看到问题的那一行，与不看问题的那一行逐项相比：{'，'.join(said + rest)}。"


def _between(outside: Choice, inside: Choice, several: tuple[Records, ...]) -> pd.Series:
    """By how much less is lost with the question inside, where both were asked the same."""
    one, other = (by_ratio(choice.use, several)[choice.ratio][choice.press] for choice in (outside, inside))
    return (other - one).dropna()

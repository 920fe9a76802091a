"""The first page of the report: what was found, in five lines and a paragraph, and where it comes from.

The first three lines are of one setting, that of the shortest step.
"""

import contextlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd

from kvneox_lib.pages import storage, timings, turns
from kvneox_lib.pages.copying import OURS
from kvneox_lib.pages.decision import (
    ABOUT_THE_TEXT,
    AFTERWARDS,
    PARTS,
    SAVING,
    TEXTS,
    Choice,
    best_by_part,
    choices,
    not_candidates,
    that_count,
)
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.heads import tried
from kvneox_lib.pages.overview import every_setting
from kvneox_lib.pages.quality import WINDOW_CONTROL, furthest_moved
from kvneox_lib.pages.report import Missing, Records, found_in, middle_ratio, models, repository
from kvneox_lib.pages.selecting import bits_of, of_one_storage, with_strength
from kvneox_lib.pages.words import ENGINES, listed, number, tiny, with_interval
from kvneox_lib.studies.provenance import provenance

CONTROLS = ("random", WINDOW_CONTROL)  # no methods

# ---- the five lines -------------------------------------------------------------------------------------------------


def _gain(speed: Records) -> timings.Gain:
    """At one context and batch: this library without a press and with the one that is fastest, and transformers'."""
    gains = timings.engine_gains(timings.at_corner(speed.runs()))
    if not gains or gains[0].best is None:
        raise Missing(speed.study, "本库与 transformers 的对照")
    return gains[0]


def _of_run(run: pd.Series, records: Records) -> pd.Series | None:
    """What was measured of its press at its ratio."""
    same = of_one_storage(records.runs())
    same = same[(same["press"] == run["press"]) & (same["compression_ratio"] == run["compression_ratio"])]
    return same.iloc[0] if len(same) else None


def faster(speed: Records) -> str:
    """What compression does, what the implementation does, and both."""
    found = _gain(speed)
    stock = found.fastest_stock
    return (
        f"**快多少。** 解码的速度，压缩之后（{with_strength(found.best)}）是不压缩的 {found.by_compression.in_words}；"
        f"都不压缩，本库是 {ENGINES[stock.engine]}的 {turns.ratio(stock, found.plain).in_words}；"
        f"两样合计 {turns.ratio(stock, found.best).in_words}。"
        f"{found.plain.model} 的形状，{found.where}。"
    )


def details(speed: Records) -> str:
    """Of that setting what the lines have no room for."""
    found = _gain(speed)
    plain, best = found.plain, found.best
    level = ""
    if len(found.level):
        level = f"{listed(timings.press_and_strength(found.level))} 与 {best['press']} 分不出快慢；"
    first = turns.ratio(best, plain, "prefill_s")
    begins = "" if pd.isna(first.value) else f"首词元的用时是不压缩的 {first.in_words}；"
    peaks = [f"{_mb(row, 'peak_above_bytes')}（{timings.CACHES[engine]}）" for engine, row in found.stock.items()]
    return (
        f"前三行测于 {plain.device_name}（{plain.device}，{plain['dtype']}），方括号里是 95 % 区间；"
        f"与本库相比的是 transformers 的缓存里最快的一种。{level}{begins}{_at_smallest_batch(speed.runs(), best)}"
        f"内存的峰值都是比运行之前多用的，不压缩的 transformers 解码时是 {listed(peaks)}；"
        f"连权重与程序本身，解码时整个进程{_from_to(found, 'peak_bytes')}。"
    )


def _at_smallest_batch(runs: pd.DataFrame, run: pd.Series) -> str:
    """The cache is less of what a step reads there."""
    cells = [gain for gain in timings.engine_gains(runs) if gain.plain.context_tokens == run.context_tokens]
    least = min(cells, key=lambda gain: gain.plain.batch_size)
    same = timings.timed_runs(runs)
    for name in ("press", "compression_ratio", "engine", "context_tokens", "dtype"):
        same = same[same[name] == run[name]]
    same = same[(same["batch_size"] == least.plain.batch_size) & bits_of(same).isna()]
    if least.plain.batch_size == run.batch_size or same.empty:
        return ""
    return f"批 {least.plain.batch_size} 时，压缩的一份是 {turns.ratio(least.plain, same.iloc[0]).in_words}。"


def smaller(speed: Records) -> str:
    """The cache, and the peaks of both phases."""
    found = _gain(speed)
    cache, decoding, prefill = (
        _from_to(found, name) for name in ("kv_bytes", "peak_above_bytes", "prefill_peak_above_bytes")
    )
    return f"**省多少。** 同一设置，缓存{cache}；多用的内存，解码时的峰值{decoding}，读上下文时的{prefill}。"


def _from_to(found: timings.Gain, name: str) -> str:
    return f"由 {_mb(found.plain, name)} 变为 {_mb(found.best, name)}"


def _mb(run: pd.Series, name: str) -> str:
    size = run.get(name)
    return "—" if pd.isna(size) else f"{float(size) / 1e6:.0f} MB"


def lost(speed: Records, *several: Records) -> str:
    """Of the same setting: of texts that go on, of what is asked for afterwards; beside the best at this ratio."""
    *texts, recall, _ = several
    run = _gain(speed).best
    rows = {PARTS[records.study]: _of_run(run, records) for records in texts}
    if any(row is None for row in rows.values()):
        raise Missing(texts[0].study, with_strength(run))
    parts = [f"{with_interval(row, 'delta_nll')} nat（{name}）" for name, row in rows.items()]
    same = _of_run(run, replace(recall, frame=that_count(recall, "outside")))
    asked = "" if same is None else f"；口令答对 {with_interval(same, 'accuracy', 2)}"
    return f"**损失什么。** 同一设置，续写每个词元多 {listed(parts)}{asked}。{_best_instead(run, several)}"


def as_perplexity(speed: Records, *texts: Records) -> str:
    """What the nats of that line are as factors."""
    rows = {PARTS[records.study]: _of_run(_gain(speed).best, records) for records in texts}
    parts = [f"{name}乘以 {with_interval(row, 'ppl_ratio', 2)}" for name, row in rows.items() if row is not None]
    return f"换成困惑度，续写的损失是{'，'.join(parts)}。" if parts else ""


def _best_instead(run: pd.Series, several: tuple[Records, ...]) -> str:
    """What goes on best with as much kept, if it is another press."""
    best = [one for one in choices(*several) if one.use.studies == TEXTS and one.ratio == run["compression_ratio"]]
    if any(run["press"] in (one.press, *one.level) for one in best) or not best:
        return ""
    return f"留下同样多，续写损失最小的是 {listed(_with_losses(one, several) for one in best)}。"


def _with_losses(one: Choice, several: tuple[Records, ...]) -> str:
    run = pd.Series({"press": one.press, "compression_ratio": one.ratio})
    losses = [
        f"{PARTS[records.study]} {_of_run(run, records)['delta_nll']:.3f}"
        for records in several
        if records.study in TEXTS and (not one.parts or PARTS[records.study] in one.parts)
    ]
    level = f"；与 {listed(one.level)} 分不出" if one.level else ""
    return f"{one.press}（{'、'.join(losses)} nat{level}）"


def answers(recall: Records, task_runs: Records) -> str:
    """What becomes of what was asked for after compression."""
    ratio = middle_ratio(recall)
    whole = found_in("recall", of_one_storage(that_count(recall, "outside")).query("press == 'no_press'"), "no_press")
    every = _methods(recall, ratio)
    runs = healthy(every)
    scores = of_one_storage(that_count(task_runs, "outside"))

    def of_tasks(press: str) -> str:
        same = scores[(scores["press"] == press) & scores["compression_ratio"].isin([0.0, ratio])]
        return number(same["score"].mean() if set(same["dataset"]) == set(ABOUT_THE_TEXT) else None, ".2f")

    good, forgotten = runs[runs["accuracy"] >= 0.5], runs[runs["accuracy"] < 0.05]
    both = [("不压缩", whole.iloc[0].accuracy, of_tasks("no_press"))]
    both += [(row.press, row.accuracy, of_tasks(row.press)) for row in good.itertuples()]
    plain, *kept = (f"{name}（{said:.2f}，{score}）" for name, said, score in both)
    about = "与".join(PARTS[task] for task in ABOUT_THE_TEXT)
    return (
        f"**检索与任务。** 压缩时不知道问题，压缩率 {ratio:g}：{len(runs)} 种方法里 {len(forgotten)} 种几乎答不出口令"
        f"（不到二十分之一），答对一半以上的（括号里是口令答对的比例，{about}的平均得分）：{listed(kept)}；{plain}。"
        f"{_not_what_it_says(every.drop(runs.index))}"
    )


def _methods(recall: Records, ratio: float) -> pd.DataFrame:
    """What was asked for after compression; the best first."""
    runs = of_one_storage(recall.runs(query_aware=False, compression_ratio=ratio))
    return runs[~runs["press"].isin(CONTROLS)].sort_values("accuracy", ascending=False)


def _not_what_it_says(runs: pd.DataFrame) -> str:
    """Who would be among those that answer, and is not counted."""
    names = [f"{row.press}（{row.accuracy:.2f}）" for row in runs.itertuples() if row.accuracy >= 0.5]
    return f"{listed(names)}名不副实，不在其列（@tbl-degenerate）。" if names else ""


def fewer_bits(*with_bits: Records) -> str:
    """Where fewer bits are better than fewer entries, by the same bytes."""
    found = storage.qualities(*with_bits)
    told = storage.who_wins_in_little(found, storage.verdicts_of_tables(found))
    return f"**少记几位。** {_bits_alone(found[0])}。" + (f"括号里是领先多少：缓存{told}。" if told else "")


def saving(*with_bits: Records) -> str:
    """Down to which size fewer bits alone lose to nothing, as an item of a list."""
    won, bits = storage.verdicts_of_tables(storage.qualities(*with_bits)), storage.WAYS["bits"]
    beaten = {size for (_, size), one in won.items() if one and one.is_clear and one.first != "bits"}
    sizes = [size for size in storage.SIZES if size not in beaten and _fits(size, with_bits)]
    if not sizes:
        return f"- **{SAVING}**：没有一种大小上{bits}不输给淘汰，逐项查 @tbl-bits-nll 与 @tbl-bits-answers。"
    return (
        f"- **{SAVING}**：缓存许有 float32 的 {listed(map(storage.fraction, sizes))} 时{bits}，没有一项分明不如"
        "淘汰；再小逐项查 @tbl-bits-nll 与 @tbl-bits-answers。"
    )


def _fits(size: float, with_bits: tuple[Records, ...]) -> bool:
    return all("bits" in set(storage.best_within(one, size)["way"]) for one in storage.qualities(*with_bits))


def _bits_alone(quality: storage.Quality) -> str:
    found = quality.configurations.query("way == 'bits'").sort_values("share", ascending=False)
    bits, shares, losses = (
        "、".join(format(value + 0, spec) for value in found[name])
        for name, spec in {"bits": ".0f", "share": ".2f", "loss": ".3f"}.items()
    )
    return (
        f"条目全留，每个数只记 {bits} 位：缓存是 float32 的 {shares}，{quality.name}是 {losses}"
        f"{quality.kind.measured_in}"
    )


# ---- the argument, and where it comes from --------------------------------------------------------------------------


def argument(causes: Records, recall: Records, *several: Records) -> str:
    """The chain from a perplexity that sees nothing to the heads that copy."""
    wiki, books, *_ = several
    moved = furthest_moved(wiki, books)
    return (
        "要说损失多少，先要有测得到损失的测法。一次前向的教师强制不读压缩后的缓存，压得再狠困惑度也"
        f"{'分毫不变' if moved == 0 else f'最多变动 {tiny(moved)}'}（@sec-artefact）；"
        "让续文去读压缩后的缓存，损失才显出来。"
        f"{_forgotten(recall, books)}{_copying(causes)}{_budget_for_them(several)}"
    )


def _forgotten(recall: Records, text: Records) -> str:
    """How little perplexity may tell of presses that recall nothing."""
    ratio = middle_ratio(recall)
    at = healthy(_methods(recall, ratio)).set_index("press")["accuracy"]
    losses = healthy(of_one_storage(text.runs(compression_ratio=ratio))).set_index("press")["ppl_ratio"]
    forgetful = pd.to_numeric(losses[losses.index.intersection(at.index[at < 0.05])])
    if forgetful.empty:
        return ""
    return (
        f"困惑度还会把损失摊薄：压缩率 {ratio:g} 时几乎答不出口令的方法里，{forgetful.idxmin()} 的困惑度只乘以 "
        f"{forgetful.min():.2f}（{PARTS[text.study]}，@sec-blind）。"
    )


def _copying(causes: Records) -> str:
    shares = tried(causes.table("trial")).query("press == 'no_press'").set_index(["digits", "group"])["value"]
    run = causes.run(press="no_press")
    without, others = (shares.get(("dropped", group), float("nan")) for group in ("copying", "others"))
    if not without < 0.5 <= others:
        return ""
    return (
        f"口令靠 {run.n_heads:.0f} 个头里抄写的 {run.n_copying_heads:.0f} 个答出来：只从它们里去掉口令的数字，准确率由 "
        f"{shares['as_is', 'none']:.2f} 变为 {without:.2f}，从其余全部头里去掉则是 {others:.2f}（@sec-heads）。"
    )


def _budget_for_them(several: tuple[Records, ...]) -> str:
    asked = [one for one in choices(*several) if one.use == AFTERWARDS]
    if {(one.press, one.level, one.parts) for one in asked} != {(OURS, (), ())}:
        return ""
    best = [parts for (use, _), parts in best_by_part(*several).items() if use == AFTERWARDS]
    beside = {part: [set(of[part]) - {OURS} for of in best] for part in best[0]}
    told = [f"{part}上{_won(dict(zip([one.ratio for one in asked], sets)))}" for part, sets in beside.items()]
    lacking = not_candidates(AFTERWARDS, *several)
    left_out = f"；{listed(lacking)} 没有测全，不在比较之列" if lacking else ""
    return (
        f"先把预算给这些头的 {OURS}，在测过的压缩率（{listed(f'{one.ratio:g}' for one in asked)}）上，是唯一"
        f"在{listed(beside)}上都没有明确输给最好者的方法。单看一项，{'，'.join(told)}{left_out}（@sec-copying）。"
    )


def _won(level: dict[float, set[str]]) -> str:
    """`level`: by ratio, who cannot be told from it."""
    alone, always = [f"{ratio:g}" for ratio, names in level.items() if not names], set.intersection(*level.values())
    if alone:
        return f"它只在压缩率 {listed(alone)} 明确好于其余各种" if len(alone) < len(level) else "它明确好于其余各种"
    return f"它与 {listed(sorted(always))} 分不出" if always else "它总与别的某一种分不出"


def evidence(speed: Records, *several: Records) -> str:
    n = sum(pd.to_numeric(records.run().get("n_documents", float("nan"))) for records in several[:2])
    texts = "" if pd.isna(n) else f"和 {n:.0f} 篇文本"
    return (
        f"证据只到这里：质量的数字来自{models(*several)}{texts}，速度与内存来自{models(speed)}。"
        "它们能说明怎样才测得到损失，损失从哪里来，能省下多少时间与字节；不能说明在别的模型、别的文本上哪种方法最好（@sec-discussion）。"
    )


def imprint() -> str:
    """Licence, repository, commit and age: what is not known when the title is written."""
    here, found = repository(), provenance()
    parts = ["许可 Apache-2.0"]
    if url := web_address(here):
        parts.append(f"仓库 <{url}>")
    if found["git_commit"]:
        parts.append(f"提交 `{found['git_commit'][:7]}`" + ("（另有未提交的改动）" if found["git_dirty"] else ""))
    with contextlib.suppress(Missing):
        newest = max(str(records.frame["started_at"].max()) for records in every_setting())
        parts.append(f"最新的记录 {newest[:10]}")
    return "；".join(parts) + "。"


def web_address(folder: Path) -> str:
    """Of the repository around `folder`; nothing where its origin is no page that a reader can open."""
    command = ["git", "-C", folder, "remote", "get-url", "origin"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return public_address(done.stdout.strip())


def public_address(url: str) -> str:
    """A page that a reader can open, or nothing: no folder of this machine, and nobody's name or password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].removesuffix('.git')}" if scheme in ("http", "https") else ""

"""The first page of the report: what was found, in five lines and a paragraph, and where it comes from.

The first three lines are of one setting: of the runs whose step nobody can tell from the shortest one, that which loses
least.
"""

import contextlib
import subprocess
from dataclasses import dataclass, replace

import pandas as pd

from kvneox_lib.pages import storage, timings, turns
from kvneox_lib.pages.copying import OURS
from kvneox_lib.pages.decision import ABOUT_THE_TEXT, AFTERWARDS, SAVING, TEXTS, choices, that_count
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.heads import tried
from kvneox_lib.pages.overview import every_setting
from kvneox_lib.pages.quality import furthest_moved
from kvneox_lib.pages.report import Missing, Records, found_in, middle_ratio, models, repository
from kvneox_lib.pages.selecting import bits_of, of_one_storage, with_strength
from kvneox_lib.pages.tasks import named
from kvneox_lib.pages.words import ENGINES, STUDY_NAMES, listed, number, tiny, with_interval
from kvneox_lib.studies.provenance import provenance

# ---- the setting that the first lines are of ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Setting:
    """At one context and batch: this library without a press and with one, and the faster of transformers' caches."""

    plain: pd.Series
    run: pd.Series
    level: pd.DataFrame  # presses that are as fast
    stock: pd.Series
    losses: tuple[pd.Series, ...]  # of `run` on each text


def setting(speed: Records, *texts: Records) -> Setting:
    gains = timings.engine_gains(timings.at_corner(speed.runs()))
    if not gains or gains[0].best is None:
        raise Missing(speed.study, "本库与 transformers 的对照")
    gain = gains[0]
    fast = pd.concat([gain.best.to_frame().T, gain.level]).loc[lambda runs: bits_of(runs).isna()]
    losses = {name: _losses(run, texts) for name, run in fast.iterrows()}
    known = {name: found for name, found in losses.items() if len(found) == len(texts)}
    if not known:
        raise Missing(texts[0].study, "计过时的 press 与压缩率")
    least = min(known, key=lambda name: sum(row["delta_nll"] for row in known[name]))
    fastest = min(gain.stock.values(), key=lambda row: row.step_s)
    return Setting(gain.plain, fast.loc[least], fast.drop(index=least), fastest, known[least])


def _losses(run: pd.Series, texts: tuple[Records, ...]) -> tuple[pd.Series, ...]:
    found = []
    for records in texts:
        same = of_one_storage(records.runs())
        same = same[(same["press"] == run["press"]) & (same["compression_ratio"] == run["compression_ratio"])]
        found += [row for _, row in same.head(1).iterrows()]
    return tuple(found)


# ---- the five lines -------------------------------------------------------------------------------------------------


def faster(speed: Records, *texts: Records) -> str:
    """What compression does, what the implementation does, and both."""
    found = setting(speed, *texts)
    plain, run = found.plain, found.run
    level = f"；{listed(timings.press_and_strength(found.level))} 与它分不出快慢" if len(found.level) else ""
    first = turns.ratio(run, plain, "prefill_s")
    begins = "" if pd.isna(first.value) else f"首词元的用时是不压缩的 {first.in_words}。"
    return (
        f"**快多少。** 压缩：解码的速度是本库不压缩时的 {turns.ratio(plain, run).in_words}"
        f"（{with_strength(run)}{level}）。实现：都不压缩，本库是自带缓存里较快的 {ENGINES[found.stock.engine]}的 "
        f"{turns.ratio(found.stock, plain).in_words}。合起来 {turns.ratio(found.stock, run).in_words}。{begins}"
        f"测于 {plain.model} 的形状、上下文 {plain.context_tokens}、批 {plain.batch_size}"
        f"（{plain.device}，{plain['dtype']}）{_at_smallest_batch(speed.runs(), run)}。"
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
    return f"；批 {least.plain.batch_size} 时，压缩的一份是 {turns.ratio(least.plain, same.iloc[0]).in_words}"


def smaller(speed: Records, *texts: Records) -> str:
    """The cache, and what the process takes."""
    found = setting(speed, *texts)
    cache, decoding, prefill, process = (
        _from_to(found, name) for name in ("kv_bytes", "peak_above_bytes", "prefill_peak_above_bytes", "peak_bytes")
    )
    return (
        f"**省多少。** 同一设置，缓存{cache}；解码时进程比运行之前多用的内存，峰值{decoding}"
        f"（{ENGINES[found.stock.engine]} {_mb(found.stock, 'peak_above_bytes')}）。读上下文时的峰值{prefill}；"
        f"连权重与程序本身，解码时整个进程{process}。"
    )


def _from_to(found: Setting, name: str) -> str:
    return f"由 {_mb(found.plain, name)} 变为 {_mb(found.run, name)}"


def _mb(run: pd.Series, name: str) -> str:
    size = run.get(name)
    return "—" if pd.isna(size) else f"{float(size) / 1e6:.0f} MB"


def lost(speed: Records, *several: Records) -> str:
    """Of the same setting: of texts that go on, of what is asked for afterwards; beside the best at this ratio."""
    wiki, books, recall, _ = several
    found = setting(speed, wiki, books)
    parts = [
        f"{STUDY_NAMES[records.study]}每个词元多 {with_interval(row, 'delta_nll')} nat（困惑度乘以 "
        f"{with_interval(row, 'ppl_ratio', 2)}）"
        for records, row in zip((wiki, books), found.losses)
    ]
    same = _losses(found.run, (replace(recall, frame=that_count(recall, "outside")),))
    asked = f"；口令答对 {with_interval(same[0], 'accuracy', 2)}" if same else ""
    return f"**损失什么。** 同一设置，{'，'.join(parts)}{asked}。{_best_instead(found.run, several)}"


def _best_instead(run: pd.Series, several: tuple[Records, ...]) -> str:
    """What goes on best with as much kept, if it is another press."""
    best = [one for one in choices(*several) if one.use.studies == TEXTS and one.ratio == run["compression_ratio"]]
    if not best or run["press"] in (best[0].press, *best[0].level):
        return ""
    losses = _losses(pd.Series({**run, "press": best[0].press}), several[:2])
    told = "、".join(f"{row['delta_nll']:.3f}" for row in losses)
    return f"留下同样多、续写损失最小的是 {best[0].press}（{told} nat），各种用途该用哪一种见 @tbl-decision。"


def answers(recall: Records, task_runs: Records) -> str:
    """What becomes of what was asked for after compression."""
    ratio, runs = middle_ratio(recall), that_count(recall, "outside")
    whole = found_in("recall", of_one_storage(runs[runs["press"] == "no_press"]), "no_press").iloc[0]
    runs = of_one_storage(runs[runs["compression_ratio"] == ratio]).sort_values("accuracy", ascending=False)
    scores = of_one_storage(that_count(task_runs, "outside"))
    about = listed(named(task) for task in ABOUT_THE_TEXT)

    def of_tasks(press: str) -> float:
        same = scores[(scores["press"] == press) & scores["compression_ratio"].isin([0.0, ratio])]
        return same["score"].mean() if len(same) else float("nan")

    good, forgotten = runs[runs["accuracy"] >= 0.5], runs[runs["accuracy"] < 0.05]
    kept = [f"{row.press}（{row.accuracy:.2f}，{number(of_tasks(row.press), '.2f')}）" for row in good.itertuples()]
    return (
        f"**检索与任务。** 压缩时不知道问题，压缩率 {ratio:g}：{len(runs)} 种方法里 {len(forgotten)} 种几乎答不出口令"
        f"（不到二十分之一），答对一半以上的有 {listed(kept)}，不压缩时是"
        f"（{whole.accuracy:.2f}，{of_tasks('no_press'):.2f}）；后一个数是{about}两项任务的平均得分。"
    )


def fewer_bits(*with_bits: Records) -> str:
    """Where fewer bits are better than fewer entries, by the same bytes."""
    found = storage.qualities(*with_bits)
    won = _verdicts(found)
    parts = [f"缓存只许有 float32 的 {storage.fraction(size)} 时，{_winners(won[size])}" for size in (1 / 4, 1 / 8)]
    return f"**少记几位。** {_bits_alone(found[0])}。{'；'.join(parts)}。"


def saving(*with_bits: Records) -> str:
    """Down to which size fewer bits alone lose to nothing, as an item of a list."""
    won, bits = _verdicts(storage.qualities(*with_bits)), storage.WAYS["bits"]
    unbeaten = [
        size for size, verdicts in won.items() if not any(one.is_clear and one.first != "bits" for _, one in verdicts)
    ]
    sizes = [size for size in storage.SIZES if size in unbeaten and _fits(size, with_bits)]
    if not sizes:
        return f"- **{SAVING}**：没有一种大小上{bits}不输给核心方法的淘汰，逐项查 @tbl-bits-nll 与 @tbl-bits-answers。"
    return (
        f"- **{SAVING}**：缓存许有 float32 的 {listed(map(storage.fraction, sizes))} 时{bits}，没有一项分明不如"
        "核心方法的淘汰；再小逐项查 @tbl-bits-nll 与 @tbl-bits-answers。"
    )


def _fits(size: float, with_bits: tuple[Records, ...]) -> bool:
    return all("bits" in set(storage.best_within(one, size)["way"]) for one in storage.qualities(*with_bits))


def _verdicts(found: list[storage.Quality]) -> dict[float, list[tuple[str, storage.Verdict]]]:
    """By size, what was compared there, corrected as the two tables of the section are."""
    tables = [[one for one in found if one.kind.less_is_better == of_texts] for of_texts in (True, False)]
    won = storage.verdicts(tables[0]) | storage.verdicts(tables[1])
    return {
        size: [(one.name, won[one.name, size]) for one in found if won[one.name, size] and won[one.name, size].second]
        for size in storage.SIZES
    }


def _bits_alone(quality: storage.Quality) -> str:
    found = quality.configurations.query("way == 'bits'").sort_values("share", ascending=False)
    bits, shares, losses = (
        "、".join(format(value + 0, spec) for value in found[name])
        for name, spec in {"bits": ".0f", "share": ".2f", "loss": ".3f"}.items()
    )
    return (
        f"条目全留，每个数只记 {bits} 位：缓存是 float32 的 {shares}，{quality.name}是 {losses}"
        f"{quality.kind.measured_in}；再小就非淘汰不可"
    )


def _winners(verdicts: list[tuple[str, storage.Verdict]]) -> str:
    parts = []
    for way, words in storage.WAYS.items():
        names = [name for name, one in verdicts if one.is_clear and one.first == way]
        parts += [f"{words}在{'、'.join(names)}上最好"] if names else []
    level = [name for name, one in verdicts if not one.is_clear]
    return "，".join(parts + ([f"{'其余' if parts else '各项'}分不出"] if level else []))


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
    ratio, runs = middle_ratio(recall), that_count(recall, "outside")
    at = of_one_storage(runs[runs["compression_ratio"] == ratio]).set_index("press")["accuracy"]
    losses = healthy(of_one_storage(text.runs(compression_ratio=ratio))).set_index("press")["ppl_ratio"]
    forgetful = pd.to_numeric(losses[losses.index.intersection(at.index[at < 0.05])])
    if forgetful.empty:
        return ""
    return (
        f"困惑度还会把损失摊薄：压缩率 {ratio:g} 时几乎答不出口令的 {len(forgetful)} 种方法里，有一种的困惑度只乘以 "
        f"{forgetful.min():.2f}（@sec-blind）。"
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
    asked = {one.press for one in choices(*several) if one.use == AFTERWARDS}
    return f"先把预算给这些头的 {OURS}，在每个压缩率下都最能回答事后的问题（@sec-copying）。" if asked == {OURS} else ""


def evidence(speed: Records, *several: Records) -> str:
    n = sum(pd.to_numeric(records.run().get("n_documents", float("nan"))) for records in several[:2])
    texts = "" if pd.isna(n) else f"和 {n:.0f} 篇文本"
    return (
        f"证据只到这里：质量的数字来自{models(*several)}{texts}，速度与内存来自{models(speed)}。"
        "它们能说明怎样才测得到损失，损失从哪里来，能省下多少时间与字节；不能说明在别的模型上哪种方法最好（@sec-discussion）。"
    )


def imprint() -> str:
    """Licence, repository, commit and age: what is not known when the title is written."""
    here, found = repository(), provenance()
    parts = ["许可 Apache-2.0"]
    if url := public_address(_origin(here)):
        parts.append(f"仓库 <{url}>")
    if found["git_commit"]:
        parts.append(f"提交 `{found['git_commit'][:7]}`" + ("（另有未提交的改动）" if found["git_dirty"] else ""))
    with contextlib.suppress(Missing):
        newest = max(str(records.frame["started_at"].max()) for records in every_setting())
        parts.append(f"最新的记录 {newest[:10]}")
    return "；".join(parts) + "。"


def _origin(folder) -> str:
    try:
        command = ["git", "-C", str(folder), "remote", "get-url", "origin"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def public_address(url: str) -> str:
    """A page that a reader can open, or nothing: no folder of this machine, and nobody's name or password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].removesuffix('.git')}" if scheme in ("http", "https") else ""

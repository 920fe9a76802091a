"""What the READMEs and docs/ do not say by hand: tables of presses, parameters and results, and pictures.

    make readme

puts each block between its marks, `<!-- name -->` and `<!-- /name -->`, and draws docs/*.png (`pictures.py`). All
numbers are of the records in results/reference alone.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import matplotlib
import pandas as pd
import papermill
import pictures
from pictures import ROOT, asked_afterwards, bundled_runs, core_runs, runs_of, settings

from kvneox_lib import expand_presses
from kvneox_lib.pages import kinds, losses, quality, storage, streams, timings, turns, wordings
from kvneox_lib.pages import tasks as task_pages
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.selecting import pressed
from kvneox_lib.pages.tables import press_table
from kvneox_lib.pages.words import STUDY_NAMES, listed, number, weights_in_words
from kvneox_lib.studies.records import load_records
from kvneox_lib.studies.table import STUDIES

WRITTEN = [ROOT / "README_zh.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {"wikitext_ppl": "短文", "pg19_ppl": "长书"}
SHOWN_RATIOS = (0.5, 0.9)
# A control; by position; by keys, two that contradict each other; by attention; budgets for heads; by neighbours; by
# what heads do.
SHOWN_PRESSES = ("random", "streaming_llm", "knorm", "keydiff", "snapkv", "adakv_snapkv", "lagkv", "copying_heads")
CONTROLS = ["random", "random_recent"]
CORE_METHODS = "[docs/presses.md](docs/presses.md)"
COSTS_IN_ENGLISH = {
    "续文也被压缩": "compresses what follows too",
    "压缩时再读一遍上下文": "reads the context again to compress it",
    "先量一次模型": "measures a model once before",
    "只能用 eager 注意力": "needs eager attention",
    "键的部分通道置零（不省内存）": "sets channels of keys to zero and saves no memory",
}
NOT_WHAT_IT_SAYS = "“—”：这个设置名不副实，不参加比较，原因见报告附录。"
SAID_IN_NO_NOTEBOOK = {
    "batch_size": "每批几个窗口",
    "batch_sizes": "批的大小；与 `context_lengths` 的每个组合都测",
    "context_length": "被压缩的上下文有多少个词元",
    "context_lengths": "上下文的长度",
    "device": "`auto`：有 CUDA 就用，否则 CPU；`all`：一个模型铺在看得见的全部 GPU 上",
    "dtype": "`auto`：GPU 上 bfloat16（不支持时 float16），CPU 上 float32；03 也可以给一个列表，在同一次运行里轮流计时",
    "output_dir": "记录放在哪里，从 `params/` 所在的文件夹算起",
    "seed": "随机权重与随机 press 的种子",
    "split": "数据集的哪一部分",
}


def markdown(rows: list[list[str]], *, head: list[str]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def missing(study: str) -> str:
    return f"（`results/reference/{study}.csv` 里还没有记录。）"


# ---- tables ---------------------------------------------------------------------------------------------------------


def parameter_table() -> str:
    """Every parameter of every notebook, with its defaults, from the notebooks themselves."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for name, parameter in papermill.inspect_notebook(str(path)).items():
            found.setdefault(name, {})[path.stem[:2]] = parameter
    rows = [[f"`{name}`", *_defaults(by_notebook), _meaning(name, by_notebook)] for name, by_notebook in found.items()]
    return markdown(rows, head=["参数", "笔记本", "默认", "含义"])


def _defaults(by_notebook: dict[str, dict]) -> tuple[str, str]:
    values: dict[str, list[str]] = {}
    for notebook, parameter in by_notebook.items():
        values.setdefault(parameter["default"].replace('"', ""), []).append(notebook)
    shown = [f"`{value}`" if len(values) == 1 else f"{spans(of)}：`{value}`" for value, of in values.items()]
    return spans(by_notebook), "；".join(shown)


def spans(numbers: Iterable[str]) -> str:
    """01–03、05"""
    found: list[list[str]] = []
    for number_of in numbers:
        if found and int(number_of) == int(found[-1][-1]) + 1:
            found[-1].append(number_of)
        else:
            found.append([number_of])
    return "、".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else "、".join(run) for run in found)


def _meaning(name: str, by_notebook: dict[str, dict]) -> str:
    if name in SAID_IN_NO_NOTEBOOK:
        return SAID_IN_NO_NOTEBOOK[name]
    meanings: dict[str, list[str]] = {}
    for notebook, parameter in by_notebook.items():
        if parameter["help"]:
            meanings.setdefault(parameter["help"], []).append(notebook)
    if not meanings:
        raise ValueError(f"{name}: no notebook says what it means, nor does SAID_IN_NO_NOTEBOOK")
    return "；".join(text if len(meanings) == 1 else f"{spans(of)}：{text}" for text, of in meanings.items())


def quality_table() -> str:
    """What some presses cost on the bundled model: perplexity as a multiple of no compression's, and recall."""
    columns, notes, shown = {}, [], []
    for study, text in TEXTS.items():
        runs = _of_the_shown(bundled_runs(study))
        shown.append(runs)
        plain = runs[runs["press"] == "no_press"].iloc[0]
        notes.append(
            f"{text}（{plain['dataset']}）{plain['n_windows']:.0f} 个窗口{losses.of_documents(plain)}，"
            f"每个窗口上下文 {plain['context_tokens']} 个词元，不压缩时困惑度 {plain['ppl']:.1f}"
        )
        for ratio in SHOWN_RATIOS:
            columns[f"{text} {ratio:.2f}"] = _by_press(runs, ratio, "ppl_ratio")
    recall = _of_the_shown(asked_afterwards(bundled_runs("recall")))
    plain = recall[recall["press"] == "no_press"].iloc[0]
    notes.append(
        f"口令 {plain['n_keys']:.0f} 个，上下文 {plain['context_tokens']} 个词元，先压缩再提问，不压缩时答对 "
        f"{plain['accuracy']:.3f}"
    )
    for ratio in SHOWN_RATIOS:
        columns[f"口令 {ratio:.2f}"] = _by_press(recall, ratio, "accuracy")
    table = pd.DataFrame(columns).sort_values(f"{TEXTS['wikitext_ppl']} {SHOWN_RATIOS[-1]:.2f}")
    note = f"{_measured_on(*shown, recall)}。{'；'.join(notes)}。{wordings.known(recall)}{_dashes(table)}"
    return f"{_by_name(table, '.3f')}\n\n{note}"


def _of_the_shown(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs["press"].isin(("no_press", *SHOWN_PRESSES))]


def _by_press(runs: pd.DataFrame, ratio: float, column: str) -> pd.Series:
    """Without degenerate runs: they are in no order with the others."""
    runs = healthy(runs)
    return runs[runs["compression_ratio"] == ratio].set_index("press")[column]


def _by_name(table: pd.DataFrame, spec: str) -> str:
    rows = [[f"`{name}`", *(number(value, spec) for value in row)] for name, row in zip(table.index, table.to_numpy())]
    return markdown(rows, head=["press", *table.columns])


def _measured_on(*tables: pd.DataFrame) -> str:
    runs = pd.concat(tables)
    models = [
        f"{model}（权重：{weights}）" for model, weights in runs[["model", "weights"]].drop_duplicates().to_numpy()
    ]
    return f"模型 {listed(models)}，{listed(runs['device_name'].unique())}，{listed(runs['dtype'].unique())}"


def _dashes(table: pd.DataFrame) -> str:
    return NOT_WHAT_IT_SAYS if table.isna().any(axis=None) else ""


def task_table() -> str:
    """Scores of the tasks in the box, the question read after compression, the best on average first."""
    runs = _of_the_shown(runs_of("tasks"))
    if runs.empty:
        return missing("tasks")
    outside = task_pages.in_mode(runs, "outside")
    columns = {
        f"{task_pages.named(task)} {ratio:.2f}": _by_press(part, ratio, "score")
        for task, part in outside.groupby("dataset", sort=False)
        for ratio in SHOWN_RATIOS
    }
    table = pd.DataFrame(columns)
    table = table.loc[table.mean(axis=1).sort_values(ascending=False).index]
    plain = outside[outside["press"] == "no_press"]
    bare = "，".join(f"{task_pages.named(row.dataset)} {row.score:.2f}" for row in plain.itertuples())
    note = (
        f"{_measured_on(outside)}；每项 {plain['n_documents'].iloc[0]:.0f} 篇，列名里的数是压缩率。不压缩时：{bare}。"
        f"{wordings.known(plain)}{_dashes(table)}"
    )
    return f"{_by_name(table, '.2f')}\n\n{note}"


def control_line() -> str:
    """How little the teacher-forced control moved, beside how much the truth did: of the report's runs."""
    texts = [storage.as_it_is(pictures.first(study)) for study in TEXTS]
    runs, moved = pd.concat(map(quality.pressed, texts), ignore_index=True), quality.furthest_moved(*texts)
    worst = runs.loc[runs["delta_nll"].idxmax()]
    control = f"最多动了 {moved:.1g} nat" if moved else "一次也没有动"
    return (
        f"两种文本、各种方法与随机对照、各压缩率，共 {len(runs)} 次运行里，教师强制的对照"
        f"（[怎样才算测到了](#怎样才算测到了)）{control}，而压缩之后续读的 "
        f"nll 最多增加 {worst['delta_nll']:.2f} nat（`{worst['press']}`，压缩率 {worst['compression_ratio']:.2f}）。"
    )


def speed_table() -> str:
    """Five rows of the first setting; its other presses, and the other settings, are in the figure."""
    if not settings("speed"):
        return missing("speed")
    runs = timings.timed_settings(settings("speed"))[0].frame
    run, table = timings.at_corner(runs).iloc[0], timings.in_short(runs).drop(columns="上下文×批")
    caption = (
        f"{run.model}（权重：{run.weights}），{run.device_name}，{run['dtype']}，上下文 {run.context_tokens}，批 "
        f"{run.batch_size}；毫秒，各轮的中位数（四分位数）。{turns.basis(timings.at_corner(runs))}"
    )
    return f"{markdown(table.to_numpy().tolist(), head=list(table))}\n\n{caption}"


def streaming_table() -> str:
    runs = runs_of("streaming")
    if not len(runs):
        return missing("streaming")
    timed, parts = runs[runs["timed"].eq(True)], []  # the ablation's are not timed
    for (model, weights, dataset, device), group in timed.groupby(["model", "weights", "dataset", "device_name"]):
        table = streams.reading_table(group.sort_values(["n_tokens", "press", "n_sink"]))
        note = "计分的词元不同的行，困惑度不能直接相比；同一批词元上的比较见笔记本和报告。"
        rows = markdown(table.to_numpy().tolist(), head=list(table))
        parts.append(f"{rows}\n\n{model}（权重：{weights}），{dataset}，{device}。{note}")
    return "\n\n".join(parts)


# ---- the results in three sentences ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faster:
    """One model, context and batch in all precisions that were timed, at the middle ratio. Ranges go from the lowest
    end of an interval to the highest."""

    run: pd.Series  # this library without compression
    ratio: float
    cache: tuple[float, float]  # its bytes against the whole cache's
    step: tuple[float, float]  # of all presses, against this library's without one
    transformers: tuple[float, float]  # a step over its own fastest cache against this library's, without compression


def faster() -> list[Faster]:
    cells = [timings.at_middle_ratio(timings.at_corner(one.frame)) for one in timings.timed_settings(settings("speed"))]
    by_size = pd.concat(cells).groupby(["model", "context_tokens", "batch_size", "device_name"], sort=False)
    return [_faster([part for _, part in size.groupby("dtype", sort=False)]) for _, size in by_size]


def _faster(precisions: list[pd.DataFrame]) -> Faster:
    steps, others, compressed = [], [], []
    for cell in precisions:
        ours = cell[cell["engine"] == "ours"]
        plain = ours[ours["press"] == "no_press"].iloc[0]
        compressed.append(pressed(ours))
        steps += [turns.ratio(row, plain) for _, row in compressed[-1].iterrows()]
        others.append(turns.ratio(timings.fastest_transformers(cell), plain))
    shown = pd.concat(compressed)
    shares = shown["kv_bytes_compressed"] / shown["kv_bytes_full"]
    return Faster(plain, shown["compression_ratio"].iloc[0], (shares.min(), shares.max()), _ends(steps), _ends(others))


def _ends(ratios: list[turns.Ratio]) -> tuple[float, float]:
    return min(one.low for one in ratios), max(one.high for one in ratios)


@dataclass(frozen=True)
class Kept:
    """What is left of the core methods' quality at a ratio: presses without the controls."""

    ratio: float
    perplexity: tuple[float, float]  # as a multiple of no compression's, least and most
    plain_recall: float
    finding: dict[str, float]  # presses that answer at least half of what is answered without one
    others: list[float]
    of_least_loss: tuple[str, float]  # of those in both, the press whose perplexity rises least, and its recall


def kept(ratio: float) -> Kept:
    recall = asked_afterwards(core_runs("recall"))
    plain = recall.loc[recall["press"] == "no_press", "accuracy"].iloc[0]
    perplexity = _of_methods(core_runs("wikitext_ppl"), ratio, "ppl_ratio")
    answered = _of_methods(recall, ratio, "accuracy").sort_values(ascending=False)
    finds = answered >= plain / 2
    least = perplexity[perplexity.index.isin(answered.index)].idxmin()
    return Kept(
        ratio=ratio,
        perplexity=(perplexity.min(), perplexity.max()),
        plain_recall=plain,
        finding=answered[finds].to_dict(),
        others=answered[~finds].tolist(),
        of_least_loss=(least, answered[least]),
    )


def _of_methods(runs: pd.DataFrame, ratio: float, column: str) -> pd.Series:
    return _by_press(runs, ratio, column).drop(CONTROLS, errors="ignore")


@dataclass(frozen=True)
class Beside:
    """A method that is not among the core ones and was measured like them."""

    press: str
    perplexity: list[float]  # at each of SHOWN_RATIOS
    recall: list[float]


def beside() -> list[Beside]:
    """Those measured in both, at every ratio; that which loses least first."""
    runs = {"ppl_ratio": bundled_runs("wikitext_ppl"), "accuracy": asked_afterwards(bundled_runs("recall"))}
    measured = [_of_methods(runs[name], ratio, name) for name in runs for ratio in SHOWN_RATIOS]
    table = pd.concat(measured, axis=1).dropna().drop(expand_presses("all"), errors="ignore")
    n = len(SHOWN_RATIOS)
    found = [Beside(press, values[:n], values[n:]) for press, *values in table.itertuples()]
    return sorted(found, key=lambda one: one.perplexity[-1])


def results_in_chinese() -> str:
    sizes, (half, hard) = faster(), map(kept, SHOWN_RATIOS)
    least, its_recall = hard.of_least_loss
    run, found = sizes[0].run, [f"`{name}` 答对 {_percent(share)}" for name, share in hard.finding.items()]
    if hard.others:
        found.append(f"{'其余 ' if found else ''}{len(hard.others)} 种最多答对 {_percent(max(hard.others))}")
    least_loss = f"两项都可比的核心方法里，困惑度增加得最少（点估计）的 `{least}` 答对 {_percent(its_recall)}。"
    others = [
        f"`{one.press}`（{kinds.cost_of(one.press)}）困惑度 {_each(one.perplexity, '.2f')} 倍，口令答对 "
        f"{'、'.join(map(_percent, one.recall))}"
        for one in beside()
    ]
    ratios = "、".join(map(_percent, SHOWN_RATIOS))
    elsewhere = f"\n- **核心方法之外**（括号里是代价；依次是丢掉 {ratios}）：{'；'.join(others)}。" if others else ""
    times = "".join(
        f"  - {at.run.model}，上下文 {at.run.context_tokens}，批 {at.run.batch_size}：丢掉 {_percent(at.ratio)}，缓存占"
        f"原来的 {_range(at.cache, '.0%')}，一步用时是本库不压缩时的 {_range(at.step, '.2f')} 倍；transformers 较快的"
        f"那种缓存（不压缩）是本库的 {_range(at.transformers, '.2f')} 倍。\n"
        for at in sizes
    )
    return (
        f"- **快多少、省多少**（Pythia 的形状，{weights_in_words(run.model, run.weights)}，{run.device_name}；"
        f"范围由各方法、各精度的 95 % 区间合成，没有逐轮记录的是四分位数）：\n{times}"
        f"- **续写损失多少**（自带的 demo 模型，WikiText）：丢掉 {_percent(half.ratio)}，核心方法的困惑度变为 "
        f"{_range(half.perplexity, '.2f')} 倍；丢掉 {_percent(hard.ratio)}，{_range(hard.perplexity, '.2f')} 倍，"
        f"视方法而定（核心方法见 {CORE_METHODS}；随机对照与名不副实的设置不算）。\n"
        f"- **找东西损失多少**（同一模型）：丢掉 {_percent(hard.ratio)} 再问文中的口令，核心方法里 "
        f"{'，'.join(found)}；不压缩时 {_percent(hard.plain_recall)}。{'' if least in hard.finding else least_loss}"
        f"{elsewhere}"
    )


def results_in_english() -> str:
    sizes, (half, hard) = faster(), map(kept, SHOWN_RATIOS)
    least, its_recall = hard.of_least_loss
    run, found = sizes[0].run, [f"`{name}` answers {_percent(share)}" for name, share in hard.finding.items()]
    if hard.others:
        found.append(f"{'the other ' if found else ''}{len(hard.others)} at most {_percent(max(hard.others))}")
    least_loss = (
        f" Of those that count in both, `{least}`, whose perplexity rises least (a point estimate), answers "
        f"{_percent(its_recall)}."
    )
    others = [
        f"`{one.press}` ({_cost_in_english(one.press)}) has {_each(one.perplexity, '.2f', ' and ')} times the "
        f"perplexity and answers {' and '.join(map(_percent, one.recall))}"
        for one in beside()
    ]
    ratios = " and ".join(map(_percent, SHOWN_RATIOS))
    elsewhere = f"\n- **Beside the core methods**, with {ratios} evicted: {'; '.join(others)}." if others else ""
    times = "".join(
        f"  - {at.run.model}, {at.run.context_tokens} tokens of context, batch {at.run.batch_size}: with "
        f"{_percent(at.ratio)} evicted, the cache has {_range(at.cache, '.0%')} of its bytes, and a step takes "
        f"{_range(at.step, '.2f')} times as long as this library's without compression; over the faster of "
        f"transformers' own caches, uncompressed, {_range(at.transformers, '.2f')} times.\n"
        for at in sizes
    )
    return (
        f"- **Speed and memory** of decoding (Pythia's shapes, {run.weights} weights, {run.device_name}; ranges put "
        "together the 95 % intervals of all methods and precisions, quartiles where turns were not written down):\n"
        f"{times}"
        f"- **Continuing a text** (the bundled demo model, WikiText): with {_percent(half.ratio)} evicted, perplexity "
        f"under the core methods is {_range(half.perplexity, '.2f')} times what it was; with {_percent(hard.ratio)}, "
        f"{_range(hard.perplexity, '.2f')} times, depending on the method (which are core: {CORE_METHODS}; without "
        "controls, and settings that don't do what they say).\n"
        f"- **Finding something in it** (the same model): asked for passkeys after {_percent(hard.ratio)} of the "
        f"context was evicted, of the core methods {', '.join(found)}; without compression "
        f"{_percent(hard.plain_recall)}."
        f"{'' if least in hard.finding else least_loss}{elsewhere}"
    )


def _cost_in_english(press: str) -> str:
    costs = kinds.cost_of(press)
    return ", ".join(words for cost, words in COSTS_IN_ENGLISH.items() if cost in costs) or "at no price of its own"


def _each(values: list[float], spec: str, between: str = "、") -> str:
    return between.join(format(value, spec) for value in values)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _range(ends: tuple[float, float], spec: str) -> str:
    low, high = (format(end, spec) for end in ends)
    return low if low == high else f"{low}–{high}"


def on_gpus() -> str:
    """Which of the reference records come from a GPU."""
    all_runs = {study: load_records(pictures.REFERENCE / study) for study in STUDIES if study != "explore"}
    on_one = {study: runs[runs["device"] == "cuda"] for study, runs in all_runs.items() if len(runs)}
    parts = [
        f"{STUDY_NAMES[study]} {len(all_runs[study])} 份里的 {len(runs)} 份（{listed(runs['device_name'].unique())}，"
        f"{listed(runs['dtype'].unique())}）"
        for study, runs in on_one.items()
        if len(runs)
    ]
    if not parts:
        return "没有：参考记录全部在 CPU 上测得。"
    speed = "" if len(on_one.get("speed", ())) else "速度没有：GPU 上的吞吐与显存峰值还没有记录，CPU 上的倍数不能照搬。"
    return f"参考记录中，{'、'.join(parts)}在 GPU 上测得，其余都在 CPU 上。{speed}"


# ---- pages ----------------------------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[], str]] = {
    "presses": press_table,
    "parameters": parameter_table,
    "found": results_in_chinese,
    "found-in-short": results_in_english,
    "on-gpus": on_gpus,
    "quality": quality_table,
    "tasks": task_table,
    "control": control_line,
    "speed": speed_table,
    "streaming": streaming_table,
}


def filled(text: str) -> str:
    """`text` with what is between its marks made anew."""
    for name in re.findall(r"^<!-- /(\S+) -->$", text, re.M):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"must have {start} and {end} once each")
        before, rest = text.split(start)
        text = f"{before}{start}\n{BLOCKS[name]()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    matplotlib.use("agg")
    for page in WRITTEN:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name in pictures.PICTURES:
        pictures.save(name)

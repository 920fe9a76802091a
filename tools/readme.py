"""What README_zh.md does not say by hand: tables of presses, parameters and results, and its figures.

    make readme

puts each block between its marks, `<!-- name -->` and `<!-- /name -->`, and draws docs/*.svg. Tables of results and
figures are of the records in results/reference alone. A figure carries a digest of what is drawn in it, by which a test
knows whether it is current: the drawing itself differs between versions of matplotlib and between fonts.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pandas as pd
import papermill
from matplotlib.figure import Figure

from kvneox_lib import expand_presses
from kvneox_lib.pages import losses, streams, timings, turns, wordings
from kvneox_lib.pages import report as reporting
from kvneox_lib.pages import tasks as task_pages
from kvneox_lib.pages.degenerate import healthy, said
from kvneox_lib.pages.figures import dots, press_lines, use_style
from kvneox_lib.pages.selecting import of_finished_models, of_one_storage, of_one_wording, of_ratios
from kvneox_lib.pages.tables import press_table
from kvneox_lib.pages.words import number
from kvneox_lib.studies.records import load_records

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"
TEXTS = {"wikitext_ppl": "WikiText", "pg19_ppl": "长书"}
SHOWN_RATIOS = (0.5, 0.9)
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
    shown = [f"`{value}`" if len(values) == 1 else f"{'、'.join(of)}：`{value}`" for value, of in values.items()]
    return "、".join(by_notebook), "；".join(shown)


def _meaning(name: str, by_notebook: dict[str, dict]) -> str:
    if name in SAID_IN_NO_NOTEBOOK:
        return SAID_IN_NO_NOTEBOOK[name]
    meanings: dict[str, list[str]] = {}
    for notebook, parameter in by_notebook.items():
        if parameter["help"]:
            meanings.setdefault(parameter["help"], []).append(notebook)
    if not meanings:
        raise ValueError(f"{name}: no notebook says what it means, nor does SAID_IN_NO_NOTEBOOK")
    return "；".join(text if len(meanings) == 1 else f"{'、'.join(of)}：{text}" for text, of in meanings.items())


def core_runs(study: str) -> pd.DataFrame:
    """The core presses and no_press on the largest number of windows or keys, the cache as it is."""
    frame = of_one_wording(of_ratios(of_one_storage(of_finished_models(load_records(REFERENCE / study)))))
    frame = frame[frame["press"].isin(expand_presses("all"))]
    return frame[frame["n_keys"] == frame["n_keys"].max()] if study == "recall" else _most_windows(frame)


def _most_windows(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["max_windows"] == frame["max_windows"].max()]


def quality_table() -> str:
    """What the core presses cost on the bundled model: perplexity as a multiple of no compression's, and recall."""
    columns, notes, shown = {}, [], []
    for study, text in TEXTS.items():
        runs = core_runs(study)
        shown.append(runs)
        plain = runs[runs["press"] == "no_press"].iloc[0]
        notes.append(
            f"{text}（{plain['dataset']}）取 {plain['n_windows']:.0f} 个窗口{losses.of_documents(plain)}，"
            f"每个窗口上下文 {plain['context_tokens']} 个词元，"
            f"共计分 {plain['n_tokens']} 个词元，不压缩时困惑度 {plain['ppl']:.1f}"
        )
        for ratio in SHOWN_RATIOS:
            columns[f"{text} {ratio:.2f}"] = _by_press(runs, ratio, "ppl_ratio")
    recall = core_runs("recall")
    recall = recall[~recall["query_aware"].astype(bool)]
    shown.append(recall)
    plain = recall[recall["press"] == "no_press"].iloc[0]
    notes.append(
        f"口令 {plain['n_keys']:.0f} 个，上下文 {plain['context_tokens']} 个词元，先压缩再提问，不压缩时准确率 "
        f"{plain['accuracy']:.2f}；{wordings.known(recall).removesuffix('。')}"
    )
    for ratio in SHOWN_RATIOS:
        columns[f"口令 {ratio:.2f}"] = _by_press(recall, ratio, "accuracy")
    table = pd.DataFrame(columns).sort_values(f"{TEXTS['wikitext_ppl']} {SHOWN_RATIOS[-1]:.2f}")
    rows = [[f"`{name}`", *(number(value, ".3f") for value in row)] for name, row in zip(table.index, table.to_numpy())]
    weights = "、".join(sorted({f"{row.model}（权重：{row.weights}）" for row in recall.itertuples()}))
    note = f"模型 {weights}，{plain['device_name']}，{plain['dtype']}。" + "；".join(notes) + "。" + _named(shown)
    return markdown(rows, head=["press", *table.columns]) + f"\n\n{note}"


def _by_press(runs: pd.DataFrame, ratio: float, column: str) -> pd.Series:
    """Without degenerate runs: they are in no order with the others."""
    runs = healthy(runs)
    return runs[runs["compression_ratio"] == ratio].set_index("press")[column]


def _named(tables: list[pd.DataFrame]) -> str:
    """The degenerate runs among those shown, whose cells are empty."""
    runs = pd.concat(tables)
    return "".join(said(runs[runs["compression_ratio"].isin(SHOWN_RATIOS)]))


def task_table() -> str:
    """Scores of the tasks in the box, the question read after compression, the best of the hardest ratio first."""
    runs = of_finished_models(load_records(REFERENCE / "tasks"))
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
    rows = [[f"`{name}`", *(number(value, ".2f") for value in row)] for name, row in zip(table.index, table.to_numpy())]
    plain = outside[outside["press"] == "no_press"]
    bare = "，".join(f"{task_pages.named(row.dataset)} {row.score:.2f}" for row in plain.itertuples())
    first = plain.iloc[0]
    note = (
        f"模型 {first['model']}（权重：{first['weights']}），{first['device_name']}，{first['dtype']}；每项 "
        f"{first['n_documents']:.0f} 篇，列名里的数是压缩率。不压缩时：{bare}。{wordings.known(plain)}"
        f"{_named([outside])}"
    )
    return markdown(rows, head=["press", *table.columns]) + f"\n\n{note}"


def control_line() -> str:
    """How little the teacher-forced control moved, beside how much the truth did."""
    runs = pd.concat([core_runs(study) for study in TEXTS], ignore_index=True)
    pressed = runs[runs["press"] != "no_press"]
    worst = pressed.loc[pressed["delta_nll"].idxmax()]
    return (
        f"{len(pressed)} 次运行里，教师强制的对照最多只动了 {runs['control_delta_nll'].abs().max():.1g} nat，而压缩之后"
        f"续读的 nll 最多增加 {worst['delta_nll']:.2f} nat（`{worst['press']}`，压缩率 "
        f"{worst['compression_ratio']:.2f}）。"
    )


def speed_settings() -> list:
    return reporting.settings_in(Path("speed"), REFERENCE)


def speed_table() -> str:
    """Five rows of the first setting; its other presses, and the other settings, are in the figure."""
    if not speed_settings():
        return missing("speed")
    runs = timings.timed_settings(speed_settings())[0].frame
    run, table = timings.at_corner(runs).iloc[0], timings.in_short(runs).drop(columns="上下文×批")
    caption = (
        f"{run.model}（权重：{run.weights}），{run.device_name}，{run['dtype']}，上下文 {run.context_tokens}，批 "
        f"{run.batch_size}；毫秒，各轮的中位数（四分位数）。{turns.basis(timings.at_corner(runs))}"
    )
    return f"{caption}\n\n{markdown(table.to_numpy().tolist(), head=list(table))}"


def streaming_table() -> str:
    runs = of_finished_models(load_records(REFERENCE / "streaming"))
    if not len(runs):
        return missing("streaming")
    timed, parts = runs[runs["timed"].eq(True)], []  # the ablation's are not timed
    for (model, weights, dataset, device), group in timed.groupby(["model", "weights", "dataset", "device_name"]):
        table = streams.reading_table(group.sort_values(["n_tokens", "press", "n_sink"]))
        note = "计分的词元不同的行，困惑度不能直接相比；同一批词元上的比较见笔记本和报告。"
        rows = markdown(table.to_numpy().tolist(), head=list(table))
        parts.append(f"{model}（权重：{weights}），{dataset}，{device}。{note}\n\n{rows}")
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[], str]] = {
    "presses": press_table,
    "parameters": parameter_table,
    "quality": quality_table,
    "tasks": task_table,
    "control": control_line,
    "speed": speed_table,
    "streaming": streaming_table,
}


def filled(text: str) -> str:
    """`text` with what is between its marks made anew."""
    for name, make in BLOCKS.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"README_zh.md: must have {start} and {end} once each")
        before, rest = text.split(start)
        text = f"{before}{start}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


# ---- figures --------------------------------------------------------------------------------------------------------


def perplexity_data() -> pd.DataFrame:
    runs = core_runs("wikitext_ppl")
    columns = ["press", "compression_ratio", "delta_nll", "delta_nll_ci95_low", "delta_nll_ci95_high"]
    return runs[runs["press"] != "no_press"][columns]


def recall_data() -> pd.DataFrame:
    runs = core_runs("recall")
    runs = runs[~runs["query_aware"].astype(bool) & (runs["press"] != "no_press")]
    return runs[["press", "compression_ratio", "accuracy", "accuracy_ci95_low", "accuracy_ci95_high"]]


def speed_data() -> pd.DataFrame:
    return timings.against_plain(speed_settings())


FIGURES = {  # file: its data, the column drawn, its axis
    "perplexity.svg": (perplexity_data, "delta_nll", "每个词元的 nll 与不压缩之差（nat）"),
    "recall.svg": (recall_data, "accuracy", "口令准确率（先压缩，再提问）"),
    "speed.svg": (speed_data, "value", timings.STEP),
}


def draw(name: str) -> Figure:
    data, column, label = FIGURES[name]
    if name == "speed.svg":
        return dots(timings.step_dots(data()))
    return press_lines(data(), "compression_ratio", column, xlabel="压缩率", ylabel=label)


def digest(name: str) -> str:
    data, *labels = FIGURES[name]
    rounded = data().sort_values(["press", "compression_ratio"]).round(6)
    return hashlib.sha256(json.dumps([rounded.to_csv(index=False), *labels]).encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    found = re.search(r"<dc:description>data ([0-9a-f]{64})</dc:description>", path.read_text(encoding="utf-8"))
    return found and found[1]


def save(name: str) -> None:
    with matplotlib.rc_context():
        use_style()
        matplotlib.rcParams.update({"svg.hashsalt": "kvneox", "path.simplify": True})
        draw(name).savefig(ROOT / "docs" / name, metadata={"Date": None, "Description": f"data {digest(name)}"})


if __name__ == "__main__":
    matplotlib.use("agg")
    readme = ROOT / "README_zh.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
    for name in FIGURES:
        save(name)

"""What the report says of how things were measured: settings, protocols, records and versions."""

import json

import pandas as pd

from kvneox_lib.inputs.weights import demo_folder
from kvneox_lib.pages import overview, tasks
from kvneox_lib.pages.quality import knows_dependence
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.pages.wordings import trained_on, wordings_in
from kvneox_lib.pages.words import STUDY_NAMES, listed, weights_in_words

MEASURED = {
    "adapter": "与原版模型之差",
    "wikitext_ppl": "续文每个词元的负对数似然",
    "pg19_ppl": "续文每个词元的负对数似然",
    "recall": "答对的口令",
    "heads": "哪些头抄写，丢了它们损失多少",
    "tasks": "任务得分",
    "speed": "预填充与每步的用时，内存",
    "streaming": "长文本的负对数似然，每步的用时",
}
AMOUNTS = {  # columns of the records
    "adapter": {"n_checks": "{} 项检查", "context_tokens": "上下文 {}"},
    "wikitext_ppl": {"n_windows": "{} 个窗口", "context_length": "上下文 {}", "continuation_length": "续文 {}"},
    "pg19_ppl": {"n_windows": "{} 个窗口", "context_length": "上下文 {}", "continuation_length": "续文 {}"},
    "recall": {"n_keys": "{} 个口令", "context_length": "上下文 {}"},
    "heads": {"n_keys": "{} 个口令", "n_windows": "{} 个窗口", "context_length": "上下文 {}"},
    "tasks": {"n_documents": "每项 {} 题", "context_tokens": "上下文约 {}"},
    "speed": {"context_length": "上下文 {}", "batch_size": "批 {}"},
    "streaming": {"context_tokens": "{} 个词元"},
}
VERSIONS = {"python": "Python", "torch": "torch", "transformers": "transformers", "kvpress": "kvpress"}


# ---- settings -------------------------------------------------------------------------------------------------------


def setup_table(*studies: Records) -> pd.DataFrame:
    return pd.DataFrame(map(_setup, studies)).fillna("—")


def _setup(records: Records) -> dict[str, str]:
    """Recall was asked again in many wordings, in a setting of its own."""
    n_wordings = len(wordings_in(records.frame))
    row = {"实验": STUDY_NAMES[records.study], "量什么": MEASURED[records.study]}
    try:
        runs = records.runs()
    except Missing as missing:
        return row | {"多少": str(missing)}
    models = listed(_model(*named) for named in runs[["model", "weights"]].drop_duplicates().to_numpy())
    counted = {name: words for name, words in AMOUNTS[records.study].items() if name in runs}
    amounts = [words.format(_values(runs[name])) for name, words in counted.items()]
    return row | {
        "模型；文本": f"{models}；{_texts(runs)}",
        "多少": "，".join([f"{n_wordings} 种说法"] * (n_wordings > 1) + amounts),
    }


def _model(model: str, weights: str) -> str:
    """With where its weights come from, if it is not in the box."""
    return model if weights == "bundled" else f"{model}（{weights_in_words(model, weights)}）"


def _texts(runs: pd.DataFrame) -> str:
    return listed({"random-tokens": "随机词元"}.get(name, tasks.named(name)) for name in runs["dataset"].unique())


def _values(column: pd.Series) -> str:
    values = sorted(pd.to_numeric(column).dropna().unique())
    return listed(f"{v:.0f}" for v in values) if len(values) < 4 else f"{values[0]:.0f} 至 {values[-1]:.0f}"


def demo_model() -> str:
    demo = json.loads((demo_folder() / "config.json").read_text())
    return (
        f"**模型。** 随包附带的演示模型（demo）是一个从头训练的 GPT-NeoX：{demo['num_hidden_layers']} 层，"
        f"每层 {demo['num_attention_heads']} 个头，隐层宽 {demo['hidden_size']}，"
        f"训练长度 {demo['max_position_embeddings']}。"
        "它读过公有领域的英文小说、技术手册、WikiText-2 的验证集，以及带口令的合成段落，因此能抄出一串口令；"
        "参考记录所用的评测文本它没有读过。"
        f"{trained_on()}"
        "真实的 Pythia 权重换一个参数就能测，本文的记录用的是哪些模型，见 @tbl-setup 与 @tbl-records。"
    )


def protocol_of_perplexity(wiki: Records) -> str:
    run = wiki.run(press="no_press")
    drawn = "相邻的窗口彼此相像，所以先抽文本，再在每篇里成块抽取窗口（@sec-books 写明各实验的文本有几篇）。"
    if not knows_dependence(wiki):
        drawn = "这些记录的区间把窗口当作彼此独立的。"
    return (
        f"**困惑度。** 每个窗口的前 {run.context_length} 个词元是上下文，由 press 压缩；后 {run.continuation_length} "
        "个是续文，接着读压缩后的缓存，位置从真实长度续起。续文的第一个词元由预填充预测，不计分。短文实验共 "
        f"{run.n_windows} 个窗口、{run.n_tokens} 个计分的词元。"
        f"差值都是同一窗口上压缩与不压缩之差，区间是自助法得到的 95 % 区间：{drawn}"
        f"对照在前 {run.control_windows} 个窗口上做一次教师强制。"
    )


def protocol_of_recall(recall: Records) -> str:
    run = recall.run()
    counted = "n_contexts" in recall.frame and recall.frame["n_contexts"].notna().all()
    keys = "同一段上下文里的口令不当作彼此独立的" if counted else "这些记录把每个口令都当作独立的"
    return (
        f"\n\n**检索。** 在 {run.context_length} 个词元的上下文里藏几句口令，压缩之后再问；{run.n_keys} 个口令，"
        f"五位数字的每个词元都是模型的首选才算答对。区间是 Wilson 95 % 区间，{keys}。"
    )


def protocol_of_speed(speed: Records) -> str:
    run = speed.run()
    return (
        f"\n\n**速度。** 同样的上下文与批之下，各种实现轮流运行 {run.repeats} 轮，先热身，报告中位数与四分位数；"
        f"读带宽与运算的峰值在同一次运行里测得，下界由 @eq-floor 算出；用 {run.n_threads} 个线程。"
    )


# ---- all records ----------------------------------------------------------------------------------------------------


def _all_runs() -> pd.DataFrame:
    names = ["model", "weights", "revision", "dataset", "device", "device_name", "dtype", "git_commit"]
    names += [f"{name}_version" for name in VERSIONS]
    found = [
        pd.DataFrame({name: records.frame.get(name) for name in names}, index=records.frame.index, dtype=object).assign(
            study=records.study, setting=place
        )
        for place, records in enumerate(overview.every_setting())
    ]
    return pd.concat(found, ignore_index=True)


def records_table() -> pd.DataFrame:
    """All records there are, a row for each study and model; several settings of a study are counted."""
    runs = _all_runs()
    runs["is_state"] = runs["revision"].notna()
    rows = []
    for (study, model, is_state), part in runs.groupby(["study", "model", "is_state"], sort=False):
        said = f"{model}，训练途中的 {part['revision'].nunique()} 个状态" if is_state else model
        commits = sorted({str(commit)[:7] for commit in part["git_commit"].dropna()})
        machines = part[["device_name", "dtype"]].drop_duplicates().groupby("device_name", sort=False)["dtype"]
        row = {"实验": STUDY_NAMES[study], "模型；文本": f"{said}；{_texts(part)}"}
        row |= {"设备与精度": listed(f"{_device(name)}（{listed(types)}）" for name, types in machines)}
        row |= {"记录（设置）": f"{len(part)}（{part['setting'].nunique()}）"}
        rows.append(row | {"提交": "、".join(commits) or "不详"})
    return pd.DataFrame(rows)


def _device(name: str) -> str:
    """Without what makers add."""
    return name.replace("(R)", "").removesuffix(" Processor")


def version_table() -> pd.DataFrame:
    """The software that made the records, and in which studies."""
    runs, rows = _all_runs(), []
    for versions, part in runs.groupby([f"{name}_version" for name in VERSIONS], dropna=False, sort=False):
        studies = listed(STUDY_NAMES[study] for study in part["study"].unique())
        rows.append(dict(zip(VERSIONS.values(), versions)) | {"记录": f"{len(part)}", "实验": studies})
    return pd.DataFrame(rows)

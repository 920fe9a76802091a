"""What the report says of all studies together: settings, limits, versions."""

import json

import pandas as pd

from kvneox_lib.inputs.weights import PYTHIA, demo_folder
from kvneox_lib.pages import quality
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.report import NOTEBOOKS, Missing, Records, middle_ratio, models, setting, settings
from kvneox_lib.pages.retrieval import RULE, copying_heads
from kvneox_lib.pages.selecting import of_one_storage
from kvneox_lib.pages.wordings import trained_on, wordings_in
from kvneox_lib.pages.words import STUDY_NAMES, listed
from kvneox_lib.studies.table import STUDIES

# ---- settings -------------------------------------------------------------------------------------------------------


def setup_table(*studies: Records) -> pd.DataFrame:
    return pd.DataFrame([{"实验": _name(records), "设置": _setup(records)} for records in studies])


def _name(records: Records) -> str:
    """Recall was asked again in many wordings, in a setting of its own."""
    return STUDY_NAMES[records.study] + ("（几种说法）" if len(wordings_in(records.frame)) > 1 else "")


def _setup(records: Records) -> str:
    try:
        runs = records.runs()
    except Missing as missing:
        return str(missing)
    lengths, tokens = sorted(runs["context_tokens"].dropna().unique()), pd.to_numeric(runs["n_tokens"]).max()
    told = (
        "、".join(f"{length:.0f}" for length in lengths)
        if len(lengths) < 4
        else f"{lengths[0]:.0f} 至 {lengths[-1]:.0f}"
    )
    counted = "" if pd.isna(tokens) else f"；每份至多 {tokens:.0f} 个词元"  # tasks are counted in documents
    where = setting(runs.iloc[0], listed(dict.fromkeys(runs["dataset"])))
    return f"{len(runs)} 份记录；{where}；上下文 {told}{counted}"


def demo_model() -> str:
    demo = json.loads((demo_folder() / "config.json").read_text())
    return (
        f"**模型。** 随包附带的演示模型（demo）是一个从头训练的 GPT-NeoX：{demo['num_hidden_layers']} 层，"
        f"每层 {demo['num_attention_heads']} 个头，隐层宽 {demo['hidden_size']}，"
        f"训练长度 {demo['max_position_embeddings']}。"
        "它读过公有领域的英文小说、技术手册、WikiText-2 的验证集，以及带口令的合成段落，因此能抄出一串口令；"
        "参考记录所用的评测文本它没有读过。"
        f"{trained_on()}"
        "真实的 Pythia 权重换一个参数就能测，本文的记录用的是哪些模型，见 @tbl-setup 与 @tbl-versions。"
    )


def protocol_of_perplexity(wiki: Records) -> str:
    run = wiki.run(press="no_press")
    drawn = "相邻的窗口彼此相像，所以先抽文本，再在每篇里成块抽取窗口（@sec-books 写明各实验的文本有几篇）。"
    if not quality.knows_dependence(wiki):
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
        f"\n\n**速度。** 同一格里的各种实现轮流运行 {run.repeats} 轮，先热身，报告中位数与四分位数；"
        f"读带宽与运算的峰值在同一次运行里测得，下界由 @eq-floor 算出。{run.n_threads} 个线程。"
    )


# ---- limits ---------------------------------------------------------------------------------------------------------


def can_say(causes: Records, *studies: Records) -> str:
    """`causes` are the records of study `heads`: what only they show is not said without them."""
    text = (
        f"质量的数字来自{models(*studies)}。"
        "它们足以说明：测量方法测到了东西没有（@sec-artefact 的对照，@sec-books 的曲线）；损失从哪里来"
    )
    if causes.frame.empty:
        return f"{text}（@sec-distance 的近处与远处）。"
    return f"{text}（@sec-distance 的近处与远处，@sec-heads 的抄写的头）；检索的失败在困惑度里有多大（@sec-blind）。"


def not_general(recall: Records) -> str:
    heads = of_one_storage(recall.table("heads", query_aware=False, press="no_press"))
    runs = of_one_storage(recall.runs(query_aware=False, compression_ratio=middle_ratio(recall)))
    runs = healthy(runs).nlargest(2, "accuracy")
    return (
        f"**各方法的名次不能推广。** 检索所用的模型（{models(recall).strip()}）共有 {len(heads)} 个头，"
        f"其中抄写的（{RULE}）有 {len(copying_heads(heads))} 个（@fig-heads）；头的多少与分工因模型而异，"
        f"同一方法保住这些头的机会也就不同。{listed(runs['press'])} 在这里检索得最好，"
        "换一个模型、一种口令，次序就可能不同。"
    )


def few_models(*studies: Records) -> str:
    return (
        f"**模型**：质量只在{models(*studies)}上测。头更多、分工不同的模型里，预算怎样分可能两样；"
        "训练途中有什么变化，见 @sec-training。\n\n"
    )


def every_setting() -> list[Records]:
    """Those of models as they are used, and of states of their training."""
    found = [
        records for study in NOTEBOOKS for states in (False, True) for records in settings(study, revisions=states)
    ]
    if not found:
        raise Missing("wikitext_ppl")
    return found


def devices() -> str:
    """What was measured on which kind of machine, and what therefore is not known."""
    found = every_setting()
    parts = [records.frame[["device_name", "device"]].assign(study=STUDY_NAMES[records.study]) for records in found]
    runs = pd.concat(parts).drop_duplicates()
    told = [
        f"{device} 上的记录（{listed(sorted(part['device_name'].unique()))}）有{listed(part['study'].unique())}"
        for device, part in runs.groupby("device")
    ]
    text = f"**机器**：{'；'.join(told)}。"
    timed = [records for records in found if STUDIES[records.study].is_timed]
    if not any((records.frame["device"] == "cuda").any() for records in timed):
        text += "计时的记录都不在 CUDA 显卡上：显存峰值与 GPU 上的吞吐没有测到，CPU 上的倍数不能照搬。"
    if not any(map(_is_of_pythia, found)):
        text += "没有真实 Pythia 权重的记录：质量的数字都不是 Pythia 的。"
    return text


def _is_of_pythia(records: Records) -> bool:
    """Whether its figures of quality are of real Pythia weights: models of ours are loaded as such, and are not."""
    run = records.run()
    of_pythia = run["model"].removeprefix("EleutherAI/") in PYTHIA and run["weights"] == "pretrained"
    return of_pythia and STUDIES[records.study].values_matter


def texts(*studies: Records) -> str:
    used = sorted({name for records in studies if len(records.frame) for name in records.frame["dataset"]})
    if not used:
        raise Missing("pg19_ppl")
    counts = [records.frame["n_documents"].max() for records in studies if "n_documents" in records.frame]
    few = f"，每项实验至多 {max(counts):.0f} 篇" if counts and max(counts) == max(counts) else ""
    text = f"\n\n**文本**：质量与流式实验用的是 {listed(used)}{few}。"
    return text if "PG-19" in used else f"{text}**PG-19 本身**没有用到。"


# ---- versions -------------------------------------------------------------------------------------------------------


def version_table() -> pd.DataFrame:
    """The software that made the records, a row for each study, model, and set of versions."""
    columns = {f"{name}_version": name for name in ("python", "torch", "transformers", "kvpress")}
    rows = []
    runs = pd.concat([records.frame.assign(study=records.study) for records in every_setting()])
    for (study, model, *_), part in runs.groupby(["study", "model", *columns], dropna=False, sort=False):
        commits = sorted({commit[:7] for commit in part["git_commit"].dropna()})
        used = {name: part[column].iloc[0] for column, name in columns.items()}
        counted = {"记录": f"{len(part)}", "提交": "、".join(commits) or "不详"}
        rows.append({"实验": STUDY_NAMES[study], "模型": f"{model}{_states(part)}", **used, **counted})
    return pd.DataFrame(rows).rename(columns={"python": "Python"})


def _states(runs: pd.DataFrame) -> str:
    """After a name."""
    n = runs["revision"].nunique() if "revision" in runs else 0
    return f"（含训练途中的 {n} 个状态）" if n else ""

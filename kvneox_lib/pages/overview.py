"""What the report says of all studies together: what they show, and what they don't."""

import pandas as pd

from kvneox_lib.inputs.weights import PYTHIA
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.report import NOTEBOOKS, Missing, Records, middle_ratio, models, settings
from kvneox_lib.pages.retrieval import RULE, copying_heads
from kvneox_lib.pages.selecting import of_one_storage
from kvneox_lib.pages.words import STUDY_NAMES, listed
from kvneox_lib.studies.table import STUDIES


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

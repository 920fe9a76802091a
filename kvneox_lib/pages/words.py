"""The one vocabulary of notebooks, README and report: names of studies, engines and readings, and numbers in words."""

import re

import pandas as pd

from kvneox_lib.inputs.templates import WORDINGS

ENGINES = {
    "ours": "本库",
    "stock": "transformers（DynamicCache）",
    "static": "transformers（StaticCache）",
    "kvpress": "kvpress 循环",
}
READINGS = {"dense": "全部保留", "window": "只留窗口", "sinks": "汇聚点加窗口", "recompute": "窗口重算"}
STUDY_NAMES = {
    "adapter": "适配检查",
    "wikitext_ppl": "短文实验",
    "pg19_ppl": "长书实验",
    "speed": "速度",
    "streaming": "流式",
    "recall": "检索",
    "tasks": "任务",
    "heads": "抄写的头",
    "explore": "看一看",
}
CONTROL = "教师强制（对照）"
WEIGHTS = {"pretrained": "预训练的权重", "bundled": "随包附带的权重", "random": "随机权重"}


def weights_in_words(model: str, weights: str) -> str:
    """Where the weights of a model come from. One of ours that is not bundled was loaded like any other."""
    if (model, weights) == (WORDINGS, "pretrained"):
        return "本项目训练、未随包附带的权重"
    return WEIGHTS.get(weights, weights)


def with_interval(row: pd.Series, column: str, digits: int = 3) -> str:
    """`0.117 [0.102, 0.134]`; without the brackets where too few windows give no interval."""
    value, low, high = (row.get(name) for name in (column, f"{column}_ci95_low", f"{column}_ci95_high"))
    if pd.isna(value):
        return "—"
    return f"{value:.{digits}f}" + ("" if pd.isna(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def number(value, spec: str) -> str:
    """A number as text; a dash where there is none."""
    return "—" if pd.isna(value) else format(float(value), spec)


def signed(difference: float) -> str:
    """With its sign, and none where it is rounded to zero."""
    text = f"{difference:+.3f}"
    return text if float(text) else text[1:]


def numbers(values: pd.Series, spec: str) -> list[str]:
    return [number(value, spec) for value in values]


def bullets(lines) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def tiny(difference: float) -> str:
    """A difference that should be rounding, in nat."""
    return "零" if difference == 0 else f"{difference:.0e} nat"


def plain(name) -> str:
    """A name from outside (of a model, a text, a machine), so that nothing in it acts in Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>&|])", r"\\\1", " ".join(str(name).split()))


def model_of(loaded) -> str:
    revision = "" if loaded.revision is None else f"，训练途中的状态 {plain(loaded.revision)}"
    return f"模型 **{plain(loaded.name)}**（权重：{loaded.weights}{revision}）"


def machine_of(run: pd.Series) -> str:
    return f"设备 {run['device']}（{plain(run['device_name'])}），{run['dtype']}"


def listed(names, none: str = "没有") -> str:
    return "、".join(names) or none


def model_in_words(model: str, weights: str) -> str:
    return (
        "一个很小的演示模型"
        if (model, weights) == ("demo", "bundled")
        else f" {model}（{weights_in_words(model, weights)}）"
    )

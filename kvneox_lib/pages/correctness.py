"""What the report says of the checks against the stock model, from the records of the study `adapter`."""

import re

import pandas as pd

from kvneox_lib.pages.report import Records, found_in
from kvneox_lib.pages.words import listed

CHECKS = {  # the names that `measures.verify` gives; a group is what it was checked under
    r"logits, relative difference to stock": "logits 与原版的相对差",
    r"q, k, v, relative difference to those inside the stock attention": "q、k、v 与原版注意力内部的相对差",
    r"q cut as a contiguous block, relative difference \(must be wrong\)": "错切的 q 与原版的相对差（应当很大）",
    r"rotated keys in the cache, relative difference to stock's reordered": "缓存里的键与原版重排后的相对差",
    r"(\w+) at [\d.]+: kept positions that differ from the stock model's attention": "与独立计算不同的保留位置（个）",
    r"generation under (\w+): logits, relative difference to stock with masked positions": (
        "压缩后生成：logits 与遮住这些位置的原版的相对差"
    ),
    r"generation under (\w+): tokens that differ": "压缩后生成：与原版不同的词元（个）",
    r"(\w+) keeping 1 %: logits move, in units of 1e-5": "几乎全部淘汰：logits 的变动（以 1e-5 为单位，应当很大）",
    r"hooks left behind": "用完之后残留的钩子（个）",
}
USES = {"pipeline": "管线", "generation": "生成", "two questions": "连问两题"}
REASONS = {
    r"attn_implementation='eager' cannot serve \w+: kvpress refuses to run it on eager attention\..*": (
        "kvpress 不让它在 eager 注意力上运行"
    ),
    r"attn_implementation='sdpa' cannot serve \w+: it reads attention weights, .*": "要读注意力权重，只有 eager 给得出",
    r"DecodingPress is not compatible with multiple questions\..*": "解码中压缩会改动缓存，一段上下文只能答一个问题",
}


def in_words(name: str) -> tuple[str, str]:
    """A check in Chinese, and the press it is of; an unknown one as it is."""
    for pattern, words in CHECKS.items():
        match = re.fullmatch(pattern, name)
        if match:
            return words, "".join(match.groups())
    return name, ""


def check_table(adapter: Records) -> pd.DataFrame:
    """A row a kind of check, with the worst that was measured."""
    table = adapter.table("checks")
    table = table.assign(
        said=[in_words(name)[0] for name in table["检查"]], of=[in_words(name)[1] for name in table["检查"]]
    )
    rows = []
    for (said, sign, limit), part in table.groupby(["said", "要求", "界限"], sort=False):
        worst = part["测得"].min() if sign == "≥" else part["测得"].max()
        found = {"检查": said, "方法": listed(filter(None, part["of"]), "—"), "测得": f"{worst:.2g}"}
        rows.append(found | {"要求": f"{sign} {limit:g}", "通过": "是" if part["通过"].all() else "否"})
    return pd.DataFrame(rows)


def passed(adapter: Records) -> str:
    run = adapter.run()
    return f"正确性：与原版模型对照的 {run.n_checks} 项检查，{run.n_checks - run.n_checks_failed} 项通过。"


def all_passed(adapter: Records) -> str:
    run = adapter.run()
    if not run.n_checks_failed:
        return f"{run.n_checks} 项检查全部通过（@tbl-checks）：下文测到的损失来自淘汰，不来自改写。"
    return f"{run.n_checks} 项检查里有 {run.n_checks_failed} 项没有通过（@tbl-checks）：下文的数字要打折扣。"


def wrong_cut(adapter: Records) -> str:
    table = adapter.table("checks")
    row = table[table["检查"].str.contains("contiguous")].iloc[0]
    return f"把 `query_key_value` 当作三个连续的大块去切，取到的 q 与真正的 q 的相对差是 {row['测得']:.2g}" + (
        "：切法错了，检查看得出来。" if row["通过"] else "：切法错了，检查却没有看出来。"
    )


def matrix(adapter: Records) -> str:
    run = adapter.run()
    refused = f"，{run.n_cells_refused} 格说明理由后拒绝（@tbl-refused）" if run.n_cells_refused else ""
    return (
        f"此外把每种 press 都在两种注意力实现（eager、sdpa）、三种用法（{listed(USES.values())}）下跑一遍："
        f"共 {run.n_cells} 格，{run.n_cells - run.n_cells_refused} 格可用{refused}。"
    )


def refused_table(adapter: Records) -> pd.DataFrame:
    """Cells of the matrix that were refused, a row a reason."""
    table = adapter.table("matrix")
    cells = table.melt("press", [name for name in table if name.startswith(("eager ", "sdpa "))], "cell", "said")
    cells = cells[cells["said"].str.startswith("refused: ")].copy()
    found_in(adapter.study, cells, "拒绝的组合")
    cells[["attention", "use"]] = cells["cell"].str.split(" ", n=1, expand=True).to_numpy()
    cells["reason"] = cells["said"].str.removeprefix("refused: ").map(reason_in_words)
    rows = []
    for reason, part in cells.groupby("reason", sort=False):
        uses = listed(dict.fromkeys(USES.get(use, use) for use in part["use"]))
        names = listed(part["press"].unique())
        rows.append({"理由": reason, "注意力": listed(part["attention"].unique()), "用法": uses, "press": names})
        rows[-1]["格"] = str(len(part))
    return pd.DataFrame(rows)


def reason_in_words(reason: str) -> str:
    """In Chinese; an unknown one as the exception said it."""
    words = next((words for pattern, words in REASONS.items() if re.fullmatch(pattern, reason)), None)
    return words or f"`{reason}`"

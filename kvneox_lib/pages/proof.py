"""What notebook 00 shows of the adapter's proof."""

import pandas as pd
import torch

from kvneox_lib.pages.words import listed

WHEN = {"hook": "预填充", "exit": "退出时", "decoding": "解码中", "never": ""}


def verdict(checks: pd.DataFrame) -> str:
    failed = checks.loc[~checks["通过"], "检查"]
    told = "".join(f" 没有通过：{name}。" for name in failed)
    return f"**{len(checks) - len(failed)} / {len(checks)} 项通过。**{told}"


def where_kept(kept: dict[str, torch.Tensor]) -> pd.DataFrame:
    """The share that is kept: of all, near both ends, and in the layers that keep least and most."""
    rows = []
    for name, mask in kept.items():
        shares, end = mask.float(), max(1, mask.shape[-1] // 16)
        by_layer = shares.mean((1, 2))
        row = {"press": name, "保留比例": float(shares.mean()), "开头 1/16": float(shares[..., :end].mean())}
        row |= {"末尾 1/16": float(shares[..., -end:].mean())}
        rows.append(row | {"各层最少": float(by_layer.min()), "各层最多": float(by_layer.max())})
    return pd.DataFrame(rows)


def ends_kept(table: pd.DataFrame) -> str:
    """`table`: of `where_kept`."""
    ends = table.set_index("press")["末尾 1/16"]
    whole = listed(ends.index[ends >= 0.995])
    return f"末尾 1/16 几乎全留的：{whole}；末尾留得最少的是 {ends.idxmin()}（{ends.min():.0%}）。"


def usable(matrix: pd.DataFrame) -> pd.DataFrame:
    """Each way of using each press in a word."""
    cells = matrix.drop(columns=["press", "acts"]).map(lambda cell: "可用" if cell == "ok" else "拒绝")
    return matrix[["press"]].assign(何时压缩=matrix["acts"].map(WHEN)).join(cells)


def reasons(matrix: pd.DataFrame) -> pd.DataFrame:
    """Why what is refused is refused, and which presses say so."""
    cells = matrix.drop(columns="acts").melt(id_vars="press", value_name="理由").query("理由 != 'ok'")
    return cells.groupby("理由")["press"].unique().map("、".join).reset_index()[["press", "理由"]]


def counted(matrix: pd.DataFrame) -> str:
    cells = matrix.drop(columns=["press", "acts"]).to_numpy()
    fine = int((cells == "ok").sum())
    return f"{len(matrix)} 种 press，{cells.size} 格：{fine} 格可用，{cells.size - fine} 格说明理由后拒绝。"

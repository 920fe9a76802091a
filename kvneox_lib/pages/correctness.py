"""What the report says of the checks against the stock model, from the records of the study `adapter`."""

import pandas as pd

from kvneox_lib.pages.report import Records


def check_table(adapter: Records) -> pd.DataFrame:
    table = adapter.table("checks")
    return pd.DataFrame(
        {
            "检查": table["检查"],
            "测得": table["测得"].map("{:.2g}".format),
            "要求": table["要求"] + " " + table["界限"].map("{:g}".format),
            "通过": table["通过"].map({True: "是", False: "否"}),
        }
    )


def passed(adapter: Records) -> str:
    run = adapter.run()
    return f"正确性：与原版模型对照的 {run.n_checks} 项检查，{run.n_checks - run.n_checks_failed} 项通过。"


def wrong_cut(adapter: Records) -> str:
    table = adapter.table("checks")
    row = table[table["检查"].str.contains("contiguous")].iloc[0]
    return (
        f"把 `query_key_value` 当作三个连续的大块去切，取到的 q 与真正的 q 的相对差是 {row['测得']:.2g}："
        "完全是别的东西。"
    )


def matrix(adapter: Records) -> str:
    run = adapter.run()
    return (
        f"全部 press、两种注意力实现、三种用法共 {run.n_cells} 格，{run.n_cells - run.n_cells_refused} 格可用，"
        f"{run.n_cells_refused} 格给出理由后拒绝，没有空白。"
    )

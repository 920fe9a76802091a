"""Checks and refusals in Chinese."""

import pandas as pd
import pytest

from kvneox_lib.measures import verify
from kvneox_lib.pages import correctness
from kvneox_lib.pages import report as reporting


def test_a_check_is_told_from_the_press_it_is_of():
    assert correctness.in_words("snapkv at 0.5: kept positions that differ from the stock model's attention") == (
        "与独立计算不同的保留位置（个）",
        "snapkv",
    )
    assert correctness.in_words("something new") == ("something new", "")


@pytest.mark.parametrize(("name", "implementation"), [("adakv_snapkv", "eager"), ("observed_attention", "sdpa")])
def test_refusals_have_chinese_reasons(demo, tokenizer, name, implementation):
    refused = verify.run_cell(demo, tokenizer, name, implementation, "generation", "word " * 200)
    reason = refused.removeprefix("refused: ")
    assert refused != reason and "`" not in correctness.reason_in_words(reason)
    assert correctness.reason_in_words("because") == "`because`"


def adapter(monkeypatch, table: pd.DataFrame) -> reporting.Records:
    monkeypatch.setattr(reporting.Records, "table", lambda records, name: table)
    return reporting.Records("adapter", None, None, pd.DataFrame({"n_checks": [4], "n_checks_failed": [1]}))


def test_checks_of_several_presses_are_one_row_with_the_worst(monkeypatch):
    kept = "{} at 0.5: kept positions that differ from the stock model's attention"
    wrong = "q cut as a contiguous block, relative difference (must be wrong)"
    rows = [(kept.format("snapkv"), 0.0, "≤", 0.0, True), (kept.format("tova"), 3.0, "≤", 0.0, False)]
    rows += [("hooks left behind", 0.0, "≤", 0.0, True), (wrong, 1.2, "≥", 0.1, True)]
    records = adapter(monkeypatch, pd.DataFrame(rows, columns=["检查", "测得", "要求", "界限", "通过"]))
    table = correctness.check_table(records)
    assert table["方法"].tolist() == ["snapkv、tova", "—", "—"]
    assert table.loc[0, ["测得", "要求", "通过"]].tolist() == ["3", "≤ 0", "否"] and table["通过"][2] == "是"
    assert "1 项没有通过" in correctness.all_passed(records) and "看得出来" in correctness.wrong_cut(records)


def test_refused_cells_are_grouped_by_reason(monkeypatch):
    said = "refused: attn_implementation='sdpa' cannot serve {}: it reads attention weights, which only eager returns."
    rows = [("a", "ok", said.format("A"), "ok"), ("b", "refused: odd", said.format("B"), said.format("B"))]
    columns = ["press", "eager pipeline", "sdpa pipeline", "sdpa two questions"]
    records = adapter(monkeypatch, pd.DataFrame(rows, columns=columns).assign(acts="hook"))
    table = correctness.refused_table(records).set_index("理由")
    assert table.loc["`odd`", ["注意力", "用法", "press", "格"]].tolist() == ["eager", "管线", "b", "1"]
    row = table.loc["要读注意力权重，只有 eager 给得出"]
    assert row[["注意力", "用法", "press", "格"]].tolist() == ["sdpa", "管线、连问两题", "a、b", "3"]
    fine = adapter(monkeypatch, pd.DataFrame([("a", "ok", "ok", "ok")], columns=columns))
    with pytest.raises(reporting.Missing):
        correctness.refused_table(fine)

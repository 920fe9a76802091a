"""Presses beside the controls, on windows of which the answers are known."""

import numpy as np
import pandas as pd
import pytest

from kvneox_lib.pages import quality, verdicts
from kvneox_lib.pages import report as reporting
from kvneox_lib.presses.registry import REGISTRY

LOST = {"random": 0.5, "knorm": 0.8, "snapkv": 0.2, "tova": 0.501}


@pytest.fixture
def text(monkeypatch):
    """Records of a study in which each press loses what it is told to at 0.5, and a tenth of that at 0.25."""
    tables = {}
    monkeypatch.setattr(
        reporting.Records, "table", lambda records, name, press: tables[records.study][lambda t: t["press"] == press]
    )

    def make(study: str, **lost: float) -> reporting.Records:
        noise, windows, runs = np.random.default_rng(0), [], [{"press": "no_press", "compression_ratio": 0.0}]
        for press, loss in lost.items():
            for ratio, share in ((0.25, 0.1), (0.5, 1.0)):
                row = {"press": press, "compression_ratio": ratio}
                nll = share * loss + noise.normal(0, 0.01, 40)
                windows += [row | {"document": 0, "nll_mean": value} for value in nll]
                ends = {"delta_nll_ci95_low": share * loss - 0.01, "delta_nll_ci95_high": share * loss + 0.01}
                runs.append(row | {"delta_nll": share * loss} | ends)
        tables[study] = pd.DataFrame(windows)
        return reporting.Records(study, None, None, pd.DataFrame(runs).assign(dataset="a letter"))

    return make


def test_who_is_clearly_better_than_random(text):
    wiki = text("wikitext_ppl", **LOST, streaming_llm=0.9)
    books = text("pg19_ppl", **LOST)
    said = verdicts.beside_random(wiki, books)
    with_control = text("wikitext_ppl", **LOST, streaming_llm=0.9, random_recent=0.1)
    assert "在短文实验里明确不如随机淘汰的方法，多于明确胜过它的" in said, "two are worse, one is better"
    assert "短文实验里明确更好的：snapkv；明确更差的：knorm、streaming_llm；分不出的：1 种" in said
    assert "长书实验里明确更好的：snapkv；明确更差的：knorm；分不出的：1 种" in said
    assert "random_recent" not in verdicts.beside_random(with_control)
    assert "多于" not in verdicts.beside_random(books)
    with pytest.raises(reporting.Missing, match="random"):
        verdicts.beside_random(text("wikitext_ppl", snapkv=0.2, knorm=0.8))
    assert "损失是短文实验（a letter） 0.050 [0.040, 0.060] nat" in verdicts.room(wiki)


def test_how_far_methods_are_apart_and_whether_windows_tell_them(text):
    wiki, books = text("wikitext_ppl", **LOST, random_recent=0.1), text("pg19_ppl", **LOST)
    said = verdicts.converging(wiki, books)
    assert "压缩率 0.25 时是 0.020 与 0.080 nat，压缩率 0.5 时是 0.200 与 0.800 nat：差别在压缩率 0.5 时最大。" in said
    assert "压缩率 0.5 时成对比较仍分得出：" in said and "random_recent" not in said, "a control is no method"
    assert said.count("明确更好的 1 种（snapkv，相差 0.") == 2 and said.count("明确更差的 1 种（knorm，相差 0.") == 2
    wiki.frame.loc[(wiki.frame["press"] == "knorm") & (wiki.frame["compression_ratio"] == 0.5), "delta_nll"] = 0.21
    wiki.frame.loc[(wiki.frame["press"] == "tova") & (wiki.frame["compression_ratio"] == 0.5), "delta_nll"] = 0.2
    assert "差别在压缩率 0.25 时最大，再往上变小（在比的方法由 3 种到 3 种）。" in verdicts.converging(wiki)
    assert "成对比较也分不出：" in verdicts.converging(text("wikitext_ppl", random=0.5, tova=0.501, snapkv=0.5))
    with pytest.raises(reporting.Missing, match="几种方法"):
        verdicts.converging(text("wikitext_ppl", random=0.5, tova=0.5))


def test_the_short_table_has_two_ratios_of_each_text(text):
    wiki, books = text("wikitext_ppl", **LOST, kvzip=0.0), text("pg19_ppl", **LOST)
    assert quality.shown_ratios(wiki, books) == (0.25, 0.5)
    table = verdicts.short_table(wiki, books)
    assert table.columns.tolist() == [
        "怎样取舍",
        "press",
        "短文实验 0.25",
        "短文实验 0.5",
        "长书实验 0.25",
        "长书实验 0.5",
    ]
    assert table["press"].tolist() == ["snapkv", "random", "tova", "knorm"], "core presses, by what they lose"
    assert table["短文实验 0.5"].tolist() == ["0.200 好", "0.500", "0.501", "0.800 差"]
    assert verdicts.verdict_table(wiki, books)["press"].tolist()[0] == "kvzip"


@pytest.mark.parametrize(
    ("window", "score", "said"),
    [
        (0.2, 0.2, "它有 2 处明确好于纯随机。看末尾窗口打分的方法明确好于它的次数是：snapkv 0/2（@tbl-window）。"),
        (0.3, 0.1, "它有 2 处明确好于纯随机。看末尾窗口打分的方法明确好于它的次数是：snapkv 2/2（@tbl-window）。"),
        (0.5, 0.1, "它有 0 处明确好于纯随机。看末尾窗口打分的方法明确好于它的次数是：snapkv 2/2（@tbl-window）。"),
    ],
)
def test_what_the_window_gives_is_taken_off(text, window, score, said):
    found = verdicts.beside_window(text("wikitext_ppl", random=0.5, random_recent=window, snapkv=score))
    lost = 2 if score == window else 0
    assert said in found and f"有 2 处明确的优势，其中 {lost} 处没有明确超出" in found
    none = verdicts.beside_window(text("pg19_ppl", random=0.5, random_recent=window, snapkv=0.8))
    assert "snapkv 0/2" in none and "优势" not in none


def test_the_table_beside_the_window(text):
    table = verdicts.window_table(text("wikitext_ppl", random=0.5, random_recent=0.3, snapkv=0.1, kvzip=0.0))
    assert table.columns.tolist() == ["怎样取舍", "press", "短文实验 0.25", "短文实验 0.5"]
    assert table["press"].tolist() == ["snapkv", "random"]
    assert [cell[-2:] for cell in table["短文实验 0.5"]] == [" 好", " 差"]


def test_without_the_control_nothing_is_said_of_the_window(text):
    with pytest.raises(reporting.Missing, match="random_recent"):
        verdicts.beside_window(text("wikitext_ppl", **LOST))


def test_dividing_among_heads(text):
    said = verdicts.sharing(text("wikitext_ppl", snapkv=0.5, adakv_snapkv=0.3))
    assert "短文实验 0.5 明确更小（-0.20" in said and "缩到 8 个词元（snapkv 是 64 个）" in said
    with pytest.raises(reporting.Missing, match="adakv_snapkv"):
        verdicts.sharing(text("wikitext_ppl", snapkv=0.5, knorm=0.3))


def test_the_window_of_the_control_is_that_of_snapkv():
    assert REGISTRY["random_recent"].build(0.5).window_size == REGISTRY["snapkv"].build(0.5).window_size

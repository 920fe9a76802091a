"""Fewer bits beside fewer entries, on records whose losses are made up so that the winner is known."""

import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot

from kvneox_lib.measures.intervals import holm, wilson_ci95
from kvneox_lib.neox.bits import GROUP, form_of, pack
from kvneox_lib.pages import figures, storage
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.studies.records import write_table

matplotlib.use("agg")

N = 40  # windows, keys, documents
RATIOS = (0.5, 0.75, 0.875, 0.9375, 0.96875)
BITS = (None, 8, 4, 2)
WHOLE = 1_000_000  # bytes of the cache in float32
NUMBER = {None: 32, 8: 8.5, 4: 4.5, 2: 2.5}
COST = {None: 0.0, 8: 0.001, 4: 0.01, 2: 0.3}  # of bits alone, in nat
EVICTED = {"snapkv": 0.2, "keydiff": 0.3}  # times the ratio


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def grid():
    """Of press, ratio, bits: bytes and the mean loss."""
    for press, cost in {"no_press": 0.0, **EVICTED}.items():
        for ratio in RATIOS if cost else (0.0,):
            for bits in BITS:
                share = (1 - ratio) * NUMBER[bits] / 32
                yield press, ratio, bits, WHOLE * share, cost * ratio + COST[bits]


def perplexity(folder: Path, noise: float = 1e-4) -> Records:
    rng, rows = np.random.default_rng(0), []
    hard = rng.normal(3, 1, N)
    for press, ratio, bits, kv_bytes, loss in grid():
        losses = loss + noise * rng.normal(size=N) * (loss > 0)
        table = pd.DataFrame({"document": 0, "position": np.arange(N), "nll_mean": hard + losses})
        ends = {"delta_nll_ci95_low": losses.mean() - noise, "delta_nll_ci95_high": losses.mean() + noise}
        rows.append(
            written(folder, "windows", table, press, ratio, bits, kv_bytes) | {"delta_nll": losses.mean()} | ends
        )
    return Records("wikitext_ppl", folder, folder, pd.DataFrame(rows))


def tasks(folder: Path) -> Records:
    """A task that bits do not harm until there are 2, and eviction does at once; another that nothing harms."""
    rows = []
    for press, ratio, bits, kv_bytes, _ in grid():
        for task, harmed in {"kvneox_passkey": ratio > 0 or bits == 2, "kvneox_copy": False}.items():
            hits = N // 4 if harmed else N
            table = pd.DataFrame({"doc_id": np.arange(N), "score": (np.arange(N) < hits).astype(float)})
            low, high = wilson_ci95(hits, N)
            row = written(folder, "documents", table, press, ratio, bits, kv_bytes, task)
            rows.append(row | {"score": hits / N, "score_ci95_low": low, "score_ci95_high": high})
    return Records("tasks", folder, folder, pd.DataFrame(rows).assign(question="outside"))


def written(folder: Path, name: str, table: pd.DataFrame, press, ratio, bits, kv_bytes, dataset="a letter") -> dict:
    run_id = f"{dataset}__{press}__{ratio}__{bits}"
    write_table(folder, run_id, name, table)
    known = {"press": press, "compression_ratio": ratio, "kv_bits": bits, "kv_bytes": kv_bytes, "dataset": dataset}
    return known | {"run_id": run_id, "dtype": "float32", "path": str(folder / f"{run_id}.json")}


def speed(dtype: str = "float32") -> Records:
    """A step takes 10 ms and 10 more for all entries in full; unpacking makes 4 bits as slow as 8."""
    rows = [
        {"press": press, "compression_ratio": ratio, "kv_bits": bits, "batch_size": batch, "context_tokens": 2048}
        | {"step_s": batch * (0.01 + 0.01 * (1 - ratio) * max(8, NUMBER[bits]) / 32), "engine": "ours", "dtype": dtype}
        | {"device_name": "a machine", "model": "pythia-70m", "failure": None}
        for press, ratio, bits, _, _ in grid()
        for batch in (1, 2)
    ]
    return Records("speed", None, None, pd.DataFrame(rows))


def test_what_was_kept_in_full_is_told_from_the_rest(tmp_path):
    records = perplexity(tmp_path)
    (quality,) = storage.qualities(records)
    found = quality.configurations.groupby("way").size().to_dict()
    assert found == {"": 1, "bits": 3, "evict": 2 * len(RATIOS), "both": 2 * len(RATIOS) * 3}
    shares = quality.configurations.set_index(["press", "compression_ratio", "bits"])["share"]
    assert shares["snapkv", 0.75, 4] == pytest.approx(0.25 * 4.5 / 32)
    plain = storage.as_it_is(records).frame
    assert len(plain) == 1 + 2 * len(RATIOS) and plain["kv_bits"].isna().all()
    others = [plain[plain["compression_ratio"] == RATIOS[0]].assign(press=name) for name in ("knorm", "tova", "random")]
    among_others = Records("wikitext_ppl", None, None, pd.concat([plain, *others]))
    assert set(storage.as_it_is(among_others).frame["compression_ratio"]) == {0.0, RATIOS[0]}
    half = Records("wikitext_ppl", None, None, records.frame.assign(dtype="bfloat16"))
    in_half = storage.configurations("wikitext_ppl", half.frame)["share"]
    assert in_half.max() == 0.5  # of what the same numbers take in float32


def test_the_best_of_each_way_within_a_size(tmp_path):
    (quality,) = storage.qualities(perplexity(tmp_path))
    best = {size: storage.best_within(quality, size).set_index("way") for size in storage.SIZES}
    assert [storage.in_words(row) for _, row in best[1 / 4].iterrows()] == ["4 位", "snapkv 0.5、8 位", "snapkv 0.75"]
    assert list(best[1 / 4].index) == ["bits", "both", "evict"]
    assert storage.in_words(best[1 / 8].loc["both"]) == "snapkv 0.5、4 位"
    assert list(best[1 / 16].index) == ["both", "evict"]  # 2 bits alone are more
    assert all((found["share"] <= size * 1.05).all() for size, found in best.items())


def test_every_press_is_admitted_but_where_it_is_degenerate(tmp_path):
    records = perplexity(tmp_path)
    assert storage.choice_of_each_way(records) == (
        "只淘汰从测过的 2 种方法里挑，存成几位的只有其中的 keydiff、snapkv。"
    )
    frame = records.frame
    strong = frame["compression_ratio"] > 0.9
    of_snapkv = strong & (frame["press"] == "snapkv")
    frame["degenerate"] = np.where(of_snapkv, "fixed 0.900", None)
    table = pd.DataFrame({"document": 0, "position": np.arange(N), "nll_mean": 0.0})
    plain = storage.tables_of(frame[frame["press"] == "no_press"], "windows")
    table["nll_mean"] = plain[plain["kv_bits"].isna()].sort_values("position")["nll_mean"].to_numpy()
    own = written(tmp_path, "windows", table, "duo_attention", np.nan, None, WHOLE / 4) | {"delta_nll": 0.0}
    own |= {"delta_nll_ci95_low": 0.0, "delta_nll_ci95_high": 0.0, "degenerate": None}
    (quality,) = storage.qualities(replace(records, frame=pd.DataFrame([*frame.to_dict("records"), own])))
    best = {size: storage.best_within(quality, size).set_index("way").loc["evict", "press"] for size in (1 / 4, 1 / 16)}
    assert best == {1 / 4: "duo_attention", 1 / 16: "keydiff"}
    assert len(quality.configurations) == len(frame) - of_snapkv.sum() + 1
    frame["degenerate"] = np.where(strong, "fixed 0.900", None)
    few = replace(records, frame=frame)
    row = storage.size_table(few).set_index("大小").loc["1/16"]
    assert row["只淘汰"] == "没有名副其实的设置，最少要 0.125" and row["只量化"] == "装不下，最少要 0.078"
    assert storage.choice_of_each_way(few).endswith("；keydiff、snapkv 没有测到 1/16 那样小，或在那里名不副实。")


def test_who_wins_and_by_how_much(tmp_path):
    (quality,) = storage.qualities(perplexity(tmp_path))
    found = storage.verdict(quality, 1 / 4)
    assert (found.first, found.second, found.is_clear) == ("bits", "both", True)
    assert found.ahead == pytest.approx(0.5 * 0.2 + 0.001 - 0.01, abs=1e-3)
    assert found.interval.low < found.ahead < found.interval.high
    found = storage.verdict(quality, 1 / 8)
    assert (found.first, found.second) == ("both", "evict")  # 2 bits alone lose more than either
    assert found.ahead == pytest.approx(0.2 * (0.875 - 0.5) - 0.01, abs=1e-3)


def test_no_winner_is_named_where_windows_do_not_tell(tmp_path):
    (quality,) = storage.qualities(perplexity(tmp_path, noise=3.0))
    found = storage.verdict(quality, 1 / 4)
    assert found.ahead > 0 and not found.is_clear and found.interval.low <= 0 <= found.interval.high
    assert storage.size_table(perplexity(tmp_path, noise=3.0))["胜者"].iloc[1].startswith("分不出（")


def test_winners_are_corrected_for_all_that_the_table_shows(tmp_path):
    found = storage.qualities(perplexity(tmp_path))
    alone = [one for size in storage.SIZES if (one := storage.verdict(found[0], size)) and one.second]
    together = [one for one in storage.verdicts(found).values() if one and one.second]
    assert [one.p for one in together] == pytest.approx(holm([one.p for one in alone]))
    said = storage.size_table_reach(perplexity(tmp_path))
    assert f"共 {len(alone)} 次比较" in said and "只说这些文本" in said


def test_few_windows_carry_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "N", 4)
    (quality,) = storage.qualities(perplexity(tmp_path))
    assert not storage.verdict(quality, 1 / 4).is_clear
    assert "nan" not in storage.size_table(perplexity(tmp_path)).to_string()


def test_the_table_says_what_a_way_cannot_do(tmp_path):
    table = storage.size_table(perplexity(tmp_path)).set_index("大小")
    assert list(table.index) == ["1/2", "1/4", "1/8", "1/16", "1/32"]
    assert table.loc["1/16", "只量化"] == table.loc["1/32", "只量化"] == "装不下，最少要 0.078"
    assert table.loc["1/8", "只量化"].startswith("2 位：0.3")
    assert table.loc["1/4", "胜者"].startswith("只量化，0.09") and table.loc["1/4", "胜者"].endswith("] nat")
    assert table.loc["1/4", "只淘汰"].startswith("snapkv 0.75：0.150 [")


def test_tasks_are_measured_apart_and_level_ones_are_not_won(tmp_path):
    passkey, copying = storage.qualities(tasks(tmp_path))
    assert (passkey.name, copying.name) == ("口令", "抄写") and passkey.plain == 1
    found = storage.verdict(passkey, 1 / 4)
    assert (found.first, found.is_clear, found.ahead) == ("bits", True, 0.75)
    assert storage.best_within(passkey, 1 / 2)["share"].iloc[0] == pytest.approx(4.5 / 32)  # the smallest of equals
    assert storage.verdict(copying, 1 / 4).ahead == 0 and not storage.verdict(copying, 1 / 4).is_clear
    rows = storage.size_table(tasks(tmp_path)).set_index(["衡量", "大小"])["胜者"]
    assert rows["抄写", "1/4"] == "分不出（0.000 [0.000, 0.000]）"
    inside = tasks(tmp_path)
    inside.frame["question"] = "inside"
    with pytest.raises(Missing, match="tasks 的 kv_bits"):
        storage.qualities(inside)


def test_lines_hold_the_points_that_nothing_smaller_surpasses(tmp_path):
    (quality,), (_, level) = (storage.qualities(made(tmp_path)) for made in (perplexity, tasks))
    lines = storage.front(quality.compressed(), "share")
    assert lines["press"].unique().tolist() == list(storage.WAYS.values())
    by_hand = []
    for way, words in storage.WAYS.items():
        of_way = quality.configurations[quality.configurations["way"] == way]
        for _, row in of_way.iterrows():
            others = of_way[(of_way["share"] <= row["share"]) & (of_way.index != row.name)]
            by_hand += [(words, row["share"])] if not (others["loss"] < row["loss"]).any() else []
    assert sorted(zip(lines["press"], lines["share"])) == sorted(by_hand) and 12 < len(by_hand) < 30
    assert len(storage.front(level.compressed(), "share")) == len(level.compressed())  # a level line is drawn


def test_a_panel_for_each_measure(tmp_path):
    figure = storage.by_size(perplexity(tmp_path / "ppl"), tasks(tmp_path / "tasks"))
    shown = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in shown] == ["短文的损失", "口令", "抄写"]
    assert [container.get_label() for container in shown[0].containers] == list(storage.WAYS.values())
    assert [label.get_text() for label in shown[1].get_xticklabels()][:3] == ["1", "1/2", "1/4"]
    assert shown[1].get_xlim()[0] > shown[1].get_xlim()[1]  # smaller to the right
    assert figure.get_size_inches()[0] < 5.5  # 420 pixels across leave 8 points readable


def test_loss_against_the_time_of_a_step(tmp_path):
    (quality,), settings = storage.qualities(perplexity(tmp_path)), [speed(), speed("bfloat16")]
    timed = storage.timed_in_bits(settings)
    assert set(timed["batch_size"]) == {2} and len(timed) == 2 * len(list(grid()))
    both = storage.with_losses(timed[timed["dtype"] == "float32"], quality).set_index(
        ["press", "compression_ratio", "bits"]
    )
    assert both.loc[("snapkv", 0.5, 8), "step_ms"] == pytest.approx(2 * (10 + 10 * 0.5 * 8.5 / 32))
    assert both.loc[("snapkv", 0.5, 8), "loss"] == pytest.approx(0.101, abs=1e-3)
    lines = storage.front(both.reset_index(), "step_ms")
    assert len(lines[lines["press"] == "只量化"]) == 2  # 2 bits are no faster than 4, and worse
    figure = storage.by_time(settings, perplexity(tmp_path))
    assert [axes.get_title() for axes in figure.axes] == ["短文的损失，float32", "短文的损失，bfloat16"]
    text = storage.steps_in_words(settings)
    assert "批 2（a machine），float32：不压缩的一步是 8 位的 1.58 倍、4 位的 1.60 倍、2 位的 1.60 倍、只淘汰（" in text
    assert "；4 位的一步是 2 位的 1.00 倍；" in text and "bfloat16：" in text
    assert text.endswith("计过时的方法只有 keydiff、snapkv。")
    pressed = Records("speed", None, None, speed().frame.query("press != 'no_press'"))
    with pytest.raises(Missing, match="speed 的 no_press"):
        storage.steps_in_words([pressed])


def test_the_first_page_names_winners_and_what_bits_alone_cannot_do(tmp_path):
    text = storage.who_wins(perplexity(tmp_path / "ppl"), tasks(tmp_path / "tasks"))
    larger, below, _ = text.split("。")
    quarter, eighth = larger.split("；")
    passkey = storage.verdicts(storage.qualities(tasks(tmp_path / "tasks")))["口令", 1 / 4].ahead
    assert re.search(rf"只许占 1/4 时，只量化胜在短文的损失（0.09\d nat）、口令（{passkey:.3f}），其余分不出$", quarter)
    assert re.match(r"只许占 1/8 时，淘汰并量化胜在短文的损失（0.06\d nat），其余分不出$", eighth)
    assert below == "单靠量化至少要占 7.8%；再小，6 次比较里淘汰并量化胜过只淘汰 2 次，其余分不出"
    unclear = storage.who_wins(perplexity(tmp_path / "noisy", noise=3.0))
    assert "只许占 1/4 时，各种做法分不出；" in unclear and "胜过只淘汰 0 次" in unclear


def test_the_short_table_names_a_winner_only_where_there_is_one(tmp_path):
    found = perplexity(tmp_path / "ppl"), tasks(tmp_path / "tasks")
    table = storage.winners(*found).set_index("衡量")
    assert table.index.tolist() == ["短文的损失", "口令", "抄写"] and list(table)[:2] == ["1/2", "1/4"]
    assert table.loc["短文的损失", "1/4"].startswith("只量化，0.09") and table.loc["口令", "1/4"] == "只量化，0.750"
    assert table.loc["短文的损失", "1/16"].startswith("淘汰并量化，") and set(table.loc["抄写"]) == {"分不出"}
    whole = pd.concat([storage.size_table(*found[:1]), storage.size_table(*found[1:])])
    for row in whole.itertuples():  # the same verdicts as in the tables of all configurations
        assert row.胜者.split("（")[0].split("，")[0] == table.loc[row.衡量, row.大小].split("，")[0]


def test_an_order_holds_only_where_each_size_has_one_winner(tmp_path):
    said = storage.order(perplexity(tmp_path / "ppl"), tasks(tmp_path / "tasks"))
    assert "1/2、1/4 时都是只量化胜出，1/8、1/16、1/32 时都是淘汰并量化胜出，没有一格是只淘汰" in said
    assert said.endswith("抄写在哪种大小都分不出。")
    nothing = storage.order(perplexity(tmp_path / "noisy", noise=3.0))
    assert nothing.startswith("分得出的格子里，没有一种做法")


def test_without_such_records_the_reader_is_told(tmp_path):
    records = storage.as_it_is(perplexity(tmp_path))
    empty = Records("recall", tmp_path, tmp_path, pd.DataFrame())
    for asked in (storage.by_size, storage.size_table, storage.who_wins):
        with pytest.raises(Missing, match="wikitext_ppl 的 kv_bits"):
            asked(records, empty)
    said = storage.lacking(records, empty, tasks(tmp_path / "tasks"))
    assert "wikitext_ppl 的 kv_bits" in said and "缺少记录：recall" in said and "tasks" not in said
    for settings in ([], [storage.as_it_is(speed())]):
        with pytest.raises(Missing, match="speed 的 kv_bits"):
            storage.timed_in_bits(settings)
    assert len(storage.qualities(records, tasks(tmp_path / "tasks"))) == 2
    assert storage.as_it_is(empty).frame.empty


def test_records_from_before_there_were_bits_are_as_it_is(tmp_path):
    records = storage.as_it_is(perplexity(tmp_path))
    before = Records("wikitext_ppl", None, None, records.frame.drop(columns="kv_bits"))
    assert len(storage.as_it_is(before).frame) == len(records.frame)


def test_bits_told_are_those_that_a_block_takes():
    x = torch.randn(1, GROUP, GROUP)
    there = torch.ones(1, GROUP, dtype=torch.bool)
    taken = {bits: pack(x, x, there, form_of(bits, x)).nbytes * 8 / (2 * x.numel()) for bits in (8, 4, 2)}
    assert "、".join(f"{bits:g}" for bits in taken.values()) in storage.bits_told()
    assert "0.266、0.141、0.078" in storage.bits_told()


def test_few_panels_still_have_one_legend():
    lines = pd.DataFrame({"press": ["a", "b"], "x": [1, 2], "y": [3, 4]})
    figure = figures.front_panels({"one": figures.Front(lines, "y", 0.0, 1.5)}, "x", "y", xlabel="x")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "不压缩"]
    assert len(figure.axes) == 1

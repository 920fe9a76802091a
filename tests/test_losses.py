"""What notebooks and report say of perplexity, on small frames computed by hand."""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

from kvneox_lib.pages import losses, quality, setup
from kvneox_lib.pages import report as reporting
from kvneox_lib.pages.selecting import at_ratio, left_out_of_figures, middle_ratio, of_one_storage
from kvneox_lib.pages.shapes import cache_shares
from kvneox_lib.pages.timings import corner
from kvneox_lib.pages.words import CONTROL
from kvneox_lib.studies.records import write_table

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def study(ends=0.01) -> pd.DataFrame:
    """The runs of a study: (press, ratio, loss, how far the control moves); without intervals if `ends` is None."""
    runs = [
        ("no_press", 0.0, 0.0, 0.0),
        *(("snapkv", ratio, loss, -2e-6) for ratio, loss in ((0.25, 0.1), (0.5, 0.2), (0.75, 0.4))),
        *(("random", ratio, loss, 1e-6) for ratio, loss in ((0.75, 0.3), (0.25, 0.295), (0.5, 0.3))),
        ("think", None, -0.5, 0.0),
    ]
    frame = pd.DataFrame(runs, columns=["press", "compression_ratio", "delta_nll", "control_delta_nll"])
    low, high = (None if ends is None else frame["delta_nll"] + end for end in (-(ends or 0), ends or 0))
    frame = frame.assign(delta_nll_ci95_low=low, delta_nll_ci95_high=high)
    values = {"ppl": 20.0, "bits_per_byte": 1.5, "word_ppl": None, "kept_fraction": 0.9, "kv_bytes": 2e6}
    return frame.assign(ppl_ratio=np.exp(frame["delta_nll"]), **values)


def in_bits(runs: pd.DataFrame, bits, shift: float) -> pd.DataFrame:
    """The same runs, but for what rounding adds."""
    return runs.assign(kv_bits=bits, **{name: runs[name] + shift for name in runs if name.startswith("delta_nll")})


def test_runs_in_bits_are_told_apart():
    plain, coarse, coarser = (in_bits(study(), bits, shift) for bits, shift in ((None, 0), (4, 0.01), (2, 0.5)))
    runs = pd.concat([coarser, plain, coarse], ignore_index=True)
    table = losses.summary(runs)
    assert table["存储"].tolist() == ["2 位"] * 8 + ["原样"] * 8 + ["4 位"] * 8 and "存储" not in losses.summary(
        study()
    )
    pd.testing.assert_frame_equal(of_one_storage(runs).reset_index(drop=True), plain, check_dtype=False)
    assert losses.rising(runs).to_dict() == losses.rising(study()).to_dict()
    assert left_out_of_figures(runs) == ["图里每种 press 只画一种存储：原样；4 位、2 位的运行只在表里。"]
    assert left_out_of_figures(study()) == left_out_of_figures(plain) == []
    drawn = losses.loss_lines(runs).axes[0].containers
    assert [line.get_label() for line in drawn] == ["snapkv", "random", "think"]
    assert list(drawn[0].lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.4])
    said = [line for line in losses.highest_losses(runs) if line.startswith("snapkv")]
    assert [line.partition("：")[0] for line in said] == [
        f"snapkv（压缩率 0.75{stored}）" for stored in ("，2 位", "", "，4 位")
    ]

    bare = plain[plain["press"] == "no_press"]
    rounded = pd.concat([bare, coarse, coarser], ignore_index=True)  # nothing else as it is: the finest is drawn
    chosen = of_one_storage(rounded)
    assert chosen[chosen["press"] != "no_press"]["kv_bits"].eq(4).all() and chosen["press"].eq("no_press").sum() == 1
    assert left_out_of_figures(rounded) == ["图里每种 press 只画一种存储：4 位；2 位的运行只在表里。"]


def test_the_middle_ratio_is_of_those_at_which_most_were_measured():
    more = pd.DataFrame([("snapkv", ratio) for ratio in (0.9, 0.95, 0.97)], columns=["press", "compression_ratio"])
    assert middle_ratio(study()) == middle_ratio(pd.concat([study(), more])) == 0.5


def windows(n: int) -> pd.DataFrame:
    """Of two documents; snapkv's loss grows along the book, random is worse everywhere."""
    presses = ("no_press", 0.0, 0), ("snapkv", 0.75, 0.1), ("random", 0.75, 0.3), ("think", None, 9)
    rows = [
        {"press": press, "compression_ratio": ratio, "document": i // 3, "position": 100 * i, "nll_mean": 2 + loss}
        | {"delta_nll": loss}
        for press, ratio, slope in presses
        for i, loss in enumerate(slope * (np.arange(n) % 3 + 1))
    ]
    return pd.DataFrame(rows)


def test_an_order_is_claimed_only_where_windows_carry_it():
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 1, 40)
    runs = {"random": hard, "good": hard - 0.1 + rng.normal(0, 0.01, 40), "same": hard + rng.normal(0, 0.5, 40)}
    rows = [{"press": name, "compression_ratio": 0.5, "nll_mean": value} for name in runs for value in runs[name]]
    rows = [{**row, "document": 0} for row in rows]
    table = losses.against(pd.DataFrame(rows), "random").set_index("press")
    assert table["verdict"].to_dict() == {"good": "better", "same": ""}
    assert table.loc["good", "nll_difference"] == pytest.approx(-0.1, abs=0.01)
    swapped = losses.against(pd.DataFrame(rows), "good").set_index("press")
    assert swapped.loc["random", "verdict"] == "worse" and "good" not in swapped.index


def of_books(n_books: int, shift: float, apart: float = 0.0) -> pd.DataFrame:
    """Table `windows` of books of 40 windows in which a press is `shift` worse than random; in one book after the other
    by `apart` more, though not in the mean."""
    noise, books = np.random.default_rng(0).normal(0, 0.1, 40 * n_books), np.repeat(np.arange(n_books), 40)
    lost = {"random": np.zeros(len(books)), "press": shift + noise + apart * (books - books.mean())}
    rows = [
        {"press": name, "compression_ratio": 0.5, "document": book, "nll_mean": value}
        for name, values in lost.items()
        for book, value in zip(books, values)
    ]
    return pd.DataFrame(rows)


def test_few_books_are_spoken_of_alone_and_the_page_says_so():
    (row,) = losses.against(of_books(3, 0.1, apart=0.1), "random").itertuples()
    assert row.verdict == "worse" and not row.excludes_zero and row.nll_difference_ci95_low < 0
    said = losses.reach_of_verdicts(losses.against(of_books(3, 0.1, apart=0.1), "random"))
    assert "共 1 次比较" in said and "1 次有定论" in said and "只说这些文本" in said and "区间不含零的有 0 次" in said
    (row,) = losses.against(of_books(8, 0.1, apart=0.1), "random").itertuples()
    assert row.verdict == "" and row.p > 0.05  # of eight, other books are spoken of
    assert "只说" not in losses.reach_of_verdicts(losses.against(of_books(8, 0.1), "random"))
    assert "只说这一篇文本" in losses.reach(1) and "t 分布" in losses.reach(3) and "t 分布" not in losses.reach(8)


def test_verdicts_over_many_are_fewer():
    """Two hundred that differ by nothing."""
    rng = np.random.default_rng(3)
    rows = [
        {"press": name, "compression_ratio": 0.5, "document": 0, "nll_mean": value}
        for name in ["random", *(f"press {i}" for i in range(200))]
        for value in rng.normal(0, 0 if name == "random" else 1, 50)
    ]
    table = losses.against(pd.DataFrame(rows), "random")
    assert (table["p"] < 0.05).sum() >= 3 and (table["verdict"] != "").sum() == 0
    assert losses.judged(table.nsmallest(1, "p"))["verdict"].iloc[0] != ""


def test_presses_rise_where_the_intervals_part():
    assert losses.rising(study(0.01)).to_dict() == {"snapkv": True, "random": False}
    assert losses.rising(study(0.2)).to_dict() == {"snapkv": False, "random": False}
    assert losses.rising(study(None)).empty


def test_what_a_study_shows_in_words():
    first, rise, better, verdict, reach = losses.findings(study(), windows(9))
    assert "2.0e-06 nat" in first and "2 种 press 中，1 种" in rise and "例外：random。" in rise
    assert "区间不含零的：think —。" in better and "一共看了 7 次运行" in better and "约 0.2 次" in better
    assert "共 1 次比较" in reach
    assert verdict.startswith("压缩率 0.75，") and "显著更好的有 snapkv；分不出的有 无；显著更差的有 无" in verdict


def test_four_windows_have_no_intervals_and_no_claims():
    runs = study(None)
    assert len(losses.findings(runs, windows(4))) == 1
    assert losses.summary(runs)["与不压缩之差"].tolist()[:2] == ["0.000", "0.100"]
    figure = losses.loss_lines(runs, losses.moved(runs))
    assert [container.get_label() for container in figure.axes[0].containers] == [CONTROL, "snapkv", "random", "think"]


def test_a_strength_of_its_own_stands_at_what_it_evicted():
    placed = losses.placed(study()).set_index("press")
    assert placed.loc["think", "ratio"] == pytest.approx(0.1) and "no_press" not in placed.index
    assert losses.moved(study())["ratio"].tolist() == pytest.approx([0.1, 0.25, 0.5, 0.75])
    assert losses.moved(study())["delta_nll"].tolist() == [0, 2e-6, 2e-6, 2e-6]
    assert losses.highest_losses(study())[0] == (
        "snapkv（压缩率 0.75）：每词元多 0.400 [0.390, 0.410] nat，困惑度乘以 1.492。"
    )
    assert [line.split("（")[0] for line in losses.highest_losses(study())] == ["snapkv", "random", "think"]
    assert losses.summary(study()).iloc[-1][["压缩率", "词级困惑度", "KV缓存MB"]].tolist() == ["—", "—", "2.00"]


def test_no_press_alone_leaves_notes_in_place_of_pictures():
    runs = study()[:1]
    table = pd.DataFrame({"press": ["no_press"], "compression_ratio": 0.0, "from_token": 1, "to_token": 1})
    notes = [losses.loss_lines(runs, losses.moved(runs)), losses.distance_lines(table, middle_ratio(runs))]
    notes.append(losses.kept_maps(at_ratio(table, None)))
    assert all(figure.axes[0].texts for figure in notes)
    assert losses.lasting(table, None) == "没有由压缩率决定强度的 press，这一节略去。"


def distances(*lost: tuple[str, float, float]) -> pd.DataFrame:
    """Table `distance`: (press, loss of the first two tokens, loss of the others)."""
    edges = [(1, 1), (2, 2), (3, 16), (17, 40)]
    rows = [
        {
            "press": press,
            "compression_ratio": 0.5,
            "from_token": a,
            "to_token": b,
            "delta_nll": first if b < 3 else then,
        }
        for press, first, then in lost
        for a, b in edges
    ]
    return pd.DataFrame(rows)


def test_near_and_far_weigh_each_bin_by_its_tokens():
    table = distances(("snapkv", 0.1, 0.1), ("random", 0.6, 0.3), ("kvzip", -0.1, 0.0))
    found = losses.near_and_far(table).set_index("press")
    assert found.loc["random", "near"] == pytest.approx((2 * 0.6 + 14 * 0.3) / 16)
    assert found["far"].to_dict() == pytest.approx({"snapkv": 0.1, "random": 0.3, "kvzip": 0.0})
    assert found["kind"].to_dict() == {"snapkv": "看末尾窗口的注意力", "random": "随机", "kvzip": "重读上下文"}
    assert found["share"].isna().to_dict() == {"snapkv": False, "random": False, "kvzip": True}, "nothing is lost near"
    said = losses.lasting(table, 0.5)
    assert "第 17–40 个计分的词元" in said and "看末尾窗口的注意力 100%（snapkv）；随机 89%（random）。" in said


def test_what_hardly_fades_is_told_apart_by_text(monkeypatch):
    steady, fading = ("snapkv", 0.1, 0.1), ("snapkv", 2.0, 0.1)
    random = ("random", 1.0, 0.1)
    tables = {"wikitext_ppl": distances(steady, random), "pg19_ppl": distances(fading, random)}
    monkeypatch.setattr(reporting.Records, "table", lambda records, name, **wanted: tables[records.study])
    wiki, books = (records(name, study()) for name in tables)
    table = quality.fading_table(wiki, books).set_index("怎样取舍")
    assert table.loc["看末尾窗口的注意力", ["短文实验 近处", "短文实验 远比近"]].tolist() == ["0.100", "100%"]
    assert table.index.tolist() == ["随机", "看末尾窗口的注意力"], "what loses most near stands first"
    said = quality.lasting(wiki, books)
    assert "短文实验里，随机淘汰的损失到远处只剩 47%，几乎不消退的：snapkv；" in said
    assert "长书实验里，随机淘汰的损失到远处只剩 47%，几乎不消退的：没有一种" in said
    assert "短文实验 64%、长书实验 36%" in quality.hidden_by_means(wiki, books)
    assert "各篇文本都如此" not in said and "各篇文本都如此" in quality.lasting(wiki)
    marked = distances(steady, random, ("chunkkv_snapkv", 0.1, 0.1))
    marked = marked.assign(degenerate=np.where(marked["press"] == "chunkkv_snapkv", "kept 0.238 for 0.250", None))
    tables["wikitext_ppl"] = marked
    assert "chunkkv_snapkv" not in quality.lasting(wiki)
    assert quality.fading_table(wiki).set_index("怎样取舍").loc["看末尾窗口的注意力", "几种"] == "1"
    tables["wikitext_ppl"] = distances(steady)
    with pytest.raises(reporting.Missing, match="random"):
        quality.lasting(wiki)


def test_along_the_first_book():
    text = losses.along_book(windows(6))
    assert "困惑度最低的窗口在第 0 个词元处（7.4）" in text
    assert "压缩率 0.75 时，各 press 平均损失最大的窗口在第 200 个词元处（+0.600 nat），最小的在第 0 个" in text
    figure = losses.book_lines(windows(6), "ppl")
    assert list(figure.axes[0].get_lines()[1].get_ydata()) == pytest.approx(np.exp([2.1, 2.2, 2.3]))
    own = windows(6)[lambda table: table["press"].isin(["no_press", "think"])]
    assert "压缩率" not in losses.along_book(own) and len(losses.of_one_book(own)) == 3


def records(name: str, frame: pd.DataFrame) -> reporting.Records:
    return reporting.Records(name, None, None, frame.assign(dataset="a letter"))


def test_texts_are_compared_where_intervals_part():
    wiki, books = records("wikitext_ppl", study()), records("pg19_ppl", study())
    for name in ("delta_nll", losses.LOW, losses.HIGH):
        books.frame[name] *= 2
    assert quality.shown_ratios(wiki, books) == (0.25, 0.75)
    said = quality.texts_apart(wiki, books)
    assert "2 对里有 2 对在长书实验（a letter）里的损失明显比在短文实验（a letter）里的大" in said
    assert "（区间不相交；2.0 至 2.0 倍），没有一对相反" in said
    books.frame.loc[books.frame["compression_ratio"] == 0.25, ["delta_nll", losses.LOW, losses.HIGH]] -= 0.25
    assert "2 对里有 1 对在长书实验（a letter）里的损失明显比" in (said := quality.texts_apart(wiki, books))
    assert "有 1 对相反" in said and "倍" not in said
    assert "都相交" in quality.texts_apart(wiki, records("pg19_ppl", study()))


def test_tables_put_presses_that_work_alike_together():
    frame = study().assign(degenerate=None)
    frame.loc[(frame["press"] == "snapkv") & (frame["compression_ratio"] == 0.75), "degenerate"] = "tied 1.00"
    wiki, books = records("wikitext_ppl", frame), records("pg19_ppl", study()[lambda runs: runs["press"] != "random"])
    table = quality.loss_table(wiki, books)
    assert table.columns.tolist() == ["实验", "怎样取舍", "press", "0.25", "0.5", "0.75"]
    assert table["press"].tolist() == ["snapkv", "random", "snapkv"]
    assert table["0.75"].tolist() == ["（+0.400）", "+0.300", "+0.400"]


def test_how_losses_grow():
    with_one, without = (records("wikitext_ppl", study(ends)) for ends in (0.01, None))
    said = quality.example(with_one)
    assert "0.25 时每个词元多损失 0.100 [0.090, 0.110] nat（困惑度乘以 1.11），压缩率 0.75 时" in said
    assert quality.rising(with_one).startswith("2 条线里有 1 条") and quality.rising(with_one).endswith("是 random。")
    rising = records("wikitext_ppl", study()[lambda runs: runs["press"] != "random"])
    assert quality.rising(rising).startswith("每一种方法都是压得越多、损失越大")
    with pytest.raises(reporting.Missing, match="wikitext_ppl 的 有压缩率的 press"):
        quality.rising(records("wikitext_ppl", study()[:1]))
    with pytest.raises(reporting.Missing, match="多个压缩率的区间"):
        quality.rising(without)
    flat = with_one.frame["press"] == "random"
    marked = with_one.frame.assign(degenerate=flat.map({True: "tied 1.00", False: None}))
    assert quality.rising(records("wikitext_ppl", marked)).startswith("每一种方法"), "random is left out"


def test_all_presses_by_how_they_choose(monkeypatch):
    frame = study().assign(kept_fraction=0.5, n_windows=20)
    frame.loc[frame["press"] == "random", "press"] = "kvzip"
    frame.loc[frame["press"] == "think", "degenerate"] = "same as streaming_llm"
    monkeypatch.setattr(quality, "widest", lambda name: records(name, frame))
    table = quality.every_press("wikitext_ppl", "pg19_ppl")
    presses = ["think [@think]", "snapkv [@snapkv]", "kvzip [@kvzip]"]
    assert table["press"].tolist() == presses, "at 0.5 or a strength of its own, the best first"
    table = table.set_index(table["press"].str.split().str[0])
    assert table.loc["kvzip", ["怎样取舍", "另外的代价"]].tolist() == ["重读上下文", "压缩时再读一遍上下文"]
    assert table.loc["think", "长书实验的损失"] == "（-0.500 [-0.510, -0.490]）"
    assert table.loc["snapkv", ["实际保留", "短文实验的损失"]].tolist() == ["0.50", "0.200 [0.190, 0.210]"]
    assert "短文实验 20 个窗口，长书实验 20 个窗口" in quality.every_windows("wikitext_ppl", "pg19_ppl")


def test_without_intervals_nothing_is_said_to_overlap():
    without = records("wikitext_ppl", study(None)), records("pg19_ppl", study(None))
    with pytest.raises(reporting.Missing, match="区间"):
        quality.texts_apart(*without)


def test_what_loses_next_to_nothing_is_named():
    frame = study()
    assert "没有一种方法" in quality.nearly_free(records("wikitext_ppl", frame))
    frame.loc[frame["press"] == "snapkv", ["press", "delta_nll"]] = "kvzip", 0.01
    said = quality.nearly_free(records("wikitext_ppl", frame), records("pg19_ppl", frame))
    assert "kvzip（重读上下文）的损失" in said and "至多 0.010 nat" in said and "重放一遍上下文" in said
    assert "没有一种方法" in quality.nearly_free(records("wikitext_ppl", frame), records("pg19_ppl", study()))
    with pytest.raises(reporting.Missing, match="random"):
        quality.nearly_free(records("wikitext_ppl", frame[frame["press"] != "random"]))


def test_heads_that_keep_unequal_shares():
    rows = [("snapkv", layer, head, 0.5) for layer in range(2) for head in range(2)]
    rows += [("pyramidkv", layer, head, (0.8, 0.2)[layer]) for layer in range(2) for head in range(2)]
    rows += [("adakv_snapkv", 0, head, 0.5) for head in range(2)]
    rows += [("adakv_snapkv", 1, 0, 0.8), ("adakv_snapkv", 1, 1, 0.2)]
    heads = pd.DataFrame(rows, columns=["press", "layer", "head", "kept"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting.Records, "table", lambda records, name, **wanted: heads)
        said = quality.spread(records("pg19_ppl", study()))
    assert said == (
        "压缩率 0.5：snapkv 每层每头都留 50%；pyramidkv 各层平均从 20% 到 80%；"
        "adakv_snapkv 同一层的头相差最多的从 20% 到 80%。"
    )


def test_intervals_from_before_dependence_are_not_said_to_know_of_it():
    figures = {"context_length": 8, "continuation_length": 4, "n_windows": 6, "n_tokens": 18, "control_windows": 1}
    before = records("wikitext_ppl", study().assign(**figures))
    now = records("wikitext_ppl", before.frame.assign(n_documents=1))
    mixed = records("wikitext_ppl", now.frame.assign(n_documents=[None, *[1] * (len(now.frame) - 1)]))
    assert [quality.knows_dependence(each) for each in (before, now, mixed)] == [False, True, False]
    assert "没有考虑窗口来自哪篇文本、与哪些相邻" in quality.reach(before)
    assert "先抽文本" in setup.protocol_of_perplexity(now)
    for each in (before, mixed):
        assert "先抽" not in setup.protocol_of_perplexity(each) and "彼此独立的" in setup.protocol_of_perplexity(each)
    keys = records("recall", pd.DataFrame({"context_length": [64], "n_keys": 4}))
    assert "把每个口令都当作独立的" in setup.protocol_of_recall(keys)
    contexts = records("recall", keys.frame.assign(n_contexts=2))
    assert "同一段上下文里的口令不当作彼此独立的" in setup.protocol_of_recall(contexts)


def test_an_infinite_perplexity_is_named():
    runs = study().astype({"ppl_ratio": object})
    runs.loc[runs["press"] == "random", "press"] = "tova"
    runs.loc[(runs["press"] == "tova") & (runs["compression_ratio"] == 0.75), "ppl_ratio"] = None
    assert "有的不是有限的数" in quality.breaking(records("wikitext_ppl", runs))
    said = quality.breaking(records("wikitext_ppl", study()))
    assert "只留 25% 时，1 种方法让续文的困惑度乘以 1.49 到 1.49：press 确实起了作用" in said
    assert "2e-06 nat" in quality.unmoved(records("wikitext_ppl", study()))
    still = records("wikitext_ppl", study().assign(control_delta_nll=0.0))
    assert "6 次运行的对照与不压缩逐位相同" in quality.unmoved(still)


def test_the_share_of_the_cache_grows_with_length_and_batch():
    shares = cache_shares(1).set_index(["press", "tokens"])["share"]
    cache = 2 * 6 * 512 * 2048  # two tensors, layers, width, tokens
    weights = 6 * (12 * 512**2 + 13 * 512) + 2 * 512 + 50304 * 512
    assert shares["pythia-70m", 2048] == pytest.approx(cache / (cache + weights))
    assert (cache_shares(16)["share"] > cache_shares(1)["share"]).all()


def test_the_corner_is_the_longest_context_that_was_timed():
    cells = [(512, 4, None), (1024, 1, None), (1024, 2, None), (2048, 1, "out of memory")]
    runs = pd.DataFrame(cells, columns=["context_tokens", "batch_size", "failure"])
    runs = runs.assign(press="snapkv", compression_ratio=0.5, engine="ours")
    assert corner(runs)[["context_tokens", "batch_size"]].to_numpy().tolist() == [[1024, 2]]
    assert corner(runs[3:]).empty


def test_both_readings_side_by_side(tmp_path):
    """Evicting while reading costs a quarter of a nat with keydiff, nothing that can be told with snapkv."""
    wobble = np.tile([0.1, -0.1], 6)
    extra = {"keydiff": 0.25 + wobble, "snapkv": wobble}

    def run(press, evicts, n_windows=12):
        found = {"model": "demo", "weights_id": "w", "dataset": "text", "text_sha256": "t", "device_name": "cpu"}
        found |= {"context_tokens": 512, "press": press, "compression_ratio": 0.5, "n_windows": n_windows}
        found |= {"evict_while_reading": evicts, "prefill_chunk": 64 if evicts else None}
        found |= {"run_id": f"{press}-{evicts}-{n_windows}"}
        nll = 3.0 + np.arange(n_windows) + (extra[press] if evicts else 0.0)
        windows = pd.DataFrame({"document": 0, "position": np.arange(n_windows), "nll_mean": nll})
        write_table(tmp_path, found["run_id"], "windows", windows)
        return found | {"path": str(tmp_path / f"{found['run_id']}.json")}

    def settings(*runs):
        return [SimpleNamespace(frame=pd.DataFrame([run])) for run in runs]

    other = run("keydiff", False, n_windows=9)  # of other windows
    whole = [run(press, evicts) for press in extra for evicts in (True, False)]
    text = losses.evicting_in_words(settings(other, *whole))
    assert "每 64 个词元" in text and "2 个配置的损失之差从 +0.000 到 +0.250 nat" in text
    assert text.endswith("校正后分得开的有 keydiff 0.5（+0.250）。")
    assert losses.evicting_in_words(settings(*whole[2:])).endswith("都分不开。")
    for missing in (settings(whole[1]), settings(other, whole[0]), []):
        with pytest.raises(reporting.Missing):
            losses.evicting_in_words(missing)

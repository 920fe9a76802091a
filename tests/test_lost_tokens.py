"""What pages say of the trial and of losses follows from the tables, and says so when the tables do not carry it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from kvneox_lib.pages import figures, heads, lost_tokens, orders
from kvneox_lib.pages.ranks import rank_correlation, rank_correlation_ci95
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.studies.records import write_table

GROUPS = ("copying", "control 1", "control 2", "others")


def trial(bare: dict, pressed: dict, n_contexts: int = 40) -> pd.DataFrame:
    """Of 4 keys in each context; each a share of them that is recalled under a condition."""
    rows = []
    for press, ratio, shares in (("no_press", 0.0, bare), ("snapkv", 0.5, pressed), ("snapkv", 0.9, pressed)):
        for (digits, group), share in shares.items():
            known = {"press": press, "compression_ratio": ratio, "digits": digits, "heads": group}
            kept = 1.0 if press == "no_press" else 1 - ratio
            counted = {"n_keys": 4, "n_correct": round(4 * share), "nll_mean": 1.0, "kept_fraction": kept}
            rows += [known | counted | {"context": context} for context in range(n_contexts)]
    return pd.DataFrame(rows)


BARE = {("as_is", "none"): 1, ("dropped", "copying"): 0, ("dropped", "control 1"): 1, ("dropped", "control 2"): 0.5}
BARE |= {("dropped", "others"): 1}
PRESSED = {("as_is", "none"): 0, **{("kept", group): float(group == "copying") for group in GROUPS}}
PRESSED |= {("lent", "copying"): 0.75, ("lent", "others"): 0}


def test_draws_of_control_heads_are_one_condition():
    table = heads.tried(trial(BARE, PRESSED)).set_index(["press", "compression_ratio", "digits", "group"])
    assert table.index[0][0] == "no_press" and table.index.is_unique
    control = table.loc["no_press", 0.0, "dropped", "control"]
    assert (control["value"], control["n_keys"], control["n_draws"]) == (0.75, 320, 2)
    assert control["low"] < 0.75 < control["high"]
    assert table.loc["snapkv", 0.9, "kept", "copying"]["kept"] == pytest.approx(0.1)


def test_sentences_of_the_trial():
    table = trial(BARE | {("dropped", "control 2"): 1}, PRESSED)
    said = heads.necessary(table)
    assert "准确率 1.00 [" in said and "（抽签 2 次）1.00 [" in said and said.endswith("抄写的头是必要的。")
    said = heads.sufficient(table)
    assert said.startswith("snapkv（压缩率 0.9）的准确率是 0.00；预算不变，只在抄写的头里留住数字，便是 1.00；")
    assert said.endswith("对答出口令，在抄写的头里留住数字是充分的。")
    runs = pd.DataFrame({"lender": ["keydiff", "keydiff"]})
    said = heads.lent(runs, table)
    assert "改留 keydiff 在同一压缩率下所留的条目，snapkv（压缩率 0.9）的准确率由 0.00 变为 0.75；反过来" in said


def test_several_presses_are_told_from_the_lowest_to_the_highest():
    one = trial(BARE, PRESSED)
    other = one[one["press"] == "snapkv"].assign(press="tova", n_correct=lambda table: table["n_correct"].clip(lower=1))
    said = heads.sufficient(pd.concat([one, other]))
    assert (
        said.startswith("snapkv、tova（压缩率 0.9）的准确率是 0.00 至 0.25；")
        and "只在其余全部头里留住，是 0.00 至 0.25。" in said
    )


def test_what_the_trial_does_not_carry_is_not_said():
    no_cause = {condition: 0.5 for condition in BARE}
    table = trial(no_cause, {**PRESSED, ("kept", "others"): 1})
    assert heads.necessary(table).endswith("不足以说抄写的头是必要的。")
    assert heads.sufficient(table).endswith("不足以说在抄写的头里留住数字是充分的。")
    weakened = trial(BARE, PRESSED)  # dropped from a group of other heads, digits are missed there too
    assert heads.necessary(weakened).endswith("但这还不足以说没有它们就答不出，别处的却不碍事。")
    half = trial({**BARE, ("dropped", "copying"): 0.5, ("dropped", "control 2"): 1}, PRESSED)
    assert "损害更大" in heads.necessary(half) and "必要" not in heads.necessary(half)
    little = trial(BARE, {**PRESSED, ("kept", "copying"): 0.25})  # more than nothing, but no answer
    assert heads.sufficient(little).endswith("不足以说在抄写的头里留住数字是充分的。")


def test_a_model_in_which_none_or_all_heads_copy_is_not_tried():
    none = trial({("as_is", "none"): 1, ("dropped", "others"): 0}, {("as_is", "none"): 0})
    every = trial({("as_is", "none"): 1, ("dropped", "copying"): 0}, {("as_is", "none"): 0})
    for sentence in (heads.necessary, heads.sufficient, lambda table: heads.lent(pd.DataFrame(), table)):
        assert sentence(none) == heads.NONE_COPY and sentence(every) == heads.ALL_COPY
    figures.use_style()
    assert heads.trial_bars(none)
    found = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "copies": False, "copy_attention": [0.01, 0.02]})
    assert "没有抄写的头：投得最多的头也只有 0.020" in heads.found(found)
    every = found.assign(copies=True, copy_attention_tried=[0.5, 0.6])
    assert heads.found(every).endswith("（第 0 层 2 个）；在找头时没有用过的口令上，它们投给数字的注意力至少 0.50。")


def test_the_figure_and_the_table_show_the_same_conditions():
    table = trial(BARE, PRESSED)
    figures.use_style()
    left, right = heads.trial_bars(table).axes
    shown = [patch.get_width() for axes in (left, right) for patch in axes.patches]
    assert [f"{value:.2f}" for value in shown] == [cell[:4] for cell in heads.trial_table(table)["准确率"]]
    assert [label.get_text() for label in left.get_yticklabels()][:2] == ["不压缩", "原样"]
    assert len(left.patches) == 4 and len(right.patches) == 6


def records_of(tmp_path, of_trial: pd.DataFrame, of_losses: pd.DataFrame) -> Records:
    """Packed as a study would write them: one run of each press."""
    runs = []
    for (press, ratio), part in of_trial.groupby(["press", "compression_ratio"], dropna=False, sort=False):
        run = {"run_id": f"{press} {ratio}", "press": press, "compression_ratio": ratio, "dataset": "a text"}
        write_table(tmp_path, run["run_id"], "trial", part.drop(columns=["press", "compression_ratio"]))
        lost = of_losses[of_losses["press"] == press]
        lost = lost[lost["compression_ratio"].eq(ratio) | lost["compression_ratio"].isna()]
        if len(lost):
            table = lost.drop(columns=["press", "compression_ratio", "dataset"])
            write_table(tmp_path, run["run_id"], "losses", table)
        runs.append(run | {"n_heads": 24, "n_copying_heads": 4, "path": str(tmp_path / f"{run['run_id']}.json")})
    return Records("heads", tmp_path, tmp_path, pd.DataFrame(runs))


def losses(**changed) -> pd.DataFrame:
    """Ten windows of 100 tokens of two presses. Copying heads: one token in a hundred loses 4 nat, seen far away."""
    rows = []
    for press, copying, others in (("snapkv", 4.0, 0.0), ("knorm", 4.0, changed.get("others", 0.5))):
        for name, loss in (("copying", copying), ("others", others), ("all", copying + others)):
            for window in range(10):
                lost = {"n_tokens_lost": 1, "loss_lost": 4.0} if name != "others" else {"n_tokens_lost": 0}
                known = {"press": press, "compression_ratio": 0.75, "heads": name, "dataset": "a text"}
                known |= {"document": 0, "part": 0, "position": window}
                row = {"n_tokens": 100, "loss": loss, "n_tokens_gained": 0, "loss_gained": 0.0, "loss_lost": 0.0}
                seen = {"n_tokens_far": 20, "loss_far": loss, "n_tokens_near": 10, "loss_near": 0.0}
                rows.append({**known, **row, **lost, **seen, "n_tokens_new": 70, "loss_new": 0.0})
    return pd.DataFrame(rows)


def test_a_loss_taken_apart_sums_up():
    table = lost_tokens.lost_by_heads(losses()).set_index(["press", "heads"])
    row = table.loc["snapkv", "all"]
    assert (row["value"], row["part_lost"], row["tokens_lost"]) == (0.04, 1.0, 0.01)
    assert (row["part_far"], row["nat_far"], row["tokens_new"]) == (1.0, 0.2, 0.7)
    parts = lost_tokens.lost_by_heads(losses())
    assert np.allclose(parts.loc[parts["value"] > 0, ["part_far", "part_near", "part_new"]].sum(1), 1)


def test_a_mean_loss_is_few_tokens_times_much_and_the_others_times_little():
    found = lost_tokens.dilution(lost_tokens._whole(losses())).set_index("press")
    assert np.allclose(found["p"] * found["c"] + (1 - found["p"]) * found["rest"], found["value"])
    assert found.loc["snapkv", ["p", "c", "rest"]].tolist() == pytest.approx([0.01, 4.0, 0.0])
    assert found.loc["knorm", "rest"] == pytest.approx(0.5 / 99)
    runs = pd.DataFrame({"press": ["knorm", "snapkv"], "compression_ratio": 0.75, "accuracy": [0.5, 0.02]})
    said = lost_tokens.diluted(runs, losses())
    assert said.startswith("压缩率 0.75，snapkv 之下口令答对 0.02；在 a text 上，续文里 1.00% 的词元多付逾")
    assert "knorm 之下口令答对 0.01" in lost_tokens.diluted(runs.assign(accuracy=[0.01, 0.02]), losses())
    with pytest.raises(Missing, match="accuracy"):
        lost_tokens.diluted(runs.assign(accuracy=None), losses())
    assert f"每个平均 4.00 nat；摊到全部词元上只是 0.040 nat，困惑度不过变为 {np.exp(0.04):.3f} 倍。" in said


def test_whose_loss_it_is():
    assert "2 种方法在困惑度里的损失都主要来自抄写的头" in lost_tokens.by_heads(losses())
    assert lost_tokens.by_heads(losses(others=9.0)).endswith("抄写的头丢掉的条目的有 1 种（snapkv）。")
    assert lost_tokens.by_tokens(losses()).endswith("snapkv、knorm 的损失有 89% 至 100% 在这少数词元上。")
    split = lost_tokens.by_tokens(losses(others=9.0))
    assert split.endswith("snapkv 的损失有 100% 在这少数词元上；knorm 的损失只有 31% 在其上，大半是许多词元分摊的。")
    assert "远处出现过的 20%、只在近处出现过的 10%、没有出现过的 70%" in lost_tokens.by_seen(losses())
    assert "snapkv、knorm 的损失，本可以照抄的词元（远处出现过的）付得最多，每个 0.200 至 0.225 nat" in (
        lost_tokens.by_seen(losses())
    )
    near = losses()
    near.loc[near["press"] == "knorm", ["loss_near", "loss_far"]] = near.loc[
        near["press"] == "knorm", ["loss_far", "loss_near"]
    ].to_numpy()
    assert "knorm 则分不出谁付得最多：" in lost_tokens.by_seen(near)
    hard = losses()  # some windows are hard for all their tokens: no class of tokens pays more for that
    for which in ("far", "near", "new"):
        by_window = np.random.default_rng(0).normal(0, 1, hard["position"].nunique())
        places = hard["position"].rank(method="dense").astype(int) - 1
        hard[f"loss_{which}"] += by_window[places] * hard[f"n_tokens_{which}"]
    row = lost_tokens._whole(hard).set_index("press").loc["snapkv"]
    assert row["nat_far_low"] < row["nat_new_high"]  # intervals would not tell
    assert "snapkv、knorm 的损失，本可以照抄的词元（远处出现过的）付得最多" in lost_tokens.by_seen(hard)
    figures.use_style()
    left, right = lost_tokens.loss_bars(losses()).axes
    assert [bar.get_width() for bar in left.patches] == [0.04, 0.0, 0.04, 0.04, 0.005, 0.045]
    shown = lost_tokens.loss_table(losses())
    assert shown["它们占损失"].tolist()[:3] == ["100%", "—", "100%"]  # a loss of zero has no parts
    with pytest.raises(Missing, match="表 losses"):  # of no compression alone
        lost_tokens.loss_table(losses().iloc[:0][["press", "compression_ratio"]])


def noise() -> pd.DataFrame:
    """Of snapkv: in every window two tokens change by much, now for the worse and now for the better."""
    table = losses()
    table = table[table["press"] == "snapkv"].reset_index(drop=True)
    sign = np.where(table["position"] % 2, 1.0, -1.0)
    for which, share in (("", 1.0), ("_lost", 1.0 * (sign > 0)), ("_gained", 1.0 * (sign < 0)), ("_far", 1.0)):
        table[f"loss{which}"], table[f"n_tokens{which}"] = 8 * sign * share, table[f"n_tokens{which}"]
    return table.assign(n_tokens_lost=2 * (sign > 0), n_tokens_gained=2 * (sign < 0), loss=table["loss"] + 0.01)


def test_a_loss_that_may_be_none_has_no_parts_and_no_cause():
    """Those that lose much are chosen by it: of noise, they would carry far more than all of what is left of it."""
    table = noise()
    (row,) = lost_tokens._whole(table).itertuples()
    assert row.low < 0 < row.value and row.part_lost > 100 and not row.sure
    said = lost_tokens.by_tokens(table)
    assert said.endswith("少付这么多的占 1.0%。损失与零分不开，不谈它们占多少。")
    assert lost_tokens.by_seen(table).endswith("没有哪种方法，远处出现过的词元付得明显最多。")
    assert lost_tokens.whose(table) == "snapkv 的损失与零分不开，说不上来自哪些头。"
    with pytest.raises(Missing, match="损失不是零"):
        lost_tokens.diluted(pd.DataFrame({"press": [], "compression_ratio": [], "accuracy": []}), table)
    both = pd.concat([losses()[losses()["press"] == "knorm"], table])
    assert "（至少一半" in lost_tokens.whose(both) and "snapkv 的损失本身与零分不开" in lost_tokens.whose(both)


def test_what_gains_as_much_is_set_against_what_loses():
    table = losses()
    table[["n_tokens_gained", "loss_gained"]] = 1, -3.0  # of 4 nat lost in a window 3 come back
    said = lost_tokens.by_tokens(table[table["press"] == "snapkv"])
    assert said.endswith("两相抵之后，snapkv 的损失只有 25% 在其上，大半是许多词元分摊的。")


def test_mostly_is_asked_window_by_window():
    """Both make as much in the mean, and the copying heads more in some windows only: nothing can be said."""
    table = losses(others=3.9)
    wobble = 3 * (-1.0) ** table["position"]
    table["loss"] += wobble.where((table["heads"] == "copying") & (table["press"] == "knorm"), 0.0)
    said = lost_tokens.whose(table)
    assert "2 种方法里" in said and said.endswith("的有 1 种（snapkv）。")


def test_presses_with_a_strength_of_their_own_have_no_ratio():
    own = losses().assign(compression_ratio=np.nan)
    runs = pd.DataFrame({"press": ["snapkv"], "compression_ratio": np.nan, "accuracy": 0.02})
    for said in (lost_tokens.by_heads(own), lost_tokens.diluted(runs, own)):
        assert "各按自己的强度，" in said and "nan" not in said


def test_texts_are_compared_under_one_protocol(tmp_path):
    found = []
    for name, length in (("one", 1024), ("two", 1024), ("three", 512)):
        records = records_of(tmp_path / name, trial(BARE, PRESSED), losses().assign(compression_ratio=0.9))
        records.frame["dataset"] = name
        known = {"model": "demo", "weights_id": "a", "context_length": 1536, "continuation_length": 256}
        found.append(replace(records, frame=records.frame.assign(window_context=length, **known)))
    assert [one.frame["dataset"].iloc[0] for one in lost_tokens.of_one_protocol(found)] == ["one", "two"]
    table = lost_tokens.loss_by_text(found)
    assert table["文本"].tolist() == ["one", "two"] and set(table["压缩率"]) == {"0.9"}
    assert table["在所有头里"].tolist() == ["0.0400 [0.0400, 0.0400]"] * 2
    tokens = lost_tokens.tokens_by_text(found)
    assert tokens["占损失"].tolist() == ["100%"] * 2 and tokens["远处出现过的词元占"].tolist() == ["100%"] * 2
    assert lost_tokens.dilution_table(found)["$c$"].tolist() == ["4.00"] * 2


# ---- orders ---------------------------------------------------------------------------------------------------------


def test_an_interval_of_a_rank_correlation_is_that_of_resampled_rows():
    """The same draws, ranked and correlated one by one, by pandas."""
    rng = np.random.default_rng(5)
    one = pd.Series(rng.normal(size=12)).round(1)
    other = one + rng.normal(size=12).round(1)
    drawn = np.random.default_rng(0).integers(12, size=(200, 12))
    found = [rank_correlation(*(x.iloc[rows].reset_index(drop=True) for x in (one, other))) for rows in drawn]
    assert rank_correlation_ci95(one, other, 200) == pytest.approx(np.nanpercentile(found, [2.5, 97.5]))
    low, high = rank_correlation_ci95(one, other)
    assert low < rank_correlation(one, other) < high
    assert all(map(np.isnan, rank_correlation_ci95(one[:3], other[:3])))
    assert all(map(np.isnan, rank_correlation_ci95(one * 0, other)))


def records(study: str, tmp_path, **columns) -> Records:
    names = [f"press {i}" for i in range(8)]
    frame = pd.DataFrame(
        {"press": names, "compression_ratio": 0.5, "query_aware": False, "dataset": "a text"} | columns
    )
    return Records(study, tmp_path, tmp_path, frame)


def test_orders_that_agree_and_orders_that_do_not(tmp_path):
    loss = records("pg19_ppl", tmp_path, delta_nll=[0.1 * i for i in range(8)])
    good = records("recall", tmp_path, accuracy=[0.9 - 0.1 * i for i in range(8)])
    (row,) = orders.orders(loss, good).itertuples()
    assert row.rho == pytest.approx(1) and row.low == pytest.approx(1) and row.n_presses == 8 and row.n_little == 0
    assert orders.in_words(good, loss).endswith("1 个秩相关的区间都在零以上：两种名次大体一致。")
    bad = records("recall", tmp_path, accuracy=[0.1 * i for i in range(8)])
    assert orders.orders(loss, bad)["rho"].tolist() == pytest.approx([-1])
    assert orders.in_words(bad, loss).endswith("区间全在零以上的有 0 个，全在零以下的有 1 个。")
    mixed = records("recall", tmp_path, accuracy=[0.5, 0.1, 0.9, 0.3, 0.8, 0.0, 0.6, 0.2])
    assert orders.in_words(mixed, loss).endswith("也不足以拿一个代替另一个。")
    assert orders.order_table(mixed, loss)["准确率不到 0.05 的"].tolist() == [1]
    nothing = records("recall", tmp_path, accuracy=[0.0] * 8)
    with pytest.raises(Missing, match="与 pg19_ppl 共有的几种方法"):  # all alike: no order, and no row of nan
        orders.orders(loss, nothing)
    both = Records("recall", tmp_path, tmp_path, pd.concat([good.frame, nothing.frame.assign(compression_ratio=0.9)]))
    losses_of_both = pd.concat([loss.frame, loss.frame.assign(compression_ratio=0.9)])
    found = orders.orders(Records("pg19_ppl", tmp_path, tmp_path, losses_of_both), both)
    assert found["compression_ratio"].tolist() == [0.5]
    with pytest.raises(Missing, match="recall 的 与 pg19_ppl 共有的几种方法"):
        orders.orders(loss, Records("recall", tmp_path, tmp_path, good.frame.assign(compression_ratio=0.25)))


def test_a_degenerate_run_has_no_rank(tmp_path):
    """Seven presses agree; the eighth, best in loss and worst in recall, did not do what its name says."""
    loss = records("pg19_ppl", tmp_path, delta_nll=[0.1 * i for i in range(7)] + [-1.0])
    recall = records("recall", tmp_path, accuracy=[0.9 - 0.1 * i for i in range(7)] + [0.0])
    assert orders.orders(loss, recall)["rho"].iloc[0] < 0.5
    marked = recall.frame.assign(degenerate=[None] * 7 + ["tied 0.900"])
    (row,) = orders.orders(loss, Records("recall", tmp_path, tmp_path, marked)).itertuples()
    assert row.n_presses == 7 and row.rho == pytest.approx(1)


def test_where_hardly_any_key_is_found_there_is_no_order(tmp_path):
    loss = records("pg19_ppl", tmp_path, delta_nll=[0.1 * i for i in range(8)])
    little = records("recall", tmp_path, accuracy=[0.005 * i for i in range(8)])
    with pytest.raises(Missing, match="与 pg19_ppl 共有的几种方法"):
        orders.orders(loss, little)


def told_apart(tmp_path, study: str, values: dict[str, float]) -> Records:
    """A run of each press, with the units on which it was measured: 20 contexts of five keys, or 100 windows."""
    rows, number = [], np.arange(100)
    for press, value in values.items():
        name = f"{study} {press}"
        known = {"press": press, "compression_ratio": 0.5, "query_aware": False, "dataset": "a text", "run_id": name}
        rows.append(known | {"delta_nll": value, "accuracy": value, "path": str(tmp_path / f"{name}.json")})
        nll = 3 + np.sin(number) + value * (1 + 0.3 * np.cos(7 * number))
        hits = number * 37 % 100 < round(100 * value)
        keys = pd.DataFrame({"context": number // 5, "name": number, "correct": hits})
        windows = pd.DataFrame({"document": 0, "position": number, "nll_mean": nll})
        write_table(tmp_path, name, *(("keys", keys) if study == "recall" else ("windows", windows)))
    return Records(study, tmp_path, tmp_path, pd.DataFrame(rows))


def test_pairs_in_opposite_orders_are_counted_where_both_orders_are_clear(tmp_path):
    """By loss: a, b, then c and d, level. By recall: b first, a and c level, d last."""
    loss = told_apart(tmp_path, "pg19_ppl", {"a": 0.1, "b": 0.4, "c": 0.8, "d": 0.8})
    recall = told_apart(tmp_path, "recall", {"a": 0.5, "b": 0.9, "c": 0.5, "d": 0.1})
    said = orders.opposed(recall, loss)
    assert "压缩率 0.5 时" in said and "都分得出先后的有 4 对，其中 1 对次序相反，如 a 与 b：" in said  # ab, ad, bc, bd
    assert said.endswith("损失 0.100 对 0.400 nat，准确率 0.50 对 0.90。")
    agreeing = told_apart(tmp_path / "agreeing", "recall", {"a": 0.9, "b": 0.6, "c": 0.3, "d": 0.3})
    assert orders.opposed(agreeing, loss).endswith("都分得出先后的有 5 对，其中 0 对次序相反。")

"""What pages say of the trial and of losses follows from the tables, and says so when the tables do not carry it."""

import numpy as np
import pandas as pd
import pytest

from kvneox_lib.pages import figures, heads, lost_tokens, orders
from kvneox_lib.pages.ranks import rank_correlation, rank_correlation_ci95
from kvneox_lib.pages.report import Missing, Records

GROUPS = ("copying", "control 1", "control 2", "others")


def trial(bare: dict, pressed: dict, n_contexts: int = 10) -> pd.DataFrame:
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
    assert (control["value"], control["n_keys"], control["n_draws"]) == (0.75, 80, 2)
    assert control["low"] < 0.75 < control["high"]
    assert table.loc["snapkv", 0.9, "kept", "copying"]["kept"] == pytest.approx(0.1)


def test_sentences_of_the_trial():
    table = trial(BARE, PRESSED)
    said = heads.necessary(table)
    assert "准确率 1.00 [" in said and "（抽签 2 次）0.75 [" in said and said.endswith("抄写的头是必要的。")
    said = heads.sufficient(table)
    assert said.startswith("snapkv 0.9 准确率 0.00 [") and said.endswith("抄写的头是充分的。") and "0.5" not in said
    runs = pd.DataFrame({"lender": ["keydiff", "keydiff"]})
    assert "改留 keydiff 在同一压缩率下所留的位置，准确率：snapkv 0.9 由 0.00 变为 0.75" in heads.lent(runs, table)


def test_what_the_trial_does_not_carry_is_not_said():
    no_cause = {condition: 0.5 for condition in BARE}
    table = trial(no_cause, {**PRESSED, ("kept", "others"): 1})
    assert heads.necessary(table).endswith("不足以说抄写的头是必要的。")
    assert heads.sufficient(table).endswith("不足以说抄写的头是充分的。")
    without = {("as_is", "none"): 1, ("dropped", "others"): 0}  # a model in which no head copies
    with pytest.raises(Missing, match="抄写的头"):
        heads.necessary(trial(without, {("as_is", "none"): 0}))
    with pytest.raises(Missing):
        heads.sufficient(trial(without, {("as_is", "none"): 0}))
    found = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "copies": False, "copy_attention": [0.01, 0.02]})
    assert "没有抄写的头：投得最多的头也只有 0.020" in heads.found(found)


def test_the_figure_and_the_table_show_the_same_conditions():
    table = trial(BARE, PRESSED)
    figures.use_style()
    left, right = heads.trial_bars(table).axes
    shown = [patch.get_width() for axes in (left, right) for patch in axes.patches]
    assert [f"{value:.2f}" for value in shown] == [cell[:4] for cell in heads.trial_table(table)["准确率"]]
    assert [label.get_text() for label in left.get_yticklabels()][:2] == ["不压缩", "原样"]
    assert len(left.patches) == 4 and len(right.patches) == 6


def losses(**changed) -> pd.DataFrame:
    """Ten windows of 100 tokens of two presses. Copying heads: one token in a hundred loses 4 nat, seen far away."""
    rows = []
    for press, copying, others in (("snapkv", 4.0, 0.0), ("knorm", 4.0, changed.get("others", 0.5))):
        for name, loss in (("copying", copying), ("others", others), ("all", copying + others)):
            for window in range(10):
                lost = {"n_tokens_lost": 1, "loss_lost": 4.0} if name != "others" else {"n_tokens_lost": 0}
                known = {"press": press, "compression_ratio": 0.75, "heads": name, "document": 0, "position": window}
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
    said = lost_tokens.decomposed(losses())
    assert "snapkv 的 $p$ 是 1.00%，$c$ 是 4.00 nat，$p c$ 是 0.0400 nat，而 $\\Delta$ 是 0.0400 nat" in said


def test_whose_loss_it_is():
    assert "2 种方法在困惑度里的损失都主要来自抄写的头" in lost_tokens.by_heads(losses())
    assert "2 种方法里，困惑度的损失主要来自抄写的头丢掉的位置的有 1 种" in lost_tokens.by_heads(losses(others=9.0))
    assert lost_tokens.by_tokens(losses()).endswith("损失集中在极少数的词元上。")
    assert lost_tokens.by_tokens(losses(others=9.0)).endswith("集中在这样的词元上的有 1 种。")
    assert "远处出现过的 20%、只在近处出现过的 10%、没有出现过的 70%" in lost_tokens.by_seen(losses())
    assert lost_tokens.by_seen(losses()).endswith("本可以照抄的词元付得最多。")
    figures.use_style()
    left, right = lost_tokens.loss_bars(losses()).axes
    assert [bar.get_width() for bar in left.patches] == [0.04, 0.0, 0.04, 0.04, 0.005, 0.045]
    shown = lost_tokens.loss_table(losses())
    assert shown["它们占损失"].tolist()[:3] == ["100%", "—", "100%"]  # a loss of zero has no parts


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
    assert orders.in_words(good, loss).endswith("两种名次在每个压缩率上都大体一致。")
    bad = records("recall", tmp_path, accuracy=[0.1 * i for i in range(8)])
    assert orders.orders(loss, bad)["rho"].tolist() == pytest.approx([-1])
    assert orders.in_words(bad, loss).endswith("区间不含零的，为正者 0 个，为负者 1 个。")
    mixed = records("recall", tmp_path, accuracy=[0.5, 0.1, 0.9, 0.3, 0.8, 0.0, 0.6, 0.2])
    assert orders.in_words(mixed, loss).endswith("所以不能拿一个代替另一个。")
    assert orders.order_table(mixed, loss)["准确率不到 0.05 的"].tolist() == [1]
    with pytest.raises(Missing, match="recall 的 与 pg19_ppl 共有的几种方法"):
        orders.orders(loss, Records("recall", tmp_path, tmp_path, good.frame.assign(compression_ratio=0.25)))

"""Degenerate settings are found where arithmetic says so, and nowhere else; pages name them and rank none."""

from types import SimpleNamespace

import kvpress
import pandas as pd
import pytest
import torch

from kvneox_lib import make_press
from kvneox_lib.measures import degenerate
from kvneox_lib.measures.degenerate import Behaviour, behaviours, figures_of_each
from kvneox_lib.measures.survivors import kept_positions
from kvneox_lib.pages import degenerate as pages
from kvneox_lib.pages import retrieval, tasks
from kvneox_lib.pages.losses import against
from kvneox_lib.pages.selecting import budget_column, of_ratios, strength_axis, with_strength
from kvneox_lib.presses.by_name import expand_presses, ratio_for
from kvneox_lib.presses.registry import REGISTRY

RATIOS = (0.25, 0.5, 0.75, 0.9, 0.99)


@pytest.fixture(scope="module")
def thousand(reading):
    return reading[:, 2000:3024]


def behaviour(demo, ids, name: str, ratio: float = 0.5, **options) -> Behaviour:
    (found,) = behaviours(demo, ids, [make_press(name, ratio_for(name, ratio, demo), **options)])
    return found


# -- the cells that are known to be ----------------------------------------------------------------------------------


def test_lagkv_with_a_lag_of_128(demo, thousand):
    """Of 1,024 tokens the sinks and what follows the last whole lag but one score alike: 4 + 128 + 1020 % 128 = 256. At
    0.75 these are what is kept, and what StreamingLLM keeps; beyond, the cut is among them."""
    at = {ratio: behaviour(demo, thousand, "lagkv", ratio, lag_size=128) for ratio in (0.5, 0.75, 0.9, 0.99)}
    assert at[0.75].same_as == "streaming_llm" and at[0.75].tied_share == 0 and at[0.75].fixed_share == 1
    lag, streaming = make_press("lagkv", 0.75, lag_size=128), make_press("streaming_llm", 0.75)
    assert torch.equal(*(kept_positions(demo, thousand, press) for press in (lag, streaming)))
    for ratio in (0.9, 0.99):
        assert at[ratio].tied_share == at[ratio].fixed_share == 1
        assert at[ratio].phrases[0] == "tied 1.00"
    assert at[0.5].phrases == [] and at[0.5].fixed_share == pytest.approx(256 / 512)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_lag_of_the_row_acts_but_where_none_does(demo, thousand, ratio):
    found = behaviour(demo, thousand, "lagkv", ratio)
    lag = make_press("lagkv", ratio).lag_size
    fixed, n_kept = 4 + lag + 1020 % lag, int(1024 * (1 - ratio))
    n_lags = 1020 // lag - 1
    if ratio == 0.99:
        assert found.phrases == ["tied 1.00", "fixed 1.00"]
        return
    assert found.phrases == [] and found.fixed_share == pytest.approx(fixed / n_kept)
    assert found.tied_share == pytest.approx((n_kept - fixed) % n_lags / n_kept), "ranks repeat in every lag"


def test_no_lag_acts_when_ten_of_a_thousand_are_kept():
    """What the registry says: the sinks and the tail leave fewer than one entry for each of the other lags."""
    for lag in range(1, 511):
        n_lags, tail = 1020 // lag - 1, lag + 1020 % lag
        assert 10 - 4 - tail < n_lags


def test_snapkv_keeps_its_window_whatever_the_scores(demo, thousand):
    found = {ratio: behaviour(demo, thousand, "snapkv", ratio) for ratio in (0.5, 0.9, 0.99)}
    assert found[0.99].phrases == ["tied 1.00", "fixed 1.00"]
    assert found[0.9].phrases == [] and found[0.9].fixed_share == pytest.approx(64 / 102)
    assert found[0.5].phrases == [] and found[0.5].fixed_share == pytest.approx(64 / 512)
    for name in ("adakv_snapkv", "criticalkv_snapkv", "critical_adakv_snapkv", "key_rerotation_snapkv"):
        assert "fixed 1.00" in behaviour(demo, thousand, name, 0.99).phrases, name
        assert behaviour(demo, thousand, name, 0.5).phrases == [], name


def test_chunkkv_keeps_another_share_than_was_asked_for(demo, thousand):
    """52 chunks, of which floor(52 / 10) = 5 are kept: four or five of 20, the last of 4."""
    found = behaviour(demo, thousand, "chunkkv_snapkv", 0.9)
    assert found.kept_share in (84 / 1024, 100 / 1024)
    if found.kept_share == 84 / 1024:
        assert "kept 0.082 for 0.100" in found.phrases
    assert "tied" in behaviour(demo, thousand, "chunkkv_snapkv", 0.99).phrases[0], "3 whole chunks of window, for 1"
    assert behaviour(demo, thousand, "chunkkv_snapkv", 0.5).phrases == []


def test_a_window_in_each_chunk_that_is_longer_than_its_budget(demo, thousand):
    assert behaviour(demo, thousand, "chunk_snapkv", 0.9).phrases == ["tied 1.00", "fixed 1.00"]
    assert behaviour(demo, thousand, "chunk_snapkv", 0.5).phrases == []


@pytest.mark.parametrize("name", expand_presses("all")[1:])
def test_core_presses_are_healthy_at_a_half(demo, thousand, name):
    assert behaviour(demo, thousand, name, 0.5).phrases == []


def test_streaming_llm_is_what_it_says_at_every_ratio(demo, thousand):
    for ratio in (0.5, 0.99):
        found = behaviour(demo, thousand, "streaming_llm", ratio)
        assert found.phrases == [] and found.fixed_share is None and found.same_as is None


def test_what_keeps_the_recent_window_is_found(demo, reading):
    class Recent(kvpress.ScorerPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return torch.arange(keys.shape[2]).expand(keys.shape[:3]).float()

    (found,) = behaviours(demo, reading[:, :100], [Recent(0.5)])
    assert found.same_as == "recent window" and found.phrases == ["same as recent window"]


@pytest.mark.parametrize("goes", [False, True])
def test_ties_are_counted_as_a_sort_counts_them(goes):
    """Against every way to break them: which entries are kept in some, and not in all."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        scores = torch.randint(0, 4, (1, 7), generator=generator).float()
        k = int(torch.randint(1, 7, (1,), generator=generator))
        counts = torch.zeros(7)
        trials = [(scores + 0.1 * torch.rand(1, 7, generator=generator)).topk(k).indices[0] for _ in range(200)]
        for chosen in trials:
            counts[chosen] += 1
        always, n_kept = int((counts == 200).sum()), k
        if goes:
            always, n_kept = int((counts == 0).sum()), 7 - k
        expected = (n_kept - always) / n_kept
        assert degenerate._tied(degenerate.Call(scores, k), goes) == pytest.approx(expected)


# -- what it does not do ----------------------------------------------------------------------------------------------


def test_it_draws_nothing_and_leaves_the_answer_as_it_was(demo, reading):
    ids, press = reading[:, :200], make_press("random", 0.5)
    torch.manual_seed(3)
    expected = kept_positions(demo, ids, press)
    torch.manual_seed(3)
    figures_of_each(demo, ids, [press])
    assert torch.equal(kept_positions(demo, ids, press), expected)


def test_presses_of_which_nothing_is_said(demo, reading):
    presses = [None, make_press("decoding_knorm"), make_press("snapkv"), make_press("kvzip", 0.5)]
    nothing, decoding, too_short, replayed = behaviours(demo, reading[:, :60], presses)
    assert nothing is None and decoding is None and too_short is None
    assert replayed.kept_share == pytest.approx(0.5) and replayed.phrases == [] and replayed.fixed_share is None
    assert figures_of_each(demo, torch.zeros(1, 0, dtype=torch.long), [None]) == [degenerate.NOTHING]
    own = behaviour(demo, reading[:, :600], "duo_attention")
    assert own.asked_share is None and own.kept_share < 1, "its strength is its own, so nothing else was asked for"


def test_a_budget_is_what_was_asked_for(demo, reading):
    found = behaviours(demo, reading[:, :200], [make_press(name, keep_tokens=50) for name in ("knorm", "snapkv")])
    assert found[0].asked_share == found[0].kept_share == 0.25 and found[0].phrases == []
    assert found[1].phrases == ["tied 1.00", "fixed 1.00"]


# -- on pages ---------------------------------------------------------------------------------------------------------


def table() -> pd.DataFrame:
    rows = [("no_press", 0.0, None, None, 0.0), ("random", 0.9, None, 0.0, 0.3), ("snapkv", 0.9, None, 0.63, 0.2)]
    rows += [("lagkv", 0.9, "tied 1.00; same as streaming_llm", 1.0, 0.1), ("tova", 0.9, None, 0.0, 0.25)]
    frame = pd.DataFrame(rows, columns=["press", "compression_ratio", "degenerate", "fixed_share", "nll_mean"])
    return frame.assign(query_aware=False, accuracy=1 - frame["nll_mean"])


def test_pages_name_degenerate_runs_and_rank_the_others():
    runs = table()
    assert list(pages.healthy(runs)["press"]) == ["no_press", "random", "snapkv", "tova"]
    named, windows = pages.said(runs)
    assert "lagkv，压缩率 0.9（100% 的条目在同分者中随意取，所留与 streaming_llm 完全相同）" in named
    assert windows.endswith("窗口占了一半以上：snapkv，压缩率 0.9 时占 63%。")
    assert list(retrieval.at_middle_ratio(runs, "问题在外").index) == ["random", "snapkv", "tova"]
    compared = against(pd.concat([runs] * 6).assign(document=0), "random")
    assert set(compared["press"]) == {"snapkv", "tova"}
    scored = runs.assign(dataset="kvneox_copy", question="outside", score=runs["accuracy"])
    assert "lagkv" not in tasks.at_middle_ratio(scored, "outside").index
    before = runs.drop(columns=["degenerate", "fixed_share"])  # records from before it was looked for
    assert pages.healthy(before).equals(before) and pages.said(before) == []


def test_the_table_merges_studies_and_bits():
    frame = table()
    other = frame.assign(degenerate=frame["degenerate"].str.replace("1.00", "0.20"), kv_bits=2)
    several = [SimpleNamespace(study="recall", frame=frame), SimpleNamespace(study="tasks", frame=other)]
    (row,) = pages.table(several).itertuples(index=False)
    assert row.press == "lagkv" and row.设置 == "0.9" and row.实验 == "检索、任务"
    assert row.原因 == "20% 至 100% 的条目在同分者中随意取；所留与 streaming_llm 完全相同"
    assert pages.table([SimpleNamespace(study="recall", frame=frame.assign(degenerate=None))]).empty


def test_every_phrase_has_its_words():
    everything = Behaviour(1.0, 1.0, 0.08, 0.1, "streaming_llm"), Behaviour(0.5, None, 0.5, None, "recent window")
    for found in everything:
        assert pages.reasons(found.figures["degenerate"])
    assert len(everything[0].phrases) == 4
    with pytest.raises(ValueError, match="degenerate='odd'"):
        pages.reasons("odd")


def test_ratios_and_budgets_do_not_meet():
    runs = table().assign(keep_tokens=[None, None, None, 128, None])
    assert list(of_ratios(runs)["press"]) == ["no_press", "random", "snapkv", "tova"]
    assert with_strength(next(runs[runs["press"] == "lagkv"].itertuples())) == "lagkv，每头 128 个条目"
    assert budget_column(runs)["每头条目"] == ["—", "—", "—", "128", "—"] and budget_column(table()) == {}
    assert strength_axis(runs)[0] == "keep_tokens" and strength_axis(table())[0] == "compression_ratio"


def test_rows_say_what_they_are():
    """The figures that texts of the registry name are those of the presses."""
    for name, option in (("snapkv", "window_size"), ("pyramidkv", "window_size"), ("lagkv", "lag_size")):
        assert f"{getattr(make_press(name), option)} 个词元" in REGISTRY[name].about
    assert f" {make_press('chunkkv_snapkv').chunk_length} 个词元" in REGISTRY["chunkkv_snapkv"].about

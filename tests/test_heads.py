"""Which heads copy: what is dropped or kept is what was asked for, head by head, and nothing else changes."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_config

from kvneox_lib import KVNeoXForCausalLM, adapt, continuation_nll, make_press
from kvneox_lib.inputs.passkeys import recall_samples
from kvneox_lib.inputs.text import load_text
from kvneox_lib.measures import causes
from kvneox_lib.measures.prefill import prefill
from kvneox_lib.measures.recall import copy_attention
from kvneox_lib.measures.survivors import kept_positions
from kvneox_lib.neox.hooks import hooked
from kvneox_lib.neox.modeling import stock_twin
from kvneox_lib.pages import heads as pages
from kvneox_lib.pages.report import Missing
from kvneox_lib.studies.heads import groups_of_heads, measure_heads

KEYS = {"n_keys": 6, "keys_per_context": 3, "context_length": 400}


@pytest.fixture(scope="module")
def filler():
    return load_text("python-docs").documents[0]


@pytest.fixture(scope="module")
def samples(tokenizer, filler):
    return recall_samples(tokenizer, filler=filler, **KEYS, seed=2)


@pytest.fixture(scope="module")
def searched(tokenizer, filler):
    return recall_samples(tokenizer, filler=filler, **KEYS, seed=3)


@pytest.fixture
def demo(demo):
    return adapt(demo)


@pytest.fixture
def groups(demo, searched):
    return groups_of_heads(causes.find_copying_heads(copy_attention(demo, searched)), seed=0, control_draws=2)


@torch.no_grad()
def stock_nll(model, ids: torch.Tensor, n_context: int, kept: torch.Tensor) -> torch.Tensor:
    """Of the stock model in one pass, behind a mask for each layer and head: what comes after the context sees of it
    only what is kept."""
    stock, n = stock_twin(model), ids.shape[1]
    with ExitStack() as stack:
        for layer, of_layer in zip(stock.gpt_neox.layers, kept):
            seen = torch.ones(n, n, dtype=torch.bool).tril().repeat(*of_layer.shape[:2], 1, 1)
            seen[:, :, n_context:, :n_context] &= of_layer[:, :, None]
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

            def given(module, args, kwargs, mask=mask):
                return args, {**kwargs, "attention_mask": mask}

            stack.enter_context(hooked([layer.attention], given, before=True))
        logits = stock(ids).logits
    return -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][:, n_context:]


# ---- what is kept ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("press", ["snapkv", "keydiff", "adakv_snapkv", "pyramidkv", "chunkkv_snapkv", "kvzip"])
def test_a_choice_is_what_the_press_keeps(demo, reading, press):
    ids, press = reading[:, :300], make_press(press, 0.6)
    _, (choice,) = causes.choices(demo, ids, [press])
    assert torch.equal(choice.kept, kept_positions(demo, ids, press))
    assert choice.scores.shape == choice.kept.shape


@torch.no_grad()
@pytest.mark.parametrize("press", ["snapkv", "keydiff", "tova", "knorm"])
def test_scores_are_those_by_which_it_was_chosen(demo, reading, press):
    _, (choice,) = causes.choices(demo, reading[:, :300], [make_press(press, 0.6)])
    worst_kept = choice.scores.masked_fill(~choice.kept, torch.inf).amin(-1)
    best_evicted = choice.scores.masked_fill(choice.kept, -torch.inf).amax(-1)
    assert (worst_kept >= best_evicted).all()


@torch.no_grad()
@pytest.mark.parametrize("press", ["snapkv", "adakv_snapkv"])
def test_positions_put_in_or_taken_out_are_those_asked_for(demo, reading, press):
    """Counted head by head; who leaves for them is found by sorting."""
    _, (choice,) = causes.choices(demo, reading[:, :300], [make_press(press, 0.75)])
    wanted, heads = torch.zeros(300, dtype=torch.bool), torch.rand(choice.kept.shape[::2]) < 0.5
    wanted[[3, 40, 41, 42, 90, 280]] = True
    given, taken = choice.with_positions(wanted, heads), choice.without_positions(wanted, heads)
    evicted_some = False
    for layer, head in np.ndindex(*heads.shape):
        before, scores = choice.kept[layer, 0, head], choice.scores[layer, 0, head]
        after, without = given[layer, 0, head], taken[layer, 0, head]
        if not heads[layer, head]:
            assert torch.equal(after, before) and torch.equal(without, before)
            continue
        assert after[wanted].all() and not without[wanted].any()
        assert after.sum() == before.sum() == without.sum()
        left, missing = before & ~after, int((wanted & ~before).sum())
        others = scores[before & ~wanted].sort().values[:missing]
        assert torch.equal(scores[left].sort().values, others)
        came = without & ~before
        assert came.sum() == (before & wanted).sum()
        if came.any():
            evicted_some = True
            assert scores[came].min() >= scores[~before & ~wanted & ~came].max()
    assert evicted_some


def test_what_exceeds_the_budget_stays_out_and_of_everything_only_the_unwanted_goes():
    scores, heads = torch.rand(2, 1, 3, 20), torch.ones(2, 3, dtype=torch.bool)
    wanted = torch.arange(20) < 8
    few = causes.Choice(scores >= scores.sort(-1).values[..., -5:-4], scores)
    given = few.with_positions(wanted, heads)
    assert (given.sum(-1) == 5).all() and not given[..., 8:].any()
    everything = causes.Choice(torch.ones_like(scores, dtype=torch.bool), scores)
    assert torch.equal(everything.without_positions(wanted, heads), ~wanted.expand_as(scores))


@torch.no_grad()
def test_each_head_sees_the_entries_named_and_no_others(demo, reading):
    ids = reading[:, :200]
    full, cache = prefill(demo, ids, None), prefill(demo, ids, None)
    kept = torch.rand(*cache.kv_lengths.shape, 200) < 0.3
    causes.see_only(cache, kept)
    cache.make_ragged()
    for layer, (ragged, whole) in enumerate(zip(cache.layers, full.layers)):
        for head, keys in enumerate(ragged.held.as_tensors(0)):
            assert torch.equal(keys, whole.keys[0, head, kept[layer, 0, head]])


@torch.no_grad()
def test_reading_on_is_the_stock_model_behind_a_mask_and_leaves_the_context_as_it_was(demo, reading):
    ids, n = reading[:, :260], 200
    cache, found = causes.choices(demo, ids[:, :n], [make_press("snapkv", 0.6), make_press("adakv_snapkv", 0.9)])
    drawn = torch.rand(found[0].kept.shape) < 0.5
    for kept in (found[0].kept, drawn, found[1].kept, torch.ones_like(drawn)):
        causes.see_only(cache, kept)
        nll, _ = causes.read_after(demo, cache, ids[:, n:], n)
        assert torch.allclose(nll, stock_nll(demo, ids, n, kept), atol=1e-3)


@torch.no_grad()
def test_the_trial_is_the_stock_model_behind_a_mask(demo, samples, groups):
    """Without a press: the digits of all keys are hidden from the heads named, and from no others."""
    sample, n = samples[0], KEYS["context_length"]
    (trials,) = causes.try_each(demo, sample, [None], [None], groups)
    assert [trial.condition.heads for trial in trials] == ["none", *groups]
    digits = torch.zeros(n, dtype=torch.bool)
    for key in sample.keys:
        assert torch.equal(sample.context_ids[slice(*key.digits_span)], key.answer_ids)
        digits[slice(*key.digits_span)] = True
    for trial in trials:
        heads = groups.get(trial.condition.heads, torch.zeros_like(groups["copying"]))
        kept = ~(heads[:, None, :, None] & digits)
        assert trial.kept_fraction == pytest.approx(float(kept.float().mean()), abs=1e-6)
        for key, nll in zip(sample.keys, trial.nll):
            ids = torch.cat([sample.context_ids, key.question_ids, key.answer_ids])[None]
            expected = stock_nll(demo, ids, n, kept)[0, -len(key.answer_ids) :].mean()
            assert nll == pytest.approx(float(expected), abs=1e-3)


@torch.no_grad()
def test_under_a_press_the_budget_stays_and_lent_heads_are_those_of_the_lender(demo, samples, groups):
    press, lender = make_press("snapkv", 0.75), make_press("keydiff", 0.75)
    (trials,) = causes.try_each(demo, samples[0], [press], [lender], groups)
    assert len({round(trial.kept_fraction, 6) for trial in trials}) == 1
    by_condition = {(trial.condition.digits, trial.condition.heads): trial for trial in trials}
    assert set(by_condition) == {
        ("as_is", "none"),
        *((what, heads) for what in ("kept", "dropped") for heads in groups),
        *(("lent", heads) for heads in ("copying", "others")),
    }
    ids, key = samples[0].context_ids[None], samples[0].keys[0]
    own, lent = (kept_positions(demo, ids, one) for one in (press, lender))
    kept = torch.where(groups["copying"][:, None, :, None], lent, own)
    read = torch.cat([ids[0], key.question_ids, key.answer_ids])[None]
    expected = stock_nll(demo, read, ids.shape[1], kept)[0, -len(key.answer_ids) :].mean()
    assert by_condition["lent", "copying"].nll[0] == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("key_rerotation_snapkv", "changes the entries"),
        ("think", "changes the entries"),
        ("merging_knorm", "changes the entries"),
        ("decoding_knorm", "evicts while decoding"),
    ],
)
def test_a_press_that_does_not_choose_is_refused_before_any_work(name, why, tmp_path):
    with pytest.raises(ValueError, match=f"press=.*{why}.*allowed is"):
        measure_heads(model="demo", dataset="python-docs", press=name, output_dir=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


# ---- which heads ----------------------------------------------------------------------------------------------------


def test_in_a_model_that_does_not_copy_no_head_is_found(tokenizer, samples):
    config = tiny_config(32, vocab_size=len(tokenizer), max_position_embeddings=600, num_hidden_layers=3)
    for seed in range(3):
        torch.manual_seed(seed)
        reading = copy_attention(KVNeoXForCausalLM(config).eval(), samples)
        assert reading.max() > 0 and not causes.find_copying_heads(reading).any()


def test_heads_found_on_some_keys_are_those_of_others(demo, samples, groups):
    copying, elsewhere = groups["copying"], copy_attention(demo, samples)
    assert 1 <= copying.sum() <= copying.numel() / 3
    assert elsewhere[copying].min() > 2 * elsewhere[~copying].max()


def test_the_criterion_is_a_share_of_the_most_and_a_floor():
    found = causes.find_copying_heads(torch.tensor([[0.9, 0.46, 0.44], [0.0, 0.1, 0.2]]))
    assert found.tolist() == [[True, True, False], [False, False, False]]
    assert causes.find_copying_heads(torch.tensor([[0.15, 0.11, 0.09]])).tolist() == [[True, True, False]]
    assert not causes.find_copying_heads(torch.tensor([[0.09, 0.01]])).any()


def test_controls_are_as_many_others_and_drawn_anew():
    copying = torch.zeros(6, 4, dtype=torch.bool)
    copying[5, 1:] = True
    drawn = [causes.control_heads(copying, seed=0, draw=draw) for draw in range(8)]
    assert all(not (one & copying).any() and one.sum() == 3 for one in drawn)
    assert len({tuple(one.flatten().tolist()) for one in drawn}) > 4
    assert torch.equal(drawn[3], causes.control_heads(copying, seed=0, draw=3))
    assert causes.control_heads(~copying, seed=0, draw=0).sum() == 3  # there are no more


# ---- losses ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_press_in_all_heads_is_the_press_and_in_none_is_none(demo, reading):
    ids, n = reading[:, :600].view(2, 300), 240
    everywhere = torch.ones(6, 4, dtype=torch.bool)
    presses = [make_press("snapkv", 0.7), make_press("adakv_snapkv", 0.7), None]
    groups = {"all": everywhere, "none": ~everywhere}
    bare, by_press = causes.nll_by_heads(demo, ids, n_context=n, presses=presses, groups=groups)
    assert torch.allclose(bare.float(), continuation_nll(demo, ids, n_context=n), atol=1e-3)
    for press, found in zip(presses, by_press):
        assert torch.allclose(found["all"].float(), continuation_nll(demo, ids, n_context=n, press=press), atol=1e-3)
        assert torch.allclose(found["none"], bare, atol=1e-3)
    assert (by_press[0]["all"] - bare).abs().max() > 0.1


@torch.no_grad()
def test_a_press_in_some_heads_is_the_stock_model_behind_a_mask(demo, reading):
    ids, n, press = reading[:, :300], 240, make_press("keydiff", 0.8)
    heads = torch.rand(6, 4) < 0.5
    _, (found,) = causes.nll_by_heads(demo, ids, n_context=n, presses=[press], groups={"some": heads})
    kept = kept_positions(demo, ids[:, :n], press)
    kept[~heads[:, None].expand(6, 1, 4)] = True
    assert torch.allclose(found["some"].float(), stock_nll(demo, ids, n, kept), atol=1e-3)


def test_pairs_are_found_where_they_stood():
    """By going through the text, as a reader would."""
    ids, n, near = torch.randint(0, 12, (3, 200)), 120, 30
    found = causes.where_seen(ids, n, near)
    assert found.shape == (3, 200 - n - 1) and set(found.unique().tolist()) == {0, 1, 2}
    for row, text in enumerate(ids.tolist()):
        for i, position in enumerate(range(n + 1, 200)):
            pair = text[position - 1 : position + 1]
            stood = [end for end in range(1, position) if text[end - 1 : end + 1] == pair]
            expected = 2 if any(end < n - near for end in stood) else 1 if stood else 0
            assert found[row, i] == expected


# ---- the study ------------------------------------------------------------------------------------------------------

STUDY = {"model": "demo", "dataset": "python-docs", "context_length": 400, "n_keys": 6, "keys_per_context": 3}
STUDY |= {"search_keys": 6, "control_draws": 2, "window_context": 200, "continuation_length": 48, "max_windows": 6}


def recall_in(trial: pd.DataFrame) -> pd.Series:
    sums = trial.groupby(["digits", "heads"])[["n_correct", "n_keys"]].sum()
    return sums["n_correct"] / sums["n_keys"]


def test_copying_heads_are_necessary_and_sufficient(tmp_path, monkeypatch):
    folder = tmp_path / "results" / "heads"
    study = measure_heads(**STUDY, press=["snapkv"], compression_ratio=0.75, output_dir=folder)
    trial = study.table("trial")
    bare, pressed = (recall_in(trial[trial["press"] == name]) for name in ("no_press", "snapkv"))
    assert bare["as_is", "none"] >= 4 / 6
    assert bare["dropped", "copying"] <= 1 / 6 and bare["dropped", "others"] >= 4 / 6
    assert bare["dropped", "control 1"] >= 4 / 6
    assert pressed["as_is", "none"] <= 1 / 6 and pressed["kept", "others"] <= 1 / 6
    assert pressed["kept", "copying"] >= 4 / 6 and pressed["lent", "copying"] >= 4 / 6

    monkeypatch.chdir(tmp_path)  # where pages look for records
    assert "来源：results/heads，2 份记录" in pages.cause_of(study.loaded)
    with pytest.raises(Missing, match="运行 notebooks/08_heads.ipynb"):
        pages.of_model(replace(study.loaded, name="another"))


def test_records_hold_what_the_tables_sum_up_to_and_are_used_again(tmp_path, monkeypatch):
    asked = {**STUDY, "press": ["keydiff"], "compression_ratio": [0.5, 0.9], "output_dir": tmp_path}
    study = measure_heads(**asked)
    runs, losses = study.records.set_index("compression_ratio"), study.table("losses")
    assert runs["press"].tolist() == ["no_press", "keydiff", "keydiff"]
    for ratio in (0.5, 0.9):
        for heads, rows in losses[losses["compression_ratio"] == ratio].groupby("heads"):
            assert rows["loss"].sum() / rows["n_tokens"].sum() == pytest.approx(runs.loc[ratio, f"delta_nll_{heads}"])
            assert rows["n_tokens"].sum() == runs.loc[ratio, "n_tokens"]
            parts = rows.filter(regex="_(far|near|new)$")
            assert np.allclose(parts.filter(like="loss").sum(1), rows["loss"])
            assert (parts.filter(like="n_tokens").sum(1) == rows["n_tokens"]).all()
    trial = study.table("trial")
    own = trial[trial["digits"] == "as_is"].groupby("compression_ratio")[["n_correct", "n_keys"]].sum()
    assert (own["n_correct"] / own["n_keys"]).to_dict() == runs["accuracy"].astype(float).to_dict()
    heads = study.table("heads")
    assert len(heads) == runs["n_heads"].iloc[0] and heads["copies"].sum() == runs["n_copying_heads"].iloc[0]

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr("kvneox_lib.studies.heads.try_each", refuse)
    again = measure_heads(**asked)
    assert again.records["started_at"].tolist() == study.records["started_at"].tolist()


def test_the_loss_is_that_of_the_perplexity_study(tmp_path):
    from kvneox_lib.studies.perplexity import measure_perplexity

    common = {"model": "demo", "dataset": "python-docs", "compression_ratio": 0.75, "press": ["snapkv"]}
    of_heads = measure_heads(**{**STUDY, **common}, output_dir=tmp_path / "heads").records
    cut = {"context_length": 200, "continuation_length": 48, "max_windows": 6, "control_windows": 1}
    of_texts = measure_perplexity(**common, **cut, output_dir=tmp_path / "texts").records
    for name, other in (("delta_nll_all", "delta_nll"), ("nll_mean", "nll_mean")):
        assert of_heads[name].tolist() == pytest.approx(of_texts[other].tolist(), abs=1e-4)


def test_a_model_without_copying_heads_is_tried_as_far_as_it_goes(tmp_path, monkeypatch):
    """What is missing is left out, and nothing is found in heads that there are none of."""
    nothing = torch.zeros(6, 4, dtype=torch.bool)
    monkeypatch.setattr("kvneox_lib.studies.heads.find_copying_heads", lambda reading: nothing)
    study = measure_heads(**STUDY, press=["snapkv"], compression_ratio=0.75, output_dir=tmp_path)
    trial = study.table("trial")
    assert set(trial["heads"]) == {"none", "others"} and "lent" not in set(trial["digits"])
    runs = study.records.set_index("press")
    assert runs["n_copying_heads"].tolist() == [0, 0]
    assert runs.loc["snapkv", "delta_nll_copying"] == pytest.approx(0, abs=1e-6)
    assert runs.loc["snapkv", "delta_nll_others"] == pytest.approx(runs.loc["snapkv", "delta_nll_all"])

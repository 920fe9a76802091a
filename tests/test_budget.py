"""A budget in tokens: each head keeps as many entries as were asked for, whatever the length of the context."""

import copy
import math

import kvpress
import pytest
import torch
from transformers import DynamicCache, pipeline

from kvneox_lib import continuation_nll, generate, make_press
from kvneox_lib.measures.perplexity import score_each
from kvneox_lib.measures.prefill import prefill, with_delimiter
from kvneox_lib.measures.survivors import kept_counts, kept_positions
from kvneox_lib.presses.applying import applied, attention, check_context
from kvneox_lib.presses.facts import attention_needed, evicts_only_at_the_end, parts_of
from kvneox_lib.presses.registry import ROWS
from kvneox_lib.studies.arguments import check_argument, defaults_of
from kvneox_lib.studies.perplexity import measure_perplexity
from kvneox_lib.studies.perplexity import plan as perplexity_plan
from kvneox_lib.studies.plan import declared
from kvneox_lib.studies.tasks import measure_tasks
from kvneox_lib.studies.tasks import plan as tasks_plan

BUDGET, LENGTHS = 100, (220, 301)
ROWS_WITH_RATIO = [row.name for row in ROWS if row.takes_ratio and row.parts]
IN_PREFILL = [name for name in ROWS_WITH_RATIO if name != "ratio_decoding_knorm"]


def off_by(press, n_tokens: int, n_layers: int) -> float:
    """How many entries a head, on average, may keep more or less, as the rules round: whole chunks (ChunkKV, and the
    last may be a short one), a floor in each chunk (Chunk), a round for each layer (PyramidKV, and up in half of them),
    at least one entry a layer (KVCompose)."""
    for part in parts_of(press):
        if type(part).__name__ == "ChunkKVPress":
            return 2 * part.chunk_length
        if isinstance(part, kvpress.ChunkPress):
            return math.ceil(n_tokens / part.chunk_length) + 1
    return 0.5 if isinstance(press, kvpress.PyramidKVPress | kvpress.KVComposePress) else 0


@pytest.mark.parametrize("name", IN_PREFILL)
def test_as_many_are_kept_at_every_length(demo, reading, name):
    """One press, for one context after another; all of one that the budget holds."""
    press = make_press(name, keep_tokens=BUDGET)
    with attention(demo, "eager" if attention_needed(press) == "eager" else "sdpa"):
        for length in (*LENGTHS, 90, LENGTHS[0]):
            counts = kept_counts(prefill(demo, reading[:, 500 : 500 + length], press)).double()
            expected = min(BUDGET, length)
            assert float(counts.mean()) == pytest.approx(expected, abs=off_by(press, length, len(counts)) + 1e-9)
            shares = {"adakv", "critical_adakv", "kvzip", "kvgrad", "kvcompose", "pyramidkv", "copying_heads"}
            if length > BUDGET and not any(name.startswith(one) for one in shares):
                assert counts.unique().numel() == 1, "each head keeps as many"


@pytest.mark.parametrize(
    "name", ["snapkv", "adakv_snapkv", "kvzip", "kvcompose", "composed_snapkv_think", "block_knorm"]
)
def test_the_same_is_kept_as_at_the_ratio_that_keeps_as_many(demo, reading, name):
    """Positions, but for composed_snapkv_think, whose keys are changed: keys and values."""
    ids, ratio = reading[:, 500:700], 0.5
    budget, share = make_press(name, keep_tokens=100), make_press(name, ratio)
    if name == "composed_snapkv_think":
        for one, other in zip(prefill(demo, ids, budget).layers, prefill(demo, ids, share).layers):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    else:
        assert torch.equal(kept_positions(demo, ids, budget), kept_positions(demo, ids, share))


@pytest.mark.parametrize("name", ["keydiff", "adakv_snapkv", "kvzip", "key_rerotation_knorm", "finch"])
def test_it_acts_when_the_press_is_used_by_itself(demo, reading, name):
    press = make_press(name, keep_tokens=BUDGET)
    for length in LENGTHS:
        cache = DynamicCache()
        ids = with_delimiter(press, reading[:, 500 : 500 + length])
        with torch.no_grad(), press(demo):
            demo.model(input_ids=ids, past_key_values=cache)
        assert float(kept_counts(cache).double().mean()) == BUDGET


def test_it_acts_in_the_pipeline_of_kvpress(demo, tokenizer, reading):
    pipe, press = (
        pipeline("kv-press-text-generation", model=demo, tokenizer=tokenizer),
        make_press("knorm", keep_tokens=80),
    )
    for length in (150, 200):
        cache = DynamicCache()
        text = tokenizer.decode(reading[0, 500 : 500 + length])
        pipe(text, question="What?", press=press, cache=cache, max_new_tokens=1)
        n_context = len(tokenizer(text).input_ids)
        assert n_context > 100 and press.compression_ratio == pytest.approx(1 - 80 / n_context, abs=0.02)
        assert 80 <= cache.get_seq_length() < 100, "the question and the answer come after what was kept"


def test_generate_and_perplexity_under_a_budget(demo, reading):
    ids, press = reading[:, 500:760], make_press("snapkv", keep_tokens=96)
    made = generate(demo, ids[:, :200], press=press, max_new_tokens=2, stop_at_eos=False)
    assert (made.kv_lengths == 96).all()
    (scored,) = score_each(demo, ids, n_context=200, presses=[press])
    assert (scored.kept == 96).all()
    whole = continuation_nll(demo, ids, n_context=200, press=make_press("snapkv", keep_tokens=200))
    assert torch.equal(whole, continuation_nll(demo, ids, n_context=200))


def test_rows_of_unequal_length_keep_as_many(demo, reading):
    rows = [reading[:, 500:700], reading[:, 900:1020]]
    padded = torch.cat([rows[0], torch.cat([rows[1].new_zeros(1, 80), rows[1]], dim=1)])
    mask = torch.ones_like(padded)
    mask[1, :80] = 0
    made = generate(demo, padded, attention_mask=mask, press=make_press("keydiff", keep_tokens=70), max_new_tokens=1)
    assert (made.kv_lengths == 70).all()


@pytest.mark.parametrize("name", ["keydiff", "snapkv"])
def test_a_context_read_in_chunks_is_under_the_same_budget(demo, reading, name):
    ids, press = reading[:, 500:760], make_press(name, keep_tokens=90)
    assert evicts_only_at_the_end(press) is None
    assert (kept_counts(prefill(demo, ids, press, prefill_chunk=64)) == 90).all()
    how = {"prefill_chunk": 64, "evict_while_reading": True}
    cache = prefill(demo, ids, press, **how)
    expected = prefill(demo, ids, make_press(name, 1 - 90.5 / 260), **how)
    assert (kept_counts(cache) == 90).all()
    for one, other in zip(cache.layers, expected.layers):
        assert torch.equal(one.keys, other.keys)
    with pytest.raises(ValueError, match="SnapKVPress keeps 60 of 260 tokens"):
        prefill(demo, ids, make_press("snapkv", keep_tokens=60), **how)


def test_a_budget_while_decoding(demo, reading):
    press, cache = make_press("ratio_decoding_knorm", keep_tokens=60, compression_interval=8), DynamicCache()
    with torch.no_grad(), applied(press, demo):
        demo.model(input_ids=reading[:, :150], past_key_values=cache)
        for step in range(8):
            demo(reading[:, :1], past_key_values=cache, position_ids=torch.tensor([[150 + step]]))
    assert cache.get_seq_length() == 60


def test_a_context_that_the_budget_holds_is_not_scored(demo, reading):
    """So that none is too short: SnapKV refuses less than its window where it has to choose."""
    check_context(make_press("snapkv", keep_tokens=60), 50)
    assert (kept_counts(prefill(demo, reading[:, :50], make_press("snapkv", keep_tokens=60))) == 50).all()
    with pytest.raises(ValueError, match="window_size=64"):
        check_context(make_press("snapkv", keep_tokens=40), 50)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="keep_tokens=64 and compression_ratio=0.5: .*allowed is one"):
        make_press("snapkv", 0.5, keep_tokens=64)
    for value in (0, -1, 2.0, True, "64"):
        with pytest.raises(ValueError, match=f"keep_tokens={value!r}: must be a whole number of at least 1"):
            make_press("snapkv", keep_tokens=value)
    for row in ROWS:
        if not row.takes_ratio:
            with pytest.raises(ValueError, match=f"keep_tokens=64: {row.name} takes {row.strength}"):
                make_press(row.name, keep_tokens=64)
    assert make_press("no_press", keep_tokens=64) is None


def test_it_stays_the_press_that_it_was():
    press = make_press("adakv_snapkv", keep_tokens=64, window_size=16)
    assert isinstance(press, kvpress.AdaKVPress) and type(press).__name__ == "AdaKVPress"
    assert press.press.window_size == 16 and copy.deepcopy(press).keep_tokens == 64
    assert type(press) is type(make_press("adakv_expected_attention", keep_tokens=1))


# -- in studies -------------------------------------------------------------------------------------------------------


def test_a_plan_names_budgets_in_the_place_of_ratios():
    asked = {
        **defaults_of(measure_perplexity),
        "model": "demo",
        "press": ["snapkv", "duo_attention", "per_layer_knorm"],
    }
    asked |= {"context_length": 512, "keep_tokens": [128, 600], "compression_ratio": 0.3}
    planned = perplexity_plan(asked, 2048)
    assert [(run.press, run.ratio, run.settings["keep_tokens"]) for run in planned] == [
        ("no_press", 0.0, None),
        ("snapkv", 0.75, 128),
        ("snapkv", 0.0, 600),
        ("duo_attention", None, None),
    ]
    names = declared(measure_perplexity, perplexity_plan, asked)
    assert len(set(names)) == 4 and all("keep_tokens" not in name for name in names)
    assert ["__keep128__" in name for name in names] == [False, True, False, False]
    asked = {**defaults_of(measure_tasks), "press": "snapkv", "keep_tokens": 128, "tasks": "kvneox_copy"}
    assert [(run.ratio, run.settings["keep_tokens"]) for run in tasks_plan(asked, None)] == [(0.0, None), (None, 128)]
    check_argument(measure_perplexity, "keep_tokens", None)
    for value in (0, [128, -1], 0.5, []):
        with pytest.raises(ValueError, match="keep_tokens"):
            check_argument(measure_perplexity, "keep_tokens", value)


def test_a_study_under_budgets(demo, tmp_path):
    how = {"model": "demo", "weights": "pretrained", "dataset": "python-docs", "press": ["keydiff", "per_layer_knorm"]}
    how |= {"context_length": 128, "continuation_length": 16, "max_windows": 2, "control_windows": 1, "device": "cpu"}
    with pytest.warns(UserWarning, match=r"keep_tokens=\[32, 64\] leaves out per_layer_knorm"):
        found = measure_perplexity(**how, keep_tokens=[32, 64], output_dir=str(tmp_path))
    runs = found.records.set_index("run_id")
    keydiff = runs[runs["press"] == "keydiff"]
    assert list(keydiff["keep_tokens"]) == [32, 64] and list(keydiff["kept_fraction"]) == [0.25, 0.5]
    assert list(keydiff["compression_ratio"]) == [0.75, 0.5] and keydiff["degenerate"].isna().all()
    assert set(found.table("windows")["keep_tokens"].dropna()) == {32, 64}
    again = measure_perplexity(**how | {"press": "keydiff"}, compression_ratio=[0.75, 0.5], output_dir=str(tmp_path))
    same = again.records[again.records["press"] == "keydiff"]
    assert same["keep_tokens"].isna().all() and list(same["nll_mean"]) == list(keydiff["nll_mean"])

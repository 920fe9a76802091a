"""What a compressed cache costs, computed a second way: the stock model with a mask over what was evicted."""

import itertools
import math

import kvpress
import numpy as np
import pytest
import torch
from conftest import stock_and_ours, tiny_config
from torch.nn.functional import cross_entropy

import kvneox_lib
from kvneox_lib.measures import perplexity
from kvneox_lib.measures import prefill as prefill_module
from kvneox_lib.measures.intervals import interval
from kvneox_lib.measures.perplexity import (
    by_distance,
    continuation_nll,
    score_each,
    summarize,
    teacher_forced_nll,
)
from kvneox_lib.measures.prefill import prefill, prefill_each
from kvneox_lib.measures.survivors import kept_counts, kept_positions
from kvneox_lib.measures.verify import masked_stock_logits
from kvneox_lib.neox.modeling import stock_twin
from kvneox_lib.presses.applying import attention
from kvneox_lib.presses.by_name import make_press, press_names, ratio_for
from kvneox_lib.presses.facts import acts, attention_needed
from kvneox_lib.presses.registry import REGISTRY

N_CONTEXT = 150


@pytest.fixture(scope="module")
def pages(reading):
    return reading[:, 3000:3400].view(2, 200)


def stock_nll(model, ids) -> torch.Tensor:
    logits = stock_twin(model)(ids).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@pytest.mark.parametrize("name", ["streaming_llm", "adakv_snapkv", "pyramidkv", "snapkv"])
@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_each_nll_is_the_stock_models_with_a_mask_over_the_evicted(demo, pages, name, ratio):
    context, rest = pages[:, :N_CONTEXT], pages[:, N_CONTEXT:]
    kept = kept_positions(demo, context, make_press(name, ratio))
    assert not kept.all()
    logits = masked_stock_logits(demo, context, rest, kept)  # a row for each continuation token but the last
    expected = cross_entropy(logits.flatten(0, 1), rest[:, 1:].flatten(), reduction="none").view(2, -1)
    nll = continuation_nll(demo, pages, n_context=N_CONTEXT, press=make_press(name, ratio))
    assert nll.shape == (2, 200 - N_CONTEXT - 1)
    assert (nll - expected).abs().max() < 1e-4
    assert (nll - stock_nll(demo, pages)[:, N_CONTEXT:]).abs().max() > 0.1  # the mask does matter


@torch.no_grad()
def test_ratio_0_and_no_press_are_teacher_forced(demo, pages):
    expected = stock_nll(demo, pages)
    assert (teacher_forced_nll(demo, pages) - expected).abs().max() < 1e-4
    for name in ("no_press", "random", "snapkv", "adakv_snapkv", "kvzip", "finch"):
        nll = continuation_nll(demo, pages, n_context=N_CONTEXT, press=make_press(name, 0.0))
        assert (nll - expected[:, N_CONTEXT:]).abs().max() < 1e-4, name


def test_the_control_moves_under_no_press_and_the_continuation_does(demo, reading):
    """One pass never reads a compressed cache: the artefact that looks like strength."""
    ids, n_context = reading[:, 3000:3400], 350
    still, whole = teacher_forced_nll(demo, ids), continuation_nll(demo, ids, n_context=n_context)
    for name in press_names()[1:]:
        decoding = {"target_size": 64} if "target_size" in REGISTRY[name].defaults else {}
        press = make_press(name, ratio_for(name, 0.9, demo), **decoding)
        needed = attention_needed(press)
        with attention(demo, "sdpa" if needed == "any" else needed):
            assert torch.allclose(teacher_forced_nll(demo, ids, press=press), still, atol=1e-4), name
            moved = continuation_nll(demo, ids, n_context=n_context, press=press) - whole
        assert moved.abs().max() > 1e-3, name


def test_rerotated_keys_are_those_of_a_shorter_text():
    """On the first layer, whose keys depend on their own token alone, StreamingLLM with re-rotation is that text."""
    stock, ours = stock_and_ours(tiny_config(num_hidden_layers=1))
    ids = torch.randint(0, 97, (1, 60))
    nll = continuation_nll(ours, ids, n_context=40, press=make_press("key_rerotation_streaming_llm", 0.5))
    short = torch.cat([ids[:, :4], ids[:, 24:]], dim=1)
    expected = teacher_forced_nll(stock, short)[:, 20:]
    assert (nll - expected).abs().max() < 1e-4


def test_decoding_presses_score_as_a_loop_of_single_tokens(demo, pages):
    press = make_press("decoding_streaming_llm", target_size=64, compression_interval=8)
    nll = continuation_nll(demo, pages[:1], n_context=N_CONTEXT, press=press)
    fresh, cache, expected = make_press("decoding_streaming_llm", target_size=64, compression_interval=8), None, []
    cache = prefill(demo, pages[:1, :N_CONTEXT], None)
    with torch.no_grad(), fresh(demo):
        for t in range(N_CONTEXT, 199):
            logits = demo(pages[:1, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]])).logits[:, -1]
            expected.append(cross_entropy(logits, pages[:1, t + 1]))
    assert (nll - torch.stack(expected)).abs().max() < 1e-4
    assert cache.get_seq_length() < 64 + 8


@pytest.mark.parametrize("name", ["random", "chunkkv_snapkv", "adakv_snapkv", "snapkv"])
def test_a_batch_is_scored_as_its_rows(demo, pages, name):
    torch.manual_seed(1)
    together = continuation_nll(demo, pages, n_context=N_CONTEXT, press=make_press(name, 0.6))
    torch.manual_seed(1)
    apart = [continuation_nll(demo, row[None], n_context=N_CONTEXT, press=make_press(name, 0.6)) for row in pages]
    assert (together - torch.cat(apart)).abs().max() < 1e-4


def test_one_pass_for_many_presses_is_a_pass_for_each(demo, pages):
    ids, names = pages[:1, :N_CONTEXT], press_names()[1:]
    presses = [make_press(name, ratio_for(name, ratio, demo)) for name in names for ratio in (0.3, 0.7)]
    presses = [press for press in presses if attention_needed(press) != "eager"]
    for layer in demo.model.layers:
        layer.self_attn._modules.pop("rotary_emb", None)  # an earlier press left it there
    torch.manual_seed(3)
    together = prefill_each(demo, ids, presses)
    alone = []
    for press in presses:
        torch.manual_seed(3)
        alone.append(prefill(demo, ids, press))
    for press, one, other in zip(presses, alone, together):
        assert torch.equal(kept_counts(one), kept_counts(other)), press
        assert all(
            torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in zip(one.layers, other.layers)
        ), press


def test_draws_are_those_of_a_pass_each_on_every_device(demo, pages, monkeypatch):
    """Layers that take turns on two devices, each with a generator of its own."""
    dice = [torch.Generator(), torch.Generator()]

    class Drawing(kvpress.ScorerPress):
        def score(self, module, hidden_states, keys, *_):
            return torch.rand(keys.shape[:3], generator=dice[module.layer_idx % 2])

    def seed():
        for i, generator in enumerate(dice):
            generator.manual_seed(i)

    alone, presses = [], [Drawing(0.3), Drawing(0.6)]
    for press in presses:
        seed()
        alone.append(prefill(demo, pages[:1], press))
    seed()
    of_layers = itertools.cycle(dice)
    monkeypatch.setattr(prefill_module, "_generator", lambda device: next(of_layers))
    for one, other in zip(alone, prefill_each(demo, pages[:1], presses)):
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(one.layers, other.layers))


def test_chunks_of_logits_and_of_the_continuation_change_nothing(demo, pages, monkeypatch):
    press = make_press("adakv_snapkv", 0.5)
    expected = continuation_nll(demo, pages, n_context=100, press=press)
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 3 * demo.config.vocab_size)
    assert (continuation_nll(demo, pages, n_context=100, press=press) - expected).abs().max() < 1e-4


def test_no_more_logits_at_once_than_allowed(demo, pages, monkeypatch):
    sizes = []
    handle = demo.embed_out.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 20 * demo.config.vocab_size)
    try:
        continuation_nll(demo, pages, n_context=100)
        teacher_forced_nll(demo, pages)
    finally:
        handle.remove()
    assert max(sizes) == 20 * demo.config.vocab_size and sum(sizes) == (2 * 99 + 2 * 199) * demo.config.vocab_size


def test_a_stock_model_is_adapted_on_the_way_in():
    stock, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (2, 40))
    expected = continuation_nll(ours, ids, n_context=20, press=make_press("knorm"))
    assert torch.allclose(continuation_nll(stock, ids, n_context=20, press=make_press("knorm")), expected, atol=1e-5)
    assert isinstance(stock, kvneox_lib.KVNeoXForCausalLM)


@pytest.mark.parametrize("n_context", [0, 199, -3])
def test_wrong_lengths_are_refused(demo, pages, n_context):
    with pytest.raises(ValueError, match=rf"n_context={n_context}: must be from 1 to 198"):
        continuation_nll(demo, pages, n_context=n_context)
    with pytest.raises(ValueError, match="input_ids has shape"):
        teacher_forced_nll(demo, pages[0])


# ---- figures of a run -----------------------------------------------------------------------------------------------


def test_pairing_takes_out_what_makes_windows_differ():
    rng = np.random.default_rng(0)
    baseline = rng.normal(3, 1, (50, 1)) + rng.normal(0, 0.1, (50, 20))
    figures = summarize(baseline + 0.1, np.full(50, 80), np.full(50, 16), baseline)
    assert figures["delta_nll"] == pytest.approx(0.1) and figures["delta_nll_ci95_high"] == pytest.approx(0.1)
    assert figures["nll_mean_ci95_high"] - figures["nll_mean_ci95_low"] > 0.3
    nats = (baseline + 0.1).sum()
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / (50 * 80))
    assert figures["word_ppl"] == pytest.approx(math.exp(nats / (50 * 16)))
    assert figures["ppl"] == pytest.approx(math.exp(nats / 1000)) and figures["n_tokens"] == 1000
    assert figures["ppl_ratio"] == pytest.approx(math.exp(0.1)) and figures["n_documents"] == 1


def test_figures_and_bins_know_of_which_book_a_window_is():
    rng, books = np.random.default_rng(0), np.repeat([0, 1, 2], [20, 12, 18])
    nll = rng.normal(3, 1, (50, 20)) + books[:, None]
    figures = summarize(nll, np.full(50, 80), np.full(50, 16), np.zeros_like(nll), books)
    assert figures["n_documents"] == 3
    ends = figures["delta_nll_ci95_low"], figures["delta_nll_ci95_high"]
    assert ends == pytest.approx(interval(nll.mean(1), None, books).ends)
    last = by_distance(nll, np.zeros_like(nll), books).iloc[-1]
    ends = last["delta_nll_ci95_low"], last["delta_nll_ci95_high"]
    assert ends == pytest.approx(interval(nll[:, 16:].mean(1), None, books).ends)


def test_distance_bins_cover_each_token_once():
    baseline = np.zeros((3, 21))
    nll = np.tile(np.arange(21.0), (3, 1))
    table = by_distance(nll, baseline)
    assert table["from_token"].tolist() == [1, 2, 3, 5, 9, 17] and table["to_token"].tolist() == [1, 2, 4, 8, 16, 21]
    weights = table["to_token"] - table["from_token"] + 1
    assert (table["delta_nll"] * weights).sum() / 21 == pytest.approx(10)


def test_bytes_are_those_of_the_buffers(demo, pages):
    (scored,) = score_each(demo, pages, n_context=N_CONTEXT, presses=[make_press("knorm", 0.5)])
    assert scored.kv_bytes == 2 * 2 * 6 * 75 * 256 * 4  # rows, keys and values, layers, half the tokens, width, float32
    assert acts(make_press("knorm")) == "hook" and (scored.kept == 75).all()


def test_figures_that_do_not_exist_are_none():
    nll = np.full((3, 10), 2.0)
    figures = summarize(nll, np.full(3, 30), np.zeros(3), nll)  # no words, as in Chinese, and too few windows
    assert (
        figures["nll_per_word"] is None and figures["word_ppl"] is None and figures["ppl"] == pytest.approx(math.e**2)
    )
    assert figures["nll_mean_ci95_low"] is None and figures["ppl_ci95_high"] is None


def test_what_a_decoding_press_keeps_is_counted_when_it_has_decoded(demo, reading):
    press = make_press("decoding_knorm", target_size=64, compression_interval=8)
    (scored,) = score_each(demo, reading[:, :200], n_context=150, presses=[press])
    assert (scored.kept < 64 + 8).all() and scored.kv_bytes < 2 * 6 * 250 * 256 * 4

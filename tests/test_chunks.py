"""A context read in chunks is that of one pass; evicting while reading is what it is said to be."""

import kvpress
import pytest
import torch
from conftest import relative_difference, stock_and_ours, tiny_config
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from transformers import DynamicCache

from kvneox_lib import continuation_nll, generate
from kvneox_lib.measures import chunks
from kvneox_lib.measures.perplexity import score_each
from kvneox_lib.measures.prefill import prefill
from kvneox_lib.measures.survivors import kept_positions
from kvneox_lib.neox.hooks import hooked
from kvneox_lib.neox.masks import as_additive
from kvneox_lib.neox.modeling import evictions, stock_twin
from kvneox_lib.presses.applying import attention
from kvneox_lib.presses.by_name import make_press, press_names, ratio_for
from kvneox_lib.presses.facts import attention_needed, evicts_only_at_the_end, needs_whole_pass
from kvneox_lib.studies.perplexity import measure_perplexity

REFUSED = {"observed_attention", "kvcompose", "kvcompose_unstructured"}
EVICTING = ["random", "random_recent", "knorm", "streaming_llm", "tova", "snapkv", "keydiff", "lagkv", "cur", "qfilter"]
EVICTING += ["expected_attention_stats", "criticalkv_snapkv"]


@pytest.fixture(scope="module")
def page(reading):
    return reading[:, 3000:3300]


@pytest.fixture
def distinct(demo):
    """300 tokens of which none comes twice: on the first layer a token's keys have one norm wherever they are, and
    rounding alone would say which of them knorm keeps."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(demo.config.vocab_size, generator=generator)[None, :300]


def made(name: str, model, ratio: float = 0.6):
    decoding = {"target_size": 64} if name.startswith(("decoding", "cam")) else {}
    return make_press(name, ratio_for(name, ratio, model), **decoding)


def held_of(layer, all_keys: torch.Tensor) -> torch.Tensor:
    """(batch, heads, n): at which positions of `all_keys` the keys of a layer are, up to rounding."""
    exactly = "donot_use_mm_for_euclid_dist"
    distance, position = torch.cdist(layer.keys, all_keys, compute_mode=exactly).min(-1)
    assert distance.max() < 1e-3
    return position.sort(-1).values


@pytest.mark.parametrize("name", press_names())
def test_chunks_are_one_pass(demo, distinct, name):
    press = made(name, demo)
    with attention(demo, "eager" if attention_needed(press) == "eager" else "sdpa"):
        if name in REFUSED:
            with pytest.raises(ValueError, match="prefill_chunk=97 cannot serve .* it re.*of the context|in a pass"):
                generate(demo, distinct, press=press, max_new_tokens=1, prefill_chunk=97)
            return
        made_of, how = [], {"max_new_tokens": 8, "with_logits": True, "stop_at_eos": False}
        for chunk in (None, 97, 13):
            torch.manual_seed(0)
            made_of.append(generate(demo, distinct, press=made(name, demo), prefill_chunk=chunk, **how))
    for other in made_of[1:]:
        assert torch.equal(other.tokens, made_of[0].tokens)
        assert relative_difference(other.logits, made_of[0].logits) < 1e-4
        assert torch.equal(other.kv_lengths, made_of[0].kv_lengths) and other.kv_bytes == made_of[0].kv_bytes


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "expected_attention", "adakv_snapkv", "chunk_snapkv", "kvzip"])
def test_chunks_keep_the_positions_of_one_pass(demo, page, name):
    torch.manual_seed(0)
    expected = kept_positions(demo, page, made(name, demo))
    torch.manual_seed(0)
    full, cache = prefill(demo, page, None), prefill(demo, page, made(name, demo), prefill_chunk=97)
    for index, (all_of, layer) in enumerate(zip(full.layers, cache.layers)):
        kept = torch.zeros_like(expected[index]).scatter_(-1, held_of(layer, all_of.keys), True)
        if evictions(cache).get(index) is not None:
            kept[evictions(cache)[index]] = False
        assert torch.equal(kept, expected[index])


def test_rows_questions_and_eager_attention_in_chunks(demo, reading):
    pages, question = reading[:, 3000:3500].view(2, 250), reading[:, 4000:4012].view(2, 6)
    for name, implementation in (("snapkv", "eager"), ("chunkkv_snapkv", "sdpa"), ("adakv_snapkv", "sdpa")):
        with attention(demo, implementation):
            how = {"question_ids": question, "max_new_tokens": 4, "with_logits": True, "stop_at_eos": False}
            whole = generate(demo, pages, press=made(name, demo), **how)
            parts = generate(demo, pages, press=made(name, demo), prefill_chunk=64, **how)
        assert torch.equal(parts.tokens, whole.tokens) and relative_difference(parts.logits, whole.logits) < 1e-4


def test_rows_of_unequal_length_in_chunks_are_rows_alone(demo, reading, monkeypatch):
    rows, how = [reading[:, 3000:3250], reading[:, 4000:4180]], {"max_new_tokens": 4, "with_logits": True}
    how |= {"prefill_chunk": 64, "stop_at_eos": False}
    padded = torch.cat([rows[0], torch.cat([rows[1].new_zeros(1, 70), rows[1]], dim=1)])
    mask = torch.ones_like(padded)
    mask[1, :70] = 0
    for evicting in (False, True):
        together = generate(
            demo, padded, attention_mask=mask, press=made("keydiff", demo), evict_while_reading=evicting, **how
        )
        for row, logits in zip(rows, together.logits):
            alone = generate(demo, row, press=made("keydiff", demo), evict_while_reading=evicting, **how)
            assert relative_difference(logits, alone.logits[0]) < 1e-4
    with monkeypatch.context() as patched:
        patched.setattr(demo.model.embed_in, "forward", lambda *_: pytest.fail("the model was called"))
        with pytest.raises(ValueError, match="SnapKVPress keeps 62 of 180 tokens"):  # the other row keeps enough
            generate(
                demo, padded, attention_mask=mask, press=made("snapkv", demo, 0.65), evict_while_reading=True, **how
            )


def test_no_two_layers_hold_the_whole_context(demo, page):
    """As in one pass, each layer is compressed before the next one reads."""
    lengths, caches = [], []

    def look(module, args, kwargs, output):
        caches[:] = [kwargs["past_key_values"]]
        lengths.append([layer.keys.shape[2] for layer in caches[0].layers])

    with hooked([layer.self_attn for layer in demo.model.layers], look):
        prefill(demo, page, make_press("keydiff", 0.75), prefill_chunk=97)
    assert max(map(sum, lengths)) == 300 + 5 * 75
    assert max(map(len, lengths)) == 6 and lengths[-1] == [75] * 5 + [300]


def test_a_press_of_ones_own_is_called_as_in_one_pass(demo, page):
    """kvpress' hook, and all that it hands on, the hidden states of the whole context among them."""
    calls = []

    class Noting(kvpress.KnormPress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            position, embeddings = kwargs["cache_position"], kwargs["position_embeddings"]
            calls.append([hidden_states, keys.clone(), values.clone(), position, *embeddings])
            return super().compress(module, hidden_states, keys, values, attentions, kwargs)

    prefill(demo, page, Noting(0.5))
    prefill(demo, page, Noting(0.5), prefill_chunk=64)
    assert len(calls) == 12
    for one, other in zip(calls[:6], calls[6:]):
        for expected, found in zip(one, other):
            assert found.shape == expected.shape and (found - expected).abs().max() < 1e-3


# ---- evicting while reading -----------------------------------------------------------------------------------------


def test_which_presses_can_evict_while_reading(demo):
    can = [name for name in press_names()[1:] if not evicts_only_at_the_end(made(name, demo))]
    assert sorted(can) == sorted(EVICTING)
    cannot_be_cut = {name for name in press_names() if needs_whole_pass(made(name, demo))}
    assert cannot_be_cut == REFUSED


@pytest.mark.parametrize("name", ["keydiff", "knorm"])
@pytest.mark.parametrize(("ratio", "chunk"), [(0.5, 64), (0.68, 32), (0.9, 128), (0.4, 77)])
def test_layer_0_keeps_what_block_press_keeps(demo, distinct, name, ratio, chunk):
    """Its keys depend on their own token alone, so there kvpress' simulation is no simulation."""
    blocks = kept_positions(demo, distinct, make_press(f"block_{name}", ratio, block_size=chunk))[0]
    at_the_end = kept_positions(demo, distinct, make_press(name, ratio))[0]
    assert torch.equal(blocks, at_the_end) == (name == "knorm")  # a norm is that of its key, a mean key of all held
    cache = prefill(demo, distinct, make_press(name, ratio), prefill_chunk=chunk, evict_while_reading=True)
    found = held_of(cache.layers[0], prefill(demo, distinct, None).layers[0].keys)
    assert torch.equal(torch.zeros_like(blocks).scatter_(-1, found, True), blocks)


def score_by_hand(name: str, module, keys: torch.Tensor, hidden: torch.Tensor, n_read: int) -> torch.Tensor:
    """hidden: of all tokens read so far."""
    if name == "knorm":
        return -keys.norm(dim=-1)
    if name == "keydiff":
        return -cosine_similarity(keys, normalize(keys, dim=-1).mean(2, keepdim=True), dim=-1)
    window = 8  # snapkv
    cos, sin = module.rotary_emb(hidden, torch.arange(n_read - window, n_read)[None])
    query = module.q_proj(hidden[:, -window:]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    first, second = query.chunk(2, dim=-1)
    query = query * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    scores = query @ keys.mT / module.head_dim**0.5
    visible = torch.ones(window, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - window)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)[..., :-window].mean(2)
    pooled = torch.nn.functional.avg_pool1d(weights, 5, padding=2, stride=1)
    return torch.nn.functional.pad(pooled, (0, window), value=2.0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["knorm", "keydiff", "snapkv"])
@pytest.mark.parametrize(
    ("budget", "chunk", "edges"),
    [(20, 30, [20, 50, 80, 100]), (60, 30, [30, 60, 90, 100]), (32, 15, [2, 17, 32, 47, 62, 77, 92, 100])],
)
def test_evicting_is_a_loop_by_hand(name, budget, chunk, edges):
    """On a DynamicCache, with scores written anew: read, score, keep the best in order, read on."""
    _, model = stock_and_ours(tiny_config())
    ids, cache, states = torch.randint(0, 97, (2, 100)), DynamicCache(), [[], []]
    attentions = [layer.self_attn for layer in model.model.layers]
    for module in attentions:
        module.rotary_emb = model.model.rotary_emb

    def collect(module, args, kwargs, output):
        states[module.layer_idx].append(kwargs["hidden_states"])

    with hooked(attentions, collect):
        for start, stop in zip([0, *edges], edges):
            positions = torch.arange(start, stop)[None]
            last = model.model(ids[:, start:stop], past_key_values=cache, position_ids=positions).last_hidden_state
            for module, layer, hidden in zip(attentions, cache.layers, states):
                if layer.keys.shape[2] > budget:
                    scores = score_by_hand(name, module, layer.keys, torch.cat(hidden, 1), stop)
                    kept = scores.topk(budget).indices.sort().values[..., None].expand(-1, -1, -1, 64)
                    layer.keys, layer.values = layer.keys.gather(2, kept), layer.values.gather(2, kept)
    press = make_press(name, 1 - (budget + 0.5) / 100, **({"window_size": 8} if name == "snapkv" else {}))
    asked = press.compression_ratio
    found = generate(
        model, ids, press=press, prefill_chunk=chunk, evict_while_reading=True, max_new_tokens=1, with_logits=True
    )
    assert relative_difference(found.logits[:, 0], model.embed_out(last[:, -1])) < 1e-4
    compressed = prefill(model, ids, press, prefill_chunk=chunk, evict_while_reading=True)
    for ours, by_hand in zip(compressed.layers, cache.layers):
        assert relative_difference(ours.keys, by_hand.keys) < 1e-4
        assert relative_difference(ours.values, by_hand.values) < 1e-4
    assert press.compression_ratio == asked


@torch.no_grad()
def test_streaming_llm_is_the_stock_model_with_a_mask(demo, page):
    """What each chunk sees can be written down: sinks, as many of the last tokens as the budget has, and itself."""
    n_context, budget, chunk = 250, 100, 64
    visible = torch.ones(300, 300, dtype=torch.bool).tril()
    for start in [100, 164, 228]:
        visible[start : min(start + chunk, n_context), 4 : max(4, start - (budget - 4))] = False
    visible[n_context:, 4 : n_context - (budget - 4)] = False
    stock = stock_twin(demo)

    def put_in(module, args, kwargs):
        return args, {**kwargs, "attention_mask": as_additive(visible[None, None], demo.dtype)}

    with hooked([layer.attention for layer in stock.gpt_neox.layers], put_in, before=True):
        expected = cross_entropy(stock(page).logits[0, n_context:-1], page[0, n_context + 1 :], reduction="none")
    press = make_press("streaming_llm", 0.6)
    how = {"n_context": n_context, "prefill_chunk": chunk}
    nll = continuation_nll(demo, page, press=press, evict_while_reading=True, **how)
    assert (nll[0] - expected).abs().max() < 1e-4
    at_the_end = continuation_nll(demo, page, press=press, **how)
    assert (at_the_end - continuation_nll(demo, page, press=press, n_context=n_context)).abs().max() < 1e-4
    assert (at_the_end - nll).abs().max() > 1e-3  # two methods


@pytest.mark.parametrize("name", EVICTING)
def test_no_layer_ever_holds_more_than_budget_and_chunk(demo, page, name):
    lengths, allocated, bytes_per_entry = [], [], 2 * 4 * demo.config.head_dim * 4  # keys and values of four heads

    def look(module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        lengths.append(layer.keys.shape[2])
        allocated.append(layer.allocated_bytes // bytes_per_entry)

    press = made(name, demo, 0.7)
    with hooked([layer.self_attn for layer in demo.model.layers], look):
        cache = prefill(demo, page, press, headroom=5, prefill_chunk=50, evict_while_reading=True)
    budget = kvpress.utils.compute_n_kept(300, 0.7)
    assert max(lengths) == budget + 50 and max(allocated) == budget + 50 + 5
    assert (cache.kv_lengths == budget).all() and cache.kv_bytes == 6 * (budget + 5) * bytes_per_entry


def test_nothing_to_evict_is_no_press(demo, page):
    how = {"max_new_tokens": 4, "with_logits": True}
    whole = generate(demo, page, **how)
    found = generate(demo, page, press=make_press("keydiff", 0.0), prefill_chunk=64, evict_while_reading=True, **how)
    assert relative_difference(found.logits, whole.logits) < 1e-4


def test_wrong_combinations_are_refused_before_any_work(demo, page, monkeypatch):
    monkeypatch.setattr(demo.model.embed_in, "forward", lambda *_: pytest.fail("the model was called"))
    cases = [
        ("keydiff", {"evict_while_reading": True}, "evict_while_reading=True: allowed beside a prefill_chunk"),
        ("no_press", {"prefill_chunk": 64, "evict_while_reading": True}, "allowed with a press"),
        ("keydiff", {"prefill_chunk": 0}, "prefill_chunk=0"),
        ("keydiff", {"prefill_chunk": 2.0}, "prefill_chunk=2.0"),
        ("kvcompose", {"prefill_chunk": 64}, "it replays the whole context"),
        ("adakv_snapkv", {"prefill_chunk": 64, "evict_while_reading": True}, "AdaKVPress does more than keep"),
        ("block_keydiff", {"prefill_chunk": 64, "evict_while_reading": True}, "BlockPress does more than keep"),
        ("expected_attention", {"prefill_chunk": 64, "evict_while_reading": True}, "of the whole context"),
        ("decoding_knorm", {"prefill_chunk": 64, "evict_while_reading": True}, "DecodingPress does more than keep"),
    ]
    for name, reading, message in cases:
        press = make_press(name, 0.5)
        with pytest.raises(ValueError, match=message):
            generate(demo, page, press=press, max_new_tokens=2, **reading)
        with pytest.raises(ValueError, match=message):
            continuation_nll(demo, page, n_context=200, press=press, **reading)
        with pytest.raises(ValueError, match=message):
            score_each(demo, page, n_context=200, presses=[make_press("random", 0.5), press], **reading)
    with pytest.raises(ValueError, match="SnapKVPress keeps 59 of 300 tokens, allowed is to keep more than window"):
        prefill(demo, page, make_press("snapkv", 0.8), prefill_chunk=64, evict_while_reading=True)
    monkeypatch.setattr(demo.model.rotary_emb.native, "rope_type", "dynamic")
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        prefill(demo, page, None, prefill_chunk=64)


def test_a_failure_while_reading_leaves_the_press_as_it_was(demo, page, monkeypatch):
    press = make_press("keydiff", 0.5)
    monkeypatch.setattr(type(press), "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefill(demo, page, press, prefill_chunk=64, evict_while_reading=True)
    assert press.compression_ratio == 0.5


def test_the_budget_is_met_whatever_the_lengths():
    """compute_n_kept truncates; the ratio in between must not be one off."""
    press = kvpress.KnormPress(0.5)
    for n_held in range(2, 400, 7):
        for n_kept in range(1, n_held):
            with chunks._keeping(press, n_kept, n_held):
                assert kvpress.utils.compute_n_kept(n_held, press.compression_ratio) == n_kept


def test_the_study_reads_under_a_press_as_asked_and_without_one_in_one_pass(tmp_path):
    asked = {"model": "demo", "dataset": "python-docs", "press": "keydiff", "compression_ratio": 0.75}
    asked["output_dir"] = str(tmp_path)
    short = {"context_length": 192, "continuation_length": 32, "max_windows": 2, "control_windows": 1}
    evicting = {"prefill_chunk": 50, "evict_while_reading": True}
    with pytest.raises(ValueError, match="evict_while_reading=True: allowed beside a prefill_chunk"):
        measure_perplexity(**asked, **short, evict_while_reading=True)
    with pytest.raises(ValueError, match="AdaKVPress does more than keep"):
        measure_perplexity(**asked | {"press": ["knorm", "adakv_snapkv"]}, **short, **evicting)
    assert list(tmp_path.glob("*")) == []
    studies = [measure_perplexity(**asked, **short, **how).records for how in ({}, {"prefill_chunk": 50}, evicting)]
    baselines, runs = zip(*(study.to_dict("records") for study in studies))
    assert len({run["run_id"] for run in baselines + runs}) == 6
    assert len({run["nll_mean"] for run in baselines}) == 1 == len({run["kv_bytes"] for run in runs})
    whole, in_chunks, while_reading = (run["delta_nll"] for run in runs)
    assert abs(whole - in_chunks) < 1e-4 < abs(whole - while_reading)

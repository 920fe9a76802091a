"""The registry against kvpress itself, and what each press really does to a cache."""

import inspect
import logging
import re
from functools import partial

import kvpress
import numpy as np
import pytest
import torch
from conftest import hooks_of_presses, stock_and_ours, tiny_config
from transformers import DynamicCache

from kvneox_lib import check_press, continuation_nll, generate, load_model, make_press, press_names, teacher_forced_nll
from kvneox_lib.measures.prefill import prefill, with_delimiter
from kvneox_lib.measures.survivors import kept_counts, kept_positions
from kvneox_lib.measures.verify import answer
from kvneox_lib.pages.tables import press_table
from kvneox_lib.presses.applying import applied, attention, check_context
from kvneox_lib.presses.by_name import expand_presses, layer_ramp, ratio_for
from kvneox_lib.presses.facts import acts, attention_needed, parts_of, rerotates, rows_independent
from kvneox_lib.presses.registry import REGISTRY, ROWS, UNAVAILABLE

HOOK_ROWS = [
    row.name for row in ROWS[1:] if acts(make_press(row.name, [0.5] if "per_layer" in row.name else 0.5)) != "decoding"
]
DECODING_ROWS = [row.name for row in ROWS[1:] if row.name not in HOOK_ROWS]


def implementation_for(name: str, press) -> str:
    return "eager" if attention_needed(press) == "eager" else "sdpa"


# -- names, ratios, options ---------------------------------------------------------------------------------------


def test_every_press_of_kvpress_is_here_or_refused_with_a_reason():
    """Fails when a new kvpress brings a press that nobody has looked at."""
    in_rows = {ancestor for row in ROWS for part in row.parts for ancestor in part.__mro__}
    refused = {kvpress.KVzapPress, kvpress.FastKVzipPress, kvpress.RestoreKVPress, kvpress.LUKVPress}
    classes = {getattr(kvpress, name) for name in kvpress.__all__ if inspect.isclass(getattr(kvpress, name))}
    presses = {cls for cls in classes if issubclass(cls, kvpress.BasePress)}
    assert presses - in_rows - refused == set()
    assert len(refused) == len(UNAVAILABLE)
    for name in UNAVAILABLE:
        with pytest.raises(ValueError, match="needs trained"):
            make_press(name)


def test_wrong_arguments_are_refused_before_any_work():
    with pytest.raises(ValueError, match=r"'snapvk' is unknown; did you mean snapkv"):
        make_press("snapvk")
    for ratio in (-0.1, 1, 1.0, "0.5", True, None, float("nan"), [0.5]):
        with pytest.raises(ValueError, match="compression_ratio=.*; allowed"):
            make_press("knorm", ratio)
    with pytest.raises(ValueError, match=r"no option windowsize=8; allowed: kernel_size, window_size"):
        make_press("snapkv", windowsize=8)
    with pytest.raises(ValueError, match="per_layer_snapkv takes a list"):
        make_press("per_layer_snapkv", 0.5)
    with pytest.raises(ValueError, match="allowed is a number"):
        make_press("per_layer_snapkv", [0.5, 1.5])
    with pytest.raises(ValueError, match="refuses.*alpha_safeguard"):
        make_press("adakv_snapkv", alpha_safeguard=2)
    for name, option in [
        ("think", {"key_channel_compression_ratio": 2}),
        ("duo_attention", {"head_compression_ratio": -1}),
        ("criticalkv_snapkv", {"first_stage_ratio": 1.5}),
        ("snapkv", {"window_size": "x"}),
        ("snapkv", {"window_size": 0}),
        ("snapkv", {"kernel_size": 2.5}),
        ("streaming_llm", {"n_sink": -1}),
        ("expected_attention", {"use_vnorm": "no"}),
    ]:
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.*; allowed"):
            make_press(name, **option)
    for name, option in [("no_press", {"window_size": 4}), ("ratio_decoding_knorm", {"target_compression_ratio": 0.1})]:
        with pytest.raises(ValueError, match="has no option"):
            make_press(name, **option)
    with pytest.raises(ValueError, match="is unknown"):
        make_press(["knorm"])
    assert make_press("knorm", np.float32(0.5)).compression_ratio == 0.5
    assert make_press("streaming_llm", n_sink=0).n_sink == 0


def test_options_reach_the_wrapper_or_the_press_inside():
    press = make_press("adakv_snapkv", 0.3, alpha_safeguard=0.4, window_size=7)
    assert (press.alpha_safeguard, press.press.window_size, press.compression_ratio) == (0.4, 7, 0.3)
    press = make_press("decoding_snapkv", target_size=99, kernel_size=3)
    assert (press.target_size, press.base_press.kernel_size, press.base_press.compression_ratio) == (99, 3, 0.0)
    press = make_press("prefill_decoding_snapkv_knorm", 0.7, window_size=5, compression_interval=4)
    assert (press.prefilling_press.compression_ratio, press.prefilling_press.window_size) == (0.7, 5)
    assert press.decoding_press.compression_interval == 4
    press = make_press("composed_snapkv_think", 0.6)
    assert [type(part) for part in press.presses] == [kvpress.SnapKVPress, kvpress.ThinKPress]
    assert press.presses[0].compression_ratio == 0.6 and press.presses[1].key_channel_compression_ratio == 0.5
    assert make_press("ratio_decoding_knorm", 0.8).target_compression_ratio == 0.8
    assert make_press("no_press", 0.9) is None


def test_groups_of_names():
    core = expand_presses("all")
    assert core[0] == "no_press" and len(core) == 13 and len(set(core)) == 13
    assert expand_presses("every") == press_names() == list(REGISTRY)
    assert expand_presses(["tova", "random"]) == ["tova", "random"]
    with pytest.raises(ValueError, match="unknown"):
        expand_presses(["tova", "tovva"])


def test_rows_say_where_they_come_from():
    for row in ROWS:
        assert row.about and (row.paper == "" or row.paper.startswith(("arXiv:", "openreview:"))), row.name
        assert row.strength in {"compression_ratio", "compression_ratios"} | set(row.defaults) | {
            "target_compression_ratio"
        }


def test_the_table_of_presses_has_all():
    assert press_table().count("\n| `") == len(ROWS) - 1


# -- what a press does --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thousand(reading):
    return reading[:, 2000:3024]


def counts_under(demo, name: str, ids: torch.Tensor, **options) -> torch.Tensor:
    press = make_press(name, ratio_for(name, 0.5, demo), **options)
    demo.config._attn_implementation = implementation_for(name, press)
    try:
        return kept_counts(prefill(demo, ids, press))
    finally:
        demo.config._attn_implementation = "sdpa"


@pytest.mark.parametrize("name", HOOK_ROWS)
def test_defaults_act_at_a_thousand_tokens(demo, thousand, name):
    counts = counts_under(demo, name, thousand)
    kept = float(counts.float().mean()) / 1024
    if name == "think":
        cache = prefill(demo, thousand, make_press(name))
        assert kept == 1 and (cache.layers[0].keys == 0).all(dim=2).sum() == 4 * 32, "half of 64 channels a head"
    elif REGISTRY[name].takes_ratio or name.startswith("per_layer"):
        assert kept == pytest.approx(0.5, abs=0.01)
    else:
        assert 0.2 < kept < 0.9


def test_wrappers_do_something_of_their_own(demo, thousand):
    """The number kept may be the inner press'; then which are kept, or what is kept of them, must differ."""
    for name in (row.name for row in ROWS if len(row.parts) == 2 and row.name in HOOK_ROWS):
        inner = next(row.name for row in ROWS if row.parts == REGISTRY[name].parts[-1:])
        ids = thousand[:, :500]
        outer, plain = (counts_under(demo, each, ids) for each in (name, inner))
        if not torch.equal(outer, plain):
            continue
        caches = [prefill(demo, ids, make_press(each, 0.5)) for each in (name, inner)]
        assert any(
            not torch.equal(one.keys, other.keys) or not torch.equal(one.values, other.values)
            for one, other in zip(*(cache.layers for cache in caches))
        ), f"{name} is {inner}"


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_pyramidkv_is_a_pyramid_at_every_ratio(demo, thousand, ratio):
    counts = kept_counts(prefill(demo, thousand, make_press("pyramidkv", ratio)))[:, 0, 0]
    assert (counts.diff() < 0).all()
    assert float(counts.float().mean()) == pytest.approx(1024 * (1 - ratio), abs=1)
    default = kvpress.PyramidKVPress(0.75)  # what kvpress' own settings do instead
    assert kept_counts(prefill(demo, thousand, default)).unique().numel() == 1


@pytest.mark.parametrize("name", DECODING_ROWS)
def test_decoding_presses_act_within_seventy_steps(demo, thousand, name):
    """Nothing goes before the first step; at the interval the cache falls to its target."""
    press = make_press(name, 0.5)
    cache, lengths = DynamicCache(), []
    with torch.no_grad(), applied(press, demo):
        demo.model(input_ids=thousand, past_key_values=cache)
        for step in range(70):
            lengths.append(cache.get_seq_length())
            demo(thousand[:, :1], past_key_values=cache, position_ids=torch.tensor([[1024 + step]]))
    assert lengths[0] == (512 if name.startswith("prefill") else 1024)
    target = 256 if name.startswith("prefill") else 512
    assert lengths[32] == (528 if name.startswith("ratio") else target) and lengths[33] == lengths[32] + 1


def test_ratio_zero_keeps_everything(demo, thousand):
    for name in HOOK_ROWS:
        if REGISTRY[name].takes_ratio and attention_needed(make_press(name)) != "eager":
            press = make_press(name, 0.0, **({"key_channel_compression_ratio": 0.0} if "think" in name else {}))
            cache = prefill(demo, thousand[:, :300], press)
            assert (kept_counts(cache) == 300).all(), name


@pytest.mark.parametrize("length", [70, 257, 300, 513, 1060])
def test_chunks_are_never_too_short_for_the_press_inside(demo, reading, length):
    """kvpress' own last chunk is the remainder, and snapkv refuses one of up to 64 tokens."""
    counts = kept_counts(prefill(demo, reading[:, :length], make_press("chunk_snapkv", 0.5)))
    assert abs(float(counts.float().mean()) - length / 2) <= length // 256 + 2
    if 0 < length % 256 <= 64 and length > 256:
        with pytest.raises(AssertionError, match="greater than the window size"):
            prefill(demo, reading[:, :length], kvpress.ChunkPress(kvpress.SnapKVPress(0.5), chunk_length=256))


def test_unstructured_kvcompose_leaves_no_replay_in_the_cache(demo, thousand):
    """kvpress scores by reading the context twice and, unstructured, keeps both copies: the row crops the second."""
    ids = thousand[:, :200]
    assert prefill(demo, ids, make_press("kvcompose_unstructured")).get_seq_length() == 200
    upstream = kvpress.KVComposePress(structured=False, compression_ratio=0.5)
    assert prefill(demo, ids, upstream).get_seq_length() == 400, "kvpress has mended it: drop UnstructuredKVCompose"


# -- what a press demands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOOK_ROWS)
def test_attention_needs_are_what_kvpress_enforces(demo, thousand, name):
    """With the other attention kvpress itself fails; we say so before any work."""
    press = make_press(name, ratio_for(name, 0.5, demo))
    needed = attention_needed(press)
    if needed == "any":
        for implementation in ("eager", "sdpa"):
            demo.config._attn_implementation = implementation
            check_press(press, demo)
        demo.config._attn_implementation = "sdpa"
        return
    demo.config._attn_implementation = "sdpa" if needed == "eager" else "eager"
    try:
        with pytest.raises(ValueError, match=f"Load the model with attn_implementation='{needed}'"):
            check_press(press, demo)
        with pytest.raises(AssertionError), torch.no_grad(), press(demo):
            demo.model(input_ids=thousand[:, :300], past_key_values=DynamicCache())
    finally:
        demo.config._attn_implementation = "sdpa"


def test_per_layer_ratios_must_fit_the_model(demo):
    with pytest.raises(ValueError, match="3 entries; the model has 6 layers"):
        check_press(make_press("per_layer_knorm", [0.1, 0.2, 0.3]), demo)
    ramp = layer_ramp(0.6, 6)
    assert sum(ramp) / 6 == pytest.approx(0.6) and sorted(ramp) == ramp and 0 <= ramp[0] < ramp[-1] < 1


@pytest.mark.parametrize("name", HOOK_ROWS)
def test_rows_called_independent_are(demo, reading, name):
    press = make_press(name, ratio_for(name, 0.5, demo))
    if not rows_independent(press):
        with pytest.raises(ValueError, match="mixes the rows"):
            prefill(demo, reading[:, :600].view(2, 300), press)
        return
    demo.config._attn_implementation = implementation_for(name, press)
    try:
        ids = reading[:, :800].view(2, 400)
        together = prefill(demo, ids, press)
        counts = kept_counts(together)
        for row in range(2):
            alone = prefill(demo, ids[row : row + 1], press)
            assert torch.equal(kept_counts(alone)[:, 0], counts[:, row])
            for one, other in zip(alone.layers, together.layers):
                assert torch.allclose(one.keys[0].sum(1), other.keys[row].sum(1), atol=2e-3)
    finally:
        demo.config._attn_implementation = "sdpa"


def test_rows_called_dependent_include_every_known_offender(demo, reading):
    """ChunkKV takes row 0's chunks for all rows: an example of what looping over rows is for."""
    ids = reading[:, :600].view(2, 300)
    press = make_press("chunkkv_snapkv", 0.5)
    with torch.no_grad(), press(demo):
        both, alone = DynamicCache(), DynamicCache()
        demo.model(input_ids=ids, past_key_values=both)
        demo.model(input_ids=ids[1:], past_key_values=alone)
    assert not torch.allclose(both.layers[1].keys[1].sum(), alone.layers[1].keys[0].sum(), atol=1e-2)


# -- leaving nothing behind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["snapkv", "kvzip", "kvgrad", "kvcompose", "finch", "decoding_knorm", "adakv_snapkv"])
def test_a_failure_inside_leaves_nothing_behind(demo, reading, name):
    press = make_press(name)
    with_delimiter(press, reading[:, :200])  # FINCH wants one before it is entered

    def fail(*_):
        raise KeyError("on purpose")

    forward = demo.model.__dict__.get("forward")
    handle = demo.model.layers[3].register_forward_hook(fail)
    try:
        with pytest.raises(KeyError, match="on purpose"), torch.no_grad(), applied(press, demo):
            demo.model(input_ids=with_delimiter(press, reading[:, :200]), past_key_values=DynamicCache())
    finally:
        handle.remove()
    assert demo.config._attn_implementation == "sdpa" and demo.model.__dict__.get("forward") is forward
    assert not demo.model.embed_tokens._forward_hooks
    assert hooks_of_presses(demo) == []


def test_kvgrad_differentiates_though_the_caller_is_in_inference_mode(demo, reading):
    with torch.inference_mode():
        cache = prefill(demo, reading[:, :200], make_press("kvgrad", 0.5))
    assert kept_counts(cache).float().mean() == 100


def kept_by(press, dtype: str, ids: torch.Tensor) -> torch.Tensor:
    return kept_positions(load_model("demo", dtype=dtype, device="cpu").model, ids, press)


@pytest.mark.parametrize("name", ["kvgrad", "pyramidkv"])
def test_half_precision_keeps_what_float32_keeps(reading, name):
    """At ratio 0.5 chance would keep a half of it. The gradients and scores of kvpress' KVgrad overflow in float16."""
    ids = reading[:, 9000:9300]
    full = kept_by(make_press(name), "float32", ids)
    for dtype in ("float16", "bfloat16"):
        kept = kept_by(make_press(name), dtype, ids)
        assert float((kept & full).sum() / full.sum()) > 0.95


def test_kvgrad_is_that_of_kvpress_where_nothing_overflows(reading):
    ids = reading[:, 9000:9600]  # two chunks, whose scores are compared
    assert torch.equal(kept_by(make_press("kvgrad"), "float32", ids), kept_by(kvpress.KVgradPress(0.5), "float32", ids))
    with pytest.raises(ValueError, match="dtype='float16': the gradients of kvpress' own KVgradPress overflow"):
        kept_by(kvpress.KVgradPress(0.5), "float16", ids)


def test_kvgrad_says_when_its_gradients_overflow_all_the_same(reading):
    model = load_model("demo", dtype="float16", device="cpu").model
    model.model.layers[-1].mlp.dense_4h_to_h.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="dtype='float16': KVgrad's gradients"):
        prefill(model, reading[:, 9000:9100], make_press("kvgrad"))


def test_kvpress_no_longer_calls_the_model_untested(demo, reading, caplog):
    with caplog.at_level(logging.WARNING):
        for name in ("knorm", "kvzip", "kvcompose"):
            prefill(demo, reading[:, :150], make_press(name))
    assert "not tested" not in caplog.text


@pytest.mark.parametrize("name", ["knorm", "adakv_snapkv", "kvzip", "kvgrad", "kvcompose"])
def test_every_way_to_call_the_model_leaves_the_same_cache(demo, reading, name):
    """Through the decoder as the pipeline does, or through the causal LM, with keywords or without."""
    ids, caches, counts = reading[:, :160], [], []
    calls = (
        lambda cache: demo.model(input_ids=ids, past_key_values=cache),
        lambda cache: demo(ids, past_key_values=cache),
        lambda cache: demo(input_ids=ids, past_key_values=cache, use_cache=True),
    )
    for call in calls:
        caches.append(DynamicCache())
        with torch.no_grad(), make_press(name, 0.5)(demo):
            call(caches[-1])
        counts.append(kept_counts(caches[-1]))
    for cache, count in zip(caches[1:], counts[1:]):
        assert torch.equal(count, counts[0])
        for one, other in zip(cache.layers, caches[0].layers):
            assert torch.allclose(one.keys, other.keys, atol=1e-5)


def test_a_rerotated_key_is_the_key_of_its_new_position(demo, reading):
    """Against reading the kept tokens at their new positions: layer 0's keys depend on token and place alone."""
    ids = reading[:, :120]
    cache = prefill(demo, ids, make_press("key_rerotation_streaming_llm", 0.5))
    kept = torch.cat([ids[:, :4], ids[:, 64:]], dim=1)  # 4 sinks and the last 56
    again = prefill(demo, kept, None)
    difference = (cache.layers[0].keys - again.layers[0].keys).abs().max() / again.layers[0].keys.abs().max()
    assert cache.get_seq_length() == 60 and difference < 1e-6


def test_a_decoding_press_can_be_used_for_one_text_after_another(demo, reading):
    press = make_press("decoding_knorm", compression_interval=4, target_size=40)
    fresh = make_press("decoding_knorm", compression_interval=4, target_size=40)
    answer(demo, reading[:, :150], press, 10)
    again, first = (answer(demo, reading[:, 300:360], one, 10).logits for one in (press, fresh))
    assert torch.equal(again, first)


def test_parts_and_traits_of_presses_built_by_hand():
    by_hand = kvpress.KeyRerotationPress(kvpress.ObservedAttentionPress(0.5))
    assert [type(part).__name__ for part in parts_of(by_hand)] == ["KeyRerotationPress", "ObservedAttentionPress"]
    assert attention_needed(by_hand) == "eager" and rerotates(by_hand)
    assert not rerotates(kvpress.FinchPress(0.5, rerotate_keys=False))
    assert acts(kvpress.PrefillDecodingPress(decoding_press=kvpress.DecodingPress(kvpress.KnormPress()))) == "decoding"


# -- decoding from what is left -----------------------------------------------------------------------------------


def test_greedy_without_a_press_is_stock_generation():
    stock, ours = stock_and_ours(tiny_config())
    ids = torch.randint(1, 97, (2, 30))
    tokens = answer(ours, ids, None, 10).tokens
    expected = stock.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(tokens, expected[:, 30:])


@pytest.mark.parametrize("name", ["knorm", "key_rerotation_knorm", "finch", "adakv_snapkv", "kvzip", "pyramidkv"])
def test_greedy_answers_as_the_kvpress_pipeline(demo, tokenizer, reading, name):
    """Positions after compression included: from the true length, or from the compressed one after re-rotation."""
    from transformers import pipeline

    pipe = pipeline("kv-press-text-generation", model=demo, tokenizer=tokenizer)
    ids = reading[:, :300]
    cache = prefill(demo, ids[:, :-1], make_press(name))
    length = cache.get_seq_length() if name in ("key_rerotation_knorm", "finch") else 299
    expected = pipe.generate_answer(ids[:, -1:], cache, length, max_new_tokens=12)
    tokens = answer(demo, ids, make_press(name), 12).tokens[0].tolist()
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == expected


def test_positions_that_cannot_be_read_off_are_not_guessed(demo, reading):
    with pytest.raises(ValueError, match="FinchPress rotates the keys"):
        kept_positions(demo, reading[:, :200], make_press("finch"))
    with pytest.raises(ValueError, match="changes the keys"):
        kept_positions(demo, reading[:, :200], make_press("composed_snapkv_think"))


def test_positions_before_a_rotation_are_those_of_the_press_inside(demo, reading):
    ids = reading[:, :400].view(2, 200)
    rotated, inside = (kept_positions(demo, ids, make_press(name, 0.7)) for name in ("key_rerotation_knorm", "knorm"))
    assert torch.equal(rotated, inside) and inside.float().mean() == pytest.approx(0.3)


def test_positions_of_kvcompose_are_where_its_values_are(demo, reading):
    """Values are looked up instead of keys, above the first layer, where no two are alike."""
    ids, press = reading[:, :200], make_press("kvcompose", 0.5)
    kept = kept_positions(demo, ids, press)
    with attention(demo, "eager"):
        full = prefill(demo, ids, None)
    cache = prefill(demo, ids, press)
    for layer in range(1, 6):
        whole, some = (held.layers[layer].values[0] for held in (full, cache))
        for head in range(4):
            found = (some[head][:, None] == whole[head]).all(-1).any(0)
            assert torch.equal(kept[layer, 0, head], found)


@pytest.mark.parametrize("name", [row.name for row in ROWS[1:] if row.name != "finch"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_context_is_refused_where_kvpress_fails_and_nowhere_else(demo, reading, name, ratio):
    """At lengths around every window that a row has."""
    made = partial(make_press, name, ratio_for(name, ratio, demo))

    def read(length: int) -> None:
        with torch.no_grad(), applied(made(), demo):
            demo.model(input_ids=reading[:, :length], past_key_values=DynamicCache())

    with attention(demo, implementation_for(name, made())):
        for length in (1, 2, 4, 5, 8, 9, 12, 13, 64, 65):
            refused = []
            for call, kind in (
                (read, (AssertionError, ValueError, RuntimeError)),
                (partial(check_context, made()), ValueError),
            ):
                try:
                    call(length)
                    refused.append(False)
                except kind:
                    refused.append(True)
            assert refused[0] == refused[1], length


def test_a_context_that_is_too_short_is_refused_before_any_work(demo, reading, monkeypatch):
    ids = reading[:, :70]
    monkeypatch.setattr(demo.model, "forward", lambda *_, **__: pytest.fail("the model was called"))
    message = re.escape(
        "input_ids: a context of 64 tokens should be greater than window_size=64 of SnapKVPress; allowed is one of at "
        "least 65"
    )
    for name in ("snapkv", "adakv_snapkv", "prefill_decoding_snapkv_knorm", "key_rerotation_snapkv"):
        press = make_press(name, 0.5)
        for call in (
            lambda p: generate(demo, ids[:, :64], press=p, max_new_tokens=2),
            lambda p: continuation_nll(demo, ids, n_context=64, press=p),
            lambda p: teacher_forced_nll(demo, ids[:, :64], press=p),
            lambda p: kept_positions(demo, ids[:, :64], p),
        ):
            with pytest.raises(ValueError, match=message):
                call(press)


def test_random_recent_is_the_window_and_chance(demo, reading):
    """As many as asked for: the last 64 in every head, and of the others what another draw would not choose again."""
    torch.manual_seed(0)
    first, again = (kept_positions(demo, reading[:1, :320], make_press("random_recent", 0.5)) for _ in range(2))
    for kept in (first, again):
        assert kept.sum(-1).unique().tolist() == [160] and kept[..., -64:].all()
    assert not torch.equal(first, again)
    shares = first[..., :-64].float().mean((0, 1, 2)).unflatten(0, (4, 64)).mean(-1)
    assert (shares - 96 / 256).abs().max() < 0.1  # no part of the rest is preferred


def test_kept_positions_of_streaming_llm(demo, reading):
    kept = kept_positions(demo, reading[:, :200], make_press("streaming_llm", 0.75))
    assert kept.shape == (6, 1, 4, 200)
    expected = torch.zeros(200, dtype=torch.bool)
    expected[:4] = expected[154:] = True
    assert (kept == expected).all()

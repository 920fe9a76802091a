"""Up to four tokens through all layers in one call: what the layers say one by one, and only where none is watched."""

import copy

import pytest
import torch
from conftest import relative_difference, stock_and_ours, tiny_config
from torch import nn
from transformers import DynamicCache

from kvneox_lib import generate, make_press
from kvneox_lib.neox import compiled, kernels, layers, modeling, packer
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.modeling import KVNeoXModel

SHAPES = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]  # (batch, n)


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call that goes through all layers."""
    counted, read = [], modeling.read_layers
    monkeypatch.setattr(modeling, "read_layers", lambda *arguments: counted.append(1) or read(*arguments))
    return counted


def tokens(batch: int, n: int) -> torch.Tensor:
    return torch.randint(0, 97, (batch, n))


def read(model, ids, cache, n: int, **kwargs) -> torch.Tensor:
    """Hidden states of `ids` after a context, the last `n` of them in a pass of their own."""
    before = ids.shape[1] - n
    model.model(ids[:, :before], past_key_values=cache)
    return model.model(ids[:, before:], past_key_values=cache, **kwargs).last_hidden_state


def one_by_one(model, ids, n: int, **kwargs):
    """The same layer by layer, and what is then in the cache."""
    cache = CompactCache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVNeoXModel, "_is_a_step", lambda *_: False)
        return read(model, ids, cache, n, **kwargs), cache


def held(cache) -> list[torch.Tensor]:
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


# -- what they say ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("rotary", [0.25, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_float32(head_dim, rotary, bias, calls):
    stock, ours = stock_and_ours(tiny_config(head_dim, rotary_pct=rotary, attention_bias=bias))
    for batch, n in SHAPES:
        calls.clear()
        ids, cache = tokens(batch, 30), CompactCache(headroom=n - 1)  # the cache must grow, too
        out = read(ours, ids, cache, n)
        layer_by_layer, other = one_by_one(ours, ids, n)
        assert calls == [1]
        assert relative_difference(out, stock.gpt_neox(ids).last_hidden_state[:, -n:]) < 1e-5
        assert relative_difference(out, layer_by_layer) < 1e-5
        assert cache.get_seq_length() == 30
        assert all(relative_difference(one, same) < 1e-5 for one, same in zip(held(cache), held(other)))


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("rotary", [0.25, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16(head_dim, rotary, bias, calls):
    """Against the same numbers in float32: no further from them than the layers one by one, which round in between."""
    config = tiny_config(head_dim, rotary_pct=rotary, attention_bias=bias)
    _, ours = stock_and_ours(config, dtype=torch.bfloat16)
    exact = copy.deepcopy(ours).float()
    for batch, n in SHAPES:
        calls.clear()
        ids, cache, exact_cache = tokens(batch, 30), CompactCache(), CompactCache()
        out, (layer_by_layer, other) = read(ours, ids, cache, n), one_by_one(ours, ids, n)
        expected = read(exact, ids, exact_cache, n)
        assert calls == [1, 1] and out.dtype == torch.bfloat16
        assert relative_difference(out, expected) < max(0.01, 1.5 * relative_difference(layer_by_layer, expected))
        assert relative_difference(out, expected) < 0.03
        for one, same, right in zip(held(cache), held(other), held(exact_cache)):
            assert torch.equal(one[:, :, :-n], same[:, :, :-n]) and one.dtype == torch.bfloat16
            assert relative_difference(one[:, :, -n:], right[:, :, -n:]) < 0.03


@torch.no_grad()
def test_what_the_first_layer_stores_is_rounded_once(calls):
    """Its input is the same in both dtypes, so that its keys and values are those of float32 to half a step, though the
    layer by itself rounds what comes out of the norm, of the product and of the rotation."""
    _, ours = stock_and_ours(tiny_config(), dtype=torch.bfloat16)
    exact, ids, caches = copy.deepcopy(ours).float(), tokens(2, 22), (CompactCache(), CompactCache())
    read(ours, ids, caches[0], 2)
    read(exact, ids, caches[1], 2)
    assert calls == [1, 1]
    # cos and sin are rounded: values alone are free of that
    stored, right = (cache.layers[0].values[:, :, -2:] for cache in caches)
    assert relative_difference(stored, right) < 2**-8 + 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_shares_and_threads(dtype, calls, monkeypatch):
    _, ours = stock_and_ours(tiny_config(), dtype=dtype)
    ids, before, results = tokens(2, 40), torch.get_num_threads(), []
    try:
        for n_threads, n_shares in [(1, 1), (1, 4), (1, 200), (2, 3), (3, 4), (8, 1)]:
            torch.set_num_threads(n_threads)
            monkeypatch.setattr(compiled, "SHARES_PER_THREAD", n_shares)
            results.append(read(ours, ids, CompactCache(), 2))
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 6
    for result in results[1:]:
        assert relative_difference(result, results[0]) < (1e-5 if dtype == torch.float32 else 0.01)


@torch.no_grad()
def test_threads_of_our_own(calls, monkeypatch):
    _, ours = stock_and_ours(tiny_config())
    ids, before = tokens(2, 40), torch.get_num_threads()
    expected = read(ours, ids, CompactCache(), 2)
    monkeypatch.setattr(compiled, "torchs_openmp", lambda: None)
    try:
        torch.set_num_threads(3)
        assert relative_difference(read(ours, ids, CompactCache(), 2), expected) < 1e-5
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 2


@torch.no_grad()
def test_many_steps_and_positions_of_each_row(calls):
    """Token by token, in twos and alone, rows at positions of their own, over the growth of the cache."""
    _, ours = stock_and_ours(tiny_config())
    ids, cache = tokens(2, 80), CompactCache(headroom=3)
    positions = torch.arange(80) + torch.tensor([[0], [50]])
    expected = ours.model(ids, position_ids=positions).last_hidden_state
    ours.model(ids[:, :20], past_key_values=cache, position_ids=positions[:, :20])
    at = 20
    while at < 80:
        part = slice(at, at + (1 if at % 3 else 2))
        out = ours.model(ids[:, part], past_key_values=cache, position_ids=positions[:, part]).last_hidden_state
        assert relative_difference(out, expected[:, part]) < 1e-5
        at = min(part.stop, 80)
    assert len(calls) > 30


@torch.no_grad()
def test_heads_that_hold_different_entries(calls):
    """After make_ragged: what masking gives, one head with no entry of the context left."""
    _, ours = stock_and_ours(tiny_config())
    ids, masked, ragged = tokens(2, 34), CompactCache(), CompactCache()
    gone = torch.rand(2, 2, 30) < 0.5
    gone[1, 0] = True
    parts, results = [slice(30, 31), slice(31, 33), slice(33, 34)], []
    for cache in (masked, ragged):
        ours.model(ids[:, :30], past_key_values=cache)
        for layer in ours.model.layers:
            layer.self_attn.masked_key_indices = gone.nonzero(as_tuple=True)
        if cache is ragged:
            cache.make_ragged()
        positions = torch.arange(34)[None]
        outputs = [
            ours.model(ids[:, part], past_key_values=cache, position_ids=positions[:, part]).last_hidden_state
            for part in parts
        ]
        results.append(torch.cat(outputs, dim=1))
        assert len(calls) == (0 if cache is masked else 3)
    assert relative_difference(results[1], results[0]) < 1e-5
    assert torch.equal(ragged.kv_lengths, (30 - gone.sum(-1) + 4).expand(2, 2, 2))


@torch.no_grad()
def test_a_number_that_is_none_stays_so(calls):
    """In one row of a batch, and not in the others."""
    _, ours = stock_and_ours(tiny_config())
    ids, cache = tokens(3, 20), CompactCache()
    clean = read(ours, ids, CompactCache(), 1)
    ours.model(ids[:, :19], past_key_values=cache)
    cache.layers[0].values[1, 0, 3, 5] = torch.nan
    out = ours.model(ids[:, 19:], past_key_values=cache).last_hidden_state
    assert len(calls) == 2
    assert out[1].isnan().all() and torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 6])
def test_nothing_is_compiled_while_a_clock_runs(dtype, batch):
    _, ours = stock_and_ours(tiny_config(), dtype=dtype)
    compiled.kernel_for.cache_clear()
    kernels.make_ready.__wrapped__(dtype)
    made = compiled.kernel_for.cache_info().misses
    generate(ours, tokens(batch, 20), max_new_tokens=3, stop_at_eos=False)
    assert compiled.kernel_for.cache_info().misses == made > 0


# -- where they are not read so ---------------------------------------------------------------------------------------


WATCHED = {
    "layer": lambda layer: layer,
    "attention": lambda layer: layer.attention,
    "mlp": lambda layer: layer.mlp,
    "activation": lambda layer: layer.mlp.act,
    "norm": lambda layer: layer.post_attention_layernorm,
    "query_key_value": lambda layer: layer.attention.query_key_value,
    "dense": lambda layer: layer.attention.dense,
    "dense_h_to_4h": lambda layer: layer.mlp.dense_h_to_4h,
    "dense_4h_to_h": lambda layer: layer.mlp.dense_4h_to_h,
}


@torch.no_grad()
@pytest.mark.parametrize("which", list(WATCHED))
def test_hooks_see_every_call(which, calls):
    stock, ours = stock_and_ours(tiny_config())
    ids, cache, module = tokens(2, 20), CompactCache(), WATCHED[which](ours.model.layers[1])
    expected = stock.gpt_neox(ids).last_hidden_state
    ours.model(ids[:, :18], past_key_values=cache)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        seen, at = [], cache.get_seq_length()
        handle = register(lambda *_, seen=seen: seen.append(1))
        out = ours.model(ids[:, at : at + 1], past_key_values=cache).last_hidden_state
        handle.remove()
        assert seen == [1] and calls == []
        assert relative_difference(out, expected[:, at : at + 1]) < 1e-5
    module.forward = module.forward  # what a wrapper leaves
    ours.model(ids[:, :1], past_key_values=cache)
    assert calls == []
    del module.forward
    ours.model(ids[:, :1], past_key_values=cache)
    assert calls == [1]


CHANGED = {
    "residuals one after the other": {"use_parallel_residual": False},
    "another activation": {"hidden_act": "relu"},
    "an approximate activation": {"hidden_act": "gelu_new"},
}


@torch.no_grad()
@pytest.mark.parametrize("changes", list(CHANGED))
def test_models_that_compute_something_else(changes, calls):
    stock, ours = stock_and_ours(tiny_config(**CHANGED[changes]))
    ids = tokens(2, 20)
    out = read(ours, ids, CompactCache(), 1)
    assert calls == [] and relative_difference(out, stock.gpt_neox(ids).last_hidden_state[:, -1:]) < 1e-5


@torch.no_grad()
def test_eager_attention(calls):
    stock, ours = stock_and_ours(tiny_config(), "eager")
    ids = tokens(2, 20)
    out = read(ours, ids, CompactCache(), 2)
    assert calls == [] and relative_difference(out, stock.gpt_neox(ids).last_hidden_state[:, -2:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("batch", "n"), [(1, 5), (5, 1), (2, 3)])
def test_more_than_four_tokens(batch, n, calls):
    stock, ours = stock_and_ours(tiny_config())
    ids = tokens(batch, 20)
    out = read(ours, ids, CompactCache(), n)
    assert calls == [] and relative_difference(out, stock.gpt_neox(ids).last_hidden_state[:, -n:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("make", [DynamicCache, CompactCache])
@pytest.mark.parametrize("n", [1, 4])
def test_other_caches_and_empty_ones(make, n, calls):
    stock, ours = stock_and_ours(tiny_config())
    ids, cache = tokens(1, 20), make()
    expected = stock.gpt_neox(ids).last_hidden_state
    out = ours.model(ids[:, :n], past_key_values=cache).last_hidden_state
    assert calls == [] and relative_difference(out, expected[:, :n]) < 1e-5
    out = ours.model(ids[:, n : 2 * n], past_key_values=cache).last_hidden_state
    assert relative_difference(out, expected[:, n : 2 * n]) < 1e-5
    assert calls == ([1] if make is CompactCache else [])
    if make is CompactCache:
        cache.reset()
        out = ours.model(ids[:, :n], past_key_values=cache).last_hidden_state
        assert calls == [1] and relative_difference(out, expected[:, :n]) < 1e-5


@torch.no_grad()
def test_padding(calls):
    stock, ours = stock_and_ours(tiny_config())
    ids, mask, cache = tokens(2, 20), torch.ones(2, 20, dtype=torch.long), CompactCache()
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = stock.gpt_neox(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    before = {"attention_mask": mask[:, :18], "position_ids": positions[:, :18], "past_key_values": cache}
    ours.model(ids[:, :18], **before)
    out = ours.model(
        ids[:, 18:], attention_mask=mask, position_ids=positions[:, 18:], past_key_values=cache
    ).last_hidden_state
    assert calls == [] and relative_difference(out, expected[:, 18:]) < 1e-5
    # a mask that hides nothing is none
    out = read(ours, ids, CompactCache(), 2, attention_mask=torch.ones_like(mask))
    assert calls == [1] and relative_difference(out, stock.gpt_neox(ids).last_hidden_state[:, 18:]) < 1e-5


@torch.no_grad()
def test_entries_that_are_there_but_evicted(calls):
    """As if they had been cut out of the stock model's cache."""
    stock, ours = stock_and_ours(tiny_config())
    ids, cache, stocks, evicted = tokens(2, 20), CompactCache(), DynamicCache(), [3, 7, 8]
    ours.model(ids[:, :19], past_key_values=cache)
    stock.gpt_neox(ids[:, :19], past_key_values=stocks)
    gone, kept = torch.zeros(2, 2, 19, dtype=torch.bool), [i for i in range(19) if i not in evicted]
    gone[:, :, evicted] = True
    for layer, its in zip(ours.model.layers, stocks.layers):
        layer.self_attn.masked_key_indices = gone.nonzero(as_tuple=True)
        its.keys, its.values = its.keys[:, :, kept], its.values[:, :, kept]
    position = torch.tensor([[19]])
    out = ours.model(ids[:, 19:], past_key_values=cache, position_ids=position).last_hidden_state
    expected = stock.gpt_neox(ids[:, 19:], past_key_values=stocks, position_ids=position).last_hidden_state
    assert calls == [] and relative_difference(out, expected) < 1e-5


def test_gradients(calls):
    stock, ours = stock_and_ours(tiny_config())
    ids, cache = tokens(2, 20), CompactCache()
    with torch.no_grad():
        ours.model(ids[:, :19], past_key_values=cache)
    embedded = ours.model.embed_in(ids[:, 19:]).detach().requires_grad_()
    out = ours.model(inputs_embeds=embedded, past_key_values=cache).last_hidden_state
    out.square().sum().backward()
    assert calls == [] and embedded.grad.abs().sum() > 0
    with torch.no_grad():
        assert relative_difference(out, stock.gpt_neox(ids).last_hidden_state[:, -1:]) < 1e-5


@torch.no_grad()
def test_training(calls):
    """Then numbers are dropped, from the attention too."""
    stock, ours = stock_and_ours(tiny_config())
    ids = tokens(2, 20)
    ours.train()
    out = read(ours, ids, CompactCache(), 1)
    assert calls == [] and relative_difference(out, stock.gpt_neox(ids).last_hidden_state[:, -1:]) < 1e-5
    _, dropping = stock_and_ours(tiny_config(attention_dropout=0.5))
    for make in (CompactCache, DynamicCache):
        dropping.eval()
        cache = make()
        dropping.model(ids[:, :19], past_key_values=cache)
        dropping.train()
        outs = [dropping.model(ids[:, 19:], past_key_values=copy.deepcopy(cache)).last_hidden_state for _ in range(2)]
        assert relative_difference(*outs) > 0.01
    assert calls == []


@torch.no_grad()
def test_hidden_states_that_are_asked_for(calls):
    stock, ours = stock_and_ours(tiny_config())
    ids, cache = tokens(2, 20), CompactCache()
    ours.model(ids[:, :19], past_key_values=cache)
    found = ours.model(ids[:, 19:], past_key_values=cache, output_hidden_states=True).hidden_states
    expected = stock.gpt_neox(ids, output_hidden_states=True).hidden_states
    assert calls == [] and len(found) == len(expected)
    assert all(relative_difference(one, other[:, -1:]) < 1e-5 for one, other in zip(found, expected))


@torch.no_grad()
def test_norms_of_another_dtype_or_kind(calls):
    """Some keep norms in float32 in a model of half precision; and others have no shift."""
    _, ours = stock_and_ours(tiny_config(), dtype=torch.bfloat16)
    ours.model.layers[1].post_attention_layernorm.float()
    exact, ids = copy.deepcopy(ours).float(), tokens(2, 20)
    out = read(ours, ids, CompactCache(), 1)
    assert calls == [] and relative_difference(out, exact.model(ids).last_hidden_state[:, -1:]) < 0.03
    for norm in (nn.RMSNorm(128), nn.LayerNorm(128, bias=False), nn.LayerNorm(128, elementwise_affine=False)):
        _, ours = stock_and_ours(tiny_config())
        ours.model.layers[0].input_layernorm = norm
        out = read(ours, ids, CompactCache(), 1)
        assert calls == [] and relative_difference(out, ours.model(ids).last_hidden_state[:, -1:]) < 1e-5


# -- what a cache may be like -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 6])
def test_keys_replaced_and_values_cropped(n, calls):
    """Then their buffers are not of one size. Six tokens are read layer by layer, by the same attention."""
    _, ours = stock_and_ours(tiny_config())
    ids, caches, results = tokens(1, 30), (CompactCache(), CompactCache()), []
    for cache in caches:
        ours.model(ids[:, :20], past_key_values=cache)
        for layer in cache.layers:
            layer.keys = layer.keys[:, :, :10].clone()
            layer.values = layer.values[:, :, :10] if cache is caches[0] else layer.values[:, :, :10].clone()
        positions = torch.arange(20, 20 + n)[None]
        out = ours.model(ids[:, 20 : 20 + n], past_key_values=cache, position_ids=positions)
        results.append(out.last_hidden_state)
    assert caches[1].layers[0]._values.buffer.shape == caches[1].layers[0]._keys.buffer.shape
    assert torch.equal(*results) and len(calls) == (2 if n == 1 else 0)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_of_another_dtype_is_refused(n, ragged, dtype):
    """Its memory would be read, and written, as what it is not. In float16 keys are not written by a kernel."""
    _, ours = stock_and_ours(tiny_config())
    ids, cache = tokens(1, 30), CompactCache()
    ours.model(ids[:, :20], past_key_values=cache)
    if ragged:
        for layer in ours.model.layers:
            layer.self_attn.masked_key_indices = tuple(torch.zeros(3, 1, dtype=torch.long))
        cache.make_ragged()
    by_us = ragged or dtype == torch.bfloat16
    error, said = (
        (ValueError, f"in {dtype}, the cache 2 heads of 64 in torch.float32") if by_us else (RuntimeError, None)
    )
    with pytest.raises(error, match=said):
        ours.to(dtype).model(ids[:, 20 : 20 + n], past_key_values=cache)
    assert not by_us or cache.get_seq_length() == 20


# -- what compiled code must never be given ---------------------------------------------------------------------------


@torch.no_grad()
def test_positions_of_another_shape_are_as_in_torch():
    stock, ours = stock_and_ours(tiny_config())
    ids = tokens(2, 12)
    for positions in (torch.arange(12)[None], torch.tensor([[11]]), torch.arange(3)[:, None] + 9):
        told = []
        for model, cache in ((stock.gpt_neox, DynamicCache()), (ours.model, CompactCache())):
            model(ids[:, :9], past_key_values=cache)
            try:
                told.append(model(ids[:, 9:], past_key_values=cache, position_ids=positions).last_hidden_state)
            except RuntimeError:
                told.append(None)
        assert (told[0] is None) == (told[1] is None)
        assert told[0] is None or relative_difference(told[1], told[0]) < 1e-5


@torch.no_grad()
def test_a_model_changed_by_hand_is_gone_through_layer_by_layer(calls):
    def prune(model):
        mlp = model.gpt_neox.layers[1].mlp
        mlp.dense_h_to_4h.weight.data, mlp.dense_h_to_4h.bias.data = (
            part.data[:96].clone() for part in mlp.dense_h_to_4h.parameters()
        )
        mlp.dense_4h_to_h.weight.data = mlp.dense_4h_to_h.weight.data[:, :96].clone()

    def shift_with_gaps(model):
        dense = model.gpt_neox.layers[0].attention.dense
        dense.bias.data = dense.bias.data.repeat_interleave(2)[::2]

    def soften(model):
        model.gpt_neox.layers[1].post_attention_layernorm.eps = 0.5

    for change in (prune, shift_with_gaps, soften):
        stock, ours = stock_and_ours(tiny_config())
        change(stock), change(ours)
        calls.clear()
        ids, cache = tokens(2, 20), CompactCache()
        out = read(ours, ids, cache, 1)
        assert not calls and relative_difference(out, stock.gpt_neox(ids).last_hidden_state[:, -1:]) < 1e-5


@torch.no_grad()
def test_a_cache_of_another_model_is_refused():
    _, ours = stock_and_ours(tiny_config())
    _, other = stock_and_ours(tiny_config(head_dim=32, num_attention_heads=4, hidden_size=128))
    cache = CompactCache()
    ours.model(tokens(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="has 4 heads of 32 .* the cache 2 heads of 64"):
        other.model(tokens(1, 1), past_key_values=cache)
    cache.layers[0].values = cache.layers[0].values[:, :, :7]
    with pytest.raises(ValueError, match="holds 20 keys and 7 values"):
        ours.model(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_asking_for_hidden_states_once_slows_nothing_afterwards(calls):
    _, ours = stock_and_ours(tiny_config())
    ids, cache = tokens(1, 20), CompactCache()
    ours.model(ids[:, :18], past_key_values=cache)
    for asked in (True, False):
        calls.clear()
        out = ours.model(ids[:, 18:19], past_key_values=cache, output_hidden_states=asked)
        assert len(calls) == 1 - asked and (len(out.hidden_states or ()) == 3) == asked


def test_kernels_kept_on_disk_know_their_sources():
    """Numba itself looks at one file only."""
    number = compiled.WORDS[torch.float32]
    of_a_cache = {compiled._attend, layers._read_layers}  # which may be held otherwise
    for make in (compiled._attend, compiled._multiply, compiled._turn_into, layers._read_layers, packer._pack):
        kernel = make(*([number, number] if make in of_a_cache else [number]), compiled.VERSION, keep=False)
        assert compiled.VERSION in [cell.cell_contents for cell in kernel.__wrapped__.__closure__]


@torch.no_grad()
def test_what_is_looked_at_once_is_looked_at_anew_afterwards(calls):
    _, ours = stock_and_ours(tiny_config())
    ids, seen = tokens(1, 22), []
    generate(ours, ids[:, :20], max_new_tokens=4, stop_at_eos=False)
    assert len(calls) == 3 and "kvneox_untouched" not in vars(ours.model)
    handle = ours.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    generate(ours, ids[:, :20], max_new_tokens=4, stop_at_eos=False)
    handle.remove()
    assert len(calls) == 3 and len(seen) == 4
    press = make_press("decoding_knorm", target_size=16, compression_interval=2)
    made = generate(ours, ids[:, :20], press=press, max_new_tokens=8, stop_at_eos=False)
    assert len(calls) == 3 and (made.kv_bytes < 2 * 2 * 128 * 4 * 28)  # it was asked at every step, and evicted

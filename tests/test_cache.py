"""CompactCache does what DynamicCache does, with fewer bytes; ragged storage does what masking does."""

import copy
import pickle
import weakref

import kvpress
import pytest
import torch
from conftest import DEMO, relative_difference
from transformers import AutoModelForCausalLM, DynamicCache

from kvneox_lib.measures.prefill import prefill
from kvneox_lib.measures.survivors import kept_counts
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.modeling import evictions
from kvneox_lib.neox.ragged import RaggedLayer
from kvneox_lib.presses.applying import applied, attention
from kvneox_lib.presses.by_name import make_press, press_names, ratio_for
from kvneox_lib.presses.facts import attention_needed

HEADWISE = ("adakv_snapkv", "critical_adakv_snapkv", "dms_leverage", "kvcompose_unstructured", "kvzip", "kvgrad")


@pytest.fixture(scope="module")
def pages(reading):
    return reading[:, 9000:9600].view(2, 300)


def fill(cache, n=10, batch=2, seed=0):
    states = torch.Generator().manual_seed(seed)
    for layer in range(3):
        cache.update(*(torch.randn(batch, 4, n, 8, generator=states) for _ in range(2)), layer)
    return cache


def same(one, other) -> bool:
    pairs = zip(one.layers, other.layers)
    return all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)


@pytest.mark.parametrize("headroom", [0, 1, 64])
def test_it_grows_as_a_dynamic_cache_does(headroom):
    ours, stock = CompactCache(headroom), DynamicCache()
    for seed, n in enumerate((10, 1, 1, 5, 1, 40, 1)):
        fill(ours, n, seed=seed)
        fill(stock, n, seed=seed)
        assert same(ours, stock) and ours.get_seq_length() == stock.get_seq_length()


def test_a_token_is_written_in_place_until_the_room_is_full():
    cache = fill(CompactCache(headroom=4))
    places = [cache.layers[0].keys.data_ptr()]
    for _ in range(20):
        fill(cache, 1)
        places.append(cache.layers[0].keys.data_ptr())
    assert len(set(places[:5])) == 1 and len(set(places)) <= 5  # then a quarter more each time


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(6),
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
    ],
)
def test_what_generation_does_to_a_cache(change):
    ours, stock = fill(CompactCache(8)), fill(DynamicCache())
    change(ours), change(stock)
    assert same(ours, stock)
    batch = len(stock.layers[0].keys)
    assert same(fill(ours, 2, batch, seed=5), fill(stock, 2, batch, seed=5))


def test_reset_empties_it():
    cache = fill(CompactCache(8))
    cache.reset()
    assert cache.get_seq_length() == 0 and same(fill(cache, seed=3), fill(DynamicCache(), seed=3))


def test_fewer_keys_give_memory_back_and_a_leading_part_copies_nothing():
    cache = fill(CompactCache(headroom=2), n=100)
    layer, full = cache.layers[1], cache.kv_bytes
    assert full == 3 * 2 * 2 * 4 * 102 * 8 * 4
    place = layer.keys.data_ptr()
    layer.keys, layer.values = layer.keys[:, :, :90], layer.values[:, :, :90]
    assert layer.keys.data_ptr() == place and layer.get_seq_length() == 90 and cache.kv_bytes == full
    expected = layer.keys[:, :, 50:60].clone()
    layer.keys, layer.values = layer.keys[:, :, 50:60], layer.values[:, :, 50:60]  # not a leading part
    assert torch.equal(layer.keys, expected) and layer.keys.data_ptr() != place
    assert cache.kv_bytes == full - 2 * 2 * 4 * 90 * 8 * 4
    assert cache.kv_lengths[:, 0, 0].tolist() == [100, 10, 100]


def test_a_copy_is_its_own(demo, pages):
    cache = prefill(demo, pages, make_press("adakv_snapkv"), headroom=5)
    again = copy.deepcopy(cache)
    cache.layers[0].keys.zero_()
    assert again.layers[0].keys.abs().sum() > 0 and evictions(again).keys() == evictions(cache).keys()
    cache.make_ragged()
    assert isinstance(cache.layers[0], RaggedLayer) and not isinstance(again.layers[0], RaggedLayer)


def test_every_press_leaves_in_it_what_it_leaves_in_a_dynamic_cache(demo, reading):
    ids = reading[:, 500:700]
    for name in press_names():
        press = make_press(name, ratio_for(name, 0.6, demo))
        if name == "finch":
            continue  # wants a delimiter, see prefill
        needed, caches = attention_needed(press), []
        for cache in (CompactCache(16), DynamicCache()):
            torch.manual_seed(0)
            press = make_press(name, ratio_for(name, 0.6, demo))
            with attention(demo, "sdpa" if needed == "any" else needed), torch.no_grad(), applied(press, demo):
                demo.model(input_ids=ids, past_key_values=cache)
            caches.append(cache)
        assert same(*caches), name


@torch.no_grad()
@pytest.mark.parametrize("name", HEADWISE)
@pytest.mark.parametrize("batch", [1, 2])
def test_ragged_is_masked(demo, pages, name, batch):
    """The same next logits, for several tokens at once and then one by one, and after a crop."""
    presses = [make_press(name, 0.6) for _ in pages[:batch]]
    caches = [prefill(demo, row[None, :200], press) for row, press in zip(pages, presses)]
    ragged = CompactCache.stack(caches)
    full, kept = (
        sum(count(cache) for cache in caches) for count in (lambda c: c.kv_bytes, lambda c: kept_counts(c).sum())
    )
    assert ragged.kv_lengths.sum() == kept < 0.85 * batch * 6 * 4 * 200
    assert ragged.kv_bytes < 1.2 * full * kept / (batch * 6 * 4 * 200)

    def logits(cache, row, start, end, at):
        positions = torch.arange(at, at + end - start)[None]
        return demo(row[:, start:end], past_key_values=cache, position_ids=positions).logits

    for start, end in ((200, 220), (220, 221), (221, 222)):
        expected = torch.cat([logits(cache, row[None], start, end, start) for cache, row in zip(caches, pages)])
        assert relative_difference(logits(ragged, pages[:batch], start, end, start), expected) < 1e-5
    assert ragged.get_seq_length() == 222
    for cache in (ragged, *caches):
        cache.crop(210)
    expected = torch.cat([logits(cache, row[None], 250, 260, 210) for cache, row in zip(caches, pages)])
    assert relative_difference(logits(ragged, pages[:batch], 250, 260, 210), expected) < 1e-5
    with pytest.raises(ValueError, match="max_length=150: what was compressed cannot be cropped"):
        ragged.crop(150)


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, CompactCache])
@pytest.mark.parametrize("name", ["adakv_snapkv", "dms_leverage"])
def test_evictions_follow_the_rows_they_are_about(demo, reading, name, kind):
    """Against the rows read alone, whatever is done to the batch; and copies and pickles go on as the original."""
    rows = reading[:, 2000:2750].view(3, 250)
    changes = {
        (2, 0, 0): lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
        (1,): lambda cache: cache.batch_select_indices(torch.tensor([1])),
        (0, 2): lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        (0, 1, 2): lambda cache: cache.crop(220),
    }

    def logits(cache, ids):
        cache = copy.deepcopy(cache)
        return demo(ids, past_key_values=cache, position_ids=torch.arange(240, 240 + ids.shape[1])[None]).logits

    def read(ids):
        cache, press = kind(), make_press(name, 0.6)
        if name == "dms_leverage":
            press.press.sketch_dimension = 1  # one draw for any batch
        torch.manual_seed(0)
        with applied(press, demo):
            demo.model(input_ids=ids, past_key_values=cache)
        return cache

    alone = [read(row[None, :240]) for row in rows]
    whole = kind()
    for layer in range(6):  # put together, as some presses mix the rows of a batch
        states = [torch.cat([getattr(one.layers[layer], part) for one in alone]) for part in ("keys", "values")]
        whole.update(*states, layer)
        demo.model.layers[layer].self_attn._last_cache = weakref.ref(whole)
        batch = [torch.full_like(evictions(one)[layer][0], row) for row, one in enumerate(alone)]
        others = [torch.cat([evictions(one)[layer][part] for one in alone]) for part in (1, 2)]
        demo.model.layers[layer].self_attn.masked_key_indices = (torch.cat(batch), *others)
    assert isinstance(whole, kind) and type(whole).__name__ == kind.__name__
    for taken, change in changes.items():
        changed = copy.deepcopy(whole)
        change(changed)
        if taken == (0, 1, 2):
            for one in alone:
                one.crop(220)
        ids = torch.cat([rows[row, None, 240:] for row in taken])
        expected = torch.cat([logits(alone[row], rows[row, None, 240:]) for row in taken])
        assert relative_difference(logits(changed, ids), expected) < 1e-5
        again = pickle.loads(pickle.dumps(changed))
        assert torch.equal(logits(again, ids), logits(changed, ids))


@torch.no_grad()
def test_beams_take_their_evictions_along(demo, reading, monkeypatch):
    """Heads of each beam lose entries of their own while decoding; against masks that are reordered by hand."""
    settings = {"num_beams": 3, "max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def beams():
        press = kvpress.DecodingPress(
            kvpress.AdaKVPress(kvpress.KnormPress()),
            compression_interval=6,
            target_size=60,
            hidden_states_buffer_size=0,
        )
        with press(demo):
            return demo.generate(reading[:, 2000:2120], return_dict_in_generate=True, output_scores=True, **settings)

    def by_hand(self, cache, beam_idx):
        for index, layer in enumerate(cache.layers):
            keep = torch.ones(layer.keys.shape[:3], dtype=torch.bool)
            if evictions(cache).get(index) is not None:
                keep[tuple(evictions(cache)[index])] = False
            layer.reorder_cache(beam_idx)
            evictions(cache)[index] = (~keep[beam_idx]).nonzero(as_tuple=True)
        return cache

    ours = beams()
    monkeypatch.setattr(type(demo), "_reorder_cache", by_hand, raising=False)
    expected = beams()
    assert torch.equal(ours.sequences, expected.sequences)
    assert torch.allclose(torch.stack(ours.scores), torch.stack(expected.scores), atol=1e-4)


def test_a_batch_of_another_size_is_refused(demo, pages):
    """torch would copy one row into all. A cache that was reset begins anew."""
    ragged = prefill(demo, pages[:, :200], make_press("adakv_snapkv", 0.5))
    ragged.make_ragged()
    for cache in (prefill(demo, pages[:, :200], None), ragged):
        with torch.no_grad(), pytest.raises(ValueError, match=r"1 row\(s\), the cache holds 2"):
            demo(pages[:1, 200:201], past_key_values=cache)
    full = fill(CompactCache(8))
    full.reset()
    assert same(fill(full, batch=3, seed=3), fill(DynamicCache(), batch=3, seed=3))


def test_layers_of_different_length_stack(demo, pages):
    rows = [prefill(demo, pages[:1, :200], make_press("knorm", ratio)) for ratio in (0.3, 0.7)]
    stacked = CompactCache.stack(rows)
    assert stacked.kv_lengths[0].tolist() == [[140] * 4, [60] * 4]
    ids = pages[:1, 200:201]
    with torch.no_grad():
        expected = torch.cat([demo(ids, past_key_values=c, position_ids=torch.tensor([[200]])).logits for c in rows])
        found = demo(ids.expand(2, 1), past_key_values=stacked, position_ids=torch.tensor([[200]])).logits
    assert relative_difference(found, expected) < 1e-5


def test_ragged_bytes_are_what_the_heads_hold(demo, reading):
    cache = prefill(demo, reading[:, :1500], make_press("adakv_snapkv", 0.75))
    full = cache.kv_bytes
    assert full == 2 * 6 * 1500 * 256 * 4  # kvpress frees nothing
    cache.make_ragged()
    assert cache.kv_lengths.sum() == 6 * 4 * 375 and 0.25 <= cache.kv_bytes / full <= 0.30


def test_wrong_headroom():
    with pytest.raises(ValueError, match="headroom=-1: must be a whole number of at least 0"):
        CompactCache(-1)


@torch.no_grad()
def test_ragged_is_masked_in_half_precision(reading):
    low = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    masked = prefill(low, reading[:, :600], make_press("adakv_snapkv", 0.5))
    ragged = copy.deepcopy(masked)
    ragged.make_ragged()
    for start, end in ((600, 640), (640, 641)):
        logits = [
            low(reading[:, start:end], past_key_values=cache, position_ids=torch.arange(start, end)[None]).logits
            for cache in (ragged, masked)
        ]
        assert relative_difference(*logits) < 0.02  # a unit in the last place of bfloat16 is 0.008


def test_what_ragged_storage_cannot_do_is_said(demo, pages):
    cache = prefill(demo, pages[:, :200], make_press("adakv_snapkv", 0.5))
    cache.make_ragged()
    for change in (
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
        cache.reset,
    ):
        with pytest.raises(NotImplementedError, match="cannot be reordered, repeated or reset"):
            change()
    mask = torch.ones(2, 201, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask marks padding"):
        demo(pages[:, 200:201], past_key_values=cache, attention_mask=mask)

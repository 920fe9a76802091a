"""A cache in 8, 4 or 2 bits: what is stored is near what it was, and attention over it is that over what was stored."""

import copy
import random
from functools import partial

import pytest
import torch
from conftest import stock_and_ours, tiny_config
from transformers import pipeline

from kvneox_lib import CompactCache, continuation_nll, generate, make_press, recall_accuracy
from kvneox_lib.measures.answers import compressed_each, likelihoods
from kvneox_lib.measures.decoding import continue_rows
from kvneox_lib.measures.perplexity import read_on
from kvneox_lib.measures.prefill import prefill, store
from kvneox_lib.neox import compiled, kernels
from kvneox_lib.neox.bits import BITS, GROUP, Form, form_of, pack, unpack
from kvneox_lib.neox.kernels import make_ready, pack_blocks
from kvneox_lib.neox.modeling import evictions
from kvneox_lib.neox.ragged import RaggedLayer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 16, 20, 32, 48, 64, 80, 96, 128, 256)


@pytest.fixture(scope="module")
def pages(reading):
    """Two texts (2, 280)."""
    return torch.stack([reading[0, 2000:2280], reading[0, 7000:7280]])


def drawn_blocks(draw: random.Random, dtype: torch.dtype):
    """Keys and values (n, 64, D) of some kind, and how many tokens each block has."""
    dim, n, kind = (
        draw.choice(HEAD_DIMS),
        draw.randint(1, 6),
        draw.choice(["plain", "far from zero", "constant", "large"]),
    )
    scale, middle = {"plain": (1, 0), "far from zero": (1e-2, 50), "constant": (0, 3.3), "large": (1e4, -2e4)}[kind]
    keys, values = (torch.randn(n, GROUP, dim).mul(scale).add(middle).to(dtype) for _ in range(2))
    return keys, values, torch.tensor([draw.choice([1, 63, 64, 64, draw.randint(1, 64)]) for _ in range(n)])


def groups_of_values(values: torch.Tensor, form: Form) -> list[torch.Tensor]:
    """Told anew from the channels' order, which half precision changes."""
    channels = torch.arange(form.dim)
    order = torch.cat([channels[::2], channels[1::2]]) if values.dtype.itemsize == 2 else channels
    return [order[start : start + 64] for start in range(0, form.dim, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_stored_is_within_half_a_step(bits, dtype):
    """A step is a (2^bits - 1)-th of the group's range, and what rounding to bfloat16 adds to either end of it."""
    draw = random.Random(bits)
    for _ in range(25):
        keys, values, counts = drawn_blocks(draw, dtype)
        form = form_of(bits, keys)
        words = pack_blocks(keys, values, counts, form)
        assert words.dtype == torch.int32 and words.shape == (len(keys), form.n_words)
        keys_back, values_back, there = unpack(words, form)
        assert torch.equal(there.sum(1), counts)
        for n, k, v, k_back, v_back in zip(counts.tolist(), keys, values, keys_back, values_back):
            k, v, k_back, v_back = (x[:n].double() for x in (k, v, k_back, v_back))
            groups = [(k[:, c], k_back[:, c]) for c in range(form.dim)]
            groups += [(v[t, of], v_back[t, of]) for t in range(n) for of in groups_of_values(values, form)]
            for group, back in groups:
                reach = group.max() - group.min() + group.min().abs() / 128
                step = reach / (2**bits - 1) * (1 + 1 / 128)
                assert (group - back).abs().max() <= step / 2 + 1e-6 * group.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_code_packs_to_the_same_words(dtype):
    draw = random.Random(0)
    for _ in range(40):
        keys, values, counts = drawn_blocks(draw, dtype)
        if draw.random() < 0.3:
            keys[0, 0, 0], values[-1, 0] = draw.choice([torch.nan, torch.inf, -torch.inf]), torch.inf
        form = form_of(draw.choice(BITS), keys)
        fast = pack_blocks(keys, values, counts, form)
        assert torch.equal(fast, pack(keys, values, counts, form))


@torch.no_grad()
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_what_cannot_be_stored_is_not_hidden(spoiled):
    """It spoils its group, and what is read from that; no token is taken for absent."""
    keys, values = torch.randn(1, GROUP, 16), torch.randn(1, GROUP, 16)
    keys[0, 5, 3], values[0, 7] = spoiled, spoiled
    for words in (made(keys, values, torch.tensor([64]), Form(4, 16, False)) for made in (pack, pack_blocks)):
        keys_back, values_back, there = unpack(words, Form(4, 16, False))
        assert there.all()
        assert keys_back[..., 3].isnan().all() and keys_back[..., :3].isfinite().all()
        assert values_back[0, 7].isnan().all() and values_back[0, :7].isfinite().all()
    layer = RaggedLayer([keys[0]], [values[0]], 1, GROUP, 0, bits=4)
    assert layer.attend(*torch.randn(3, 1, 1, 1, 16), 0.25).isnan().all()


# -- attention --------------------------------------------------------------------------------------------------------


def exact_attention(query, key, value, scaling):
    """In float64 for one row, all (n, D)."""
    query, key, value = (states.double() for states in (query, key, value))
    scores = query @ key.t() * scaling
    scores = scores.masked_fill(torch.ones_like(scores).tril(len(key) - len(query)) == 0, -torch.inf)
    return scores.softmax(-1) @ value


def as_stored(layer: RaggedLayer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values (n, D) of each row in float32: out of blocks, then what is in full."""
    rows = []
    for row, words in enumerate(layer.held.rows()):
        keys, values, there = unpack(words, layer.held.form)
        new = [torch.empty(0, layer.held.dim)] * 2
        if layer.new_keys.length:
            new = [room.filled[0, row].float() for room in (layer.new_keys, layer.new_values)]
        rows.append(tuple(torch.cat([x[there], y]) for x, y in zip((keys, values), new)))
    return rows


READ = [(dtype, bits) for dtype in DTYPES[:2] for bits in BITS] + [(torch.float16, 4)]  # each is compiled for itself


@torch.no_grad()
@pytest.mark.parametrize("way", ["compiled", "plain"])
@pytest.mark.parametrize(("dtype", "bits"), READ)
def test_attention_is_that_over_what_is_stored(dtype, bits, way, monkeypatch):
    """Rows of any length, some of them a few tokens, whatever is read since: one token, some, or more than a group.
    Numbers of any size."""
    monkeypatch.setattr(kernels, "compiled", (lambda: None) if way == "plain" else kernels.compiled)
    draw = random.Random(1)
    for _ in range(8):
        batch, heads, dim = draw.randint(1, 3), draw.randint(1, 3), draw.choice(HEAD_DIMS)
        residual, scale = draw.choice([0, 0, 7, 64]), draw.choice([1, 3, 1e-3, 1e4])
        monkeypatch.setattr(compiled, "SHARES_PER_THREAD", draw.choice([1, 3, 4, 30]))
        lengths = [residual + draw.choice([1, 63, 64, 65, 128, draw.randint(1, 300)]) for _ in range(batch * heads)]
        keys, values = ([torch.randn(n, dim).mul(scale).to(dtype) for n in lengths] for _ in range(2))
        layer = RaggedLayer(keys, values, batch, max(lengths), draw.choice([0, 20, 200]), bits, residual)
        assert torch.equal(layer.lengths().flatten(), torch.tensor(lengths))
        for n_new in (draw.randint(1, 8), 1, 40, draw.randint(60, 70), 1, draw.randint(1, 8)):
            query, key, value = (torch.randn(batch, heads, n_new, dim) for _ in range(3))
            query, key, value = ((x * by).to(dtype) for x, by in ((query, 1 / scale), (key, scale), (value, scale)))
            layer.settle()
            before, in_full = as_stored(layer), layer.new_keys.length
            assert residual <= in_full < residual + GROUP
            out = layer.attend(query, key, value, dim**-0.5)
            new = zip(key.flatten(0, 1).float(), value.flatten(0, 1).float())
            rows = [tuple(map(torch.cat, zip(old, more))) for old, more in zip(before, new)]
            exact = [exact_attention(q, *row, dim**-0.5) for q, row in zip(query.flatten(0, 1), rows)]
            exact = torch.stack(exact).view(query.shape)
            rounding = torch.finfo(dtype).eps / 2
            assert (out.double() - exact).abs().max() / exact.abs().max() - rounding < 1e-5, (
                lengths,
                n_new,
                dim,
                residual,
            )


@torch.no_grad()
def test_all_layers_in_one_call_read_it_too(monkeypatch):
    """A token of one sample goes through all layers in one call, one of six samples layer by layer."""
    for dtype, bits, most in ((torch.float32, 8, 1e-5), (torch.float32, 2, 1e-5), (torch.bfloat16, 4, 0.05)):
        _, ours = stock_and_ours(tiny_config(), dtype=dtype)
        ids, told = torch.randint(1, 97, (6, 90)), {}
        for way in ("compiled", "plain"):
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "compiled", (lambda: None) if way == "plain" else kernels.compiled)
                for rows in (ids, ids[:1]):
                    cache = CompactCache(bits=bits)
                    ours.model(rows[:, :70], past_key_values=cache)
                    steps = [ours.model(rows[:, at : at + 1], past_key_values=cache)[0] for at in range(70, 90)]
                    told[way, len(rows)] = torch.cat(steps, 1)[0].double()
        expected = told["plain", 6]
        for found in told.values():
            assert (found - expected).abs().max() / expected.abs().max() < most


def test_nothing_is_compiled_while_a_clock_runs():
    _, ours = stock_and_ours(tiny_config())
    compiled.kernel_for.cache_clear()
    make_ready.__wrapped__(torch.float32, 4)
    made = compiled.kernel_for.cache_info().misses
    for n_context in (5, 70):
        generate(ours, torch.randint(1, 97, (1, n_context)), max_new_tokens=3, stop_at_eos=False, kv_bits=4)
    assert compiled.kernel_for.cache_info().misses == made > 0


# -- the cache --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_press_sees_all_as_it_is_and_what_it_leaves_is_stored(demo, pages):
    """With kvpress' own context manager: nothing is in bits before the next tokens are read."""
    for name in ("snapkv", "adakv_snapkv", "kvzip"):
        press, kept = make_press(name, 0.5), []
        for cache in (CompactCache(bits=4), CompactCache()):
            with press(demo):
                demo.model(input_ids=pages[:1], past_key_values=cache)
            kept.append([layer.keys.clone() for layer in cache.layers])
            left = [evictions(cache).get(index) for index in range(len(cache.layers))]
            demo.model(input_ids=pages[:1, :1], past_key_values=cache, position_ids=torch.tensor([[pages.shape[1]]]))
            if cache.bits:
                assert all(layer.bits == 4 for layer in cache.layers)
                for layer, before, gone in zip(cache.layers, kept[0], left):
                    n = before.shape[2] - (0 if gone is None else torch.bincount(gone[1], minlength=before.shape[1]))
                    assert torch.equal(layer.lengths()[0], torch.as_tensor(n + 1).expand(before.shape[1]))
        assert all(map(torch.equal, *kept))


@torch.no_grad()
@pytest.mark.parametrize("name", ["no_press", "snapkv", "adakv_snapkv"])
def test_perplexity_is_that_of_what_was_stored(demo, pages, name):
    """Beside another way: the keys and values of an ordinary cache replaced by what comes out of blocks."""
    press, n = make_press(name, 0.5), 200
    found = continuation_nll(demo, pages[:1], n_context=n, press=press, kv_bits=2)
    cache, stored = (prefill(demo, pages[:1, :n], press) for _ in range(2))
    store(stored, press, 2)
    for index, (layer, other) in enumerate(zip(cache.layers, stored.layers)):
        keep, gone = torch.ones(layer.keys.shape[:3], dtype=torch.bool), evictions(cache).get(index)
        if gone is not None:
            keep[gone] = False
        keys, values = layer.keys.clone(), layer.values.clone()
        keys[keep], values[keep] = (torch.cat(rows) for rows in zip(*as_stored(other)))
        layer.keys, layer.values = keys, values
    expected, _ = read_on(demo, cache, pages[:1, n:], n, press)
    assert (found - expected).abs().max() < 1e-3
    assert (found - continuation_nll(demo, pages[:1], n_context=n, press=press)).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", ["snapkv", "adakv_snapkv", "key_rerotation_knorm"])
def test_several_questions_in_the_pipeline_are_each_alone(demo, tokenizer, reading, name):
    pipe = pipeline("kv-press-text-generation", model=demo, tokenizer=tokenizer)
    context = tokenizer.decode(reading[0, 2000:2300])
    questions = [
        "What does it return?",
        "And then?",
        "Which of these is the first, and what comes after it in the text?",
    ]
    for bits in (4, 2):
        how = {"press": make_press(name, 0.5), "max_new_tokens": 80}  # more than a group
        together = pipe(context, questions=questions, cache=CompactCache(bits=bits), **how)["answers"]
        alone = [pipe(context, question=one, cache=CompactCache(bits=bits), **how)["answer"] for one in questions]
        assert together == alone


@torch.no_grad()
def test_what_was_read_can_be_taken_back(demo, pages):
    """Also when whole groups of it are in bits by now, and into a group."""
    cache, n = CompactCache(bits=4), 150

    def read(start, stop):
        at = torch.arange(start, stop)[None]
        return demo.model(input_ids=pages[:, start:stop], past_key_values=cache, position_ids=at).last_hidden_state

    read(0, n)
    cache.settle()
    before = copy.deepcopy(cache)
    first = torch.cat([read(at, at + 1) for at in range(n, n + 70)], 1)
    cache.crop(n)
    assert cache.get_seq_length() == n and torch.equal(cache.layers[0].held.rows()[0], before.layers[0].held.rows()[0])
    assert torch.equal(torch.cat([read(at, at + 1) for at in range(n, n + 70)], 1), first)
    states = cache.layers[1].keys
    cache.crop(n + 10)
    assert torch.equal(cache.layers[1].keys, states[:, :, : n + 10])
    cache.crop(100)  # into the context, as all rows of it are equally long
    assert torch.equal(cache.layers[1].keys, states[:, :, :100]) and cache.layers[1].lengths().unique().tolist() == [
        100
    ]
    with pytest.raises(NotImplementedError, match="cropped, not replaced"):
        cache.layers[0].keys = cache.layers[0].keys + 1


@torch.no_grad()
def test_who_once_asked_for_hidden_states_still_gets_bits(demo, pages):
    """transformers leaves hooks on such a model; those of a press alone keep all as it is, which is said."""
    ours = copy.deepcopy(demo)
    ours(pages[:, :5], output_hidden_states=True, output_attentions=True)
    handle = ours.model.layers[0].attention.register_forward_hook(lambda *_: None)
    cache = CompactCache(bits=4)
    ours(pages, past_key_values=cache)
    ours(pages[:, :1], past_key_values=cache)
    assert {layer.bits for layer in cache.layers} == {4}
    handle.remove()
    with make_press("knorm", 0.5)(ours), pytest.warns(UserWarning, match="while a press is attached"):
        ours.generate(pages, past_key_values=CompactCache(bits=4), max_new_tokens=3, min_new_tokens=3, pad_token_id=0)


@torch.no_grad()
def test_a_context_may_be_empty_beside_others(demo, reading):
    """In either order, and as without compression where nothing has been rounded yet."""
    context, rest = reading[0, 2000:2200], reading[0, 3000:3010]
    how = {"max_new_tokens": 5, "stop_when": None}
    for bits in (None, 8):
        alone = {}
        for contexts in ([context], [[]], [context, []], [[], context]):
            found = [compressed_each(demo, one, [make_press("adakv_snapkv", 0.5)], 0, [bits])[0] for one in contexts]
            caches, positions = [one.cache for one in found], [one.position for one in found]
            made = continue_rows(demo, caches, [rest] * len(found), None, positions, **how)
            for one, tokens in zip(contexts, made):
                assert torch.equal(alone.setdefault(len(one), tokens), tokens)


@torch.no_grad()
def test_likelihoods_do_not_hang_on_what_is_asked_beside_them(demo, reading):
    context, rest = reading[0, 2000:2300].tolist(), reading[0, 3000:3130].tolist()
    several = [reading[0, start : start + 5].tolist() for start in (4000, 5000)]
    for bits, off in ((None, 1e-3), (2, 1e-3)):
        (found,) = compressed_each(demo, context, [None], 0, [bits])
        ((together, _), _) = next(likelihoods(demo, [found], {tuple(rest): several}))
        (found,) = compressed_each(demo, context, [None], 0, [bits])
        ((alone, _),) = next(likelihoods(demo, [found], {tuple(rest): several[:1]}))
        assert abs(together - alone) < off


def test_a_context_read_in_inference_mode(demo, pages):
    cache = CompactCache(bits=4)
    with torch.inference_mode():
        demo.model(pages[:, :101], past_key_values=cache)
        demo.model(pages[:, 101:102], past_key_values=cache)
    with torch.no_grad():
        for at in range(102, 180):
            demo.model(pages[:, at : at + 1], past_key_values=cache)
    assert cache.layers[0].held.n_blocks.unique().tolist() == [3]


@torch.no_grad()
def test_beams_and_repeated_samples(demo, pages):
    options = {"max_new_tokens": 80, "min_new_tokens": 80, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    beams = demo.generate(pages[:1], past_key_values=CompactCache(bits=8), **options)
    assert (beams == demo.generate(pages[:1], **options)).float().mean() > 0.9
    cache = CompactCache(bits=2)
    demo.model(input_ids=pages, past_key_values=cache)
    cache.settle()
    one, other = (cache.layers[0].keys[row] for row in (0, 1))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys[0], other) and torch.equal(cache.layers[0].keys[1], one)
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, torch.stack([other, other, one, one]))
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(cache.layers[0].keys, torch.stack([other, one]))
    cache.crop(100)
    assert torch.equal(cache.layers[0].keys, torch.stack([other, one])[:, :, :100])


@torch.no_grad()
def test_bytes(demo):
    """At 2,048 tokens, what is in full and what is allocated included: shares of float32."""
    ids = torch.randint(1, 1000, (1, 2048))
    full = prefill(demo, ids, None).kv_bytes
    heads = demo.config.num_hidden_layers * demo.config.num_attention_heads
    assert full == 2048 * heads * 2 * demo.config.head_dim * 4
    for name, bits, most in (
        ("no_press", 8, 0.28),
        ("no_press", 4, 0.16),
        ("no_press", 2, 0.10),
        ("adakv_snapkv", 4, 0.06),
    ):
        press = make_press(name, 0.75)
        cache = prefill(demo, ids, press)
        store(cache, press, bits)
        allocated = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(cache)}
        assert cache.kv_bytes == sum(allocated.values()) <= most * full
        assert cache.used_bytes <= cache.kv_bytes


def tensors_of(cache: CompactCache):
    for layer in cache.layers:
        yield layer.held.words
        yield from (room.buffer for room in (layer.new_keys, layer.new_values) if room.buffer is not None)


@torch.no_grad()
def test_rows_of_unequal_length_are_nearly_each_alone(demo, reading):
    """Nearly: what some have read since the context beyond what all have is in bits earlier than alone."""
    texts = [reading[0, start : start + n] for start, n in ((12000, 150), (13000, 110))]
    questions = [reading[0, 15000:15004], reading[0, 16000:16011]]
    ids = torch.zeros(2, 150, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1
    how = {"press": make_press("adakv_snapkv", 0.5), "max_new_tokens": 70, "stop_at_eos": False, "with_logits": True}
    for bits, most in ((8, 0.02), (4, 0.3)):
        both = generate(demo, ids, attention_mask=mask, question_ids=questions, kv_bits=bits, **how)
        for row, (text, question) in enumerate(zip(texts, questions)):
            alone = generate(demo, text[None], question_ids=question[None], kv_bits=bits, **how)
            assert (both.logits[row, :8] - alone.logits[0, :8]).abs().max() < most * alone.logits.std()


@torch.no_grad()
def test_recall_in_bits(demo, tokenizer, reading):
    asked = partial(
        recall_accuracy, demo, tokenizer, n_keys=12, context_length=512, filler=tokenizer.decode(reading[0, :20000])
    )
    whole = asked()
    for bits in (8, 4):
        found = asked(kv_bits=bits)
        assert found.accuracy >= whole.accuracy and found.nll != whole.nll
        assert found.rows[0].kv_bytes < 0.3 * whole.rows[0].kv_bytes


def test_what_cannot_be_is_refused_before_any_work(demo, pages):
    for bits in (3, 16, True, "4"):
        with pytest.raises(ValueError, match="kv_bits=.*allowed is 8, 4, 2"):
            continuation_nll(demo, pages, n_context=100, kv_bits=bits)
        with pytest.raises(ValueError, match="bits="):
            CompactCache(bits=bits)
    with pytest.raises(ValueError, match="residual=-1"):
        CompactCache(bits=4, residual=-1)
    press = make_press("decoding_knorm", 0.5)
    for call in (partial(generate, max_new_tokens=2), partial(continuation_nll, n_context=100)):
        with pytest.raises(ValueError, match="it evicts while decoding"):
            call(demo, pages, press=press, kv_bits=4)

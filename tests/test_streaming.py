"""Reading in chunks equals reading token by token, and a stream goes on for ever without drifting or growing."""

import copy
import itertools
import runpy
import warnings
import weakref
from collections import Counter

import pytest
import torch
from conftest import REPOSITORY, stock_and_ours, tiny_config
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from kvneox_lib import StreamingDecoder, generate, make_press, streaming_nll, teacher_forced_nll
from kvneox_lib.measures.streaming import recomputed_nll
from kvneox_lib.neox import ring

LOOP = runpy.run_path(str(REPOSITORY / "benchmarks" / "streaming.py"))  # written without this library


def public_nll(stock, ids, n_sink: int, window: int, rerotate: bool = True) -> torch.Tensor:
    step = LOOP["PublicLoop"](copy.deepcopy(stock), n_sink, window, rerotate).step
    return LOOP["token_by_token"](step, ids)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return stock_and_ours(tiny_config(head_dim=32))


@pytest.mark.parametrize("rerotate", [True, False])
@pytest.mark.parametrize(("n_sink", "window"), [(4, 20), (0, 7), (1, 1), (3, 200), (130, 16)])
def test_chunks_equal_the_loop(pair, n_sink, window, rerotate):
    """(3, 200) never fills up; 130 sinks are more than the queries of one product."""
    stock, ours = pair
    ids = torch.randint(97, (2, 150))
    expected = public_nll(stock, ids, n_sink, window, rerotate)
    for chunk in (1, 3, 37, 1024):
        nll = streaming_nll(ours, ids, n_sink=n_sink, window=window, rerotate=rerotate, chunk=chunk)
        assert (nll - expected).abs().max() < 1e-4, chunk
    if n_sink and n_sink + window < 149:  # else there is nothing to tell apart
        assert (expected - public_nll(stock, ids, n_sink, window, not rerotate)).abs().max() > 0.1


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("parallel", [True, False])
def test_every_share_of_rotary_dimensions(share, parallel):
    stock, ours = stock_and_ours(tiny_config(head_dim=16, rotary_pct=share, use_parallel_residual=parallel))
    ids = torch.randint(97, (1, 90))
    nll = streaming_nll(ours, ids, n_sink=4, window=20, chunk=16)
    assert (nll - public_nll(stock, ids, 4, 20)).abs().max() < 1e-4


def test_blocks_of_queries_may_be_cut_anywhere(pair, monkeypatch):
    ids = torch.randint(97, (1, 150))
    whole = streaming_nll(pair[1], ids, n_sink=4, window=20)
    for block in (1, 5, 64):
        monkeypatch.setattr(ring, "QUERIES_AT_ONCE", block)
        assert (streaming_nll(pair[1], ids, n_sink=4, window=20) - whole).abs().max() < 1e-4


def test_true_positions_are_the_stock_model_under_a_mask(pair):
    stock, ours = pair
    ids, n_sink, window = torch.randint(97, (2, 60)), 2, 9
    query, key = torch.arange(60)[:, None], torch.arange(60)
    seen = (key <= query) & ((key < n_sink) | (key >= query - window))
    logits = stock(ids, attention_mask=seen[None, None].expand(2, 1, -1, -1)).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    nll = streaming_nll(ours, ids, n_sink=n_sink, window=window, rerotate=False, chunk=8)
    assert (nll - expected).abs().max() < 1e-4


def test_a_window_over_everything_is_plain_reading(demo, reading):
    ids = reading[:, :300]
    assert (streaming_nll(demo, ids, n_sink=4, window=300) - teacher_forced_nll(demo, ids)).abs().max() < 1e-4


def test_half_precision(demo, reading):
    ids = reading[:, :400]
    expected = streaming_nll(demo, ids, n_sink=4, window=60)
    half = copy.deepcopy(demo).to(torch.bfloat16)
    for chunk in (64, 1):
        nll = streaming_nll(half, ids, n_sink=4, window=60, chunk=chunk)
        assert (nll - expected).abs().mean() < 0.03


def test_recomputation_is_a_fresh_pass_over_each_window(pair):
    stock, ours = pair
    ids, positions = torch.randint(97, (2, 60)), torch.tensor([3, 20, 58])
    nll = recomputed_nll(ours, ids, window=10, positions=positions)
    for i, position in enumerate(positions.tolist()):
        logits = stock(ids[:, max(0, position - 10) : position + 1]).logits[:, -1]
        expected = cross_entropy(logits, ids[:, position + 1], reduction="none")
        assert (nll[:, i] - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="positions=.*from 0 to 58"):
        recomputed_nll(ours, ids, window=10, positions=torch.tensor([59]))


class LiveBytes(TorchDispatchMode):
    """The most bytes at once in tensors that operations have returned."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = Counter(), 0  # storages: how many tensors hold each

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                self.held[key] += 1
                weakref.finalize(tensor, self._let_go, key)
        self.peak = max(self.peak, sum(n_bytes for _, n_bytes in self.held))
        return result

    def _let_go(self, key):
        self.held[key] -= 1
        if not self.held[key]:
            del self.held[key]


def test_memory_does_not_depend_on_the_length(pair):
    """But for the nll itself, in parts and whole."""
    ids, peaks = torch.randint(97, (1, 4000)), []
    for length in (600, 4000):
        with LiveBytes() as seen:
            streaming_nll(pair[1], ids[:, :length], n_sink=4, window=50, chunk=64)
        peaks.append(seen.peak)
    assert 0 <= peaks[1] - peaks[0] < 3 * 4 * 3400 < peaks[0]


# ---- the decoder ----


def read_each(decoder, model, ids) -> torch.Tensor:
    """nll (batch, T - 1), a token at a time"""
    return LOOP["token_by_token"](lambda token: decoder.read(model, token), ids)


@pytest.mark.parametrize("rerotate", [True, False])
def test_a_stream_read_by_tokens_and_turns(pair, rerotate):
    stock, ours = pair
    ids = torch.randint(97, (2, 120))
    expected = public_nll(stock, ids, 3, 17, rerotate)
    decoder = StreamingDecoder(3, 17, rerotate)
    assert (read_each(decoder, ours, ids) - expected).abs().max() < 1e-4
    assert decoder.n_seen == 119 and decoder.max_capacity == 20
    assert decoder.compression_count == 2 * (119 - 20)  # layers, and tokens beyond what is held
    decoder.reset()
    decoder.read(ours, ids[:, :50])  # at once, then by tokens
    assert (read_each(decoder, ours, ids[:, 50:]) - expected[:, 50:]).abs().max() < 1e-4


@pytest.mark.slow
def test_no_drift_after_a_hundred_thousand_tokens():
    """With two layers a token depends on the sinks and on two windows: there a stream of any length is that of a short
    text, which the public loop can read."""
    stock, ours = stock_and_ours(tiny_config(head_dim=16))
    n_sink, window, n_last = 4, 30, 200
    ids = torch.randint(97, (1, 100_000))
    decoder = StreamingDecoder(n_sink, window)
    decoder.read(ours, ids[:, :n_sink])
    held = decoder.kv_bytes, decoder.cache.layers[0].keys.data_ptr()
    decoder.read(ours, ids[:, n_sink:90_000])
    nll = read_each(decoder, ours, ids[:, 90_000:])
    assert (decoder.kv_bytes, decoder.cache.layers[0].keys.data_ptr()) == held
    in_chunks = streaming_nll(ours, ids, n_sink=n_sink, window=window)
    assert (nll - in_chunks[:, 90_000:]).abs().max() < 1e-3
    short = torch.cat([ids[:, :n_sink], ids[:, -n_last - 3 * window :]], dim=1)
    expected = public_nll(stock, short, n_sink, window)
    assert (nll[:, -n_last + 1 :] - expected[:, -n_last + 1 :]).abs().max() < 1e-3


def greedy_by_loop(stock, ids, n: int, n_sink: int, window: int) -> list[int]:
    step, tokens = LOOP["PublicLoop"](copy.deepcopy(stock), n_sink, window).step, []
    for i in range(ids.shape[1] + n - 1):
        logits = step(ids[:, i : i + 1] if i < ids.shape[1] else torch.tensor([[tokens[-1]]]))
        if i >= ids.shape[1] - 1:
            tokens.append(int(logits.argmax()))
    return tokens


def test_stream_and_generate_choose_the_tokens_of_the_loop(pair, monkeypatch):
    stock, ours = pair
    ids = torch.randint(1, 97, (1, 30))
    expected = greedy_by_loop(stock, ids, 40, 3, 17)
    decoder = StreamingDecoder(3, 17)
    tokens = decoder.stream(ours, ids, stop_at_eos=False)
    assert [int(token) for token in itertools.islice(tokens, 40)] == expected

    monkeypatch.setattr(ours.generation_config, "eos_token_id", None)
    with decoder.register(ours):
        for _ in range(2):  # each call is a new stream
            made = ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
            assert made[0, 30:].tolist() == expected
        assert decoder.n_seen == 69 and decoder.compression_count > 0
        further = torch.cat([made, torch.randint(1, 97, (1, 5))], dim=1)
        longer = ours.generate(further, past_key_values=decoder.cache, max_new_tokens=10, do_sample=False)
    assert longer[0, 75:].tolist() == greedy_by_loop(stock, further, 10, 3, 17)
    plain = ours.generate(ids, max_new_tokens=40, do_sample=False)
    assert plain[0, 30:].tolist() != expected and not ours.model._forward_pre_hooks


def test_beams_take_their_cache_along(pair):
    _, ours = pair
    ids = torch.randint(1, 97, (2, 12))
    asked = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    plain = ours.generate(ids, **asked)
    with StreamingDecoder(2, 30).register(ours):  # nothing is let go of
        assert torch.equal(ours.generate(ids, **asked), plain)


def test_turns_of_a_conversation(pair):
    """What was said last is read with the next turn."""
    _, ours = pair
    turns = [torch.randint(1, 97, (2, n)) for n in (9, 1, 14)]
    decoder, said = StreamingDecoder(3, 17), []
    for turn in turns:
        said += [turn, torch.stack(list(decoder.stream(ours, turn, max_new_tokens=8, stop_at_eos=False)), 1)]
    text = torch.cat(said, dim=1)
    nll = streaming_nll(ours, text, n_sink=3, window=17)
    logits = StreamingDecoder(3, 17).read(ours, text[:, :-1])
    assert torch.equal(logits.argmax(-1), text[:, -1])
    expected = cross_entropy(logits, text[:, -1], reduction="none")
    assert (nll[:, -1] - expected).abs().max() < 1e-4 and decoder.n_seen == text.shape[1] - 1


def test_reading_goes_on_after_what_was_said(pair):
    _, ours = pair
    prompt, more = torch.randint(1, 97, (1, 10)), torch.randint(1, 97, (1, 3))
    decoder = StreamingDecoder(3, 17)
    said = torch.stack(list(decoder.stream(ours, prompt, max_new_tokens=4, stop_at_eos=False)), 1)
    logits = decoder.read(ours, more)
    whole = StreamingDecoder(3, 17).read(ours, torch.cat([prompt, said, more], dim=1))
    assert decoder.n_seen == 17 and (logits - whole).abs().max() < 1e-4


def test_a_turn_that_is_over_cannot_go_on(pair):
    _, ours = pair
    ids = torch.randint(1, 97, (1, 10))
    for act in ("stream", "read", "reset"):
        decoder = StreamingDecoder(3, 17)
        first = decoder.stream(ours, ids, stop_at_eos=False)
        next(first)
        getattr(decoder, act)(*([] if act == "reset" else [ours, ids]))
        with pytest.raises(ValueError, match="this turn is over"):
            next(first)


def test_an_interrupted_stream_is_not_gone_on_with(pair, monkeypatch):
    """Some layers would have read more than others, or a prompt in part."""
    _, ours = pair
    ids, layer = torch.randint(1, 97, (1, 10)), ours.model.layers[1]
    decoder = StreamingDecoder(3, 17)
    decoder.read(ours, ids)

    def stop(*_):
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        decoder.read(ours, ids)
    hook.remove()
    with pytest.raises(ValueError, match="interrupted"):
        decoder.read(ours, ids)
    with pytest.raises(ValueError, match="interrupted"):
        decoder.stream(ours, ids)
    decoder.reset()
    assert decoder.read(ours, ids).shape == (1, 97)


def test_ropes_that_change_with_length_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    _, ours = stock_and_ours(tiny_config(rope_parameters=rope))
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        StreamingDecoder(3, 17).read(ours, torch.randint(97, (1, 5)))


def test_what_is_kept_has_no_graph_and_serves_in_every_mode(pair):
    _, ours = pair
    ids, decoder = torch.randint(97, (1, 5)), StreamingDecoder(3, 17)
    with torch.inference_mode():
        decoder.read(ours, ids)
    decoder.read(ours, ids)
    with decoder.register(ours):
        assert ours(ids).logits.requires_grad and not decoder.cache.layers[0].keys.requires_grad
        ours.model(ids)  # given by position
        with pytest.raises(ValueError, match="or what is seen"):
            ours(ids, attention_mask=torch.eye(5, dtype=torch.bool)[None, None])
        with pytest.raises(ValueError, match="or another one on this model"):
            StreamingDecoder(1, 5).register(ours)


def test_text_comes_as_it_becomes_complete(demo, tokenizer):
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    tokens = torch.cat(list(StreamingDecoder(4, 60).stream(demo, ids, max_new_tokens=50, stop_at_eos=False)))
    pieces = list(StreamingDecoder(4, 60).stream(demo, ids, max_new_tokens=50, stop_at_eos=False, tokenizer=tokenizer))
    assert len(pieces) > 10 and "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_character_of_several_tokens_comes_once(tokenizer):
    from kvneox_lib.measures.streaming import _pieces

    ids = torch.tensor(tokenizer("a 狐狸 b").input_ids)
    assert len(ids) > 7  # some of these characters take several tokens
    pieces = list(_pieces(iter(ids[:, None]), tokenizer))
    assert "".join(pieces) == "a 狐狸 b" and not any("\ufffd" in piece for piece in pieces)


def test_a_stream_ends_with_its_text(pair, monkeypatch):
    _, ours = pair
    ids = torch.randint(1, 97, (1, 20))
    endless = [int(t) for t in itertools.islice(StreamingDecoder(3, 17).stream(ours, ids, stop_at_eos=False), 30)]
    monkeypatch.setattr(ours.generation_config, "eos_token_id", endless[10])
    stopped = [int(token) for token in StreamingDecoder(3, 17).stream(ours, ids)]
    assert stopped == endless[: endless.index(endless[10]) + 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1, 10), "n_sink=-1: must be a whole number of at least 0"),
        ((4, 0), "window=0: must be a whole number of at least 1"),
        ((4, 2.5), "window=2.5"),
    ],
)
def test_settings_are_refused_at_once(pair, settings, message):
    with pytest.raises(ValueError, match=message):
        StreamingDecoder(*settings)
    with pytest.raises(ValueError, match=message):
        streaming_nll(pair[1], torch.randint(97, (1, 5)), n_sink=settings[0], window=settings[1])


def test_more_than_the_trained_length_is_refused(pair):
    _, ours = pair  # trained on 256
    ids = torch.randint(97, (1, 300))
    assert streaming_nll(ours, ids, n_sink=4, window=251).isfinite().all()
    for act in (
        lambda: streaming_nll(ours, ids, n_sink=4, window=252),
        lambda: StreamingDecoder(4, 252).stream(ours, ids),
        lambda: StreamingDecoder(4, 252).register(ours),
    ):
        with pytest.raises(ValueError, match="n_sink=4, window=252: .*257, the model was trained on 256"):
            act()
    with pytest.warns(UserWarning, match="positions pass 256"):
        streaming_nll(ours, ids, n_sink=4, window=252, rerotate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streaming_nll(ours, ids[:, :257], n_sink=4, window=252, rerotate=False)
        streaming_nll(ours, ids, n_sink=0, window=255, rerotate=False)  # no distance is above 255


def test_what_a_stream_cannot_go_on_with(pair):
    _, ours = pair
    decoder = StreamingDecoder(4, 20)
    decoder.read(ours, torch.randint(97, (2, 5)))
    with pytest.raises(ValueError, match=r"input_ids has 3 row\(s\), this stream began with 2"):
        decoder.stream(ours, torch.randint(97, (3, 5)))
    with pytest.raises(ValueError, match="not the one that this stream began with"):
        decoder.read(stock_and_ours(tiny_config())[1], torch.randint(97, (2, 5)))
    with pytest.raises(ValueError, match="text is streamed for one row"):
        decoder.stream(ours, torch.randint(97, (2, 5)), tokenizer=object())
    with pytest.raises(ValueError, match="nothing is registered"), decoder:
        pass
    with pytest.raises(NotImplementedError, match="cannot be brought back"):
        decoder.cache.crop(1)
    with pytest.raises(ValueError, match="filled elsewhere"), StreamingDecoder(1, 5).register(ours):
        ours(torch.randint(97, (2, 3)), past_key_values=decoder.cache)
    assert not ours.model._forward_pre_hooks


def test_padding_is_refused_under_generate(pair):
    ids, mask = torch.randint(1, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with StreamingDecoder(2, 6).register(pair[1]), pytest.raises(ValueError, match="marks padding"):
        pair[1].generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)


# ---- other scorers while decoding ----


@pytest.mark.parametrize("name", ["decoding_knorm", "decoding_streaming_llm", "prefill_decoding_knorm"])
def test_presses_that_act_while_decoding_hold_their_size(demo, reading, name):
    press = make_press(name, target_size=48, compression_interval=16)
    made = generate(demo, reading[:, :120], press=press, max_new_tokens=400, stop_at_eos=False)
    entry = 2 * 6 * 4 * 64 * 4  # keys and values, layers, heads, dimensions, bytes
    assert made.tokens.shape[1] == 400 and made.kv_bytes <= (48 + 2 * 16) * entry


def test_a_stream_builds_no_graph_and_leaves_the_callers_mode_alone(reading):
    _, model = stock_and_ours(tiny_config())
    graphs = []
    handle = model.embed_out.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            decoder = StreamingDecoder(2, 10)
            for token in decoder.stream(model, torch.randint(1, 97, (1, 20)), max_new_tokens=3, stop_at_eos=False):
                assert not token.requires_grad and torch.is_grad_enabled() == grad
            assert not decoder.read(model, torch.randint(1, 97, (1, 3))).requires_grad
            assert torch.is_grad_enabled() == grad
    handle.remove()
    assert graphs == [False] * 8

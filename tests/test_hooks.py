"""Turns: what several threads ask of one model at once is what they are told one after another."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
import torch
from conftest import stock_and_ours, tiny_config
from transformers import DynamicCache

from kvneox_lib import StreamingDecoder, continuation_nll, generate, make_press, streaming_nll, teacher_forced_nll
from kvneox_lib.inputs.passkeys import RecallKey, RecallSample
from kvneox_lib.measures.prefill import prefill, prefill_each
from kvneox_lib.measures.recall import ask_each
from kvneox_lib.measures.survivors import kept_positions
from kvneox_lib.neox import hooks
from kvneox_lib.neox.hooks import hooked, turn
from kvneox_lib.presses.applying import applied, attention


def test_threads_get_what_they_would_get_alone(demo, reading):
    """Two presses of different strengths, one that switches to eager attention, and none; by several functions."""
    ids = reading[:, 3000:3180]
    presses = [("snapkv", 0.3), ("snapkv", 0.8), ("kvcompose", 0.5), ("no_press", 0.0)]

    def ask(name: str, ratio: float) -> list[torch.Tensor]:
        made = generate(demo, ids[:, :170], press=make_press(name, ratio), max_new_tokens=3, stop_at_eos=False)
        kept = kept_positions(demo, ids[:, :100], make_press(name, ratio))
        nll = continuation_nll(demo, ids, n_context=150, press=make_press(name, ratio))
        with torch.no_grad():
            return [made.tokens, made.kv_lengths, kept, nll, demo(ids).logits]

    expected = [ask(*press) for press in presses]
    with ThreadPoolExecutor(len(presses)) as pool:
        for _ in range(3):
            for found, alone in zip(pool.map(lambda press: ask(*press), presses), expected):
                assert all(torch.equal(one, other) for one, other in zip(found, alone))
    assert demo.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "take", [lambda model: applied(make_press("knorm"), model), lambda model: attention(model, "eager"), turn]
)
def test_a_bare_call_waits_until_a_press_is_gone(demo, reading, take):
    done = Event()

    def call():
        with torch.no_grad():
            demo(reading[:, :8])
        done.set()

    with take(demo):
        thread = Thread(target=call)
        thread.start()
        assert not done.wait(0.3)
        with torch.no_grad():
            demo(reading[:, :8])  # its own thread goes on
    thread.join(10)
    assert done.is_set()


def test_generators_give_the_turn_back_between_their_yields(demo, reading):
    key = RecallKey("x", "78", torch.tensor([5, 6]), torch.tensor([7, 8]), 0.5, (3, 6), (4, 5))
    sample = RecallSample(reading[0, :100], [key, key])
    stream = StreamingDecoder(2, 30).stream(demo, reading[:, :20])
    asked = ask_each(demo, sample, [make_press("knorm")])
    next(stream), next(asked)
    other = Thread(target=lambda: teacher_forced_nll(demo, reading[:, :8]))
    other.start()
    other.join(10)
    assert not other.is_alive()


def test_a_model_that_has_taken_turns_can_be_copied_and_is_let_go():
    stock, model = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (1, 40))
    expected = continuation_nll(model, ids, n_context=20, press=make_press("knorm"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(continuation_nll(twin, ids, n_context=20, press=make_press("knorm")), expected)
        assert turn(twin) is not turn(model)
    assert turn(model) is turn(model.model)
    n_models = len(hooks._turns)
    del twin, model
    gc.collect()
    assert len(hooks._turns) < n_models


def test_hooks_are_gone_whatever_happens():
    modules, seen = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], []
    with pytest.raises(KeyError), hooked(modules, lambda module, args, kwargs, output: seen.append(module)):
        modules[1](torch.zeros(2))
        raise KeyError
    with hooked(modules, lambda module, args, kwargs: ((args[0] + 1,), kwargs), before=True):
        assert torch.equal(modules[0](torch.zeros(2)), modules[0].weight.sum(1) + modules[0].bias)
    assert seen == [modules[1]]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    with pytest.raises(AttributeError), hooked([modules[0], None], print):
        pass
    assert not modules[0]._forward_hooks


def _sample(ids: torch.Tensor) -> RecallSample:
    return RecallSample(ids, [RecallKey("x", "78", ids[:2], ids[2:4], 0.5, (3, 6), (4, 5))])


READINGS = {
    "generate": lambda model, ids, press: generate(model, ids, press=press, max_new_tokens=2),
    "continuation_nll": lambda model, ids, press: continuation_nll(model, ids, n_context=90, press=press),
    "teacher_forced_nll": lambda model, ids, press: teacher_forced_nll(model, ids, press=press),
    "streaming_nll": lambda model, ids, press: streaming_nll(model, ids, n_sink=0, window=120),
    "kept_positions": lambda model, ids, press: kept_positions(model, ids, press),
    "stream": lambda model, ids, press: next(StreamingDecoder(1, 20).stream(model, ids)),
    "read": lambda model, ids, press: StreamingDecoder(1, 20).read(model, ids),
    "prefill_each": lambda model, ids, press: prefill_each(model, ids, [None, press]),
    "prefill": lambda model, ids, press: prefill(model, ids, press),
    "ask_each": lambda model, ids, press: next(
        ask_each(
            model, RecallSample(ids[0], [RecallKey("x", "78", ids[0, :2], ids[0, 2:4], 0.5, (3, 6), (4, 5))]), [press]
        )
    ),
}


@pytest.mark.parametrize("reading_of", READINGS.values(), ids=READINGS)
@pytest.mark.parametrize("given", [None, "knorm"])
def test_what_is_attached_already_takes_no_part_in_a_measurement(demo, reading, reading_of, given):
    """It would compress twice, or put its own cache in the place of the one that is measured."""
    ids, press = reading[:, 3000:3100], make_press(given) if given else None
    for name in ("knorm", "kvzip", "kvcompose"):
        with make_press(name)(demo):
            with pytest.raises(ValueError, match="applied to this model already"):
                reading_of(demo, ids, press)
            with torch.no_grad():
                demo.model(input_ids=ids[:, :20], past_key_values=DynamicCache())  # kvpress' own way goes on
    with StreamingDecoder(0, 5).register(demo), pytest.raises(ValueError, match="StreamingDecoder is registered"):
        reading_of(demo, ids, press)
    reading_of(demo, ids, press)


def test_a_registered_stream_and_a_press_refuse_each_other_but_not_their_own_reading(demo, reading):
    ids = reading[:, :30]
    with StreamingDecoder(1, 20).register(demo) as decoder:
        assert decoder.read(demo, ids).shape == (1, demo.config.vocab_size)
        with pytest.raises(ValueError, match="KnormPress is applied"), make_press("knorm")(demo):
            demo.generate(ids, max_new_tokens=2)

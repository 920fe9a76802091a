"""generate() against model.generate under the press, and against the kvpress pipeline."""

import contextlib
import re

import pytest
import torch
from conftest import stock_and_ours, tiny_config
from transformers import pipeline

from kvneox_lib import StreamingDecoder, continuation_nll, streaming_nll, teacher_forced_nll
from kvneox_lib.measures.decoding import generate
from kvneox_lib.measures.streaming import recomputed_nll
from kvneox_lib.measures.survivors import kept_positions
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.presses.by_name import make_press, press_names
from kvneox_lib.presses.facts import acts, attention_needed, rows_independent

IN_HOOKS = [
    name
    for name in press_names()
    if not name.startswith("per_layer")
    and acts(make_press(name)) in ("hook", "never")
    and attention_needed(make_press(name)) != "eager"
    and not name.startswith(("key_rerotation", "finch"))  # transformers goes on at the true length there
]


@pytest.fixture(scope="module")
def pages(reading):
    return reading[:, 12000:12560].view(2, 280)


@pytest.mark.parametrize("name", IN_HOOKS)
def test_tokens_are_those_of_transformers_under_the_press(demo, pages, name):
    rows = pages if rows_independent(make_press(name)) else pages[:1]
    torch.manual_seed(4)
    press = make_press(name, 0.6)
    with press(demo) if press else contextlib.nullcontext():
        expected = demo.generate(rows, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)
    torch.manual_seed(4)
    made = generate(demo, rows, press=make_press(name, 0.6), max_new_tokens=10, min_new_tokens=10)
    assert torch.equal(made.tokens, expected[:, 280:])
    assert made.prefill_s > 0 and made.decode_s > 0


@pytest.mark.parametrize(
    "name",
    ["no_press", "snapkv", "adakv_snapkv", "key_rerotation_knorm", "pyramidkv", "kvzip", "decoding_knorm", "kvcompose"],
)
def test_answers_are_those_of_the_pipeline(demo, tokenizer, reading, name):
    options = {"target_size": 128, "compression_interval": 8} if name == "decoding_knorm" else {}
    context, question = tokenizer.decode(reading[0, 2000:2300]), "What does it return?"
    pipe = pipeline("kv-press-text-generation", model=demo, tokenizer=tokenizer)
    tensors = pipe.preprocess(context, [question], answer_prefix="", max_context_length=400)
    press = make_press(name, 0.5, **options)
    answer = pipe(context, question=question, press=press, max_new_tokens=20)["answer"]
    made = generate(
        demo,
        tensors["context_ids"],
        press=make_press(name, 0.5, **options),
        question_ids=tensors["questions_ids"][0],
        max_new_tokens=20,
    )
    assert tokenizer.decode(made.tokens[0], skip_special_tokens=True) == answer


def test_rows_that_a_press_would_mix_are_generated_as_alone(demo, pages):
    for name in ("chunkkv_snapkv", "critical_adakv_snapkv", "simlayerkv", "kvcompose", "kvcompose_unstructured"):
        options = {"n_recent": 32, "n_initial": 4, "n_last": 1} if name == "simlayerkv" else {}
        together = generate(demo, pages, press=make_press(name, 0.7, **options), max_new_tokens=8, stop_at_eos=False)
        for row, tokens in zip(pages, together.tokens):
            alone = generate(
                demo, row[None], press=make_press(name, 0.7, **options), max_new_tokens=8, stop_at_eos=False
            )
            assert torch.equal(alone.tokens[0], tokens), name


def test_each_sample_ends_for_itself(demo, pages, monkeypatch):
    free = generate(demo, pages, max_new_tokens=16, stop_at_eos=False).tokens
    ends = [t for t in range(1, 15) if free[0, t] not in free[0, :t] and free[0, t] not in free[1]]
    first, end = ends[0], int(free[0, ends[0]])
    monkeypatch.setattr(demo.generation_config, "eos_token_id", [end, 3])
    stopped = generate(demo, pages, max_new_tokens=16).tokens
    assert torch.equal(stopped[0, :first], free[0, :first])
    assert (stopped[0, first:] == end).all()  # repeated until the other has ended
    assert torch.equal(stopped[1], free[1])
    assert generate(demo, pages[:1], max_new_tokens=16).tokens.shape[1] == first + 1
    longer = generate(demo, pages[:1], max_new_tokens=16, min_new_tokens=first + 3).tokens
    assert longer.shape[1] >= first + 3 and end not in longer[0, : first + 3]
    assert torch.equal(generate(demo, pages[:1], max_new_tokens=16, stop_at_eos=False).tokens[0], free[0])


def test_drawing_follows_the_models_distribution():
    _, model = stock_and_ours(tiny_config())
    ids = torch.randint(1, 97, (1, 12))
    torch.manual_seed(0)
    drawn = generate(model, ids.expand(4000, -1), max_new_tokens=1, stop_at_eos=False, temperature=1.5).tokens[:, 0]
    with torch.no_grad():
        expected = (model(ids).logits[0, -1] / 1.5).softmax(-1)
    assert (torch.bincount(drawn, minlength=97) / 4000 - expected).abs().max() < 0.03


def test_bytes_and_lengths_are_those_of_the_cache(demo, pages):
    made = generate(demo, pages, press=make_press("pyramidkv", 0.5), max_new_tokens=5, stop_at_eos=False)
    assert made.kv_lengths.shape == (6, 2, 4) and made.kv_lengths[0, 0, 0] > made.kv_lengths[5, 0, 0]
    room = made.kv_lengths[:, 0, 0] + 5
    assert made.kv_bytes == 2 * 2 * int(room.sum()) * 256 * 4
    asked = generate(demo, pages, press=make_press("knorm", 0.5), question_ids=pages[:, :7], max_new_tokens=5)
    assert (asked.kv_lengths == 140).all()


def test_the_vocabulary_is_projected_once_a_token(demo, pages):
    rows = []
    handle = demo.embed_out.register_forward_hook(lambda module, args, output: rows.append(output.numel()))
    generate(demo, pages, max_new_tokens=4, stop_at_eos=False)
    handle.remove()
    assert rows == [2 * demo.config.vocab_size] * 4


def test_a_compact_cache_serves_transformers_and_the_pipeline(demo, tokenizer, reading, pages):
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        stock = demo.generate(pages, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **options)
        ours = demo.generate(
            pages, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, past_key_values=CompactCache(4), **options
        )
        assert torch.equal(stock, ours)
    pipe = pipeline("kv-press-text-generation", model=demo, tokenizer=tokenizer)
    context, questions = tokenizer.decode(reading[0, 2000:2300]), ["What does it return?", "And then?"]
    for name in ("snapkv", "adakv_snapkv"):
        asked = {"questions": questions, "max_new_tokens": 12}
        expected = pipe(context, press=make_press(name), **asked)
        assert pipe(context, press=make_press(name), cache=CompactCache(8), **asked) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be a whole number of at least 1"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1: must be a whole number of at least 0"),
        ({"temperature": -1.0}, "temperature=-1.0: must be 0 (greedy) or above"),
        ({"question_ids": torch.ones(1, 3, dtype=torch.long)}, "question_ids has shape (1, 3)"),
        ({"attention_mask": torch.tensor([[0] + [1] * 279] * 2)}, "attention_mask marks padding"),
    ],
)
def test_wrong_arguments_are_refused(demo, pages, wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(demo, pages, **{"max_new_tokens": 4, **wrong})
    with pytest.raises(ValueError, match="mixes the rows of a batch while decoding"):
        generate(demo, pages, press=make_press("cam_streaming_llm"), max_new_tokens=4)


def test_going_past_the_trained_length_is_said(demo, reading):
    with pytest.warns(UserWarning, match="max_new_tokens=3 goes on to position 2050, the model was trained on 2048"):
        generate(demo, reading[:, :2047], max_new_tokens=3)


def test_logits_are_those_that_chose_the_tokens(demo, pages):
    with torch.no_grad():
        first = demo(pages).logits[:, -1]
    made = generate(demo, pages, max_new_tokens=6, stop_at_eos=False, with_logits=True)
    assert made.logits.shape == (2, 6, demo.config.vocab_size)
    assert torch.allclose(made.logits[:, 0], first, atol=1e-4)
    assert torch.equal(made.logits.argmax(-1), made.tokens)
    assert generate(demo, pages, max_new_tokens=1).logits is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2, 3]], "is a list; must be a tensor"),
        (torch.ones(1, 300), "has dtype torch.float32; must be whole numbers"),
        (torch.ones(1, 300, dtype=torch.bool), "has dtype torch.bool; must be whole numbers"),
        (torch.ones(300, dtype=torch.long), "has shape (300,); must be (batch, T)"),
        (torch.ones(0, 300, dtype=torch.long), "has shape (0, 300); must be (batch, T)"),
        (torch.ones(1, 0, dtype=torch.long), "has shape (1, 0); must be (batch, T)"),
        (torch.full((1, 300), -1), "has the id -1; must be from 0 to 8191"),
        (torch.full((1, 300), 8192), "has the id 8192; must be from 0 to 8191"),
    ],
)
def test_ids_that_are_none_are_refused_before_any_work(demo, pages, ids, message, monkeypatch):
    monkeypatch.setattr(demo.model, "forward", lambda *_, **__: pytest.fail("the model was called"))
    decoder = StreamingDecoder(4, 40)
    calls = [
        lambda: generate(demo, ids, max_new_tokens=2),
        lambda: continuation_nll(demo, ids, n_context=100),
        lambda: teacher_forced_nll(demo, ids),
        lambda: streaming_nll(demo, ids, n_sink=4, window=40),
        lambda: recomputed_nll(demo, ids, window=40, positions=torch.tensor([1])),
        lambda: decoder.stream(demo, ids),
        lambda: decoder.read(demo, ids),
        lambda: kept_positions(demo, ids, None),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(f"input_ids {message}")):
            call()
    with pytest.raises(ValueError, match="question_ids "):
        generate(demo, pages, question_ids=ids, max_new_tokens=2)


def test_ids_of_any_whole_type_will_do(demo, pages):
    expected = continuation_nll(demo, pages[:1, :60], n_context=40)
    assert torch.equal(continuation_nll(demo, pages[:1, :60].int(), n_context=40), expected)

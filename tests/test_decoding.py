"""generate() against model.generate under the press, and against the kvpress pipeline."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from conftest import relative_difference, stock_and_ours, tiny_config
from transformers import pipeline

from kvneox_lib import StreamingDecoder, continuation_nll, streaming_nll, teacher_forced_nll
from kvneox_lib.measures.decoding import generate
from kvneox_lib.measures.streaming import recomputed_nll
from kvneox_lib.measures.survivors import kept_positions
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.hooks import hooked
from kvneox_lib.neox.modeling import stock_twin
from kvneox_lib.presses.by_name import make_press, press_names, ratio_for
from kvneox_lib.presses.facts import acts, attention_needed, rows_independent

IN_HOOKS = [
    name
    for name in press_names()
    if not name.startswith("per_layer")
    and acts(make_press(name)) in ("hook", "never")
    and attention_needed(make_press(name)) != "eager"
    and not name.startswith(("key_rerotation", "finch"))  # transformers goes on at the true length there
]


def mask_of(*lengths: int) -> torch.Tensor:
    """Left padding to the longest."""
    return (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()


def padded(rows: list[torch.Tensor], fill: int = 0) -> dict[str, torch.Tensor]:
    mask = mask_of(*map(len, rows))
    ids = torch.full_like(mask, fill)
    ids[mask == 1] = torch.cat(rows)
    return {"input_ids": ids, "attention_mask": mask}


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


@pytest.fixture(scope="module")
def unequal(reading):
    """Texts of 150, 110 and 150 tokens."""
    return [reading[0, start : start + n] for start, n in ((12000, 150), (13000, 110), (14000, 150))]


ALONE = ("no_press", "knorm", "pyramidkv", "think", "block_knorm", "merging_snapkv", "per_layer_knorm")  # in hooks
ALONE += ("adakv_snapkv", "kvcompose_unstructured", "kvzip", "kvgrad", "critical_adakv_snapkv")  # heads for themselves
ALONE += ("chunkkv_snapkv", "simlayerkv", "kvcompose", "compactor", "dms_leverage", "random")  # mix rows, or draw
ALONE += ("key_rerotation_snapkv", "finch")  # positions go on from the compressed length


ASKED = [(name, n_questions) for name in ALONE for n_questions in ((0, 0, 0), (5, 9, 7))]
ASKED += [("no_press", (5, 45, 5)), ("think", (5, 45, 5))]  # unequal prompts after which each row holds 155 entries


@pytest.mark.parametrize(("name", "n_questions"), ASKED)
def test_rows_of_unequal_length_are_generated_as_alone(demo, reading, unequal, name, n_questions):
    options = {"n_recent": 32, "n_initial": 4, "n_last": 1} if name == "simlayerkv" else {}
    questions = [reading[0, 16000 : 16000 + n] if n else None for n in n_questions]
    settings = {"max_new_tokens": 5, "stop_at_eos": False, "with_logits": True}

    def made(ids, question_ids, attention_mask=None):
        press = make_press(name, ratio_for(name, 0.6, demo), **options)
        return generate(demo, ids, press=press, question_ids=question_ids, attention_mask=attention_mask, **settings)

    asked, batch = questions if all(n_questions) else None, padded(unequal)
    torch.manual_seed(0)
    together = made(batch["input_ids"], asked, batch["attention_mask"])
    torch.manual_seed(0)
    for row in (1, 0, 2):  # the shortest first, as in a batch: those that draw then draw the same
        alone = made(unequal[row][None], None if questions[row] is None else questions[row][None])
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert relative_difference(together.logits[row], alone.logits[0]) < 1e-5
        assert torch.equal(alone.kv_lengths[:, 0], together.kv_lengths[:, row])


def test_rows_of_unequal_length_are_those_of_transformers(demo, unequal):
    settings = {"max_new_tokens": 12, "min_new_tokens": 12}
    batch = padded(unequal)
    expected = stock_twin(demo).generate(**batch, do_sample=False, pad_token_id=0, **settings)[:, 150:]
    assert torch.equal(generate(demo, **batch, **settings).tokens, expected)


@pytest.mark.parametrize("name", ["no_press", "snapkv", "adakv_snapkv", "chunkkv_snapkv"])
def test_padding_is_never_read(demo, unequal, name):
    def made(fill):
        settings = {"press": make_press(name, 0.6), "max_new_tokens": 3, "with_logits": True}
        return generate(demo, **padded(unequal, fill), **settings)

    assert torch.equal(made(0).logits, made(4711).logits)


def test_padding_before_every_row_is_as_if_it_were_not_there(demo, pages):
    mask = torch.ones(2, 280, dtype=torch.bool)
    mask[:, :40] = False
    settings = {"press": make_press("decoding_knorm", target_size=128), "max_new_tokens": 40}
    expected, found = generate(demo, pages[:, 40:], **settings), generate(demo, pages, attention_mask=mask, **settings)
    assert torch.equal(expected.tokens, found.tokens) and expected.kv_bytes == found.kv_bytes


@pytest.mark.parametrize(
    ("name", "expected"),
    [("knorm", [(1, 110), (2, 150), (3, 1)]), ("chunkkv_snapkv", [(1, 110), (1, 150), (1, 150), (3, 1)])],
)
def test_rows_of_one_length_are_read_at_once_and_all_are_continued_at_once(demo, unequal, name, expected):
    shapes = []
    with hooked([demo.gpt_neox.embed_in], lambda module, args, kwargs, output: shapes.append(tuple(args[0].shape))):
        generate(demo, **padded(unequal), press=make_press(name), max_new_tokens=2, stop_at_eos=False)
    assert shapes == expected


def test_questions_of_unequal_length_after_prompts_of_equal_length(demo, pages):
    for name in ("no_press", "adakv_snapkv", "key_rerotation_knorm"):
        settings = {"max_new_tokens": 6, "stop_at_eos": False}
        questions = [pages[0, :4], pages[1:, 50:61]]
        together = generate(demo, pages, press=make_press(name, 0.6), question_ids=questions, **settings)
        for row, tokens, question in zip(pages, together.tokens, questions):
            asked = {"press": make_press(name, 0.6), "question_ids": question.view(1, -1)}
            assert torch.equal(generate(demo, row[None], **asked, **settings).tokens[0], tokens)


def test_samples_of_unequal_length_end_for_themselves(demo, unequal, monkeypatch):
    free = generate(demo, **padded(unequal), max_new_tokens=16, stop_at_eos=False).tokens
    others = free[1:].flatten().tolist()
    first = next(t for t in range(1, 16) if free[0, t] not in free[0, :t] and int(free[0, t]) not in others)
    monkeypatch.setattr(demo.generation_config, "eos_token_id", int(free[0, first]))
    stopped = generate(demo, **padded(unequal), max_new_tokens=16).tokens
    assert torch.equal(stopped[0, :first], free[0, :first]) and (stopped[0, first:] == free[0, first]).all()
    assert torch.equal(stopped[1:], free[1:])


def test_what_cannot_be_done_with_rows_of_unequal_length_is_refused(demo, pages, unequal, monkeypatch):
    monkeypatch.setattr(demo.model, "forward", lambda *_, **__: pytest.fail("the model was called"))
    for name in ("decoding_knorm", "ratio_decoding_knorm", "prefill_decoding_knorm"):
        with pytest.raises(ValueError, match="compresses while decoding, which rows of unequal length cannot"):
            generate(demo, **padded(unequal), press=make_press(name), max_new_tokens=4)
        with pytest.raises(ValueError, match="compresses while decoding, which rows of unequal length cannot"):
            generate(demo, pages, question_ids=[pages[0, :3], pages[1, :4]], press=make_press(name), max_new_tokens=4)
    for name in ("snapkv", "finch"):
        with pytest.raises(ValueError, match="a context of 60 tokens"):
            generate(demo, **padded([*unequal, unequal[0][:60]]), press=make_press(name), max_new_tokens=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be a whole number of at least 1"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1: must be a whole number of at least 0"),
        ({"temperature": -1.0}, "temperature=-1.0: must be 0 (greedy) or above"),
        ({"question_ids": torch.ones(1, 3, dtype=torch.long)}, "question_ids has shape (1, 3)"),
        ({"question_ids": [torch.ones(3, dtype=torch.long)]}, "question_ids has 1 questions; must be one for each"),
        ({"question_ids": [torch.ones(3, dtype=torch.long), [1]]}, "question_ids[1] is a list; must be a tensor"),
        ({"question_ids": [torch.ones(2, 3, dtype=torch.long)] * 2}, "question_ids[0] has shape (2, 3); must be (n,)"),
        ({"question_ids": [torch.ones(0, dtype=torch.long)] * 2}, "question_ids[0] has shape (1, 0)"),
        ({"attention_mask": [[1] * 280] * 2}, "attention_mask is a list; must be a tensor"),
        ({"attention_mask": torch.ones(2, 279)}, "attention_mask has shape (2, 279); must be (2, 280)"),
        ({"attention_mask": torch.ones(2, 1, 280, 280)}, "attention_mask has shape (2, 1, 280, 280); must be (2, 280)"),
        ({"attention_mask": torch.full((2, 280), 2)}, "attention_mask holds 2; must be 0 or 1"),
        ({"attention_mask": torch.full((2, 280), -0.5)}, "attention_mask holds -0.5; must be 0 or 1"),
        ({"attention_mask": mask_of(280, 0)}, "attention_mask: row 1 is all padding; must be zeros, if any, then ones"),
        ({"attention_mask": mask_of(280, 270).flip(1)}, "attention_mask: row 1 has padding after text"),
        ({"attention_mask": mask_of(280, 5).roll(-2, 1) | mask_of(280, 1)}, "row 1 has padding after text"),  # a hole
    ],
)
def test_wrong_arguments_are_refused(demo, pages, wrong, message, monkeypatch):
    monkeypatch.setattr(demo.model, "forward", lambda *_, **__: pytest.fail("the model was called"))
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(demo, pages, **{"max_new_tokens": 4, **wrong})
    with pytest.raises(ValueError, match="mixes the rows of a batch while decoding"):
        generate(demo, pages, press=make_press("cam_streaming_llm"), max_new_tokens=4)


def test_going_past_the_trained_length_is_said(demo, reading):
    with pytest.warns(UserWarning, match="max_new_tokens=3 goes on to position 2050, the model was trained on 2048"):
        generate(demo, reading[:, :2047], max_new_tokens=3)
    mask = mask_of(1000, 10)
    with pytest.warns(UserWarning, match="max_new_tokens=2 goes on to position 2053") as warned:
        asked = [reading[0, :1], reading[0, :2041]]  # the longest row in all: 10 + 2041
        generate(demo, reading[:, :2000].view(2, 1000), attention_mask=mask, question_ids=asked, max_new_tokens=2)
    assert [Path(one.filename).name for one in warned] == ["test_decoding.py"]


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

"""Passkeys: where they are said to be, and known to the bundled model in this form."""

import re

import numpy as np
import pytest
import torch

from kvneox_lib.inputs import windows
from kvneox_lib.inputs.passkeys import recall_samples
from kvneox_lib.inputs.text import load_text


@pytest.fixture(scope="module")
def filler():
    return load_text("python-docs").documents[0]


@pytest.fixture(scope="module")
def asked(tokenizer, filler):
    return {"filler": filler, "n_keys": 10, "keys_per_context": 4, "context_length": 600, "seed": 3}


def test_contexts_have_their_length_and_spans_are_exact(tokenizer, asked):
    samples = recall_samples(tokenizer, **asked)
    assert [len(sample.keys) for sample in samples] == [4, 4, 2]
    for sample in samples:
        assert sample.context_ids.shape == (600,)
        assert len({key.name for key in sample.keys}) == len(sample.keys)
        ends = 0
        for key in sample.keys:
            assert re.fullmatch(r"[A-Z][a-z]{3,6}", key.name) and re.fullmatch(r"\d{5}", key.digits)
            start, end = key.span
            statement = tokenizer.decode(sample.context_ids[start:end])
            assert statement == f" The passkey of {key.name} is {key.digits}. Remember it."
            assert tokenizer.decode(sample.context_ids[slice(*key.digits_span)]) == f" {key.digits}"
            assert torch.equal(sample.context_ids[slice(*key.digits_span)], key.answer_ids)
            question = f"\n\nWhat is the passkey of {key.name}? The passkey of {key.name} is"
            assert tokenizer.decode(key.question_ids) == question
            whole = tokenizer(f"{question} {key.digits}").input_ids  # apart they are the tokens that they are together
            assert torch.cat([key.question_ids, key.answer_ids]).tolist() == whole
            assert start >= ends
            ends = end


def test_filler_goes_on_across_a_statement_and_sentences_stay_whole(tokenizer, asked, filler):
    for sample in recall_samples(tokenizer, **asked):
        ids, holes = sample.context_ids.tolist(), [key.span for key in sample.keys]
        rest = [i for at, i in enumerate(ids) if not any(start <= at < end for start, end in holes)]
        assert tokenizer.decode(rest) in filler
        for start, end in holes:
            before, after = tokenizer.decode(ids[:start])[-1:], tokenizer.decode(ids[end:])[:1]
            assert not before.isspace() and after in ("", " ", "\n")
        whole = tokenizer(tokenizer.decode(ids[:590])).input_ids  # the last token may be half of a word
        assert whole[:580] == ids[:580]


def test_of_a_large_filler_only_the_parts_of_contexts_are_read(tokenizer, asked, filler, tmp_path, monkeypatch):
    usual = recall_samples(tokenizer, **asked)
    monkeypatch.setattr(windows, "LARGE", len(filler) // 2)
    monkeypatch.setattr(windows, "PART", len(filler) // 20)
    monkeypatch.setenv("KVNEOX_CACHE", str(tmp_path))
    samples = recall_samples(tokenizer, **asked)
    assert len(list(tmp_path.rglob("*.npz"))) == len(samples) == 3
    places = []
    for sample, other in zip(samples, usual):
        assert [(key.name, key.digits, key.depth) for key in sample.keys] == [
            (key.name, key.digits, key.depth) for key in other.keys
        ]
        holes = [key.span for key in sample.keys]
        rest = [i for at, i in enumerate(sample.context_ids.tolist()) if not any(a <= at < b for a, b in holes)]
        places.append(filler.index(tokenizer.decode(rest)) / len(filler))
    assert places == sorted(places) and np.abs(np.diff(places) - 1 / 3).max() < 0.06


def test_the_seed_decides(tokenizer, asked):
    def flat(samples):
        return [(s.context_ids.tolist(), [(k.name, k.digits, k.depth, k.span) for k in s.keys]) for s in samples]

    one = flat(recall_samples(tokenizer, **asked))
    assert one == flat(recall_samples(tokenizer, **asked))
    other = flat(recall_samples(tokenizer, **{**asked, "seed": 4}))
    assert all(a[0] != b[0] for a, b in zip(one, other))
    assert not {k[1] for _, keys in one for k in keys} & {k[1] for _, keys in other for k in keys}


def test_depths_are_where_they_were_asked_for(tokenizer, asked):
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    samples = recall_samples(tokenizer, **{**asked, "n_keys": 40, "keys_per_context": 2}, depths=depths)
    keys = [key for sample in samples for key in sample.keys]
    assert sorted(key.depth for key in keys) == sorted(depths * 8)
    assert {key.span[0] for key in keys if key.depth == 0.0} == {0}
    errors = [abs(key.depth - key.span[0] / (600 - (key.span[1] - key.span[0]))) for key in keys]
    assert max(errors) < 0.08
    random = [key.depth for sample in recall_samples(tokenizer, **{**asked, "n_keys": 60}) for key in sample.keys]
    assert len(set(random)) == 60 and 0.35 < np.mean(random) < 0.65 and min(random) < 0.15 and max(random) > 0.85


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_keys": 0}, "n_keys=0"),
        ({"keys_per_context": 0}, "keys_per_context=0"),
        ({"context_length": 40}, "context_length=40: 4 statements have"),
        ({"depths": [0.5, 1.5]}, "depths="),
        ({"depths": []}, "depths="),
        ({"filler": "Too short. Indeed."}, "leave 532 for the filler, which has 6"),
    ],
)
def test_what_recall_cannot_do_is_refused(tokenizer, asked, wrong, message):
    with pytest.raises(ValueError, match=message):
        recall_samples(tokenizer, **{**asked, **wrong})


def test_the_bundled_model_knows_this_form(demo, tokenizer, asked):
    """Each digit is predicted by a query that has the statement before it, in a context of the filler's own words."""
    [sample] = recall_samples(tokenizer, **{**asked, "n_keys": 4, "context_length": 400})
    for key in sample.keys:
        ids = torch.cat([sample.context_ids, key.question_ids, key.answer_ids])[None]
        with torch.no_grad():
            logits = demo(ids, logits_to_keep=len(key.answer_ids) + 1).logits[0, :-1]
        assert torch.equal(logits.argmax(-1), key.answer_ids), key

"""Passkeys: where they are said to be, and known to the bundled model in this form."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from transformers import PreTrainedTokenizerFast

from kvneox_lib.inputs import windows
from kvneox_lib.inputs.passkeys import recall_samples
from kvneox_lib.inputs.templates import DEMO, TEMPLATES, WORDINGS, Template, expand_templates
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
        ({"n_keys": 60, "keys_per_context": 60}, r"between 1 and that .*keys_per_context=60, n_distractors=0"),
        ({"n_distractors": 60}, r"context_length=600: 64 statements have .*n_distractors=60"),
        ({"n_distractors": -1}, "n_distractors=-1"),
        ({"template": "acount"}, "template='acount': did you mean account"),
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


# ---- wordings, other numbers, many keys -----------------------------------------------------------------------------


def told(tokenizer, sample, key):
    return tokenizer.decode(sample.context_ids[slice(*key.span)])


@pytest.mark.parametrize(("depths", "digest"), [(None, "e60530876661a713"), ([0.05, 0.5, 0.95], "2ce80764e4fe4941")])
def test_the_first_wording_is_what_it_was_before_there_were_others(tokenizer, depths, digest):
    """Made by the code from before: every id, span and depth."""
    nouns = [f"{a} {b}" for a in ("old", "grey", "young") for b in ("miller", "horse", "ferry")]
    filler = " ".join(f"On day {n} the {noun} was seen near the river." for n in range(60) for noun in nouns)
    asked = {"n_keys": 10, "keys_per_context": 4, "context_length": 600, "seed": 3}
    found = [
        (sample.context_ids.tolist(), [_plain(key) for key in sample.keys])
        for sample in recall_samples(tokenizer, filler=filler, depths=depths, **asked)
    ]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == digest


def _plain(key):
    ids = key.question_ids.tolist(), key.answer_ids.tolist()
    return key.name, key.digits, *ids, key.depth, key.span, key.digits_span


@pytest.fixture(params=["demo", "pythia"])
def any_tokenizer(request, tokenizer):
    if request.param == "demo":
        return tokenizer
    path = REPOSITORY.parent / "shared" / "data" / "pythia-published" / "20B_tokenizer.json"
    if not path.exists():
        pytest.skip(f"Pythia's tokenizer is not at {path}")
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


@pytest.mark.parametrize("name", TEMPLATES)
def test_digits_are_the_same_tokens_where_they_are_told_and_answered(any_tokenizer, asked, name):
    first, template = recall_samples(any_tokenizer, **asked), TEMPLATES[name]
    samples = recall_samples(any_tokenizer, **asked, template=name)
    for sample, other in zip(samples, first, strict=True):
        assert sample.context_ids.shape == (600,) and sample.distractors == []
        assert [(k.name, k.digits, k.depth) for k in sample.keys] == [(k.name, k.digits, k.depth) for k in other.keys]
        for key in sample.keys:
            statement = template.statement.replace("{name}", key.name).replace("{digits}", key.digits)
            assert told(any_tokenizer, sample, key) == statement
            assert sample.context_ids[slice(*key.span)].tolist() == any_tokenizer(statement).input_ids
            assert torch.equal(sample.context_ids[slice(*key.digits_span)], key.answer_ids)
            whole = template.question.replace("{name}", key.name) + f" {key.digits}"
            assert any_tokenizer(whole).input_ids == key.question_ids.tolist() + key.answer_ids.tolist()


def test_distractors_are_other_numbers_in_other_words_and_move_no_key(tokenizer, asked):
    asked = {**asked, "n_keys": 40, "keys_per_context": 2}
    plain, crowded = (recall_samples(tokenizer, **asked, n_distractors=n) for n in (0, 6))
    depths, wordings = [], set()
    for sample, other in zip(crowded, plain, strict=True):
        assert len(sample.context_ids) == 600 and len(sample.distractors) == 6
        assert [(k.name, k.digits, k.depth) for k in sample.keys] == [(k.name, k.digits, k.depth) for k in other.keys]
        assert all(
            told(tokenizer, sample, key) == told(tokenizer, other, old) for key, old in zip(sample.keys, other.keys)
        )
        everything = sorted([*sample.keys, *sample.distractors], key=lambda key: key.span)
        assert all(one.span[1] <= two.span[0] for one, two in zip(everything, everything[1:]))
        assert len({key.name for key in everything}) == len({key.digits for key in everything}) == 8
        for key in sample.distractors:
            fits = [
                name
                for name, t in TEMPLATES.items()
                if "".join(t.told(key.name, key.digits)) == told(tokenizer, sample, key)
            ]
            wordings.update(fits)
            assert len(fits) == 1
        depths += [key.depth for key in sample.distractors]
    assert wordings == set(TEMPLATES) - {"passkey"}
    assert 0.4 < np.mean(depths) < 0.6 and min(depths) < 0.1 and max(depths) > 0.9
    again = recall_samples(tokenizer, **asked, n_distractors=6)
    assert all(torch.equal(one.context_ids, two.context_ids) for one, two in zip(crowded, again))


def test_many_keys_stand_in_one_context(tokenizer, asked):
    [sample] = recall_samples(tokenizer, **{**asked, "n_keys": 30, "keys_per_context": 30, "context_length": 1200})
    assert len(sample.context_ids) == 1200 and len({key.name for key in sample.keys}) == 30
    for key in sample.keys:
        assert told(tokenizer, sample, key) == f" The passkey of {key.name} is {key.digits}. Remember it."


def test_a_wording_of_your_own(tokenizer, asked):
    own = Template(" Room {digits} belongs to {name}.", "\n\nWhich room belongs to {name}? Room")
    for sample in recall_samples(tokenizer, **asked, template=own, n_distractors=2):
        for key in sample.keys:
            assert told(tokenizer, sample, key) == f" Room {key.digits} belongs to {key.name}."
            assert tokenizer.decode(key.question_ids) == f"\n\nWhich room belongs to {key.name}? Room"
    assert not own.trained


@pytest.mark.parametrize(
    ("statement", "question", "named"),
    [
        ("Room {digits} belongs to {name}.", "Whose? {name} has", "statement"),  # no space before it
        (" Room number{digits} belongs to {name}.", "Whose? {name} has", "statement"),
        (" Room {digits}7 belongs to {name}.", "Whose? {name} has", "statement"),
        (" Rooms {digits} and {digits} belong to {name}.", "Whose? {name} has", "statement"),
        (" Room {digits} is free.", "Whose? {name} has", "statement"),
        (" {name} has no room.", "Whose? {name} has", "statement"),
        (" Room {digits} belongs to {name} in {town}.", "Whose? {name} has", "statement"),
        (" Room {digits} belongs to {name}.", "Whose? {name} has ", "question"),
        (" Room {digits} belongs to {name}.", "Whose?", "question"),
        (" Room {digits} belongs to {name}.", "{name}: {digits}", "question"),
    ],
)
def test_a_wording_in_which_the_digits_would_be_other_tokens_is_refused(statement, question, named):
    with pytest.raises(ValueError, match=f"{named}='"):
        Template(statement, question)


def test_wordings_by_name():
    assert expand_templates("all") == [*TEMPLATES] == expand_templates(["all", "house"])
    assert expand_templates(["order", "house", "order"]) == ["order", "house"]
    assert [name for name, one in TEMPLATES.items() if DEMO in one.trained] == ["passkey"]
    assert {WORDINGS in one.trained for one in TEMPLATES.values()} == {True, False}
    for wrong in ("phone", 3, ["house", None]):
        with pytest.raises(ValueError, match="template="):
            expand_templates(wrong)

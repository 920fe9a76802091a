"""Recall: every digit is predicted from the compressed cache, and losing the digits loses the answer."""

import pytest
import torch

from kvneox_lib.inputs.passkeys import recall_samples
from kvneox_lib.inputs.text import load_text
from kvneox_lib.measures import recall
from kvneox_lib.measures.recall import ask_each, copy_attention, recall_accuracy
from kvneox_lib.measures.survivors import kept_positions
from kvneox_lib.neox.modeling import stock_twin
from kvneox_lib.presses.by_name import make_press

SAMPLE = {"n_keys": 6, "keys_per_context": 3, "context_length": 500, "seed": 2}


@pytest.fixture(scope="module")
def filler():
    return load_text("python-docs").documents[0]


@pytest.fixture(scope="module")
def samples(tokenizer, filler):
    return recall_samples(tokenizer, filler=filler, **SAMPLE)


@torch.no_grad()
@pytest.mark.parametrize("query_aware", [False, True])
def test_without_a_press_it_is_the_stock_model(demo, tokenizer, filler, samples, query_aware):
    result = recall_accuracy(demo, tokenizer, filler=filler, query_aware=query_aware, **SAMPLE)
    stock, expected = stock_twin(demo), []
    for sample in samples:
        for key in sample.keys:
            ids = torch.cat([sample.context_ids, key.question_ids, key.answer_ids])[None]
            nll = -stock(ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])
            expected.append(float(nll[-len(key.answer_ids) :].mean()))
    assert [row.nll for row in result.rows] == pytest.approx(expected, abs=1e-4)
    assert result.accuracy >= 5 / 6 and result.nll == pytest.approx(sum(expected) / 6, abs=1e-4)


@torch.no_grad()
def test_another_wording_among_other_numbers_is_the_stock_model(demo, tokenizer, filler):
    asked = {**SAMPLE, "n_keys": 3, "template": "house", "n_distractors": 2}
    result, stock, expected = recall_accuracy(demo, tokenizer, filler=filler, **asked), stock_twin(demo), []
    [sample] = recall_samples(tokenizer, filler=filler, **asked)
    text = tokenizer.decode(sample.context_ids)
    assert all(f" {key.name} lives in house {key.digits} now." in text for key in sample.keys)
    for key in sample.keys:
        ids = torch.cat([sample.context_ids, key.question_ids, key.answer_ids])[None]
        nll = -stock(ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])
        expected.append(float(nll[-len(key.answer_ids) :].mean()))
    assert [row.nll for row in result.rows] == pytest.approx(expected, abs=1e-4)
    assert [row.name for row in result.rows] == [key.name for key in sample.keys]


@torch.no_grad()
def test_correct_is_what_greedy_generation_says(demo, samples):
    presses = [None, make_press("random", 0.5), make_press("streaming_llm", 0.5)]
    said = []
    for sample in samples:
        for i, key in enumerate(sample.keys):
            prompt = torch.cat([sample.context_ids, key.question_ids])[None]
            answer = demo.generate(prompt, max_new_tokens=len(key.answer_ids), do_sample=False, pad_token_id=0)
            rows = list(ask_each(demo, sample, presses))[i]
            said.append(rows[0].correct)
            assert said[-1] == torch.equal(answer[0, prompt.shape[1] :], key.answer_ids)
    assert any(said)


@pytest.mark.parametrize("query_aware", [False, True])
def test_no_digit_is_predicted_by_the_prefill(demo, samples, query_aware, monkeypatch):
    """Break the logits of every pass that starts an empty cache: nothing changes. Break the others: all changes."""
    press, read = make_press("snapkv", 0.5), demo.model.forward

    def answers(broken: str):
        def forward(past_key_values, **kwargs):
            starts = past_key_values.get_seq_length() == 0
            outputs = read(past_key_values=past_key_values, **kwargs)
            if broken == ("prefill" if starts else "reading"):
                outputs.last_hidden_state = -outputs.last_hidden_state
            return outputs

        monkeypatch.setattr(demo.model, "forward", forward)
        return [rows[0].nll for rows in ask_each(demo, samples[0], [press], query_aware)]

    sound = answers("nothing")
    assert answers("prefill") == sound
    assert all(abs(a - b) > 0.1 for a, b in zip(answers("reading"), sound))


def test_a_question_leaves_no_trace_for_the_next(demo, samples):
    press = make_press("adakv_snapkv", 0.5)
    together = [rows[0] for rows in ask_each(demo, samples[0], [press])]
    for key, row in zip(samples[0].keys, together):
        alone = recall.RecallSample(samples[0].context_ids, [key])
        assert next(ask_each(demo, alone, [press]))[0] == row


def test_losing_the_digits_loses_the_answer(demo, tokenizer, filler):
    """A press that evicts exactly the digits, and one that evicts as many tokens elsewhere."""
    from kvpress import ScorerPress

    samples = recall_samples(tokenizer, filler=filler, n_keys=6, keys_per_context=1, context_length=400, seed=1)
    outcome = {}
    for name, shift in (("digits", 0), ("elsewhere", 40)):
        rows = []
        for sample in samples:
            (key,) = sample.keys
            n = key.digits_span[1] - key.digits_span[0]
            first = key.digits_span[0] + (shift if key.digits_span[0] < 300 else -shift)

            class Surgical(ScorerPress):
                def score(self, module, hidden_states, keys, values, attentions, kwargs, first=first, n=n):
                    scores = torch.ones(keys.shape[:3])
                    scores[:, :, first : first + n] = 0
                    return scores

            rows += [rows[0] for rows in ask_each(demo, sample, [Surgical(n / 400 + 1e-9)])]
        outcome[name] = recall.RecallResult(rows)
    assert outcome["digits"].accuracy == 0 and outcome["elsewhere"].accuracy >= 5 / 6
    assert {row.digits_kept for row in outcome["digits"].rows} == {0.0}
    assert {row.digits_kept for row in outcome["elsewhere"].rows} == {1.0}


def test_what_is_kept_around_a_key_is_what_kept_positions_says(demo, samples):
    press, sample = make_press("snapkv", 0.6), samples[0]
    kept = kept_positions(demo, sample.context_ids[None], make_press("snapkv", 0.6))[:, 0].float()
    for key, (row,) in zip(sample.keys, ask_each(demo, sample, [press])):
        assert row.digits_kept == pytest.approx(float(kept[..., slice(*key.digits_span)].mean()))
        assert row.statement_kept == pytest.approx(float(kept[..., slice(*key.span)].mean()))
        assert row.kept_fraction == pytest.approx(0.4) and row.depth == key.depth
    (row,) = next(ask_each(demo, sample, [make_press("think")]))
    assert row.digits_kept is None and row.kept_fraction == 1


def test_rerotated_keys_are_told_by_the_press_inside_and_those_of_kvcompose_by_counting(demo, samples):
    sample = samples[0]
    inside, rotated, composed = next(
        ask_each(demo, sample, [make_press(n) for n in ("knorm", "key_rerotation_knorm", "kvcompose")])
    )
    assert rotated.digits_kept == inside.digits_kept > 0 and rotated.statement_kept == inside.statement_kept
    kept = kept_positions(demo, sample.context_ids[None], make_press("kvcompose"))
    assert 0 < composed.digits_kept < 1 and composed.kept_fraction == pytest.approx(float(kept.float().mean()))


@torch.no_grad()
def test_copy_attention_is_the_stock_models(demo, samples):
    stock, seen = stock_twin(demo), []
    for key in samples[0].keys:
        ids = torch.cat([samples[0].context_ids, key.question_ids, key.answer_ids])[None]
        weights = torch.stack(stock(ids[:, :-1], output_attentions=True).attentions)[:, 0]  # (layers, heads, T, T)
        first = ids.shape[1] - 1 - len(key.answer_ids)
        pairs = [weights[..., first + j, key.digits_span[0] + j] for j in range(len(key.answer_ids))]
        seen.append(torch.stack(pairs).mean(0))
    found = copy_attention(demo, samples[:1])
    assert (found - torch.stack(seen).mean(0)).abs().max() < 1e-4
    assert found.max() > 0.5 and (found > 0.1).float().mean() < 0.5  # few heads do it


def test_wrong_arguments_are_refused(demo, tokenizer, filler):
    with pytest.raises(ValueError, match="n_keys=0: must be a whole number of at least 1"):
        recall_accuracy(demo, tokenizer, filler=filler, n_keys=0, context_length=100)
    with pytest.raises(ValueError, match="context_length=20"):
        recall_accuracy(demo, tokenizer, filler=filler, n_keys=4, context_length=20)

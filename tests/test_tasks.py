"""Tasks through lm-evaluation-harness: without a press as the harness' own model on the stock class, under one as the
stock class that cannot see what was evicted."""

import random

import pytest
import torch
from conftest import stock_and_ours, tiny_config
from datasets import Dataset, DatasetDict
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvneox_lib import continuation_nll, generate, load_model, make_press
from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.answers import draws_for, shortened
from kvneox_lib.measures.decoding import continue_rows
from kvneox_lib.measures.evaluation import AskedTask, evaluate_each
from kvneox_lib.measures.prefill import prefill
from kvneox_lib.measures.questions import Form
from kvneox_lib.measures.survivors import kept_positions
from kvneox_lib.measures.tasks import KVNeoXLM
from kvneox_lib.measures.verify import masked_stock_logits
from kvneox_lib.neox.modeling import stock_twin
from kvneox_lib.presses.applying import attention
from kvneox_lib.presses.by_name import press_names
from kvneox_lib.presses.facts import acts, attention_needed

LENGTH = 256  # tokens that the models here take: prompts longer than that are cheap


@pytest.fixture
def bundled(demo, tokenizer):
    return LoadedModel(demo, tokenizer, "demo", "bundled", "in the box")


@pytest.fixture
def lm_of(bundled):
    def make(press=None, **how):
        return KVNeoXLM(bundled, press=press, **{"max_length": LENGTH, **how})

    return make


@pytest.fixture
def hf(demo, tokenizer):
    """The harness' own model around the stock class with the same weights."""
    return HFLM(pretrained=stock_twin(demo), tokenizer=tokenizer, batch_size=3, max_length=LENGTH, device="cpu")


@pytest.fixture(scope="module")
def prose(reading, tokenizer):
    return " ".join(tokenizer.decode(reading[0, 3000:6000]).split(" ")[1:-1]).strip()


def asked(*pairs: tuple[str, str], doc: dict | None = None) -> list[Instance]:
    return [Instance("loglikelihood", doc or {}, pair, 0, ("t", n, 1)) for n, pair in enumerate(pairs)]


def to_continue(prompts: list[str], **how) -> list[Instance]:
    return [Instance("generate_until", {}, (prompt, how), 0, ("t", n, 1)) for n, prompt in enumerate(prompts)]


def assert_same(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]], by: float = 1e-4) -> None:
    assert [said for _, said in ours] == [said for _, said in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=by / 10, abs=by)


# ---- no press: the harness' own model ----


def test_likelihoods_are_those_of_the_harness_own_model(lm_of, hf, prose):
    shared, draw = prose[:300], random.Random(0)
    pairs = [(shared, ending) for ending in (" yes", " no", " something longer than that", "\n\n", " yes and no")]
    for n in (1, 2, 7, 60, 300, 900, 1500, 3000):  # the last of them longer than the model
        at = draw.randrange(len(prose) - 4000)
        pairs.append((prose[at : at + n], prose[at + n : at + n + draw.randrange(1, 60)]))
    pairs += [("", "Hello world"), ("A context with trailing space ", "word"), ("Two  ", " and more"), ("a", " b")]
    pairs.append((prose[:500], prose[500:1200]))
    pairs += [("<|endoftext|>", "The"), (shared, " yes")]  # as the prefix itself; asked twice
    assert_same(lm_of().loglikelihood(asked(*pairs)), hf.loglikelihood(asked(*pairs)))


def test_a_likely_continuation_is_told_as_greedy(lm_of, hf, demo, tokenizer, prose):
    ids = tokenizer(prose[:400], return_tensors="pt").input_ids
    said = tokenizer.decode(generate(demo, ids, max_new_tokens=4).tokens[0])
    requests = asked((prose[:400], said), (prose[:400], said + " zebra"))
    ours = lm_of().loglikelihood(requests)
    assert [greedy for _, greedy in ours] == [True, False]
    assert_same(ours, hf.loglikelihood(requests))


def test_rolling_likelihoods_are_those_of_the_harness_own_model(lm_of, hf, prose):
    texts = [prose[:50], prose[100:1100], prose[:4000], "x"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", n, 1)) for n, text in enumerate(texts)]
    assert lm_of().loglikelihood_rolling(requests) == pytest.approx(hf.loglikelihood_rolling(requests), rel=1e-5)


@pytest.mark.parametrize("until", [["."], ["\n"], [" of the", "tion"], ["e t"], [], ["never to be said"]])
def test_texts_are_those_of_the_harness_own_model(lm_of, hf, prose, until):
    prompts = [prose[a : a + n] for a, n in ((0, 90), (500, 300), (800, 700), (1200, 2500), (40, 8), (2000, 300))]
    requests = to_continue(prompts, until=until, max_gen_toks=16)
    ours = lm_of().generate_until(requests)
    assert ours == hf.generate_until(requests)
    assert ours == lm_of(batch_size=4).generate_until(requests)
    assert not any(stop in text for text in ours for stop in until)


def test_requests_that_stop_differently_are_not_mixed(lm_of, hf, prose):
    short = to_continue([prose[:200], prose[900:1000]], until=["\n"], max_gen_toks=3)
    long = to_continue([prose[300:400], prose[:200]], until=["."], max_gen_toks=12)
    mixed = [short[0], long[0], short[1], long[1]]
    assert lm_of(batch_size=4).generate_until(mixed) == hf.generate_until(mixed)


def test_an_end_of_text_ends_it_as_in_the_harness_own_model(tokenizer):
    stock, ours = stock_and_ours(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=LENGTH))
    prompts = ["One two three", "Four five six seven"]
    third = generate(ours, tokenizer(prompts[0], return_tensors="pt").input_ids, max_new_tokens=3).tokens[0, 2]
    for model in (stock, ours):  # what the first of them says third is the end of text from now on
        rows = model.get_output_embeddings().weight.data
        rows[[0, int(third)]] = rows[[int(third), 0]]
    their = HFLM(pretrained=stock, tokenizer=tokenizer, batch_size=2, max_length=LENGTH, device="cpu")
    requests = to_continue(prompts, until=[], max_gen_toks=12)
    for batch_size in (1, 2):
        texts = KVNeoXLM(ours, tokenizer=tokenizer, batch_size=batch_size).generate_until(requests)
        assert texts == their.generate_until(requests)
        assert 0 < len(texts[0]) < len(texts[1]) and tokenizer.eos_token not in "".join(texts)


def test_a_temperature_draws(lm_of, prose):
    request = to_continue([prose[:300]], until=[], max_gen_toks=12, do_sample=True, temperature=1.5)
    greedy = to_continue([prose[:300]], until=[], max_gen_toks=12, do_sample=False, temperature=1.5)
    drawn = {lm_of().generate_until(request)[0] for _ in range(4)}
    assert len(drawn) > 1
    assert lm_of().generate_until(greedy) == lm_of().generate_until(to_continue([prose[:300]], max_gen_toks=12))


# ---- under a press: the stock model that cannot see what was evicted ----

MASKED = ("streaming_llm", "snapkv", "pyramidkv", "adakv_snapkv")


def masked_likelihood(model, context: list[int], rest: list[int], tokens: list[int], press) -> tuple[float, bool]:
    """In one pass of transformers' own class."""
    ids, read = torch.tensor([context]), torch.tensor([[*rest, *tokens]])
    kept = kept_positions(model, ids, press)
    logits = masked_stock_logits(model, ids, read, kept)[0, len(rest) - 1 :]
    targets = torch.tensor(tokens)
    each = logits.log_softmax(-1).gather(-1, targets[:, None])
    return float(each.sum()), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("question", ["outside", "inside"])
@pytest.mark.parametrize("name", MASKED)
def test_likelihoods_under_a_press_are_those_of_the_stock_model_behind_a_mask(
    lm_of, demo, tokenizer, prose, name, question
):
    context, endings = prose[:700].strip(), [" no, never", "\n\n"]
    questions = ["\nQuestion: What is a name?\nAnswer:", "\nAnd then?"]
    requests = asked(*((context + q, ending) for q in questions for ending in endings), doc={"context": context})
    lm = lm_of(name, question=question)
    expected = []
    n_context = len(tokenizer.encode(context))
    for request in requests:
        prompt, ending = request.args
        ids = tokenizer.encode(prompt)
        n = n_context if question == "outside" else len(ids) - 1
        press = make_press(name, 0.5)
        expected.append(masked_likelihood(demo, ids[:n], ids[n:], tokenizer.encode(ending), press))
    answers = lm.loglikelihood(requests)
    assert_same(answers, expected, by=1e-3)
    assert {reading.rule for reading in lm.readings} == {"context" if question == "outside" else "inside"}
    assert {reading.context_tokens for reading in lm.readings} >= {n}
    moved = [abs(one - other) for (one, _), (other, _) in zip(answers, lm_of().loglikelihood(requests))]
    assert max(moved) > 0.1  # the press is felt at all


@pytest.mark.parametrize("name", MASKED)
def test_long_prompts_are_cut_and_then_compressed(lm_of, demo, tokenizer, prose, name):
    """With no document to tell a context, all but the last token is."""
    ((answer),) = lm_of(name).loglikelihood(asked((prose, " and so on")))
    tokens = tokenizer.encode(" and so on")
    ids = tokenizer.encode(prose)[-(LENGTH + 1 - len(tokens)) :]
    assert_same([answer], [masked_likelihood(demo, ids[:-1], ids[-1:], tokens, make_press(name, 0.5))], by=1e-3)


@pytest.mark.parametrize("name", MASKED)
def test_texts_under_a_press_are_those_of_the_stock_model_behind_a_mask(lm_of, demo, tokenizer, prose, name):
    contexts = [prose[a:z].strip() for a, z in ((0, 700), (100, 600), (900, 1500))]
    requests = [
        Instance("generate_until", {"context": c}, (c + "\nSo what?", {"until": [], "max_gen_toks": 5}), 0, ("t", n, 1))
        for n, c in enumerate(contexts)
    ]
    lm = lm_of(name, batch_size=3)
    for context, text in zip(contexts, lm.generate_until(requests)):
        ids = tokenizer.encode(context + "\nSo what?")
        n = len(tokenizer.encode(context))
        kept, said = kept_positions(demo, torch.tensor([ids[:n]]), make_press(name, 0.5)), []
        for _ in range(5):
            read = torch.tensor([[*ids[n:], *said, 0]])
            said.append(int(masked_stock_logits(demo, torch.tensor([ids[:n]]), read, kept)[0, -1].argmax()))
        assert text == tokenizer.decode(said, skip_special_tokens=True)
    assert [reading.doc_id for reading in lm.readings] == [0, 1, 2]
    assert {round(reading.kept_fraction, 1) for reading in lm.readings} == {0.5}


QUESTION, ENDING = "\nQuestion: What is it?\nAnswer:", " the name of the thing"


NAMES = [  # but those that take a list, or statistics that take long
    name for name in press_names() if not name.startswith(("per_layer", "qfilter"))
]


def strength_of(name: str) -> dict:
    """Presses that act while decoding, soon enough to be felt in a few tokens."""
    if acts(make_press(name)) != "decoding" or name == "cam_streaming_llm":  # which acts at every step
        return {}
    soon = {"compression_interval": 3}
    if name != "ratio_decoding_knorm":
        soon |= {"target_size": 90}
    return soon | ({"window_size": 2} if name == "decoding_snapkv" else {})


@pytest.mark.parametrize("name", NAMES)
def test_every_press_answers_as_it_does_where_perplexity_is_measured(lm_of, demo, tokenizer, prose, name):
    """Presses that need eager attention get it, and all is left as it was found (the fixture looks)."""
    context, rest, tokens = (tokenizer.encode(part) for part in (prose[:500].rstrip(), QUESTION, ENDING))
    options = strength_of(name)
    lm = lm_of(name, **options)
    request = asked((prose[:500].rstrip() + QUESTION, ENDING), doc={"context": prose[:500]})
    ((value, _),) = lm.loglikelihood(request)
    assert lm.readings[0].context_tokens == len(context) and lm.readings[0].compressed == (name != "no_press")
    press = make_press(name, 0.5, **options)
    with attention(demo, "eager" if attention_needed(press) == "eager" else "sdpa"):
        torch.manual_seed(draws_for(0, context))
        nll = continuation_nll(demo, torch.tensor([context + rest + tokens]), n_context=len(context), press=press)
    assert value == pytest.approx(-float(nll[0, -len(tokens) :].sum()), abs=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if acts(make_press(name)) == "decoding"])
def test_presses_that_act_while_decoding_answer_each_request_as_if_it_were_alone(lm_of, demo, tokenizer, prose, name):
    """Their counters are of one continuation, and rows are not decoded together."""
    options = strength_of(name)
    doc = {"context": prose[:500]}
    endings = (" a much longer name of the thing than that", ENDING)
    requests = asked(*((prose[:500].rstrip() + QUESTION, ending) for ending in endings), doc=doc)
    together = lm_of(name, **options).loglikelihood(requests)
    alone = [lm_of(name, **options).loglikelihood([request])[0] for request in requests]
    assert_same(together, alone, by=1e-5)

    texts = to_continue([prose[:300], prose[600:1100]], until=[], max_gen_toks=9)
    made = lm_of(name, batch_size=2, **options).generate_until(texts)
    for request, text in zip(texts, made):
        ids = tokenizer(request.args[0], return_tensors="pt").input_ids
        press = make_press(name, 0.5, **options)
        tokens = generate(demo, ids[:, :-1], press=press, question_ids=ids[:, -1:], max_new_tokens=9).tokens
        assert text == tokenizer.decode(tokens[0])


# ---- several presses in one go ----

DOCUMENTS = [
    {"context": " ".join(f"The box number {n} holds {n + 3} balls." for n in range(9)), "query": f"In box {n} are"}
    | {"choices": [f"{n + 3} balls", "no balls at all", "cats"], "label": n % 2}
    for n in range(4)
]
CHOOSING = {
    "task": "choosing",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}\nQuestion: {{query}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
SAYING = {
    "task": "saying",
    "output_type": "generate_until",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{choices[0]}}",
    "fewshot_split": "test",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def manager_of_none() -> TaskManager:
    return TaskManager(include_defaults=False)  # to look for all of the harness' tasks takes seconds


@pytest.fixture
def no_pip_list(monkeypatch):
    """The harness asks pip what is installed, for its record, which takes longer than the task."""
    monkeypatch.setattr(evaluator, "add_env_info", lambda record: None)


def on_documents(config: dict) -> dict:
    data = DatasetDict({"test": Dataset.from_list(DOCUMENTS)})
    return config | {"custom_dataset": lambda **_: data, "test_split": "test"}


def scores_of(results: dict) -> dict:
    return {task: {k: v for k, v in found.items() if "stderr" not in k} for task, found in results["results"].items()}


def answers_of(results: dict) -> dict:
    return {task: [(one["doc_id"], one["resps"]) for one in samples] for task, samples in results["samples"].items()}


def task_of(config: dict, shots: int = 0) -> AskedTask:
    task = ConfigurableTask(config=on_documents(config) | {"num_fewshot": shots})
    return AskedTask(config["task"], task, limit=3, seed=5)


@pytest.mark.parametrize(
    "config, shots, names, rule",
    [
        (CHOOSING, 0, ("streaming_llm", "no_press", "kvzip"), "context"),
        (CHOOSING, 3, ("no_press", "knorm", "adakv_snapkv"), "context"),
        (SAYING, 3, ("no_press", "knorm", "adakv_snapkv"), "fewshot"),
    ],
)
def test_presses_in_one_go_are_each_press_alone(lm_of, no_pip_list, config, shots, names, rule):
    options = {"window_size": 8}
    presses = [make_press(name, 0.5, **(options if "snapkv" in name else {})) for name in names]
    together = list(evaluate_each(lm_of(), presses, task_of(config, shots)))
    assert len(together) == len(names)
    for name, (results, readings) in zip(names, together):
        lm = lm_of(name, **(options if "snapkv" in name else {}))
        lm.forms = {"saying": Form(SAYING["doc_to_text"])}
        how = {"num_fewshot": shots or None, "limit": 3, "fewshot_random_seed": 5}
        alone = simple_evaluate(lm, tasks=[on_documents(config)], task_manager=manager_of_none(), **how)
        assert scores_of(results) == scores_of(alone)
        assert answers_of(results) == answers_of(alone)
        assert readings == lm.readings and len(readings) == 3 * (3 if config is CHOOSING else 1)
        assert {reading.rule for reading in readings} == {rule}
    assert len({str(answers_of(results)) for results, _ in together}) > 1  # a press is felt


def test_what_some_presses_read_and_others_refuse_is_told(lm_of):
    presses = [make_press("observed_attention", 0.5), make_press("adakv_snapkv", 0.5)]
    with pytest.raises(ValueError, match="some read eager attention, others refuse it"):
        next(evaluate_each(lm_of(), presses, task_of(CHOOSING)))


def test_the_harness_finds_it_by_name(no_pip_list):
    results = simple_evaluate(
        model="kvneox",
        model_args="pretrained=demo,weights=auto,press=snapkv,compression_ratio=0.5,window_size=16,dtype=float32",
        tasks=[on_documents(CHOOSING)],
        task_manager=manager_of_none(),
        limit=2,
    )
    assert results["config"]["press"] == "snapkv" and results["config"]["weights"] == "bundled"
    assert results["config"]["kept_fraction"] == pytest.approx(0.5, abs=0.02)
    assert results["config"]["context_rule"] == "context=2"
    press = make_press("snapkv", 0.5, window_size=16)
    lm = KVNeoXLM(load_model("demo", dtype="float32"), press=press)
    alone = simple_evaluate(lm, tasks=[on_documents(CHOOSING)], task_manager=manager_of_none(), limit=2)
    assert answers_of(results) == answers_of(alone)


# ---- how a prompt is shortened ----


def test_what_is_left_of_a_prompt_and_how_much_of_it_is_context():
    draw = random.Random(1)
    for _ in range(3000):
        n = draw.randrange(1, 40)
        n_context, room, cut = draw.randrange(n), draw.randrange(1, 45), draw.choice(["left", "middle"])
        prompt = shortened(range(n), n_context, room, cut, "a rule")
        n_cut = max(n - room, 0)
        assert (len(prompt.ids), prompt.n_cut, prompt.rule) == (n - n_cut, n_cut, "a rule")
        if cut == "left" or not n_cut:
            assert list(prompt.ids) == list(range(n))[n_cut:]
        else:  # the halves at both ends, of which the latter may be longer by one
            assert list(prompt.ids) == [*range(n)][: room // 2] + [*range(n)][n - (room - room // 2) :]
        assert list(prompt.context) == [token for token in prompt.ids if token < n_context]
        assert list(prompt.rest) == [token for token in prompt.ids if token >= n_context] and prompt.rest


def test_a_prompt_cut_in_the_middle_is_the_prompt_without_it(lm_of, tokenizer, prose):
    ids = tokenizer.encode(prose)
    room = LENGTH + 1 - len(tokenizer.encode(ENDING))
    left = tokenizer.decode([*ids[: room // 2], *ids[-(room - room // 2) :]])
    cut, short = (lm_of(cut="middle").loglikelihood(asked((text, ENDING))) for text in (prose, left))
    assert tokenizer.encode(left) == [*ids[: room // 2], *ids[-(room - room // 2) :]]
    assert_same(cut, short, by=1e-5)
    assert abs(cut[0][0] - lm_of().loglikelihood(asked((prose, ENDING)))[0][0]) > 1e-3


# ---- what is refused, before any work ----


def test_what_cannot_be_answered_is_refused(lm_of, prose):
    empty = asked((prose[:200], ""))
    with pytest.raises(ValueError, match="t, document 0: the continuation is empty"):
        lm_of().loglikelihood(empty)
    with pytest.raises(ValueError, match="no token beside the prompt's last"):
        lm_of().loglikelihood(asked(("", "<|endoftext|>")))
    with pytest.raises(ValueError, match="KnormPress: no prompt has a context that it can compress"):
        lm_of("knorm").loglikelihood(asked(("One", " two")))
    with pytest.raises(ValueError, match="SnapKVPress: no prompt .* the longest has 3 token.*num_fewshot"):
        lm_of("snapkv").loglikelihood(asked(("One two three four", " five"), ("One", " two")))
    with pytest.raises(ValueError, match="SnapKVPress: no prompt"):
        lm_of("snapkv").generate_until(to_continue(["One two three four"], until=[], max_gen_toks=5))
    with pytest.raises(ValueError, match="press='snapkv': a rolling likelihood .*notebook 01"):
        lm_of("snapkv").loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (prose,), 0, ("t", 0, 1))])
    with pytest.raises(ValueError, match=f"tokens after the prompt; allowed are {LENGTH}"):
        lm_of().loglikelihood(asked(("One", prose)))


def test_a_few_short_contexts_among_long_ones_are_read_as_they_are(lm_of, prose):
    requests = asked(("One two three four", " five"), (prose[:900], ENDING))
    lm = lm_of("snapkv")
    answers = lm.loglikelihood(requests)
    assert_same(answers[:1], lm_of().loglikelihood(requests[:1]))
    assert [reading.compressed for reading in lm.readings] == [False, True]
    assert [reading.kept_fraction for reading in lm.readings] == pytest.approx([1, 0.5], abs=0.01)
    assert lm.get_model_info()["n_not_compressed"] == 1


@pytest.mark.parametrize(
    "how, message",
    [
        ({"num_beams": 3}, "generation_kwargs num_beams.*allowed are until, max_gen_toks, do_sample, temperature"),
        ({"max_gen_toks": LENGTH}, f"max_gen_toks={LENGTH}: allowed are at most {LENGTH - 1}"),
    ],
)
def test_generation_kwargs_that_are_not_to_be_had_are_refused(lm_of, how, message):
    with pytest.raises(ValueError, match=message):
        lm_of().generate_until(to_continue(["One"], until=["."], **how))


@pytest.mark.parametrize(
    "how, message",
    [
        ({"question": "middle"}, "question='middle'.*outside, inside"),
        ({"cut": "right"}, "cut='right'.*left, middle"),
        ({"batch_size": "auto"}, "batch_size='auto': must be a whole number"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"press": "snapvk"}, "press 'snapvk' is unknown; did you mean snapkv"),
        ({"press": "snapkv", "windw_size": 3}, "windw_size"),
        ({"press": "snapkv", "compression_ratio": 1.5}, "compression_ratio=1.5"),
        ({"no_such_argument": 3}, "no_such_argument"),
        ({"pretrained": "demo", "weights": "random"}, "weights='random': random weights answer nothing"),
        ({"pretrained": "demo", "weights": "none"}, "weights='none'"),
    ],
)
def test_arguments_that_are_wrong_are_refused(bundled, how, message):
    with pytest.raises(ValueError, match=message):
        KVNeoXLM(**{"pretrained": bundled, **how})


def test_a_model_is_given_with_its_tokenizer(demo):
    with pytest.raises(ValueError, match="tokenizer=None: must be that of the model"):
        KVNeoXLM(demo)


# ---- decoding until something is said ----


def test_decoding_stops_where_it_is_told_to(demo, reading):
    rows = reading[:, 500:900].view(2, 200)
    free = generate(demo, rows, max_new_tokens=12, stop_at_eos=False).tokens
    told = []

    def says(tokens: torch.Tensor) -> torch.Tensor:
        told.append(tokens.shape)
        return torch.tensor([tokens.shape[1] >= 3, tokens.shape[1] >= 5])

    made = generate(demo, rows, max_new_tokens=12, stop_when=says).tokens
    assert told == [(2, n) for n in range(1, 6)]  # after each step, and nothing is decoded beyond
    assert made.shape == (2, 5) and torch.equal(made[1], free[1, :5]) and torch.equal(made[0, :3], free[0, :3])
    assert (made[0, 3:] == demo.generation_config.eos_token_id).all()


@pytest.mark.parametrize("name", ["no_press", "snapkv", "adakv_snapkv"])
def test_rows_read_before_go_on_as_generate_does(demo, reading, name):
    """Contexts and questions of unequal length, each read by itself, decoded together."""
    contexts = [reading[:, 500:700], reading[:, 900:1030], reading[:, 2000:2200]]
    questions = [reading[0, 700:703], reading[0, 1030:1031], reading[0, 2200:2207]]
    caches = [prefill(demo, context, make_press(name, 0.6)) for context in contexts]
    positions = [context.shape[1] for context in contexts]
    made = continue_rows(demo, caches, questions, make_press(name, 0.6), positions, max_new_tokens=9)
    for row, context, question in zip(made, contexts, questions):
        alone = generate(
            demo, context, press=make_press(name, 0.6), question_ids=question[None], max_new_tokens=9
        ).tokens[0]
        assert torch.equal(row[: len(alone)], alone)

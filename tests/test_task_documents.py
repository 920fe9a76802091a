"""The bundled tasks: what their documents say, and that the harness' own model can do them."""

import re
from collections import Counter
from itertools import pairwise

import pytest

from kvneox_lib.inputs.tasks import documents
from kvneox_lib.inputs.text import load_text

lm_eval = pytest.importorskip("lm_eval")
FOLDER = documents.__file__.rpartition("/")[0]
TASKS = {
    "kvneox_passkey": documents.passkey,
    "kvneox_multikey": documents.multikey,
    "kvneox_cloze": documents.cloze,
    "kvneox_cloze_free": documents.cloze,
    "kvneox_copy": documents.copy,
}
MAKERS = [documents.passkey, documents.multikey, documents.cloze, documents.copy]
STATED = re.compile(r" The passkey of (\w+) is (\d{5})\. Remember it\.")
PUNCTUATION = "\"'“”‘’()[]{}<>*`|.,;:!?—"


@pytest.fixture(scope="module")
def book():
    return load_text("python-docs").documents[0]


@pytest.fixture(scope="module")
def made():
    """The documents of each task as they are by default."""
    return {make: make()["test"].to_list() for make in MAKERS}


def lower_words(text: str) -> list[str]:
    return [piece.strip(PUNCTUATION).lower() for piece in text.split()]


@pytest.mark.parametrize("make", MAKERS)
def test_documents_are_the_same_each_time_whatever_else_the_harness_hands_over(make, made):
    again = make(n_documents=30, version=1.0, config_source="elsewhere")["test"].to_list()
    assert again == made[make][:30]
    other = make(n_documents=30, seed=1)["test"].to_list()
    assert not {document["context"] for document in other} & {document["context"] for document in again[:5]}


@pytest.mark.parametrize("make", MAKERS)
def test_contexts_differ_are_as_long_as_asked_and_begin_and_end_with_a_word(make, made, book):
    rows = made[make]
    assert len(rows) == 240
    assert len({row["context"] for row in rows}) == 240
    for row in rows:
        context = row["context"]
        assert 0.85 * 3600 <= len(context) <= 3600
        start = STATED.sub("", context)[:200]
        assert re.search(rf"[.!?][\"'”’)\]]*\s+{re.escape(start)}", book) or book.startswith(start)
        assert not context[-1].isspace() and row["question"][0].isspace() and not row["question"][-1].isspace()
        assert row["choices"][row["label"]] == row["answer"]
    short = make(n_documents=12, context_characters=1500)["test"].to_list()
    assert all(0.85 * 1500 <= len(row["context"]) <= 1500 for row in short)


@pytest.mark.parametrize("make", MAKERS)
def test_the_first_documents_are_a_fair_sample(make, made, book):
    """All depths, the whole of the book, and every label: a limit cuts the list."""
    first = made[make][:24]
    depths = sorted(row["depth"] for row in first)
    assert depths[0] < 0.1 and depths[-1] > 0.9
    assert max(b - a for a, b in pairwise(depths)) < 0.18
    places = sorted(book.index(STATED.sub("", row["context"])) / len(book) for row in first)
    assert max(b - a for a, b in pairwise([0, *places, 1])) < 0.2
    if len(first[0]["choices"]) > 1:
        assert set(Counter(row["label"] for row in first).values()) == {6}


def test_the_passkey_that_is_asked_for_stands_once_where_it_is_said_to(made, book):
    for row in made[documents.passkey]:
        name = re.fullmatch(r"\n\nWhat is the passkey of (\w+)\? The passkey of \1 is", row["question"])[1]
        stated = STATED.findall(row["context"])
        assert len(stated) == len(dict(stated)) == 4 and dict(stated)[name] == row["answer"]
        assert name not in book
        place = next(m.start() for m in STATED.finditer(row["context"]) if m[1] == name)
        assert row["depth"] == pytest.approx(place / len(row["context"]))
        assert STATED.sub("", row["context"]) in book  # the filler goes on across the statements


def test_one_choice_tells_three_passkeys_right_and_each_other_one_right_alone(made):
    for row in made[documents.multikey]:
        stated = dict(STATED.findall(row["context"]))
        told = [
            re.findall(r"passkey of (\w+) is (\d{5})\.", f"{row['question']} {choice}") for choice in row["choices"]
        ]
        assert len(set(row["choices"])) == 4
        assert all([name for name, _ in choice] == [name for name, _ in told[0]] for choice in told)
        right = [[digits == stated[name] for name, digits in choice] for choice in told]
        assert right[row["label"]] == [True] * 3
        assert sorted(map(sum, right)) == [1, 1, 1, 3]
        assert {tuple(sorted(digits for _, digits in choice)) for choice in told} == {
            tuple(sorted(stated[name] for name, _ in told[0]))
        }
        assert len(set(map(tuple, right))) == 4  # so each of the three is the only right one somewhere


def test_the_word_of_a_cloze_stands_once_in_the_context_and_only_it_follows_there(made, book):
    for row in made[documents.cloze]:
        context, question, answer = lower_words(row["context"]), lower_words(row["question"]), row["answer"]
        assert re.search(re.escape(row["context"] + row["question"]) + rf" {answer}\b", book)
        assert len(question) == 10 and len(answer) >= 4
        assert context.count(answer) == 1 and answer not in question
        assert context[context.index(answer) - 1] == question[-1]
        place = row["context"].lower().index(answer, int(row["depth"] * len(row["context"])) - 5)
        assert place - row["depth"] * len(row["context"]) == pytest.approx(0, abs=5)  # a quotation mark may come first
        for choice in set(row["choices"]) - {answer}:
            assert choice in context and choice not in question
            assert (question[-1], choice) not in pairwise([*context, *question])
            assert re.search(rf"\b{re.escape(question[-1])}\W+{choice}\b", book, re.I)
        assert len(set(row["choices"])) == 4


def test_the_copy_goes_on_as_the_sentence_did(made):
    for row in made[documents.copy]:
        beginning = row["question"].removeprefix("\n\n")
        assert row["question"] == f"\n\n{beginning}" and 8 <= len(beginning.split()) <= 16
        assert row["context"].count(beginning) == 1
        place = row["context"].index(beginning)
        assert row["context"][place + len(beginning) :].startswith(f" {row['answer']}")
        assert len(row["answer"].split()) == 3
        assert row["depth"] == pytest.approx(place / len(row["context"]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_documents": 0}, "n_documents=0.*at least 1"),
        ({"context_characters": 50}, "context_characters=50.*at least 600"),
        ({"context_characters": 10**7}, "context_characters=10000000.*at most"),
        ({"seed": "a"}, "seed='a'"),
        ({"n_documents": 10**4}, "n_documents=10000.*places for [1-9]"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        documents.cloze(**wrong)


@pytest.fixture(scope="module")
def tasks():
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=FOLDER, include_defaults=False, metadata={"n_documents": 24})


def test_every_task_is_found_and_asks_what_its_documents_say(tasks):
    assert set(tasks.all_subtasks) == set(TASKS)
    for name, make in TASKS.items():
        task = tasks.load(name)["tasks"][name]
        rows = make(n_documents=24)["test"].to_list()
        assert list(task.test_docs()) == rows
        for row in rows[:3]:
            assert task.fewshot_context(row, 0) == row["context"] + row["question"]


def test_tasks_fit_the_context_of_the_bundled_model(made, tokenizer):
    for rows in made.values():
        for row in rows:
            longest = max(row["choices"], key=len)
            prompt = tokenizer(f"{row['context']}{row['question']} {longest}", verbose=False).input_ids
            assert len(prompt) <= 1900


def test_the_harness_own_model_can_tell_passkeys(tasks, demo, tokenizer):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=demo, tokenizer=tokenizer, max_length=2048, batch_size=4)
    found = lm_eval.simple_evaluate(model, tasks=["kvneox_passkey"], task_manager=tasks, bootstrap_iters=0)
    assert found["results"]["kvneox_passkey"]["exact_match,none"] >= 0.9
    for sample in found["samples"]["kvneox_passkey"]:  # told again from what the model wrote
        written = re.match(r"\s*(\d+)", sample["resps"][0][0])
        assert sample["exact_match"] == (written is not None and written[1] == sample["doc"]["answer"])

"""Where a prompt's context ends: in the prompts that lm-evaluation-harness itself builds from its own task files, with
documents in the columns that those tasks read."""

import json
import random
import unicodedata
from pathlib import Path

import lm_eval.tasks
import pytest
from conftest import REPOSITORY
from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerFast

from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.questions import Form, end_of_context, form_of
from kvneox_lib.measures.tasks import KVNeoXLM

TASK_FILES = Path(lm_eval.tasks.__file__).parent
PYTHIA_TOKENIZER = REPOSITORY.parent / "shared/data/pythia-published/20B_tokenizer.json"


def task_of(path: str, documents: list[dict], **changes) -> ConfigurableTask:
    """One of the harness' tasks on documents of our own, which are also its shots."""
    config = load_yaml(TASK_FILES / path, resolve_func="ruler" not in path)  # whose functions download essays and words
    for split in ("training_split", "validation_split", "test_split"):
        config.pop(split, None)
    data = DatasetDict({"test": Dataset.from_list(documents)})
    config |= {"custom_dataset": lambda **_: data, "test_split": "test", "fewshot_split": "test"}
    task = ConfigurableTask(config=config | changes)
    task.set_fewshot_seed(1)
    return task


def prompts_of(task: ConfigurableTask, shots: int = 0) -> list[tuple[str | list[str], dict]]:
    """What the harness asks of each document: a prompt; several where the choices are what is read."""
    prefix = task.config.gen_prefix
    return [
        (task.fewshot_context(doc, shots, gen_prefix=prefix and task.resolve_field(doc, prefix)), doc)
        for doc in task.eval_docs
    ]


def split(prompt: str, doc: dict, task: ConfigurableTask | None = None) -> tuple[str, str, str]:
    """The context, what is asked, and the rule."""
    end, rule = end_of_context(prompt, doc, lambda: task and Form.of(task.config))
    end = len(prompt) if end is None else end
    return prompt[:end], prompt[end:], rule


# ---- the passages are a field of their own ----

PASSAGES = "Passage 1:\nThe café of Zoë was built in 1921. \n\nPassage 2:\nIt was pulled down in 1950.\n"


@pytest.mark.parametrize("context", [PASSAGES, PASSAGES.strip(), PASSAGES + " \n", "短い文章。" * 9 + "🙂"])
@pytest.mark.parametrize("name", ["hotpotqa_e", "narrativeqa", "triviaqa", "passage_count", "gov_report", "lcc_e"])
def test_longbench_ends_its_context_where_the_field_ends(name, context):
    columns = {"question": "When was it built?", "input": "", "answers": ["1921"], "all_classes": []}
    task = task_of(f"longbench/{name}.yaml", [{**columns, "context": context}])
    ((prompt, doc),) = prompts_of(task)
    before, _, after = prompt.partition(context.strip())
    found, asked, rule = split(prompt, doc, task)
    assert rule == "context"
    assert found.startswith(before + context.strip()) and not found.removeprefix(before + context.strip()).strip()
    assert asked.strip() == after.strip() and asked


def test_a_context_that_is_quoted_twice_ends_with_the_last():
    doc = {"context": "The sky is blue."}
    prompt = "The sky is blue. Is it? The sky is blue. Once more: is it?"
    assert split(prompt, doc) == ("The sky is blue. Is it? The sky is blue.", " Once more: is it?", "context")


def test_a_context_that_the_prompt_does_not_quote_is_no_rule():
    assert split("Is it?", {"context": "The sky is blue."}) == ("Is it?", "", "none")
    assert split("Is it?", {"context": "Is it?"}) == ("Is it?", "", "none")  # nothing would be left to ask
    assert split("Is it?", {"context": ""}) == ("Is it?", "", "none")
    assert split("Is it?", None) == ("Is it?", "", "none")


# ---- RULER ----

NEEDLES = "\n".join(["The grass is green."] * 5 + ["One of the special magic numbers for pier is: 4711."])
CHAIN = "The grass is green. The sky is blue.\n VAR ABC = 12345 Here we go.\n VAR DEF = VAR ABC \n"
RULER = {  # body, question, and what leads to the answer, as the generators of RULER write them
    "niah_single_1": (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\n{NEEDLES}",
        "What is the special magic number for pier mentioned in the provided text?",
        "The special magic number for pier mentioned in the provided text is",
    ),
    "vt": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{CHAIN}\nQuestion: Find all variables that are assigned the value 54321 in the text above. Answer: Z\n\n\n"
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{CHAIN}",
        "Question: Find all variables that are assigned the value 12345 in the text above.",
        "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assgined the "
        "value 12345, they are:",
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n1. tree 2. house 3. tree",
        "Question: What are the 10 most common words in the above list?",
        "Answer: The top 10 words that appear most often in the list are:",
    ),
    "qa_squad": (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\nDocument 1:\nAda was born in 1815.\n\nDocument 2:\nBob was not.\n\n"
        "Answer the question based on the given documents. Only give me the answer and do not output any other words\n",
        "Question: When was Ada born?",
        "Answer:",
    ),
}


@pytest.mark.parametrize("name", RULER)
@pytest.mark.parametrize("tail", ["", " ", "\n"])
def test_ruler_asks_in_its_last_line(name, tail):
    body, question, leads = RULER[name]
    doc = {"input": f"{body}\n{question}{tail}", "outputs": ["4711"], "gen_prefix": leads, "max_length": 4096}
    task = task_of(f"ruler/{name}.yaml", [doc], process_results=None, metric_list=[{"metric": "acc"}])
    ((prompt, doc),) = prompts_of(task)
    found, asked, rule = split(prompt, doc, task)
    assert (found, rule) == (body, "ruler")
    assert asked.split() == f"{question} {leads}".split()


@pytest.mark.parametrize("name", ["vt", "cwe"])  # that of needles wants the network
def test_ruler_asks_in_its_last_line_in_what_its_own_generators_write(name, tokenizer):
    pytest.importorskip("wonderwords")
    from lm_eval.tasks.ruler import cwe_utils, vt_utils

    random.seed(0)
    if name == "vt":
        (shot,) = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)
        written = vt_utils.sys_vartrack_w_noise_random(tokenizer, 2, 1500, icl_example=shot)
    else:
        written = cwe_utils.sys_word_pair_random(2, 700, tokenizer)
    for doc in written:
        found, asked, rule = split(f"{doc['input']} {doc['gen_prefix']}", doc)
        assert rule == "ruler" and asked.startswith("\nQuestion:") and asked.count("\n") == 1
        assert set(doc["outputs"]) <= set(found.split())


# ---- shots ----

LAMBADA = [{"text": f"In town number {n} lived a man whose name was Tom{n}"} for n in range(6)]
HELLASWAG = [
    {
        "ind": n,
        "activity_label": "Baking",
        "ctx_a": f"A cook [title] takes {n} eggs.",
        "ctx_b": "the cook",
        "endings": ["breaks them.", "[x] flies away.", "sings.", "is a tree."],
        "label": "0",
    }
    for n in range(6)
]
WINOGRANDE = [
    {"sentence": f"The {n} trophies did not fit the bags because the _ were small.", "option1": "bags", "answer": "1"}
    | {"option2": "trophies"}
    for n in range(6)
]
WSC = [
    {"text": f"{n} cats saw {n} mice because they ran.", "options": [f"{n} cats", f"{n} mice"], "label": 0}
    | {"pronoun": "they", "pronoun_loc": 24, "quote": "they ran", "quote_loc": 24, "source": ""}
    for n in range(6)
]
PIQA = [{"goal": f"Boil {n} eggs", "sol1": "Use water.", "sol2": "Use sand.", "label": 0} for n in range(6)]


def last_document(task: ConfigurableTask, doc: dict, number: int) -> str:
    """As the harness renders it, before the answer."""
    return task.doc_to_choice(doc)[number] if task.multiple_input else task.doc_to_text(doc)


@pytest.mark.parametrize("description", ["", "Go on with the text of {{'a' ~ 'n'}} author.\n\n"])
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize(
    "path, documents, form",
    [
        ("lambada/lambada_openai.yaml", LAMBADA, "lambada_openai"),
        ("hellaswag/hellaswag.yaml", HELLASWAG, "hellaswag"),
        ("winogrande/default.yaml", WINOGRANDE, "winogrande"),
        ("wsc273/default.yaml", WSC, "wsc273"),
        ("piqa/piqa.yaml", PIQA, "piqa"),
    ],
)
def test_shots_are_the_context_and_the_last_document_is_asked(path, documents, form, shots, description):
    task = task_of(path, documents, description=description)
    known = form_of(form)  # as it stands in the harness' index, without the data
    for prompt, doc in prompts_of(task, shots):
        for number, one in enumerate(prompt if task.multiple_input else [prompt]):
            last = last_document(task, doc, number)
            for told in (Form.of(task.config), Form(known.doc_to_text, known.doc_to_choice, description)):
                end, rule = end_of_context(one, doc, lambda told=told: told)
                if shots:
                    assert rule == "fewshot" and one[end:] == last
                else:  # a description alone is no shot
                    assert (end, rule) == (None, "none")


def test_a_task_that_the_index_does_not_know_has_no_form():
    assert form_of("no_such_task") is None
    assert form_of(None) is None
    assert split("Once. Twice.", {"text": "Twice."}, None)[2] == "none"


# ---- a passage that is quoted ----

BOOLQ = [{"passage": f"Cats{n} are felines. They meow.", "question": "do cats meow", "label": 1} for n in range(6)]
SCIQ = [
    {"support": " Mesophiles grow best in moderate temperature.\n", "question": "What grows?", "correct_answer": "a"}
    | {f"distractor{n}": f"b{n}" for n in (1, 2, 3)}
]
PROBLEMS = [
    {"question": "Who is Tom?", "answer": "A", "options": ["a boy", "a cat", "a dog", "a car"]},
    {"question": "Tom was  _  .", "answer": "B", "options": ["old", "sad", "red", "big"]},
]
RACE = [{"article": "Tom is a boy.\nHe was sad.", "problems": str(PROBLEMS)}]


@pytest.mark.parametrize(
    "path, documents, passage, after",
    [
        ("super_glue/boolq/default.yaml", BOOLQ[:1], BOOLQ[0]["passage"], "\nQuestion: do cats meow?\nAnswer:"),
        ("sciq/sciq.yaml", SCIQ, SCIQ[0]["support"].strip(), "\nQuestion: What grows?\nAnswer:"),
        ("race/race.yaml", RACE, RACE[0]["article"], "\n\nQuestion: Who is Tom?\nAnswer: a boy\nTom was  _  ."),
    ],
)
def test_a_passage_is_the_context_and_the_question_is_asked(path, documents, passage, after):
    task = task_of(path, documents)
    ((prompt, doc),) = prompts_of(task)
    found, asked, rule = split(prompt, doc, task)
    assert rule == "passage" and found.rstrip().endswith(passage)
    assert asked.strip() == after.strip()


def test_shots_come_before_passages():
    task = task_of("super_glue/boolq/default.yaml", BOOLQ)
    for prompt, doc in prompts_of(task, 2):
        _, asked, rule = split(prompt, doc, task)
        assert rule == "fewshot" and asked == f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"


# ---- from characters to tokens ----

TEXTS = [
    "The café of Zoë:\n\n   indented,\tand a   gap. ",
    "短い文章。質問は何ですか 🙂🙃 e\u0301te\u0301 naïve\u200d",
    "def f(x):\n        return x\n\n\nclass A:\n    pass\n",
    "<|endoftext|>One. Two  three; four's fünf\r\nSix ",
]


def pythia_tokenizer():
    if not PYTHIA_TOKENIZER.exists():
        pytest.skip("Pythia's own tokenizer is not here")
    return PreTrainedTokenizerFast(tokenizer_file=str(PYTHIA_TOKENIZER), eos_token="<|endoftext|>")


@pytest.mark.parametrize("own", [True, False])
def test_the_context_never_holds_a_token_of_what_is_asked(demo, tokenizer, own):
    """The split is at the character boundary, or before it by what one token spans."""
    tokens = pythia_tokenizer() if own else tokenizer
    lm = KVNeoXLM(LoadedModel(demo, tokens, "demo", "bundled", "here"))
    exact = 0
    for text in TEXTS:
        for end in range(1, len(text)):
            if text[end - 1].isspace() or unicodedata.combining(text[end]) or text.rfind(text[:end]):
                continue  # no end of a word, amid a letter, or quoted again
            prompt = Instance("loglikelihood", {"context": text[:end]}, (text, " yes"), 0, ("t", 0, 1))
            ids, _ = lm._pair(prompt)
            n, rule = lm._end_of_context(prompt, ids)
            assert rule == "context" and 0 <= n < len(ids)
            expected = _tokens_within(tokens, text, end)
            assert n == min(expected, len(ids) - 1)
            exact += tokens.decode(ids[:n]) == text[:end]
    assert exact > 40  # else nothing was told


def _tokens_within(tokens, text: str, end: int) -> int:
    """The most tokens that spell no more than the first `end` characters, told from what they say."""
    ids, composed = tokens.encode(text), lambda part: unicodedata.normalize("NFC", part)  # as Pythia's tokenizer does
    return max(n for n in range(len(ids) + 1) if composed(text[:end]).startswith(composed(tokens.decode(ids[:n]))))


def test_forms_are_told_from_files_and_from_what_was_loaded():
    task = task_of("hellaswag/hellaswag.yaml", HELLASWAG)
    known = form_of("hellaswag")
    assert json.dumps([known.doc_to_text, known.doc_to_choice]) == json.dumps(["{{query}}", "choices"])
    assert Form.of(task.config).last_documents(next(iter(task.eval_docs))) == ["Baking: A cook. takes 0 eggs. The cook"]

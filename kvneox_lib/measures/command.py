"""`python -m kvneox_lib tasks`: lm-evaluation-harness' own command line, with our model and the tasks in the box."""

import sys
from collections.abc import Callable
from functools import partial

import lm_eval
from lm_eval._cli import HarnessCLI

from kvneox_lib.inputs.harness import bundled_tasks, cache_first, check_task_names, load_tasks, replaced
from kvneox_lib.measures.scores import Scores, beside_published
from kvneox_lib.measures.tasks import KVNeoXLM

PROGRAM = "python -m kvneox_lib tasks"


def run(arguments: list[str]) -> int:
    """arguments: those of `lm-eval run`; `--model` is ours."""
    with replaced(sys, "argv", [PROGRAM, "run", "--model", "kvneox", *arguments]):
        cli = HarnessCLI()
        asked = cli.parse_args()
    if not asked.tasks:
        raise ValueError("--tasks: names are missing; must be one or more, such as --tasks kvneox_passkey,kvneox_copy")
    if not asked.include_path and not any("/" in name or "*" in name for name in asked.tasks):
        check_task_names(asked.tasks)  # before weights are loaded
    lm = _model(asked)
    # RULER makes its prompts for a tokenizer and a length.
    known = {"tokenizer": lm.tokenizer.name_or_path, "max_seq_lengths": [lm.max_length]}
    asked.metadata = known | (asked.metadata or {})
    asked.include_path = [str(bundled_tasks()), *([asked.include_path] if asked.include_path else [])]
    made = classmethod(lambda *_, **__: lm)  # the harness asks for the model by name
    with replaced(KVNeoXLM, "create_from_arg_obj", made):
        with replaced(lm_eval, "simple_evaluate", partial(_evaluate, lm_eval.simple_evaluate, lm)):
            cli.execute(asked)
    return 0


def _model(asked) -> KVNeoXLM:
    given = asked.model_args or {}
    if "pretrained" not in given:
        raise ValueError("--model_args: pretrained is missing; must name a model, such as --model_args pretrained=demo")
    names = ("batch_size", "max_batch_size", "device")
    return KVNeoXLM(**given | {name: getattr(asked, name) for name in names if getattr(asked, name, None) is not None})


def _evaluate(evaluate: Callable, lm: KVNeoXLM, *, tasks: list, task_manager, **how) -> dict:
    if all(isinstance(task, str) for task in tasks):
        tasks = load_tasks(tasks, task_manager)
    with cache_first():
        results = evaluate(tasks=tasks, task_manager=task_manager, **how)
    if lm.presses == [None]:
        for task in results["n-samples"]:
            _say_what_was_published(Scores.of(results, lm.readings, task), lm, task)
    return results


def _say_what_was_published(scores: Scores, lm: KVNeoXLM, task: str) -> None:
    table = beside_published(scores.metrics, lm.loaded, task, scores.num_fewshot)
    for row in table.dropna(subset="published").itertuples():
        measured, theirs = f"{row.value:.4f} ± {row.stderr:.4f}", f"{row.published:.4f} ± {row.published_stderr:.4f}"
        print(f"{task} {row.metric}: {measured}, published by EleutherAI: {theirs}")

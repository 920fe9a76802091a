"""`python -m kvneox_lib tasks`: lm-evaluation-harness' own command line, with our model and the tasks in the box."""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import lm_eval
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig

from kvneox_lib.inputs.harness import bundled_tasks, cache_first, check_task_names, load_tasks, replaced
from kvneox_lib.measures.questions import Form
from kvneox_lib.measures.scores import Scores, beside_published
from kvneox_lib.measures.tasks import KVNeoXLM

ABOUT = """\
lm-evaluation-harness with a GPT-NeoX model whose KV cache is compressed. Its own arguments follow; --model is ours.
--model_args pretrained=<alias, hub id, folder or demo>,press=<name>,compression_ratio=0.5,question=outside|inside,
             cut=left|middle, keep_tokens=256 in place of the ratio (entries of each head, however long the context is),
             kv_bits=8|4|2 for each number that is left of the cache (as it is without it), and fields of the press,
             such as window_size=32
--tasks      the harness' own, and in the box kvneox_passkey, _multikey, _cloze, _cloze_free and _copy
"""


def run(arguments: list[str]) -> int:
    """arguments: those of `lm-eval run`."""
    if {"-h", "--help"} & {*arguments}:
        print(ABOUT)
    with replaced(sys, "argv", ["python -m kvneox_lib tasks", "run", "--model", "kvneox", *arguments]):
        cli = HarnessCLI()
        asked = cli.parse_args()
    _take_from_file(asked)
    if not asked.tasks:
        raise ValueError("--tasks: names are missing; must be one or more, such as --tasks kvneox_passkey,kvneox_copy")
    if not asked.include_path and not any("/" in name or "*" in name for name in asked.tasks):
        check_task_names(asked.tasks)  # before weights are loaded
    lm = _model(asked)
    if asked.use_cache:
        asked.use_cache = f"{asked.use_cache}_{_digest(asked, lm)}"
    # RULER makes its prompts for a tokenizer and a length.
    known = {"tokenizer": lm.tokenizer.name_or_path, "max_seq_lengths": [lm.max_length]}
    asked.metadata = known | (asked.metadata or {})
    asked.include_path = [str(bundled_tasks()), *([asked.include_path] if asked.include_path else [])]
    made = classmethod(lambda *_, **__: lm)  # the harness asks for the model by name
    with replaced(KVNeoXLM, "create_from_arg_obj", made):
        with replaced(lm_eval, "simple_evaluate", partial(_evaluate, lm_eval.simple_evaluate, lm)):
            cli.execute(asked)
    return 0


def _take_from_file(asked: Namespace) -> None:
    """What --config says and the command line does not."""
    if not asked.config:
        return
    for name, value in EvaluatorConfig.load_yaml_config(asked.config).items():
        if name != "model" and getattr(asked, name, None) is None:
            setattr(asked, name, value)
    if isinstance(asked.tasks, str):
        asked.tasks = asked.tasks.split(",")


def _model(asked: Namespace) -> KVNeoXLM:
    given = asked.model_args or {}
    if "pretrained" not in given:
        raise ValueError("--model_args: pretrained is missing; must name a model, such as --model_args pretrained=demo")
    names = ("batch_size", "max_batch_size", "device")
    return KVNeoXLM(**given | {name: getattr(asked, name) for name in names if getattr(asked, name, None) is not None})


def _digest(asked: Namespace, lm: KVNeoXLM) -> str:
    """The harness keeps answers by their requests alone: those of another press must not be taken for this one's."""
    told = sorted((asked.model_args or {}).items()), lm.loaded.weights_id, lm.max_length
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def _evaluate(evaluate: Callable, lm: KVNeoXLM, *, tasks: list, task_manager, **how) -> dict:
    if all(isinstance(task, str) for task in tasks):
        tasks = load_tasks(tasks, task_manager)
    with cache_first():
        loaded = task_manager.load(tasks)
        lm.forms = {name: Form.of(task.config) for name, task in loaded["tasks"].items() if hasattr(task, "config")}
        with replaced(task_manager, "load", lambda _: loaded):
            results = evaluate(tasks=tasks, task_manager=task_manager, **how)
    if (lm.presses, lm.kv_bits) == ([None], [None]):
        for task in results["n-samples"]:
            _say_what_was_published(Scores.of(results, lm.readings, task), lm, task)
    return results


def _say_what_was_published(scores: Scores, lm: KVNeoXLM, task: str) -> None:
    table = beside_published(scores.metrics, lm.loaded, task, scores.num_fewshot)
    for row in table.dropna(subset="published").itertuples():
        measured, theirs = f"{row.value:.4f} ± {row.stderr:.4f}", f"{row.published:.4f} ± {row.published_stderr:.4f}"
        print(f"{task} {row.metric}: {measured}, published by EleutherAI: {theirs}")

"""A task of lm-evaluation-harness under several presses at once: its data is loaded once, and each context is read once
for all presses that can share that.
"""

import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property

from lm_eval import evaluate
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import get_sample_size

from kvneox_lib.inputs.harness import is_bundled, load_tasks, task_manager
from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.prefill import bits_of_each
from kvneox_lib.measures.questions import Form
from kvneox_lib.measures.scores import Reading
from kvneox_lib.measures.tasks import KVNeoXLM

# The harness says of each task that makes its documents itself how that could be told to.
logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs can be passed" not in record.getMessage())


@dataclass(frozen=True)
class AskedTask:
    """A task with its data, and how much of it is asked in which way."""

    name: str
    task: Task
    limit: float | None  # documents, or a share of them below 1
    seed: int  # of the shots

    @cached_property
    def requests(self) -> list:
        """As every evaluation makes them anew."""
        self.task.set_fewshot_seed(self.seed)
        with _quiet():
            self.task.build_all_requests(limit=get_sample_size(self.task, self.limit))
        return self.task.instances

    @property
    def documents_sha256(self) -> str:
        """Tells these prompts from others: the data of a task, its wording or its shots may change."""
        asked = repr([(request.doc_id, request.args) for request in self.requests])
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


def asked_tasks(
    names: Sequence[str], model: LoadedModel, *, num_fewshot: int | None, limit: float | None, seed: int
) -> dict[str, AskedTask]:
    """num_fewshot: None is what the task says. Prompts that a task makes itself fit the model."""
    folder, length = model.tokenizer.name_or_path, model.model.config.max_position_embeddings
    in_the_box = all(map(is_bundled, names))
    manager = task_manager(tokenizer=folder, max_length=length, bundled_only=in_the_box, seed=seed)
    found = {}
    for name in names:
        task = manager.load(load_tasks([name], manager))["tasks"][name]
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config("num_fewshot", (own or 0) if num_fewshot is None else num_fewshot)
        found[name] = AskedTask(name, task, limit, seed)
    return found


def evaluate_each(
    lm: KVNeoXLM, presses: list, asked: AskedTask, kv_bits: list[int | None] | None = None
) -> Iterator[tuple[dict, list[Reading]]]:
    """lm-eval's results, with samples, and the readings, under each press, in the bits that are given for each. All
    presses answer a request in one go, as far as they can share the reading of its context."""
    lm.forms = {asked.name: Form.of(asked.task.config)}
    lm.presses, lm._answers, lm._readings = presses, {}, [[] for _ in presses]
    lm.kv_bits = bits_of_each(kv_bits, presses)
    for lm.turn in range(len(presses)):
        asked.task.set_fewshot_seed(asked.seed)
        with _quiet():
            results = evaluate(lm, {"tasks": {asked.name: asked.task}}, limit=asked.limit, bootstrap_iters=1000)
        yield results, lm.readings


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and lines that the harness prints for each press anew."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield

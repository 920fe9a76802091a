"""Where the context of a task's prompt ends, and what is asked begins.

A press that sees the question keeps what answers it; what counts for a cache that is used again is a question that
comes after. So the prompts of lm-evaluation-harness are split: by the first rule of the table that knows the prompt. In
a prompt that no rule knows, all but the last token is context, and the record says so.
"""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache

from kvneox_lib.inputs.harness import task_index

NO_RULE = "none"  # all but the last token
INSIDE = "inside"  # the same, as was asked for


@dataclass(frozen=True)
class Form:
    """What a task's YAML says of its prompts; each entry is a template, the name of a field, or a function."""

    doc_to_text: str | Callable | None = None
    doc_to_choice: str | list | Callable | None = None
    description: str | Callable | None = None

    @classmethod
    def of(cls, config) -> "Form":
        """From lm-eval's TaskConfig, or from such a mapping. The former is a dict too, but an empty one: it answers by
        its attributes."""
        return cls(*(getattr(config, part.name, None) or config.get(part.name) for part in fields(cls)))

    def last_documents(self, doc: Mapping) -> list[str]:
        """What the prompt of `doc` may end with, before what leads to the answer. Where the choices are what is read
        and one ending is scored (winogrande), each of them."""
        text = _rendered(self.doc_to_text, doc)
        are_read = self.doc_to_choice is not None and (not isinstance(text, str) or text.isdigit())
        found = _choices(self.doc_to_choice, doc) if are_read else [text]
        return [one for one in found if isinstance(one, str) and one]


def _rendered(how, doc: Mapping):
    from lm_eval.utils import apply_template

    if callable(how):
        return how(doc)
    if isinstance(how, str):
        return doc[how] if how in doc else apply_template(how, doc)
    return how


def _choices(how, doc: Mapping) -> list[str]:
    """A template of choices spells a list."""
    found = _rendered(how, doc)
    found = ast.literal_eval(found) if isinstance(found, str) else found
    return list(found.values() if isinstance(found, Mapping) else found)


# ---- the rules: each from the prompt, its document and its task's form to the number of characters of context --------


def _after_context(prompt: str, doc: Mapping, form: Form | None) -> int | None:
    """LongBench, and whoever else calls it so: the passages are the field `context`."""
    return _after_field(prompt, doc, ("context",))


def _before_the_final_question(prompt: str, doc: Mapping, form: Form | None) -> int | None:
    """RULER: what it asks is the last line of its `input`, and what leads to the answer may come after that."""
    text = doc.get("input")
    if not isinstance(text, str) or "outputs" not in doc or text not in prompt:
        return None
    line = text.rstrip().rfind("\n")
    return None if line < 0 else prompt.rfind(text) + line


def _before_the_last_document(prompt: str, doc: Mapping, form: Form | None) -> int | None:
    """Few-shot prompts of any task: the shots are the context."""
    if form is None:
        return None
    starts = [prompt.rfind(text) for text in form.last_documents(doc)]
    start = max(starts, default=-1)
    described = _rendered(form.description, doc) or ""
    shots = prompt[: max(start, 0)].strip().removeprefix(described.strip())
    return start if shots.strip() else None


PASSAGES = ("passage", "story", "article", "support", "paragraph", "document", "premise")


def _after_the_passage(prompt: str, doc: Mapping, form: Form | None) -> int | None:
    """A text that the document brings along and the prompt quotes."""
    return _after_field(prompt, doc, PASSAGES)


def _after_field(prompt: str, doc: Mapping, names: tuple[str, ...]) -> int | None:
    texts = (doc.get(name) for name in names)
    stripped = [text.strip() for text in texts if isinstance(text, str)]  # as some templates do it
    return max((prompt.rfind(text) + len(text) for text in stripped if text and text in prompt), default=None)


RULES = {
    "context": _after_context,
    "ruler": _before_the_final_question,
    "fewshot": _before_the_last_document,
    "passage": _after_the_passage,
}


def end_of_context(prompt: str, doc, form: Callable[[], Form | None]) -> tuple[int | None, str]:
    """The number of characters of `prompt` that are context, and the rule that says so; None: no rule knows it.

    form: of the document's task, asked for only where a rule needs it.
    """
    if isinstance(doc, Mapping):
        for name, rule in RULES.items():
            end = rule(prompt, doc, form() if name == "fewshot" else None)
            if end is not None and 0 < end < len(prompt):
                return end, name
    return None, NO_RULE


@cache
def form_of(task_name: str | None) -> Form | None:
    """As lm-eval's own index of tasks tells it, without the task's data; None for a task that is not there."""
    entry = task_index().get(task_name)
    if entry is None or entry.yaml_path is None:
        return None
    from lm_eval.tasks._yaml_loader import load_yaml

    return Form.of(load_yaml(entry.yaml_path, resolve_func=True))

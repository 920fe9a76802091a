"""Training-free KV-cache compression on GPT-NeoX models, with the presses of kvpress."""

from kvneox_lib.inputs.templates import Template
from kvneox_lib.inputs.text import load_text
from kvneox_lib.inputs.weights import LoadedModel, load_model
from kvneox_lib.inputs.windows import windows
from kvneox_lib.measures.decoding import Generation, generate
from kvneox_lib.measures.perplexity import continuation_nll, teacher_forced_nll
from kvneox_lib.measures.recall import RecallResult, recall_accuracy
from kvneox_lib.measures.streaming import StreamingDecoder, streaming_nll
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, adapt
from kvneox_lib.presses.applying import check_press
from kvneox_lib.presses.by_name import expand_presses, make_press, press_names

__all__ = [
    "CompactCache",
    "Generation",
    "KVNeoXForCausalLM",
    "KVNeoXLM",
    "LoadedModel",
    "RecallResult",
    "StreamingDecoder",
    "Template",
    "adapt",
    "check_press",
    "continuation_nll",
    "expand_presses",
    "generate",
    "load_model",
    "load_text",
    "make_press",
    "press_names",
    "recall_accuracy",
    "streaming_nll",
    "teacher_forced_nll",
    "windows",
]


def __getattr__(name: str):
    """lm-evaluation-harness is an extra, and takes a second to import."""
    if name != "KVNeoXLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from kvneox_lib.measures.tasks import KVNeoXLM
    except ModuleNotFoundError as error:
        from kvneox_lib.inputs.harness import PACKAGES

        raise ImportError(f"KVNeoXLM wants lm-evaluation-harness ({error}): pip install '{PACKAGES}'") from error
    return KVNeoXLM

"""Training-free KV-cache compression on GPT-NeoX models, with the presses of kvpress."""

from kvneox_lib.cache import CompactCache
from kvneox_lib.decoding import Generation, generate
from kvneox_lib.modeling import KVNeoXForCausalLM, adapt
from kvneox_lib.models import LoadedModel, load_model
from kvneox_lib.perplexity import continuation_nll, teacher_forced_nll
from kvneox_lib.presses import check_press, expand_presses, make_press, press_names
from kvneox_lib.recall import RecallResult, recall_accuracy
from kvneox_lib.streaming import StreamingDecoder, streaming_nll

__all__ = [
    "CompactCache",
    "Generation",
    "KVNeoXForCausalLM",
    "LoadedModel",
    "RecallResult",
    "StreamingDecoder",
    "adapt",
    "check_press",
    "continuation_nll",
    "expand_presses",
    "generate",
    "load_model",
    "make_press",
    "press_names",
    "recall_accuracy",
    "streaming_nll",
    "teacher_forced_nll",
]
